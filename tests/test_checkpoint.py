"""Checkpoints: read into every layout, written in the background with checksums, refused where damaged or hostile."""

import json
import os
import pickle
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import launch
from deepspeed.runtime.zero.config import ZeroStageEnum
from relayout import LAYOUTS, SAVED_ON
from torch import distributed as dist

from posttrain.common import files
from posttrain.engine import checkpoint_folder, shards
from posttrain.engine.checkpoint_folder import file_problem, read_manifest
from posttrain.engine.checkpoints import Checkpoints, _random_states, _restore_random_states
from posttrain.engine.writer import BackgroundWriter

BAND = {"float32": 1e-5, "bfloat16": 3e-3}  # of losses and gradient norms, as in benchmarks/invariance.py


@pytest.fixture(scope="module")
def states(tiny, tmp_path_factory, cpu_adam) -> Path:
    """Training states after 2 steps on 2 ranks in every layout, and how each went on."""
    folder = tmp_path_factory.mktemp("states")
    (folder / "tiny").symlink_to(tiny.folder)
    done = launch("tests/relayout.py", "save", str(folder))
    assert done.returncode == 0, done.stdout
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BAND)
def test_the_saved_states_were_trained_alike(states, dtype):
    """With several micro-batches a step, whose gradients ZeRO-1 in bfloat16 adds up otherwise than the other stages."""
    curves = [json.loads((states / f"{dtype}_{zero}.json").read_text())["curve"] for zero in LAYOUTS]
    for curve in curves[1:]:
        for mine, other in zip(curve, curves[2], strict=True):
            assert mine == pytest.approx(other, abs=10 * BAND[dtype]), curves


