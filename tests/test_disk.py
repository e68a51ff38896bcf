"""Disks that are full, read-only or broken: the file is named, what to do is said, and nothing that was there is lost."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import start_run
from test_runs import sft_arguments

from posttrain.common import files
from posttrain.common.errors import described
from posttrain.recipes.keys import SFTRecipe
from posttrain.run.directory import Run
from posttrain.run.stored import read_log
from posttrain.training.command import sft


@pytest.fixture
def disk(tmp_path):
    """Call it with mount's options: a small file system of its own."""
    mounted = []

    def mount(options: str) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir(exist_ok=True)
        how = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(how, capture_output=True).returncode:
            pytest.skip("needs the right to mount a file system")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's own thread
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "run.json", "events.out.tfevents..."])
def test_a_full_disk_is_named_with_what_could_not_be_written(disk, name):
    run_dir = disk("size=2m") / "run"
    run = Run(SFTRecipe(checkpoint_path="x", sft_data_dir="y", out_dir=str(run_dir), max_iters=9), 0, {})
    start_run(run, 1, 9)
    run.log(1, "train", {"loss": 2.0, "grad_norm": 1.0})
    run.sync()
    with (run_dir.parent / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError, match="No space"):
        while True:
            filler.write(bytes(4096))
    long = {f"key_{number}": 1.0 for number in range(1000)}  # longer than what is free in a file's last page
    actions = {
        "metrics.jsonl": lambda: run.log(2, "train", {"loss": 2.0, "grad_norm": 1.0, **long}),
        "samples.jsonl": lambda: run.log_samples(2, [{"prompt": "a", "answer": "b" * 9000, "tokens": 1}]),
        "run.json": run.finished,
        "events.out.tfevents...": lambda: [(tracker.texts({"a": "b" * 9000}, 2), tracker.flush()) for tracker in run.trackers],
    }
    with pytest.raises(OSError, match="No space") as error:
        actions[name]()
    assert described(error.value) == f"{run_dir / name}: No space left on device: make room, and the same command goes on"
    assert [record["step"] for record in read_log(run_dir, "metrics.jsonl")] == [1]  # a line that was cut does not count
    (run_dir.parent / "filler").unlink()


def test_an_error_of_the_disk_is_named(tmp_path):
    with pytest.raises(OSError, match="broken") as error, files.written_whole(tmp_path / "x"):
        raise OSError(errno.EIO, "broken")
    assert described(error.value) == f"{tmp_path}/x: broken: look at the disk, and the same command goes on"


def test_a_read_only_out_dir_is_refused_before_the_model_is_loaded(disk, tiny, monkeypatch):
    place = disk("ro")
    monkeypatch.setattr(sys, "argv", ["sft.py", *sft_arguments(tiny, place / "runs" / "mine")])
    with pytest.raises(ValueError, match=rf"^out_dir {place}/runs/mine cannot be written \({place}: Read-only file system\): name another"):
        sft()


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    host = os.uname().nodename
    mine = subprocess.Popen(["sleep", "60"])
    gone = subprocess.Popen(["true"])
    gone.wait()
    try:
        going = tmp_path / f"report.html.{host}.{mine.pid}.incomplete"
        for path in (going, tmp_path / f"run.json.{host}.{gone.pid}.incomplete", tmp_path / "recipe.yaml.other.host.7.incomplete"):
            path.write_text("half")
        (tmp_path / "final.incomplete" / "deep").mkdir(parents=True)
        (tmp_path / "metrics.jsonl").write_text("whole")
        theirs = ("mine.incomplete", "step_1.incomplete", "v2.7.incomplete")
        for name in theirs:
            (tmp_path / name).mkdir()
            (tmp_path / name / "precious.txt").write_text("mine")
        (tmp_path / "step_000007.incomplete").mkdir()
        files.sweep(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {going.name, "metrics.jsonl", *theirs}
    finally:
        mine.kill()
        mine.wait()
