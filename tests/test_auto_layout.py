"""ds_config: auto, activation_checkpointing: auto: what is chosen, that the curve does not depend on it, and what an existing run keeps."""

import pytest
import torch
from conftest import launch, metrics, rank_environment

from posttrain.planning import machines
from posttrain.planning.machines import find_gpu
from posttrain.planning.planner import ZERO0, Planner, Way
from posttrain.recipes.keys import SFTRecipe
from posttrain.recipes.reading import build_recipe
from posttrain.run.stored import read_facts, read_recipe, write_facts, write_recipe
from posttrain.training import auto_batch, auto_layout
from posttrain.training.auto_layout import USUAL


def planner(gpu: str, size: str, gpus: int = 8, nodes: int = 1, **keys) -> Planner:
    recipe = {"out_dir": "run", "checkpoint_path": "model", "sft_data_dir": "not/there", "global_batch_size": 128, **keys}
    return Planner(build_recipe(SFTRecipe, recipe, {}), find_gpu(gpu), gpus, nodes, size)


def ways(of: Planner) -> list:
    return [way for way in of.ways() if way.ds_config != ZERO0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gpu", "size", "gpus", "expected"),
    [
        ("b200", "8b", 8, "zero1 none"),
        ("h100", "8b", 8, "zero2 none"),  # in micro-batches of half the size: that is faster than to recompute
        ("4090", "1.8b", 2, "zero2 full"),
        ("b200", "70b", 8, "zero3 full"),
        ("h100", "70b", 8, "zero3_offload full"),
    ],
)
def test_what_is_recommended(gpu, size, gpus, expected):
    here = planner(gpu, size, gpus)
    best = here.best(ways(here))
    assert f"{best.ds_config.removeprefix('ds_configs/').removesuffix('.json')} {best.checkpointing}" == expected
    assert here.parts(best, here.most_tokens(best)).total <= here.usable


@pytest.mark.slow
def test_a_node_without_room_for_what_is_offloaded_is_not_asked_to_hold_it():
    here = planner("h100", "70b")
    here.host = here.on_host(here.best(ways(here))) - 1
    assert here.best(ways(here)) is None
    assert "16 such GPUs" in here.smallest_change(ways(here))
    assert "GB of host memory" in here.smallest_change(ways(here))


@pytest.mark.slow
def test_what_would_fit_does_fit():
    here = planner("4090", "8b", gpus=1)
    here.host = 100e9
    assert here.best(ways(here)) is None
    said = here.smallest_change(ways(here))
    assert said.startswith("4 such GPUs")
    for gpus, fits in ((2, False), (4, True)):
        there = planner("4090", "8b", gpus)
        there.host = gpus * 100e9
        assert (there.best(ways(there)) is not None) == fits


def test_a_second_copy_of_the_weights_is_for_nodes_of_its_size():
    eight, four = ({way.ds_config for way in planner("h100", "0.6b", gpus, 2).ways()} for gpus in (8, 4))
    assert eight - four == {"ds_configs/zeropp.json"}


@pytest.mark.slow
def test_activations_may_be_offloaded_where_nothing_else_is_named():
    here = planner("h100", "8b")
    offloading = [Way(way.ds_config, "offload") for way in ways(here) if way.checkpointing == "full"]
    assert here.best(offloading).checkpointing == "offload"


@pytest.mark.slow
def test_what_has_no_fused_kernels_is_counted_without():
    """Plain PyTorch keeps more for the backward pass."""
    plain, fused, unknown = planner("h100", "1.8b", kernels="torch"), planner("h100", "1.8b"), planner("h100", "1.8b")
    unknown.fused = False
    totals = [one.parts(USUAL, 8192).total for one in (fused, unknown, plain)]
    assert totals[0] < 0.85 * min(totals[1:])


def test_a_job_may_not_take_all_memory_of_its_host(tmp_path, monkeypatch):
    monkeypatch.setattr(machines, "CGROUPS", tmp_path)
    whole = machines.free_on_host()
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert machines.free_on_host() == pytest.approx(whole, rel=0.2)
    (tmp_path / "memory.max").write_text("1001000\n")
    assert machines.free_on_host() == pytest.approx(0.9 * 1_000_000)