@pytest.fixture
def alone(tmp_path):
    """A process group of one; another test of this process may have left one."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [SAVED_ON, 3])
def test_a_training_state_goes_on_in_every_layout(states, ranks):
    """In the same one bit for bit; from any into any other within rounding, optimizer included: two steps are compared."""
    done = launch("tests/relayout.py", "load", str(states), ranks=ranks)
    assert done.returncode == 0, done.stdout
    results = json.loads((states / f"loaded_{ranks}.json").read_text())
    assert {(r["from"], r["to"]) for r in results if r["dtype"] == "float32"} >= {(zero, zero) for zero in LAYOUTS}
    assert len(results) == (10 if ranks == SAVED_ON else 35)
    for result in results:
        right = json.loads((states / f"{result['dtype']}_{result['from']}.json").read_text())
        if ranks == SAVED_ON:
            assert {name: result[name] for name in right} == right, result
        for mine, other in zip(result["curve"], right["curve"], strict=True):
            assert mine == pytest.approx(other, abs=BAND[result["dtype"]]), result


@pytest.mark.slow
def test_deepspeeds_own_tool_reads_the_same_weights(states):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    for zero in LAYOUTS[1:]:
        folder = states / f"float32_{zero}"
        theirs = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag="step_000002")
        saved = shards.Saved(folder / "step_000002", read_manifest(folder / "step_000002")["state"])
        for name in saved.shapes:
            assert torch.equal(theirs[name], saved.parameter(name)), (zero, name)


@pytest.mark.slow
def test_a_checkpoint_that_is_not_what_was_written_is_not_used(states, tmp_path, alone):
    """Each way of being damaged, or made to harm, is told by its cause; what was saved before is found instead."""
    said: list[str] = []
    for step in (1, 2):
        shutil.copytree(states / "float32_zero2" / "step_000002", tmp_path / "checkpoints" / f"step_{step:06d}")
    newest = tmp_path / "checkpoints" / "step_000002"
    checkpoints = Checkpoints(SimpleNamespace(), tmp_path / "checkpoints", 2, said.append, {})
    assert checkpoints.newest().path == newest
    weights, manifest = newest / "mp_rank_00_model_states.pt", newest / "manifest.json"
    content, text = weights.read_bytes(), manifest.read_text()

    def resealed(**changes) -> None:
        facts = {**json.loads(text), **changes}
        facts.pop("checksum")
        manifest.write_text(json.dumps(facts | {"checksum": files.checksum(facts)}))

    flipped = content[:5000] + bytes([content[5000] ^ 4]) + content[5001:]
    (tmp_path / "outside").write_bytes(content)
    cases = [
        (lambda: weights.write_bytes(content[:-1]), "mp_rank_00_model_states.pt has"),
        (lambda: weights.write_bytes(flipped), "mp_rank_00_model_states.pt is not what was written"),
        (lambda: weights.unlink(), "mp_rank_00_model_states.pt is missing"),
        (lambda: manifest.write_text(text.replace('"step": 2', '"step": 3')), "manifest.json is not what was written"),
        (lambda: manifest.write_text(text[:100]), "manifest.json is not readable"),
        (lambda: manifest.unlink(), "it has no manifest.json"),
        (lambda: resealed(format=7), "it has format 7, this code reads 1"),
        (
            lambda: resealed(files={"../../outside": files.file_facts(tmp_path / "outside")}),
            "'../../outside', which is not a file in this",
        ),
        (lambda: (weights.unlink(), weights.symlink_to(tmp_path / "outside")), "which is not a file in this folder"),
    ]
    for damage, cause in cases:
        weights.unlink(missing_ok=True)
        weights.write_bytes(content)
        manifest.write_text(text)
        assert checkpoints.newest().path == newest
        said.clear()
        damage()
        assert checkpoints.newest().path.name == "step_000001", cause
        assert len(said) == 1
        assert cause in said[0]
    damage()
    other = tmp_path / "checkpoints" / "step_000001"
    other.rename(tmp_path / "kept")
    with pytest.raises(ValueError, match=r"none of the checkpoints .* can be used"):
        checkpoints.newest()
    (tmp_path / "kept").rename(other)
    checkpoints.forget_after(1)
    assert {path.name for path in newest.parent.iterdir()} == {"step_000001", "step_000002.damaged", "latest"}
    assert (newest.parent / "latest").read_text() == "step_000001"


@pytest.mark.slow
def test_what_follows_a_save_is_done_at_the_next_start_where_a_kill_came_before_it(states, tmp_path, alone):
    folder = tmp_path / "checkpoints"
    for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0)):
        manifest = Path(shutil.copytree(states / "float32_zero2" / "step_000002", folder / f"step_{step:06d}")) / "manifest.json"
        facts = {**read_manifest(manifest.parent), "validation": loss}
        facts.pop("checksum", None)
        manifest.write_text(json.dumps(facts | {"checksum": files.checksum(facts)}))
    Checkpoints(SimpleNamespace(), folder, 1, lambda text: None, {}).forget_after(3)
    assert {path.name for path in folder.iterdir()} == {"step_000002", "step_000003", "latest", "best"}
    assert [(folder / name).read_text() for name in ("latest", "best")] == ["step_000003", "step_000002"]


@pytest.mark.slow
def test_a_checkpoint_that_carries_code_does_not_run_it(states, tmp_path):
    """Also where its manifest was made to fit."""
    folder = tmp_path / "step_000002"
    shutil.copytree(states / "float32_zero2" / "step_000002", folder)
    victim = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    with torch.serialization.safe_globals(shards.ALLOWED):
        content = torch.load(victim, weights_only=True)

    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save(content | {"more": Harm()}, victim)
    saved = shards.Saved(folder, read_manifest(folder)["state"])
    with pytest.raises(ValueError, match=r"optim_states\.pt holds more than tensors and plain values"):
        for name in saved.shapes:
            saved.parameter(name)
    assert not (tmp_path / "harm").exists()


def write(folder: Path, state: dict) -> BackgroundWriter:
    writer = BackgroundWriter()
    info = SimpleNamespace(save_dir=str(folder), tag="step")
    (folder / "step").mkdir(exist_ok=True)
    writer.create(info)
    writer.save(state, str(folder / "step" / "state.pt"))
    writer.commit(info)
    return writer


def test_what_is_written_is_the_state_at_the_time_of_the_save(tmp_path):
    """Training goes on while the thread writes; the checksum taken on the way is the file's."""
    weight = torch.arange(300_000.0)
    state = {"weight": weight, "tied": weight, "part": weight[10:20], "nested": [{"x": torch.ones(3, 2).T}], "plain": {"a": [1, "b"]}}
    writer = write(tmp_path, state)
    weight.zero_()
    state["plain"]["a"].append("later")
    writer.thread.join()
    path = tmp_path / "step" / "state.pt"
    assert writer.files == {"state.pt": files.file_facts(path)}
    read = torch.load(path, weights_only=True)
    assert torch.equal(read["weight"], torch.arange(300_000.0))
    assert torch.equal(read["part"], torch.arange(10.0, 20.0))
    assert torch.equal(read["nested"][0]["x"], torch.ones(2, 3))
    assert read["plain"] == {"a": [1, "b"]}
    assert path.stat().st_size < 1.1 * weight.nbytes  # tied weights once


