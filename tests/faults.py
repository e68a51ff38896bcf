"""A run is never lost: real two-rank runs, each hit at a random moment, then finished by the same command. Prints the tally.

    python tests/faults.py --rounds 60 [--seed 0]

Runs start under the real launcher and supervisor; with forked=True, as test_faults.py has it, only those whose fault concerns these.
After each round final/model.safetensors and every number of metrics.jsonl must equal the undisturbed run's, byte for byte, TensorBoard
must show each step once, and no process may be left. FAULTS has one function for each way of being hit.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import psutil  # noqa: E402
import warm  # noqa: E402
from conftest import launch_command, metrics, rank_environment, start  # noqa: E402
from tiny import make_tiny  # noqa: E402

STEPS = 120
PATIENCE = 120  # seconds for a start, or for a run to end after it was hit
CURVE = ("step", "split", "loss", "learning_rate", "grad_norm", "epoch", "num_tokens")


class Round:
    """One run directory and the processes that work on it; `forked`: from the warm process, unless the launcher is what is tested."""

    def __init__(self, folder: Path, tiny: Path, draw: random.Random, forked: bool):
        self.folder, self.draw, self.out, self.forked = folder, draw, folder / "run", forked
        paths = [f"--checkpoint_path={tiny}/base", f"--sft_data_dir={tiny}/sft", f"--out_dir={self.out}"]
        numbers = [f"--max_iters={STEPS}", "--global_batch_size=8", "--learning_rate=1e-3", "--warmup_iters=2", "--max_tokens_per_gpu=160"]
        how = ["--dtype=float32", "--ds_config=ds_configs/zero2.json", "--eval_interval=40", "--save_interval=15", "--skip_spikes=0"]
        self.arguments = [*paths, *numbers, *how, "--watchdog_seconds=5", "--log_interval=40"]
        self.log = (folder / "log").open("ab")
        self.process: subprocess.Popen | warm.Started | None = None

    def start(self, stdout: BinaryIO | None = None, supervised: bool = True, is_about_the_launcher: bool = False) -> None:
        if self.forked and not is_about_the_launcher:
            self.process = start("posttrain/sft.py", *self.arguments, outputs=[stdout or self.log])
            return
        command = launch_command("posttrain/sft.py", *self.arguments, ranks=2)
        if supervised:
            command = [sys.executable, str(ROOT / "launch" / "supervise.py"), *command]
        output = {"stdout": stdout or self.log, "stderr": stdout or self.log}
        self.process = subprocess.Popen(command, env=rank_environment(), start_new_session=True, **output)

    def reach_a_step(self, least: int = 1) -> int:
        """Wait until a random step has been logged."""
        step, deadline = self.draw.randint(least, STEPS - 20), time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.process.poll() is None:
            if (self.out / "metrics.jsonl").is_file() and len((self.out / "metrics.jsonl").read_bytes().splitlines()) >= step:
                time.sleep(self.draw.random() * 0.05)
                return step
            time.sleep(0.005)
        raise AssertionError(f"step {step} was not reached: {self.tail()}")

    def processes(self) -> list[psutil.Process]:
        """Everything that works on this directory, whoever started it."""
        found, forked = [], self.forked_ranks()
        for process in psutil.process_iter():
            try:
                is_ours = process.pid in forked or f"--out_dir={self.out}" in process.cmdline()
                if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def forked_ranks(self) -> list[int]:
        """Ids of the processes that were forked, whose command line is the warm process's."""
        return self.process.pids if isinstance(self.process, warm.Started) and self.process.poll() is None else []

    def ranks(self) -> list[psutil.Process]:
        if forked := self.forked_ranks():
            return [psutil.Process(pid) for pid in forked]
        return sorted((p for p in self.processes() if any(a.startswith("--local_rank=") for a in p.cmdline())), key=lambda p: p.cmdline())

    def kill_all(self) -> None:
        processes = self.processes()
        for process in processes:
            process.kill()
        psutil.wait_procs(processes, timeout=PATIENCE)

    def end(self) -> int:
        """Wait for the command, and for whatever it leaves behind."""
        code, deadline = self.process.wait(PATIENCE), time.monotonic() + PATIENCE
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left, f"left behind: {left}"
        return code

    def checkpoints(self) -> list[Path]:
        return sorted(path for path in (self.out / "checkpoints").glob("step_*") if path.suffix == "")

    def text(self) -> str:
        """What was printed."""
        return (self.folder / "log").read_text()

    def tail(self) -> str:
        return self.text()[-2000:]


def one_rank_killed(run: Round) -> None:
    run.start(supervised=run.draw.random() < 0.5)
    run.reach_a_step()
    run.draw.choice(run.ranks()).kill()
    assert run.end() not in (0, None)
    assert re.search(r"has died, last seen in phase \w+ of step \d+, its log is /.*/logs/rank_\d\.log", run.text()), run.tail()


def all_killed(run: Round) -> None:
    run.start()
    run.reach_a_step()
    run.kill_all()
    run.end()


def sigterm(run: Round) -> None:
    """To the supervisor, or to one rank alone, or to the bare deepspeed command, which dies and leaves its ranks behind."""
    where = run.draw.choice(["supervisor", "rank", "launcher"])
    number = run.draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]) if where != "launcher" else signal.SIGTERM
    run.start(supervised=where == "supervisor", is_about_the_launcher=True)
    run.reach_a_step()
    target = run.draw.choice(run.ranks()) if where == "rank" else run.process
    target.send_signal(number)
    code = run.end()
    assert where == "launcher" or code == 0, (where, code)
    assert "the same command goes on with step" in run.text(), run.tail()
    expected = "the launcher has gone" if where == "launcher" else signal.Signals(number).name
    assert expected in run.text(), run.tail()


