#!/usr/bin/env bash
# Examines this machine, or all hosts of a hostfile, before a run, and says what to fix. Changes nothing.
#   bash launch/doctor.sh [HOSTFILE] [--key=value ...]     keys of a recipe, whose model, data and out_dir are examined, too
# Environment: HOSTFILE, RECIPE, NUM_GPUS, MASTER_ADDR, MASTER_PORT, NCCL_... and GLOO_..., as for a run.
[ "${1:-}" != --help ] || exec sed -nE '2,/^[^#]/s/^#( |$)//p' "${BASH_SOURCE[0]}"
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[ -x "$python" ] || {
    echo "doctor.sh: there is no environment here yet; make it with: source $root/launch/env.sh" >&2
    exit 2
}
export PYTHONDONTWRITEBYTECODE=1
exec "$python" "$root/launch/doctor/doctor.py" "$@"
