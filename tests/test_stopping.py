"""Stopping and starting again: what asks a run to stop, the supervisor, longer runs, limits of time."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, last_of_each, metrics, python, rank_environment, start, start_run
from test_runs import sft_arguments

from posttrain.parallel.stopping import STARTED, StopRequest
from posttrain.recipes.keys import SFTRecipe
from posttrain.recipes.reading import build_recipe
from posttrain.run.directory import Run
from posttrain.run.resume import already_finished, resolve

SUPERVISE = [sys.executable, str(ROOT / "launch" / "supervise.py")]
LEAST = {"checkpoint_path": "x", "sft_data_dir": "y", "out_dir": "z", "epochs": 1, "batch_size": 1}


@pytest.fixture
def signals():
    """Handlers as they were."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)}
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_a_signal_asks(signals):
    stop = StopRequest(0, launcher=None)
    assert stop.reason is None
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0.2)
    assert stop.reason == "SIGUSR1"


def test_the_time_limit_leaves_room_for_a_step_and_a_save(signals, monkeypatch):
    monkeypatch.setenv(STARTED, str(time.time() - 1000))  # the job began before this start of it
    stop = StopRequest(1100, launcher=None)
    assert stop.reason is None
    stop.expect(step_seconds=20, save_seconds=30)  # 2 x 20 + 2 x 30 + 5 > 100
    assert stop.reason == "the time limit is near"


def test_a_clock_that_is_set_back_lengthens_no_time_limit(signals, monkeypatch):
    stop = StopRequest(0.2, launcher=None)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert stop.reason is None
    time.sleep(0.25)
    assert stop.reason == "the time limit is near"


@pytest.mark.parametrize(
    ("text", "seconds"), [("8h", 28800), ("90m", 5400), ("45s", 45), ("1.5h", 5400), ("08:00:30", 28830), ("60", 60), (0, 0)]
)
def test_a_time_limit_may_be_written_in_several_ways(text, seconds):
    assert build_recipe(SFTRecipe, LEAST, {"time_limit": text}).time_limit == seconds


def test_a_time_limit_that_is_none_is_refused():
    with pytest.raises(ValueError, match="time_limit='8 hours'"):
        build_recipe(SFTRecipe, LEAST | {"time_limit": "8 hours"}, {})


def supervise(tmp_path: Path, script: str, *more: str) -> tuple[subprocess.CompletedProcess, int]:
    """The supervisor's result, and how often it started the script."""
    (tmp_path / "script.py").write_text(f"open({str(tmp_path / 'starts')!r}, 'a').write('x')\n{script}\n")
    command = [*SUPERVISE, sys.executable, str(tmp_path / "script.py"), *more]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)
    return done, len((tmp_path / "starts").read_text()) if (tmp_path / "starts").exists() else 0


@pytest.mark.slow
def test_a_failure_is_started_again(tmp_path):
    text = f"import os, sys; sys.exit(0 if os.path.getsize({str(tmp_path / 'starts')!r}) > 1 else 9)"
    done, starts = supervise(tmp_path, text, "--max_restarts=2")
    assert (done.returncode, starts) == (0, 2)
    assert "exit code 9; restart 1 of 2" in done.stdout


@pytest.mark.slow
def test_restarts_are_counted(tmp_path):
    done, starts = supervise(tmp_path, "import sys; sys.exit(9)", "--max_restarts=1")
    assert (done.returncode, starts) == (9, 2)


def test_a_mistake_is_not_repeated(tmp_path):
    done, starts = supervise(tmp_path, "import sys; sys.exit(2)", "--max_restarts=5")
    assert (done.returncode, starts) == (2, 1)


def test_a_number_of_restarts_that_is_none_is_refused(tmp_path):
    done, starts = supervise(tmp_path, "", "--max_restarts=many")
    assert (done.returncode, starts) == (2, 0)
    assert "expected --max_restarts=NUMBER" in done.stdout


def test_nothing_is_left_running(tmp_path):
    """A command that fails and leaves a child behind."""
    pid = str(tmp_path / "pid")
    text = f"import subprocess, sys\nopen({pid!r}, 'w').write(str(subprocess.Popen(['sleep', '300']).pid))\nsys.exit(1)"
    done, _ = supervise(tmp_path, text)
    assert done.returncode == 1
    time.sleep(0.2)
    pid = int((tmp_path / "pid").read_text())
    state = Path(f"/proc/{pid}/stat").read_text().split()[2] if Path(f"/proc/{pid}").exists() else "gone"
    assert state in ("gone", "Z")  # a zombie is its parent's to clear away, here init's


def stand_in(tmp_path: Path, seconds: float, code: int = 0) -> list[str]:
    """The command of a rank that takes `seconds` to save once it is asked to stop, and ends with `code`."""
    text = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from posttrain.parallel.stopping import StopRequest, tell_that_all_is_well
