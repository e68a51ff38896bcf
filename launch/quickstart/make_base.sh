#!/usr/bin/env bash
# Trains the committed base model anew, on the world's documents with posttrain/sft.py: two ranks, about 12 minutes on two cores.
#   bash launch/quickstart/make_base.sh      then commit launch/quickstart/base
[ "${1:-}" != --help ] || exec sed -nE '2,/^[^#]/s/^#( |$)//p' "${BASH_SOURCE[0]}"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch/env.sh
export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

out=runs/quickstart
rm -rf "$out"
python launch/quickstart/world.py "$out/world" corpus
python launch/quickstart/base.py blank "$out/world" "$out/blank"
python data_prep/prepare_sft.py --source "$out/world/corpus.jsonl" --tokenizer "$out/blank" --output_dir "$out/data/base" --val_size 300 --duplicates keep
deepspeed --quiet --num_gpus 2 posttrain/sft.py launch/quickstart/base.yaml
python launch/quickstart/base.py commit "$out/pretraining/final" launch/quickstart/base
