#!/usr/bin/env bash
# SFT on the GPUs of this machine. Environment: NUM_GPUS (8), RECIPE. Everything else goes to posttrain/sft.py:
#   bash launch/sft_8gpu.sh --learning_rate=1e-5 --out_dir=runs/lr1e-5
#   NUM_GPUS=2 bash launch/sft_8gpu.sh ...       two GPUs, or two processes on a machine without any
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/launch/env.sh"
exec deepspeed --quiet --num_gpus "${NUM_GPUS:-8}" "$root/posttrain/sft.py" ${RECIPE:+"$RECIPE"} "$@"
