"""Worker of test_distribute.py, on two ranks: loads models as training does, and writes what each rank held and got, OUT.RANK.

distributed.py OUT BASE ...
"""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import deepspeed  # noqa: E402
import torch  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from posttrain.engine.build import shard  # noqa: E402
from posttrain.engine.ds_config import merge_config, read_ds_config  # noqa: E402
from posttrain.engine.optimizer import parameter_groups  # noqa: E402
from posttrain.engine.start import start_distributed  # noqa: E402
from posttrain.model import policy  # noqa: E402
from posttrain.model.weights import hash_weights  # noqa: E402
from posttrain.parallel.script import run_script  # noqa: E402
from posttrain.planning.activations import LiveBytes  # noqa: E402
from posttrain.recipes.keys import SFTRecipe  # noqa: E402
from posttrain.recipes.reading import build_recipe  # noqa: E402

ZERO3 = "ds_configs/zero3.json"


def no_files(*_):
    raise AssertionError("rank 0 alone reads a model's files")


def seen(recipe, tokenizer, device: torch.device, sharded: bool) -> dict:
    """Load a model; returns what this rank held at most meanwhile, and the hashes of what it has in the end."""
    live = LiveBytes()
    with live:
        loaded, _ = policy.load_policy(recipe, tokenizer, device, sharded=sharded)
        if sharded:
            shard(loaded, merge_config(recipe, read_ds_config(ZERO3)))
    parameters = list(loaded.parameters())
    groups = [len(group["params"]) for group in parameter_groups(loaded, 0.1)]
    found = {"most": live.most, "groups": groups, "devices": sorted({str(one.device) for one in [*parameters, *loaded.buffers()]})}
    with deepspeed.zero.GatheredParameters(parameters) if sharded else torch.no_grad():
        found |= {"now": hash_weights(loaded.model), "sizes": [one.nbytes for one in parameters]}
    return found | {"read": loaded.weights, "tied": loaded.head.weight is loaded.model.get_input_embeddings().weight}


def main() -> None:
    out, *bases = [one for one in sys.argv[1:] if not one.startswith("--local_rank")]
    device = start_distributed()
    if os.environ["RANK"] == "1":
        policy.load_model = no_files
    results = {}
    for base in bases:
        values = {"checkpoint_path": base, "sft_data_dir": "x", "out_dir": "x", "global_batch_size": 2, "dtype": "float32"}
        recipe = build_recipe(SFTRecipe, {**values, "ds_config": ZERO3}, {})
        tokenizer = AutoTokenizer.from_pretrained(base)
        results[Path(base).name] = {str(sharded): seen(recipe, tokenizer, device, sharded) for sharded in (False, True)}
    Path(f"{out}.{os.environ['RANK']}").write_text(json.dumps(results))


run_script(main)
