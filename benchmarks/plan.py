# ruff: noqa: E402
"""What posttrain/plan.py predicts beside what runs take: python benchmarks/plan.py [--race cpu|gpu]        writes results/plan_RACE.json

cpu   two ranks, a Qwen3 of 109 million parameters     gpu   one GPU, the shape of Qwen3-1.7B
Memory of a rank is counted above what imports take, without pages of files (on a GPU what torch allocates); time is seconds a step after
the first two. On a CPU memory is measured in a run of its own in which freed memory returns to the system at once: otherwise glibc keeps
up to half as much again, and not the same in every run.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.dpo import ULTRAFEEDBACK
from benchmarks.sft import LONG, ON_CPU, ON_GPU, QWEN3_1_7B
from benchmarks.side_by_side import RESULTS, WARM, Contestant, Race, as_text, machine, make_world, run_once, suffix, versions
from posttrain.planning.machines import this_machine
from posttrain.planning.planner import Planner, Way
from posttrain.planning.timing import time_here
from posttrain.recipes.keys import DPORecipe, SFTRecipe
from posttrain.recipes.reading import build_recipe

MODEL = {
    "vocab_size": 16000,
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_hidden_layers": 14,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}
SHORT = {"lengths": {"instruction": (60, 0.5), "output": (250, 0.7)}, "longest": 900}
CPU = {"model": MODEL, "steps": 4, **ON_CPU}
GPU = {"model": QWEN3_1_7B, "steps": 6, **ON_GPU}
RACES = {
    "cpu": {
        "sft": Race("SFT of 109M parameters", "sft", batch=8, **SHORT, **CPU),
        "dpo": Race("DPO of 109M parameters", "dpo", batch=4, **ULTRAFEEDBACK, **CPU),
    },
    "gpu": {
        "sft": Race("SFT of Qwen3-1.7B's shape", "sft", batch=16, lengths=LONG, longest=1900, **GPU),
        "dpo": Race("DPO of Qwen3-1.7B's shape", "dpo", batch=32, **ULTRAFEEDBACK, **GPU),
    },
}
CONFIGURATIONS = [  # kind, ds_config, activation checkpointing, tokens in a micro-batch
    ("sft", "zero1", "none", 4096),
    ("sft", "zero2", "none", 2048),
    ("sft", "zero2", "selective", 4096),
    ("sft", "zero3", "none", 4096),
    ("sft", "zero3", "full", 4096),
    ("dpo", "zero2", "none", 4096),
]


def name(kind: str, ds_config: str, checkpointing: str, tokens: int) -> str:
    return f"{kind}, {ds_config}, activation checkpointing {checkpointing}, {tokens} tokens"


def predict(race: Race, world: Path, options: dict) -> tuple[dict, float]:
    """What the planner predicts for such a run, and the mean tokens of its examples."""
    paths = {"sft": ("checkpoint_path", "sft_data_dir"), "dpo": ("sft_checkpoint_path", "dpo_data_dir")}[race.kind]
    recipe = {paths[0]: world / "base", paths[1]: world / race.kind, "out_dir": world / "run", "max_iters": race.steps}
    recipe |= {"global_batch_size": race.batch, "dtype": race.dtype, **options}
    kind = SFTRecipe if race.kind == "sft" else DPORecipe
    recipe = build_recipe(kind, {}, {key: str(value) for key, value in recipe.items()})
    planner = Planner(recipe, this_machine(race.ranks), race.ranks, 1)
    way = Way(recipe.ds_config, recipe.activation_checkpointing)
    time_here(planner, [way.checkpointing], [way.ds_config])
    one = planner.estimate(way)
    return {"peak_mb": round(one.parts.total / 2**20, 1), "step_seconds": round(float(one.step_seconds), 3)}, planner.work.lengths.mean()


def _run(race_name: str, race: Race, options: dict, world: Path, mean_tokens: float) -> dict:
    """Run one configuration, and return its memory and seconds a step."""
    results = [run_once(race, Contestant("ours", "ours", "", options), world)]
    if race_name == "cpu":
        results.append(run_once(race, Contestant("ours", "ours", "", options), world, MALLOC_MMAP_THRESHOLD_="262144"))
    if failed := next((result for result in results if isinstance(result, str)), None):
        sys.exit(f"{race.name}, {options}: {failed}")
    seconds, tokens = (sum(results[0][name][WARM - 1 :]) for name in ("step_seconds", "step_tokens"))
    seconds *= mean_tokens * race.batch / tokens  # of a mean step: some have more tokens than others
    return {"peak_mb": results[-1]["peak_mb_without_files"], "step_seconds": round(float(seconds), 3)}


def measure(race_name: str, chosen: list[str], before: dict) -> dict:
    """Measure the chosen configurations beside predictions; or, given results of `before`, only predict anew."""
    races = RACES[race_name]
    measured = {}
    for kind, race in races.items():
        world = Path(tempfile.mkdtemp(prefix="posttrain_plan_"))
        make_world(race, world)
        for configuration in CONFIGURATIONS:
            if configuration[0] != kind or (chosen and not any(word in name(*configuration) for word in chosen)):
                continue
            _, ds_config, checkpointing, tokens = configuration
            options = {"activation_checkpointing": checkpointing, "max_tokens_per_gpu": tokens * (4 if race_name == "gpu" else 1)}
            race.ds_config = f"ds_configs/{ds_config}.json"
            predicted, mean_tokens = predict(race, world, options | {"ds_config": race.ds_config})
            seen = before.get(name(*configuration), {}).get("measured") or _run(race_name, race, options, world, mean_tokens)
            off = {f"{what}_off_by": round(predicted[what] / seen[what] - 1, 3) for what in seen}
            measured[name(*configuration)] = {"measured": seen, "predicted": predicted, **off}
            print(name(*configuration), measured[name(*configuration)], flush=True)
        shutil.rmtree(world)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--race", default="cpu", choices=RACES)
    parser.add_argument("--only", nargs="*", default=[], help="configurations whose name has one of these words")
    parser.add_argument("--predict", action="store_true", help="predict anew beside what was measured, on the same machine")
    options = parser.parse_args()
    path = RESULTS / f"plan_{options.race}{suffix(RACES[options.race]['sft'].dtype)}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if options.predict else {"machine": machine(), "configurations": {}}
    if before["machine"] != machine():
        sys.exit(f"{path} was measured on {before['machine']}, this is {machine()}: leave --predict out")
    measured = measure(options.race, options.only, before["configurations"])
    path.write_text(as_text({"machine": machine(), "versions": versions(), "configurations": measured}), encoding="utf-8")


if __name__ == "__main__":
    main()
