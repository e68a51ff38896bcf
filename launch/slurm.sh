#!/usr/bin/env bash
# A run as a Slurm job, on the nodes that sbatch is told to take:
#   sbatch --nodes=2 --gpus-per-node=8 --time=12:00:00 launch/slurm.sh launch/sft_multinode.sh --out_dir=runs/one
# Five minutes before its time is over the run saves and stops, and also at scancel, if saving takes less than KillWait (30 s). The same
# command continues the run. For a chain of such jobs submit it several times, with --job-name=NAME --dependency=singleton.
# Ask for GPUs with --gpus-per-node, even with whole nodes: a job step sees no others. Environment, set for sbatch: RECIPE, NCCL_...,
# GLOO_..., NUM_GPUS (ranks of each node, if it has no GPUs or not all are to be used).
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --signal=USR1@300
[ "${1:-}" != --help ] || exec sed -nE '2,/^[^#]/s/^#( |$)//p' "${BASH_SOURCE[0]}"
set -euo pipefail
if [ -z "${SLURM_JOB_ID:-}" ] || [ ! -f "${1:-}" ]; then
    echo "usage: sbatch --nodes=N launch/slurm.sh launch/sft_multinode.sh [--key=value ...]" >&2
    exit 2
fi
# two jobs on one node need two ports
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"
# One task a node starts that node's ranks (launch/multinode.py asks Slurm for the nodes). By default Slurm binds the task to one core, and
# ends all tasks soon after one has ended; they end by themselves once they have saved.
unset HOSTFILE NODE_RANK # sbatch passes on those of the shell that submitted
exec srun --cpu-bind=none --kill-on-bad-exit=0 --wait=0 bash "$@"
