#!/usr/bin/env bash
# SFT on all hosts of a hostfile, for example nodes of 8 x B200. Everything else goes to posttrain/sft.py:
#   HOSTFILE=launch/hostfile bash launch/sft_multinode.sh --learning_rate=1e-5 --out_dir=runs/lr1e-5
#   sbatch --nodes=2 --gpus-per-node=8 launch/slurm.sh launch/sft_multinode.sh ...     as a Slurm job
#   NODE_RANK=1 bash launch/sft_multinode.sh ...     without ssh: the same on every host, 0 on the first, 1 on the second, ...
# NCCL needs no settings where one network joins the hosts: it finds GPUs, NVLink and InfiniBand by itself. What may be needed (the settings
# go to all hosts; launch/doctor.sh says which):
#   NCCL_SOCKET_IFNAME=eth0     where hosts have several Ethernet networks: the one over which they reach each other
#   NCCL_IB_HCA=mlx5_0,mlx5_1   where some InfiniBand cards have no cable, or are for storage: those to use
#   NCCL_DEBUG=INFO             prints what NCCL has chosen: NET/IB is InfiniBand, NET/Socket is TCP and some ten times slower
# Environment: HOSTFILE, RECIPE, NUM_GPUS (of each host), MASTER_ADDR, MASTER_PORT, NODE_RANK; launch/multinode.py explains them.
# --max_restarts=N, and signals, as with sft_8gpu.sh.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/launch/env.sh"
exec python "$root/launch/multinode.py" "$root/posttrain/sft.py" ${RECIPE:+"$RECIPE"} "$@"
