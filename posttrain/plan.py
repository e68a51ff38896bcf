"""Estimates what a run takes, before it runs: memory of each GPU by part, largest micro-batch, time, communication; picks a ds_config.

python posttrain/plan.py [RECIPE.yaml] [--gpus=8] [--nodes=1] [--gpu=h100|rtx4090|...|here] [--gpu_memory=24] [--model=8b] [--key=value]

If the recipe's model is not there yet, it assumes --model's shape, or that of the size in the model's name; without data it assumes rows of
2,048 tokens; and it says so. --gpu=here times the model's layers and DeepSpeed's engines on this machine; for a named GPU it assumes the
share of the peak FLOP/s that one H200 reached.
"""

import sys
from pathlib import Path


def main() -> None:
    """Print the estimates for a command line. Raises ValueError or OSError for a mistake in it."""
    from posttrain.common.options import Parser
    from posttrain.data.manifest import read_manifest
    from posttrain.planning.machines import device_of, this_machine
    from posttrain.planning.shapes import SHAPES, assumed_shape
    from posttrain.recipes.reading import load_recipe_of_either_kind
    from posttrain.training.missing import prepare_command

    parser = Parser("plan", __doc__)
    parser.add_argument("--gpus", type=int, default=8, help="GPUs per node, or ranks on a CPU; default 8")
    parser.add_argument("--nodes", type=int, default=1, help="default 1")
    parser.add_argument("--gpu", help="the GPU to estimate for, e.g. h100, rtx4090, a100-40gb; here: this machine; default b200")
    parser.add_argument("--gpu_memory", type=float, help="its memory in GB, for a GPU that is not known or has another amount")
    parser.add_argument(
        "--model", choices=list(SHAPES), help="the shape to assume if there is no model at the recipe's path yet; default: by its name"
    )
    options, others = parser.parse_known_args()
    if options.gpus < 1 or options.nodes < 1:
        raise ValueError(f"--gpus and --nodes should be at least 1, saw {options.gpus} and {options.nodes}")
    here = options.gpu == "here"
    if here and (options.nodes > 1 or options.gpu_memory):
        given = f"--nodes={options.nodes}" if options.nodes > 1 else f"--gpu_memory={options.gpu_memory:g}"
        raise ValueError(f"--gpu=here times this machine alone, saw {given}: leave it out, or name the GPU")
    device = None if here else device_of(options.gpu, options.gpu_memory)
    recipe = load_recipe_of_either_kind(others)
    assumed_shape(recipe, options.model)
    if Path(recipe.data_dir).exists():
        read_manifest(recipe.data_dir, prepare_command(recipe), recipe.kind)
    from posttrain.model import own_code
    from posttrain.planning.table import table  # only now: they import torch and transformers, which takes seconds

    if recipe.trust_remote_code:
        own_code.register(recipe.model_path)
    device = device or this_machine(options.gpus)
    print(table(recipe, device, gpus=options.gpus, nodes=options.nodes, assumed=options.model, here=here))


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the folder with posttrain in it, which need not be installed
    from posttrain.parallel.script import run_script

    run_script(main)
