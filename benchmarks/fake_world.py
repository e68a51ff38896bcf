# ruff: noqa: E402
"""What the planner says of up to 512 GPUs beside what rank 0 of them holds and sends: python benchmarks/fake_world.py

Nothing is computed or sent: rank 0 alone runs, in torch's fake process group, on tensors that have shapes and no values (FakeTensorMode).
Model, collectives and DeepSpeed's engine are the real ones, for two optimizer steps of two micro-batches of 4,096 tokens, in bfloat16,
without activation checkpointing. `memory_gb` is the most of all storages alive at once, `sent_gb` what the collectives of the second step
send, `operations` how many operations of torch the host starts in its last micro-batch. Nodes have 8 ranks. zero3_offload is left out:
DeepSpeed's Adam for the CPU reads values. A case of 8 ranks takes a minute, one of 512 ten; results/fake_world.json is written after each.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.collectives import Counting
from benchmarks.side_by_side import RESULTS, as_text, versions

PATH = RESULTS / "fake_world.json"
NODE, TOKENS, MICRO_BATCHES = 8, 4096, 2
CASES = [
    *[(8, ds_config, "8b") for ds_config in ("zero0", "zero1", "zero2", "zero3", "zeropp")],
    *[(8, ds_config, "1.8b") for ds_config in ("zero1", "zero2", "zero3")],  # with one embedding for input and output, the larger part here
    *[(8, ds_config, "70b") for ds_config in ("zero3", "zeropp")],
    *[(ranks, ds_config, "8b") for ranks in (64, 512) for ds_config in ("zero1", "zero3", "zeropp")],
    *[(ranks, ds_config, "70b") for ranks in (64, 512) for ds_config in ("zero3", "zeropp")],
]


def name(ranks: int, ds_config: str, model: str) -> str:
    return f"{model}, {ds_config}, {ranks} ranks"


def plan(ranks: int, ds_config: str, model: str):
    """The planner for a case; `model` is a size of SHAPES, or a folder with a config.json."""
    from posttrain.operators.logprob import PLAIN
    from posttrain.planning.machines import find_gpu
    from posttrain.planning.planner import Planner
    from posttrain.planning.work import ASSUMED_ROW
    from posttrain.recipes.keys import SFTRecipe
    from posttrain.recipes.reading import build_recipe

    recipe = {"out_dir": "run", "checkpoint_path": model, "sft_data_dir": "none yet", "dtype": "bfloat16", "max_tokens_per_gpu": TOKENS}
    recipe |= {
        "global_batch_size": MICRO_BATCHES * TOKENS // ASSUMED_ROW * ranks,
        "ds_config": f"ds_configs/{ds_config}.json",
        "activation_checkpointing": "none",
    }
    planner = Planner(build_recipe(SFTRecipe, recipe, {}), find_gpu("b200"), NODE, ranks // NODE)
    planner.head = PLAIN  # compiled, it would allocate nothing without values
    return planner


def predict(ranks: int, ds_config: str, model: str) -> dict:
    """What the planner predicts."""
    from posttrain.engine.ds_config import read_ds_config
    from posttrain.planning.memory import Zero
    from posttrain.planning.planner import Way

    planner = plan(ranks, ds_config, model)
    parts = planner.parts(Way(planner.recipe.ds_config, planner.recipe.activation_checkpointing), TOKENS)
    sent = planner.sent(Zero.of(read_ds_config(planner.recipe.ds_config)), MICRO_BATCHES)
    return {"memory_gb": round(parts.total / 1e9, 3), "sent_gb": round(sent / 1e9, 3)}


class Host(TorchDispatchMode):
    """Counts the operations that the host starts, and answers 0 where it asks for a value: then no gradient overflows or is clipped."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        if function is torch.ops.aten._local_scalar_dense.default:
            return 0.0 if args[0].dtype.is_floating_point else 0
        return function(*args, **(kwargs or {}))


def measure(ranks: int, ds_config: str, model: str) -> dict:
    """Run rank 0's two steps in this process, which is then of no other use: what it held and sent."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # the package wants an address, to which nobody connects
    from deepspeed.runtime.zero import partitioned_param_coordinator
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from posttrain.engine.build import build_engine
    from posttrain.engine.ds_config import read_ds_config
    from posttrain.engine.start import start_distributed
    from posttrain.planning import activations

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    start_distributed()
    # it compares what rank 0 has sent with what this rank has, and of values neither has any
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda _: None
    planner = plan(ranks, ds_config, model)
    recipe, batch = planner.recipe, planner.work.micro_batch(TOKENS)
    live, counting, host = activations.LiveBytes(), Counting(), Host()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, live, host, activations.matmuls_without_copies():
        policy = activations.policy_without_values(
            planner.counted, planner.dtype, recipe.activation_checkpointing, fused=True, head=planner.head
        )
        # DeepSpeed asks for the device and dtype that it has, and torch (2.13) cannot set the data of a parameter without values
        policy._apply = lambda *_: policy
        engine = build_engine(policy, recipe, read_ds_config(recipe.ds_config))
        live.most = live.now  # at ZeRO-3 rank 0 has had the whole model: in its host's memory
        batch = activations.batch_without_values(batch, fake)
        with activations.allocating_as_counted(policy, fused=True):
            for _ in range(2):
                counting.sent.clear()
                with counting:
                    for number in range(1, MICRO_BATCHES + 1):
                        host.operations = 0
                        engine.backward(engine(batch).sum(), is_last=number == MICRO_BATCHES)
                    operations = host.operations
                    assert engine.update() == (0.0, True)
    return {"memory_gb": round(live.most / 1e9, 3), "sent_gb": round(counting.sent.total() / 1e9, 3), "operations": operations}


def measure_apart(ranks: int, ds_config: str, model: str) -> dict:
    """As `measure`, in a process of its own."""
    command = [sys.executable, __file__, "--one", str(ranks), ds_config, model]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout.splitlines()[-1])


def row(case: tuple[int, str, str], measured: dict, predicted: dict) -> dict:
    """What results/fake_world.json has of a case."""
    off = {f"{what}_off_by": round(predicted[what] / measured[what] - 1, 4) for what in predicted}
    return {**dict(zip(("ranks", "ds_config", "model"), case, strict=True)), "measured": measured, "predicted": predicted, **off}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=3, metavar=("RANKS", "DS_CONFIG", "MODEL"), help="print what is measured of one case, as JSON")
    parser.add_argument("--only", nargs="*", default=[], help="cases whose name, as in the results, has one of these words")
    parser.add_argument("--predict", action="store_true", help="predict anew beside what was measured")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(int(options.one[0]), *options.one[1:])))
        return
    keep = options.only or options.predict
    results = json.loads(PATH.read_text(encoding="utf-8")) if keep else {"versions": versions(), "cases": {}}
    if results["versions"] != versions() and not options.predict:
        sys.exit(f"{PATH} was measured with {results['versions']}, here are {versions()}: measure all cases, without --only")
    before = results["cases"]
    for case in CASES:
        if (options.predict and name(*case) not in before) or not any(word in name(*case) for word in options.only or [""]):
            continue
        measured = before[name(*case)]["measured"] if options.predict else measure_apart(*case)
        before[name(*case)] = row(case, measured, predict(*case))
        results["cases"] = {name(*one): before[name(*one)] for one in CASES if name(*one) in before}
        PATH.write_text(as_text(results), encoding="utf-8")
        print(name(*case), before[name(*case)], flush=True)


if __name__ == "__main__":
    main()
