#!/usr/bin/env bash
# Every measurement that needs a GPU, on one of them, in one call of under ten minutes: kernels, where a step's time goes, SFT and DPO beside
# TRL. Results go to benchmarks/results/ and, where OUT names a folder, there too. Packages must be there already (torch, deepspeed,
# transformers, datasets, trl, and liger-kernel for the contestant that uses it). RACE=dry tries the script on a CPU, kernels left out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
race="${RACE:-gpu}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
[ "$race" = dry ] || python benchmarks/kernels.py --name "kernels_$race"
python benchmarks/phases.py --race "$race"
python benchmarks/sft.py --race "$race" --rounds "${ROUNDS:-1}"
python benchmarks/dpo.py --race "ultrafeedback_$race" --rounds "${ROUNDS:-1}"
if [ -n "${OUT:-}" ]; then cp benchmarks/results/*_"$race".json "$OUT"/; fi
