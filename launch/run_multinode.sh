#!/usr/bin/env bash
# What sft_multinode.sh and dpo_multinode.sh do: train on all hosts of a hostfile, for example nodes of 8 x B200.
#   HOSTFILE=launch/hostfile bash launch/sft_multinode.sh --learning_rate=1e-5 --out_dir=runs/lr1e-5
#   NODE_RANK=1 bash launch/dpo_multinode.sh ...     without ssh: the same on every host, 0 on the first, 1 on the second, ...
#   sbatch --nodes=2 --gpus-per-node=8 launch/slurm.sh launch/sft_multinode.sh ...     as a Slurm job
# Every other --key=value goes to posttrain/sft.py or dpo.py; --max_restarts=N and signals work as in run_8gpu.sh.
# Environment: HOSTFILE, RECIPE, NUM_GPUS (of each host), MASTER_ADDR, MASTER_PORT, NODE_RANK; launch/multinode.py explains them.
# NCCL needs no settings where one network joins the hosts: it finds GPUs, NVLink and InfiniBand by itself. What may be needed (the settings
# go to all hosts; launch/doctor.sh says which):
#   NCCL_SOCKET_IFNAME=eth0     where hosts have several Ethernet networks: the one over which they reach each other
#   NCCL_IB_HCA=mlx5_0,mlx5_1   where some InfiniBand cards have no cable, or are for storage: those to use
#   NCCL_DEBUG=INFO             prints what NCCL has chosen: NET/IB is InfiniBand, NET/Socket is TCP and some ten times slower
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
script="$root/posttrain/${1:-}.py"
for argument in "$@"; do
    [ "$argument" = --help ] || continue
    sed -nE '2,/^[^#]/s/^#( |$)//p' "${BASH_SOURCE[0]}"
    [ ! -f "$root/.venv/complete" ] || exec "$root/.venv/bin/python" "$script" --help
    echo "After source launch/env.sh the keys of the recipe are listed here, too."
    exit
done
[ -f "$script" ] || {
    echo "run_multinode.sh: start it by sft_multinode.sh or dpo_multinode.sh" >&2
    exit 2
}
shift
source "$root/launch/env.sh"
exec python "$root/launch/multinode.py" "$script" ${RECIPE:+"$RECIPE"} "$@"
