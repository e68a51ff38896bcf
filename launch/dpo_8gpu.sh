#!/usr/bin/env bash
# DPO on the GPUs of this machine. Environment: NUM_GPUS (8), RECIPE, MASTER_PORT (29500). Everything else goes to posttrain/dpo.py:
#   bash launch/dpo_8gpu.sh --beta=0.05 --out_dir=runs/beta0.05
#   NUM_GPUS=2 bash launch/dpo_8gpu.sh ...       two GPUs, or two processes on a machine without any
#   --max_restarts=3                             start again, from the newest checkpoint, where a rank or the machine failed
# Ctrl-C, SIGTERM and SIGUSR1 save and stop; the same command goes on.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/launch/env.sh"
for argument in "$@"; do
    [ "$argument" != --help ] || exec python "$root/posttrain/dpo.py" --help
done
launcher=(deepspeed --quiet --num_gpus "${NUM_GPUS:-8}" --master_port "${MASTER_PORT:-29500}")
exec python "$root/launch/supervise.py" "${launcher[@]}" "$root/posttrain/dpo.py" ${RECIPE:+"$RECIPE"} "$@"