def full_disk(run: Round) -> None:
    """On a small file system: no room when a save begins, or just not enough for it."""
    run.out.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(run.out)], check=True)
    run.start()
    run.reach_a_step(least=20)
    left = run.draw.choice([100_000, 520_000])  # a checkpoint is expected to need 465,000 bytes, and needs 540,000
    with (run.out / "checkpoints" / "filler").open("wb", buffering=0) as filler:
        while run.process.poll() is None:  # again and again: a save that ends just now deletes an older checkpoint, which makes room
            with contextlib.suppress(OSError):  # a save that takes the room first: then the disk is full already
                filler.write(bytes(max(0, shutil.disk_usage(run.out).free - left)))
            time.sleep(0.005)
    assert run.end() != 0
    assert "make room" in run.text() or "No space left" in run.text(), run.tail()
    (run.out / "checkpoints" / "filler").unlink()


def damaged_file(run: Round) -> None:
    """Of the newest checkpoint: cut short, one bit flipped, or gone."""
    run.start()
    run.reach_a_step(least=50)
    run.kill_all()
    run.end()
    victim = run.draw.choice(sorted(run.checkpoints()[-1].iterdir()))
    content = victim.read_bytes()
    match run.draw.choice(["cut", "flip", "gone"]):
        case "cut":
            victim.write_bytes(content[: run.draw.randrange(len(content))])
        case "flip":
            place = run.draw.randrange(len(content))
            victim.write_bytes(content[:place] + bytes([content[place] ^ 1 << run.draw.randrange(8)]) + content[place + 1 :])
        case "gone":
            victim.unlink()
    run.start()
    assert run.end() == 0, run.tail()
    assert "is damaged, and is not used" in run.text(), run.tail()


def latest_deleted(run: Round) -> None:
    run.start()
    run.reach_a_step(least=20)
    run.kill_all()
    run.end()
    (run.out / "checkpoints" / "latest").unlink()


def stopped_rank(run: Round) -> None:
    run.start(supervised=run.draw.random() < 0.5)
    run.reach_a_step()
    run.draw.choice(run.ranks()).send_signal(signal.SIGSTOP)
    assert run.end() != 0
    assert "has not answered for" in run.text(), run.tail()
    assert "was in phase" in run.text(), run.tail()  # and the other one's stack


def closed_stdout(run: Round) -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as stdout:
        run.start(stdout=stdout)
    run.reach_a_step()
    os.close(reader)
    assert run.end() == 0  # the run needs no terminal


FAULTS: list[Callable[[Round], None]] = [
    *(one_rank_killed, all_killed, sigterm, full_disk, damaged_file, latest_deleted, stopped_rank, closed_stdout)
]


def finish(run: Round) -> None:
    """The same command ends the run."""
    if not (run.out / "final").is_dir():
        run.start()
        assert run.end() == 0, run.tail()
    assert (run.out / "final").is_dir()


def outcome(out: Path) -> dict:
    """What must be equal: weights, every number that does not depend on time, and TensorBoard's steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out))
    events.Reload()
    records = [*metrics(out, "train"), *metrics(out, "eval")]
    return {
        "weights": (out / "final" / "model.safetensors").read_bytes(),
        "numbers": [[record.get(name) for name in CURVE] for record in records],
        "tensorboard": {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in ("train/loss", "train/grad_norm", "eval/loss")},
    }


def unmount(folder: Path) -> None:
    if (folder / "run").is_mount():
        subprocess.run(["umount", str(folder / "run")], check=True)


def campaign(rounds: int, seed: int, folder: Path, faults: list[Callable[[Round], None]] = FAULTS, forked: bool = False) -> list[dict]:
    """Each round's fault and what was wrong after it; nothing, if all is well."""
    make_tiny(folder)
    base = folder / "undisturbed"
    base.mkdir()
    undisturbed = Round(base, folder, random.Random(seed), forked)
    finish(undisturbed)
    expected, results = outcome(undisturbed.out), []
    for number in range(rounds):
        fault, place = faults[number % len(faults)], folder / f"round_{number}"
        place.mkdir()
        run, started, wrong = Round(place, folder, random.Random(f"{seed} {number}"), forked), time.monotonic(), ""
        try:
            fault(run)
            finish(run)
            seen = outcome(run.out)
            wrong = ", ".join(name for name in expected if seen[name] != expected[name])
        except (AssertionError, subprocess.SubprocessError, OSError) as error:
            wrong = f"{type(error).__name__}: {error}"
        finally:
            run.kill_all()
            unmount(place)
        results.append({"round": number, "fault": fault.__name__, "wrong": wrong, "seconds": time.monotonic() - started})
        print(
            f"round {number:>3}  {fault.__name__:<16} {results[-1]['seconds']:>5.0f} s  {'LOST: ' + wrong if wrong else 'equal'}",
            flush=True,
        )
        if not wrong:
            shutil.rmtree(place)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fault", choices=[fault.__name__ for fault in FAULTS], help="this one only")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="posttrain_faults_"))
    chosen = [fault for fault in FAULTS if options.fault in (None, fault.__name__)]
    results = campaign(options.rounds, options.seed, folder, chosen)
    lost = Counter(result["fault"] for result in results if result["wrong"])
    for fault, count in Counter(result["fault"] for result in results).items():
        print(f"{fault:<16} {count - lost[fault]} of {count} finished equal to the undisturbed run")
    print(json.dumps({"rounds": len(results), "lost": sum(lost.values()), "seed": options.seed}))
    if lost:
        print(f"logs: {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