@pytest.mark.parametrize("tokens", [4096, "auto"])
def test_a_run_keeps_its_layout_in_the_same_setting_only(tmp_path, monkeypatch, tokens):
    here = {"ranks": 8, "device": "H100"}
    monkeypatch.setattr(auto_batch, "ranks_and_device", lambda _: here)
    values = {
        "out_dir": str(tmp_path),
        "checkpoint_path": "model",
        "sft_data_dir": "data",
        "global_batch_size": 8,
        "max_tokens_per_gpu": tokens,
    }
    recipe, device = build_recipe(SFTRecipe, values, {}), torch.device("cpu")
    chosen = {"ds_config": "ds_configs/zero3.json", "activation_checkpointing": "selective"}
    layout = auto_layout.record(recipe, recipe.model_copy(update=chosen), device)
    write_facts(tmp_path, {"kind": "sft", "layout": layout})
    kept, said = auto_layout._of_run(recipe, device)
    assert kept == chosen | {"max_tokens_per_gpu": tokens}
    assert said == "ds_configs/zero3.json, activation_checkpointing selective (auto: as this run had it before)"
    here["ranks"] = 4
    assert auto_layout._of_run(recipe, device) is None

    # one that was begun by a version that did not choose, on eight ranks
    start = {"when": "2026-01-01T00:00:00", "ranks": 8, "device": "H100", "ds_config": "zero3", "states": {}}
    write_facts(tmp_path, {"kind": "sft", "starts": [start]})
    write_recipe(tmp_path, recipe.model_dump() | chosen)
    assert auto_layout._of_run(recipe, device) is None
    here["ranks"] = 8
    assert auto_layout._of_run(recipe, device)[0] == chosen


@pytest.fixture(scope="module")
def runs(wide, tmp_path_factory):
    """Run SFT where rank 1 may take so many bytes more than it has at its start; returns what was printed, and the run."""
    folder = tmp_path_factory.mktemp("auto")

    def run(name: str, memory: float, *more: str, code: int = 0, **others: str):
        environment = rank_environment() | {"MORE": str(memory), **others}
        done = launch("tests/fitted.py", *wide, f"--out_dir={folder / name}", *more, env=environment)
        assert done.returncode == code, done.stdout
        return done.stdout, folder / name

    return run


@pytest.mark.slow
def test_with_less_memory_a_run_takes_more_time_and_has_the_same_curve(runs):
    plain, plain_run = runs("plain", 1e12)
    assert "layout     ds_configs/zero1.json, activation_checkpointing none (auto: the fastest that fits, by estimate with " in plain
    assert read_recipe(plain_run)["ds_config"] == read_recipe(plain_run)["activation_checkpointing"] == "auto"
    assert read_facts(plain_run)["starts"][0]["ds_config"] == "zero1"

    less, less_run = runs("less", 0.3e9)
    chosen = read_facts(less_run)["layout"]
    assert 192 <= (tokens := chosen["max_tokens_per_gpu"]) < 1850  # as many as a rank has in a step
    layout = f"layout     {chosen['ds_config']}, activation_checkpointing {chosen['activation_checkpointing']} (auto: "
    assert layout in less and f" and micro-batches of at most {tokens:,} tokens)" in less
    assert f"in micro-batches of at most {tokens:,}" in less
    curves = [[one["loss"] for one in metrics(run)] for run in (plain_run, less_run)]
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)

    longer = ["--max_iters=4", "--lr_decay_iters=4", "--extend"]
    again, _ = runs("less", 1e12, *longer)  # as it had it, although more would fit now
    assert f"{layout}as this run had it before)" in again and f"in micro-batches of at most {tokens:,}" in again


@pytest.mark.slow
def test_a_run_that_was_begun_with_a_layout_goes_on_with_it(runs):
    _, run = runs("named", 1e12, "--ds_config=ds_configs/zero3.json", "--activation_checkpointing=full")
    assert "layout" not in read_facts(run)
    again, _ = runs("named", 1e12, "--max_iters=4", "--lr_decay_iters=4", "--extend")
    assert "layout     ds_configs/zero3.json, activation_checkpointing full (auto: as this run had it" in again
    assert [start["ds_config"] for start in read_facts(run)["starts"]] == ["zero3", "zero3"]


@pytest.mark.slow
def test_what_fits_nowhere_is_refused_with_what_would_do(runs):
    refused, run = runs("none", -1e12, code=2)
    assert "does not fit on 2 x CPU. What takes the least, ds_configs/zero" in refused
    assert "GB for each rank would do. To try it all the same, name both: --ds_config=ds_configs/zero" in refused
    assert not run.exists()


@pytest.mark.slow
def test_a_model_that_cannot_be_counted_gets_the_usual_layout(runs):
    said, run = runs("uncounted", 1e12, "--activation_checkpointing=full", UNCOUNTED="1")
    assert (
        "layout     ds_configs/zero1.json, activation_checkpointing full (auto: the usual one, since memory cannot be estimated: " in said
    )
    assert read_facts(run)["layout"]["ds_config"] == "ds_configs/zero1.json"
