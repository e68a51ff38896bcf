#!/usr/bin/env bash
# SFT on the GPUs of this machine; run_8gpu.sh explains options and environment:
#   bash launch/sft_8gpu.sh --max_iters=1000 --out_dir=runs/one
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_8gpu.sh" sft "$@"
