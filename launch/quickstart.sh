#!/usr/bin/env bash
# Takes a base model through SFT and DPO, then shows what each did in a table and on a page. It installs what it needs.
#   bash launch/quickstart.sh            continues what an earlier call left in runs/quickstart
#   bash launch/quickstart.sh --fresh    starts over
# It runs two ranks: on GPUs where there are two, else on the CPU.
[ "${1:-}" != --help ] || exec sed -nE '2,/^[^#]/s/^#( |$)//p' "${BASH_SOURCE[0]}"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in
    --fresh) rm -rf runs/quickstart ;;
    "") ;;
    *)
        echo "quickstart.sh takes only --fresh, saw '$1'" >&2
        exit 1
        ;;
esac
source launch/env.sh

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
ranks=2
if [ "$gpus" -eq 0 ]; then
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
elif [ "$gpus" -eq 1 ]; then
    ranks=1
fi
started=$SECONDS

out=runs/quickstart
base=launch/quickstart/base
mkdir -p "$out"
[ -f "$out/world/prompts.txt" ] || python launch/quickstart/world.py "$out/world"
for stage in sft dpo; do
    [ -d "$out/data/$stage" ] || python "data_prep/prepare_$stage.py" --source "$out/world/$stage.jsonl" --tokenizer "$base" \
        --duplicates keep --output_dir "$out/data/$stage"
done

launcher=(deepspeed --quiet --num_gpus "$ranks" --master_port "${MASTER_PORT:-29500}")
for stage in sft dpo; do
    # a finished stage has final/, which is written last and whole
    [ -d "$out/$stage/final" ] || python launch/supervise.py "${launcher[@]}" "posttrain/$stage.py" "launch/quickstart/$stage.yaml"
done
mkdir -p "$out/base" && cp -r "$base/." "$out/base/"
python launch/quickstart/measure.py --base "$out/base" --sft "$out/sft/final" --dpo "$out/dpo/final" \
    --eval "$out/world/eval.json" --out_dir "$out"
python posttrain/report.py "$out/sft" "$out/dpo" --results "$out/results.json" --output "$out/report"

cat <<END

Done in $((SECONDS - started)) s. The table is in $out/results.json, all of it on one page in $out/report/report.html.
To try next, after source launch/env.sh:
    python posttrain/serve.py --checkpoint base=$base --checkpoint $out/sft --checkpoint $out/dpo      # talk to them, side by side
    tensorboard --logdir runs
    python posttrain/sft.py --help
    deepspeed --quiet --num_gpus $ranks posttrain/dpo.py launch/quickstart/dpo.yaml --out_dir=runs/quickstart/other --chosen_nll_weight=0
END