def test_a_file_that_cannot_be_written_is_an_error_of_the_save(tmp_path):
    writer = BackgroundWriter()
    info = SimpleNamespace(save_dir=str(tmp_path), tag="step")
    writer.create(info)
    writer.save({"x": torch.ones(2)}, str(tmp_path / "missing" / "state.pt"))
    writer.commit(info)
    writer.thread.join()
    assert isinstance(writer.error, OSError)
    assert "missing" in str(writer.error)


def test_a_stage_is_written_alike_by_every_python(monkeypatch):
    """Also where an enum is pickled as by Python 3.11.2."""
    monkeypatch.setattr(ZeroStageEnum, "__reduce_ex__", lambda stage, _: (getattr, (type(stage), stage.name)))
    assert b"getattr" not in pickle.dumps(ZeroStageEnum.weights) and pickle.loads(pickle.dumps(ZeroStageEnum.weights)) == 3


def test_a_checksum_sees_one_bit(tmp_path):
    content = os.urandom(1000)
    (tmp_path / "x").write_bytes(content)
    facts = files.file_facts(tmp_path / "x")
    assert file_problem(tmp_path, "x", facts) is None
    (tmp_path / "x").write_bytes(content[:77] + bytes([content[77] ^ 1]) + content[78:])
    assert "checksum" in (file_problem(tmp_path, "x", facts) or "")


STATE = {"zero_stage": 2, "optimizer_step": 0, "shapes": {"w": [2, 3]}, "files": ["rank.pt"], "fragments": [[["w", 0, 6, 0, 0]]]}
FACTS = {
    **{"format": checkpoint_folder.FORMAT, "step": 1, "validation": None, "world_size": 1, "files": {"rank.pt": {"size": 1, "xxh3": "0"}}},
    **{"guard": {"norms": [], "highest": 0.0, "bad_in_a_row": 0, "last_applied": 1}, "state": STATE},
}


def write_manifest(folder: Path, facts: dict) -> None:
    (folder / "manifest.json").write_text(json.dumps(facts | {"checksum": files.checksum(facts)}))


OTHER_MANIFESTS = {
    **{f"no {name}": ({name: None}, name) for name in ("format", "step", "guard", "state", "files")},
    **{f"{name}: {said}": ({"state": {**STATE, name: value}}, said) for name, value, said in (
        ("zero_stage", 7, "state.zero_stage"),
        ("zero_stage", 3, "rank.pt holds no training state of ZeRO-3"),
        ("files", [5], "state.files.0"),
        ("files", ["other.pt"], "no size and checksum of other.pt"),
        ("shapes", {"w": [-1]}, "state.shapes.w.0"),
        ("shapes", {"w": [2**40]}, "holds 6 of 1099511627776 elements of w"),
        ("shapes", {"w": [2**40, 2**40]}, "holds 6 of "),
        ("shapes", {"v": [2, 3]}, "'w', 0, 6, 0, 0.*no part of a parameter"),
        ("fragments", [[["w", 0, 6]]], "state.fragments.0.0"),
        ("fragments", [[["w", "0", 6, 0, 0]]], "state.fragments.0.0"),
        ("fragments", [[["w", 1, 6, 0, 0]]], "no part of a parameter"),
        ("fragments", [[["w", 0, 4, 0, 0], ["w", 2, 2, 0, 4]]], "has elements of w twice"),
        ("fragments", [[["w", 0, 5, 0, 0]]], "holds 5 of 6 elements of w"),
        ("fragments", [[["w", 0, 6, 9, 0]]], "rank.pt lacks elements of w"),
        ("fragments", [[["w", 0, 6, 0, 1]]], "rank.pt lacks elements of w"),
        ("has_buffers", True, "no size and checksum of buffers.pt"),
    )},
}  # fmt: skip


