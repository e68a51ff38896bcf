#!/usr/bin/env bash
# Every measurement that needs a GPU, on one of them, in calls of under ten minutes:
#   bash benchmarks/gpu.sh                 what to look at first, kernels, where a step's time goes, SFT and DPO beside TRL
#   bash benchmarks/gpu.sh kernels sft     some of them
# Results go to benchmarks/results/ and, where OUT names a folder, there too (those of the part first only there). Packages must be there
# already (torch, deepspeed, transformers, datasets, trl, and liger-kernel, flash-attn and cut-cross-entropy for what uses them).
# RACE=dry tries the script on a CPU.
[ "${1:-}" != --help ] || exec sed -nE '2,/^[^#]/s/^#( |$)//p' "${BASH_SOURCE[0]}"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
race="${RACE:-gpu}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
parts=("$@")
[ $# -gt 0 ] || parts=(first kernels phases sft dpo)
for part in "${parts[@]}"; do
    case "$part" in
        first)
            options=()
            [ "$race" != dry ] || options+=(--dry)
            # straight to OUT, after each of its own parts: a call that is cut copies nothing
            [ -z "${OUT:-}" ] || options+=(--out "$OUT/first_minutes_$race.json")
            python benchmarks/first_minutes.py "${options[@]}"
            ;;
        kernels) [ "$race" = dry ] || python benchmarks/kernels.py --name "kernels_$race" ;;
        phases) python benchmarks/phases.py --race "$race" ;;
        sft) python benchmarks/sft.py --race "$race" --rounds "${ROUNDS:-1}" ;;
        dpo) python benchmarks/dpo.py --race "ultrafeedback_$race" --rounds "${ROUNDS:-1}" ;;
        *)
            echo "gpu.sh: there is no part $part; there are first, kernels, phases, sft and dpo" >&2
            exit 2
            ;;
    esac
    if [ -n "${OUT:-}" ] && [ "$part" != first ]; then cp benchmarks/results/*_"$race".json "$OUT"/; fi
done
