#!/usr/bin/env bash
# One run for each value of a recipe key, one after another:
#   bash launch/sweep.sh beta 0.05 0.1 0.3 -- bash launch/dpo_8gpu.sh --max_iters=200 --out_dir=runs/beta
# makes runs/beta/beta_0.05 and so on; `tensorboard --logdir runs/beta` compares them. After a run that fails the sweep goes on, and ends with
# exit code 1; the same command again continues what is not finished.
[ "${1:-}" != --help ] || exec sed -nE '2,/^[^#]/s/^#( |$)//p' "${BASH_SOURCE[0]}"
set -euo pipefail
usage() {
    echo "sweep.sh: $1; expected KEY VALUE ... -- COMMAND ... --out_dir=DIR" >&2
    exit 2
}
[ $# -gt 0 ] || usage "there are no arguments"
key="$1" values=() out="" failed=()
shift
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    values+=("$1")
    shift
done
[ ${#values[@]} -gt 0 ] || usage "$key has no values"
[ $# -gt 1 ] || usage "there is no command after --"
shift
for argument in "$@"; do case "$argument" in --out_dir=*) out="${argument#--out_dir=}" ;; esac done
[ -n "$out" ] || usage "the command has no --out_dir, below which each run gets a directory"
for value in "${values[@]}"; do
    run="$out/${key}_${value//\//_}"
    echo "sweep.sh: --$key=$value into $run"
    "$@" "--$key=$value" "--out_dir=$run" || failed+=("$value")
done
[ ${#failed[@]} -eq 0 ] || {
    echo "sweep.sh: failed: ${failed[*]}" >&2
    exit 1
}
