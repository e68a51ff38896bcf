#!/usr/bin/env bash
# DPO on all hosts of a hostfile, for example nodes of 8 x B200. Everything else goes to posttrain/dpo.py:
#   HOSTFILE=launch/hostfile bash launch/dpo_multinode.sh --beta=0.05 --out_dir=runs/beta0.05
#   sbatch --nodes=2 --gpus-per-node=8 launch/slurm.sh launch/dpo_multinode.sh ...     as a Slurm job
#   NODE_RANK=1 bash launch/dpo_multinode.sh ...     without ssh: the same on every host, 0 on the first, 1 on the second, ...
# Settings of NCCL: see sft_multinode.sh.
# Environment: HOSTFILE, RECIPE, NUM_GPUS (of each host), MASTER_ADDR, MASTER_PORT, NODE_RANK; launch/multinode.py explains them.
# --max_restarts=N, and signals, as with dpo_8gpu.sh.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/launch/env.sh"
exec python "$root/launch/multinode.py" "$root/posttrain/dpo.py" ${RECIPE:+"$RECIPE"} "$@"
