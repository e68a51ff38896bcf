#!/usr/bin/env bash
# DPO on the GPUs of this machine; run_8gpu.sh explains options and environment:
#   bash launch/dpo_8gpu.sh --max_iters=1000 --out_dir=runs/one
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_8gpu.sh" dpo "$@"