def tell(*words): os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # in one piece: print's may mingle with another rank's
stop = StopRequest(0, launcher=None)
tell("ready")
while stop.reason is None: time.sleep(0.01)
tell("asked", stop.reason)
time.sleep({seconds})
tell("saved")
if {code} == 0: tell_that_all_is_well()
sys.exit({code})
"""
    (tmp_path / "rank.py").write_text(text)
    return [sys.executable, str(tmp_path / "rank.py"), "--local_rank=0"]


@pytest.mark.slow
def test_torchruns_ranks_are_told_from_torchrun_and_from_what_they_start(tmp_path):
    """torchrun, if it got the signal, would print a traceback, and kill after 30 s the ranks that still save."""
    python, script, _ = stand_in(tmp_path, 0.5)
    path = Path(script)
    helper = "import subprocess\nhelper = subprocess.Popen(['sleep', '5'])\n"
    path.write_text(helper + path.read_text().replace("time.sleep(0.5)", "time.sleep(0.5); tell('helper', helper.poll())"))
    command = [*SUPERVISE, python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    shown = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=rank_environment(), **shown)
    lines = iter(process.stdout.readline, "")
    ready = list(itertools.islice((line for line in lines if line == "ready\n"), 2))
    process.send_signal(signal.SIGTERM)
    rest = list(lines)
    assert process.wait(30) == 0, rest
    assert sorted(ready + rest) == sorted(2 * ["ready\n", "asked SIGTERM\n", "helper None\n", "saved\n"])


@pytest.mark.slow
def test_a_rank_gets_each_signal_once_and_a_second_one_ends_it(tmp_path):
    process = subprocess.Popen([*SUPERVISE, *stand_in(tmp_path, 60)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "asked SIGTERM\n"
    time.sleep(2.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize("code", [0, 1])
def test_ranks_save_even_where_their_launcher_dies_at_the_signal(tmp_path, code):
    """As DeepSpeed's do, when a scheduler signals every process of a job: the outer one dies, the inner one waits and ends with 1."""
    stays = "import signal, subprocess, sys\nsignal.signal(signal.SIGTERM, lambda *_: None)"
    (tmp_path / "inner.py").write_text(f"{stays}\nsubprocess.run({stand_in(tmp_path, 1.5, code)!r})\nsys.exit(1)")
    (tmp_path / "launcher.py").write_text(f"import subprocess, sys\nsubprocess.run([sys.executable, {str(tmp_path / 'inner.py')!r}])")
    process = subprocess.Popen([*SUPERVISE, sys.executable, str(tmp_path / "launcher.py")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    for pid in [child.pid for child in psutil.Process(process.pid).children(recursive=True)] + [process.pid]:
        os.kill(pid, signal.SIGTERM)
    assert process.stdout.readline() == "asked SIGTERM\n"
    assert process.stdout.readline() == "saved\n"
    assert (process.wait(10) == 0) == (code == 0)  # 1, as where the disk is full: it was asked to stop, but it is not saved


@pytest.mark.slow
def test_an_orderly_end_before_a_restart_says_nothing_of_what_follows(tmp_path):
    """The first start stops in order, as ranks do whose launcher dies; the second is interrupted before it has saved anything."""
    (tmp_path / "script.py").write_text(f"""
import os, sys, time
open({str(tmp_path / "starts")!r}, "a").write("x")
if os.path.getsize({str(tmp_path / "starts")!r}) == 1:
    open(os.environ["POSTTRAIN_ALL_IS_WELL"], "w").close()
    sys.exit(9)
print("ready", flush=True)
time.sleep(60)
""")
    command = [*SUPERVISE, sys.executable, str(tmp_path / "script.py"), "--max_restarts=1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM


def test_there_is_nothing_to_extend_in_a_new_run(tmp_path):
    values = {**LEAST, "epochs": None, "max_iters": 6, "out_dir": str(tmp_path / "run"), "extend": True}
    with pytest.raises(
        ValueError, match=r"--extend makes a run longer, and .*run is not a run: leave --extend out, or name the run's --out_dir"
    ):
        resolve(build_recipe(SFTRecipe, values, {}), 1)


def test_an_extension_that_was_interrupted_is_not_finished(tmp_path):
    """final/ is there, of the shorter run, while the longer one is under way."""
    values = {**LEAST, "epochs": None, "max_iters": 6, "out_dir": str(tmp_path / "run")}
    short = build_recipe(SFTRecipe, values, {})
    begun = Run(short, 0, {})
    start_run(begun, 1, 6)
    (tmp_path / "run" / "final").mkdir()
    begun.finished()
    begun.close()
    assert already_finished(resolve(short, 1), 0)
    with pytest.raises(ValueError, match=r"the learning rate of .* is 0 after step 6: give --lr_decay_iters"):
        resolve(build_recipe(SFTRecipe, values, {"max_iters": 9, "extend": True}), 1)
    for _ in range(2):  # the first start of the longer run is interrupted
        longer = resolve(build_recipe(SFTRecipe, values, {"max_iters": 9, "lr_decay_iters": 9, "extend": True}), 1)
        assert not already_finished(longer, 0)
        again = Run(longer, 0, {})
        start_run(again, 7, 9)
        again.close()
    again.finished()
    assert already_finished(resolve(build_recipe(SFTRecipe, values, {"max_iters": 9}), 1), 0)


def alone(tiny, out_dir, *more: str) -> subprocess.CompletedProcess:
    """The SFT script on one device, without a launcher."""
    arguments = last_of_each(sft_arguments(tiny, out_dir, "--eval_interval=0", "--decay_lr=False", "--min_lr=0", *more))
    return python("posttrain/sft.py", *arguments)


@pytest.mark.slow
def test_a_longer_run_must_be_asked_for_and_is_then_the_same_as_one_from_the_start(tiny, tmp_path):
    straight, grown = tmp_path / "straight", tmp_path / "grown"
    share = ("--warmup_iters=none", "--warmup_ratio=0.8")  # 5 of 6 steps; of 9 it would be 8
    assert alone(tiny, straight, "--max_iters=9", "--warmup_iters=5").returncode == 0
    assert alone(tiny, grown, *share).returncode == 0
    refused = alone(tiny, grown, *share, "--max_iters=9")
    assert refused.returncode == 2
    assert "max_iters: 6 -> 9" in refused.stdout
    assert "add --extend" in refused.stdout
    done = alone(tiny, grown, *share, "--max_iters=9", "--extend")
    assert done.returncode == 0, done.stdout
    assert "continuing after step 6" in done.stdout
    assert [record["loss"] for record in metrics(grown)] == [record["loss"] for record in metrics(straight)]
    files = [run / "final" / "model.safetensors" for run in (straight, grown)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert '"from_step": 7' in (grown / "run.json").read_text()
    assert "is finished" in alone(tiny, grown, *share, "--max_iters=9").stdout  # what it was extended to is now what it is


@pytest.mark.slow
def test_a_run_saves_and_stops_before_its_time_is_over(tiny, tmp_path):
    done = alone(
        tiny, tmp_path / "run", "--max_iters=100000", "--time_limit=9s", "--save_seconds=2", "--save_interval=0", "--skip_spikes=0"
    )
    assert done.returncode == 0, done.stdout
    assert "the time limit is near (rank 0)" in done.stdout
    assert done.stdout.count("saved ") >= 1
    last = metrics(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / f"step_{last:06d}").is_dir()


@pytest.mark.slow
def test_another_number_of_ranks_and_another_stage_in_the_middle_of_a_run(tiny, tmp_path):
    """2 ranks at ZeRO-2, then 1 at ZeRO-3, then 4 at ZeRO-1: the losses of the run that never changed, to 1e-5 in float32."""
    steps, base = 60, ["--max_iters=60", "--learning_rate=1e-3", "--eval_interval=1", "--save_interval=0", "--skip_spikes=0"]
    straight, changed = tmp_path / "straight", tmp_path / "changed"
    run_through(tiny, straight, 2, "zero2", None, base)
    for ranks, zero, last in ((2, "zero2", 30), (1, "zero3", 70), (4, "zero1", None)):
        output = run_through(tiny, changed, ranks, zero, last, base)
    assert "from 1 ranks at ZeRO-3 to 4 at ZeRO-1" in output
    for split in ("train", "eval"):
        mine, right = metrics(changed, split), metrics(straight, split)
        assert [record["step"] for record in mine] == [record["step"] for record in right]
        for one, other in zip(mine, right, strict=True):
            assert one["loss"] == pytest.approx(other["loss"], abs=1e-5), (split, one["step"])
    assert len(metrics(changed)) == steps


def run_through(tiny, out_dir: Path, ranks: int, zero: str, last: int | None, more: list[str]) -> str:
    """Run until about record `last` of two a step, stopped by SIGTERM to all ranks, or to the end; what was printed."""
    arguments = last_of_each(sft_arguments(tiny, out_dir, *more, f"--ds_config=ds_configs/{zero}.json"))
    process = start("posttrain/sft.py", *arguments, ranks=ranks)
    while last and process.poll() is None:
        if (out_dir / "metrics.jsonl").exists() and len((out_dir / "metrics.jsonl").read_bytes().splitlines()) > last:
            process.terminate()
            break
        time.sleep(0.01)
    assert process.wait(240) == 0, process.output
    assert last is None or "the same command goes on" in process.output
    return process.output
