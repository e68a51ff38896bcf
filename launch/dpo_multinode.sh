#!/usr/bin/env bash
# DPO on all hosts of a hostfile; run_multinode.sh explains options and environment:
#   HOSTFILE=launch/hostfile bash launch/dpo_multinode.sh --max_iters=1000 --out_dir=runs/one
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_multinode.sh" dpo "$@"