@pytest.mark.parametrize("name", [*OTHER_MANIFESTS, "no validation", "whole"])
def test_a_manifest_of_other_content_is_refused_in_one_sentence(tmp_path, name):
    """Its checksum is right, as of one that a stranger has written."""
    content = {"single_partition_of_fp32_groups": [torch.arange(6.0)], "base_optimizer_state": {"state": {}}}
    torch.save({"optimizer_state_dict": content}, tmp_path / "rank.pt")
    changes, said = OTHER_MANIFESTS.get(name, ({}, "validation"))
    write_manifest(tmp_path, {key: value for key, value in (FACTS | changes).items() if name != f"no {key}"})

    def read() -> torch.Tensor:
        return shards.Saved(tmp_path, read_manifest(tmp_path)["state"]).parameter("w")

    if name == "whole":
        assert read().tolist() == [[0, 1, 2], [3, 4, 5]]
        return
    with pytest.raises(ValueError, match=said) as error:
        read()
    assert len(str(error.value).replace(str(tmp_path), "")) < 300


def test_random_states_of_other_content_are_refused(tmp_path):
    for content in ({"torch": 5}, 5, _random_states() | {"python": (3,)}):
        torch.save(content, tmp_path / "random.pt")
        with pytest.raises(ValueError, match=rf"random.pt holds no random states \(.*move {tmp_path} away"):
            _restore_random_states(tmp_path / "random.pt")


def test_the_newest_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(SimpleNamespace(), tmp_path, 2, print, {})
    for step, loss in ((1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, None)):
        (tmp_path / f"step_{step:06d}").mkdir()
        write_manifest(tmp_path / f"step_{step:06d}", FACTS | {"validation": loss})
        checkpoints._delete_old()
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_000002", "step_000004", "step_000005"]
    assert (tmp_path / "best").read_text() == "step_000002"


def test_no_room_is_told_before_anything_is_written(tmp_path, alone, monkeypatch):
    engine = SimpleNamespace(module=torch.nn.Linear(10, 10, bias=False), zero_stage=2)
    checkpoints = Checkpoints(engine, tmp_path / "run" / "checkpoints", 2, print, {})
    assert checkpoints.bytes_of_one() == 100 * (4 + 12)
    usage = shutil.disk_usage(tmp_path)
    for free, saves, fits in ((1600, 1, True), (1599, 1, False), (4 * 1600, 9, True), (4 * 1600 - 1, 9, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        if fits:
            checkpoints.check_space_for(saves, 0)
        else:
            with pytest.raises(OSError, match=r"Nothing was deleted: make room"):
                checkpoints.check_space_for(saves, 0)
    assert not (tmp_path / "run").exists()


def test_every_rank_sees_the_same_folder(tmp_path, alone, monkeypatch):
    checkpoints = Checkpoints(SimpleNamespace(), tmp_path / "run" / "checkpoints", 2, print, {})
    checkpoints.check_shared()
    assert list((tmp_path / "run").iterdir()) == []
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(Path, "exists", lambda path: False)  # as on a host with a disk of its own
    with pytest.raises(ValueError, match=r"is not the same folder on all hosts"):
        checkpoints.check_shared()


def test_two_starts_do_not_work_on_one_run(tmp_path, alone):
    first, second = (Checkpoints(SimpleNamespace(), tmp_path / "run" / "checkpoints", 2, print, {}) for _ in range(2))
    first.lock()
    with pytest.raises(ValueError, match=r"is in use by another process of this run"):
        second.lock()
    first.held.close()  # as when its process ends
    second.lock()


def test_random_states_come_back(tmp_path):
    import random

    import numpy as np

    def draw() -> tuple:
        return torch.rand(3).tolist(), random.random(), np.random.rand(2).tolist()

    torch.save(_random_states(), tmp_path / "random.pt")
    first = draw()
    assert draw() != first
    _restore_random_states(tmp_path / "random.pt")
    assert draw() == first


def test_only_tensors_and_plain_values_are_allowed():
    """The allowed types build nothing but themselves."""
    assert {kind.__module__.split(".")[0] for kind in shards.ALLOWED} == {"deepspeed"}
    with pytest.raises(pickle.UnpicklingError), torch.serialization.safe_globals(shards.ALLOWED):
        torch.load(_pickled(print), weights_only=True)


def _pickled(value):
    import io

    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer
