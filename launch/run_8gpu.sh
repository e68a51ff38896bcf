#!/usr/bin/env bash
# What sft_8gpu.sh and dpo_8gpu.sh do: train on the GPUs of this machine.
#   bash launch/sft_8gpu.sh --learning_rate=1e-5 --out_dir=runs/lr1e-5     every --key=value goes to posttrain/sft.py, --help lists them
#   NUM_GPUS=2 bash launch/dpo_8gpu.sh ...      on two GPUs, or two processes on a machine without any
#   --max_restarts=3                            starts again, from the newest checkpoint, where a rank or the machine failed
# Environment: NUM_GPUS (8), RECIPE (posttrain/recipes/), MASTER_PORT (29500).
# Ctrl-C, SIGTERM and SIGUSR1 save and stop; the same command goes on.
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
    echo "run_8gpu.sh: start it by sft_8gpu.sh or dpo_8gpu.sh" >&2
    exit 2
}
shift
source "$root/launch/env.sh"
launcher=(deepspeed --quiet --num_gpus "${NUM_GPUS:-8}" --master_port "${MASTER_PORT:-29500}")
exec python "$root/launch/supervise.py" "${launcher[@]}" "$script" ${RECIPE:+"$RECIPE"} "$@"
