"""A run is killed at every one of its file operations, each time by another start, and ends as the undisturbed one, byte for byte.

    python tests/kills.py [--every 1]        all operations, or every n-th of them; prints each, and the tally
    kills.py SEEN N sft --key=value ...      a rank: is killed before the first operation in out_dir that no earlier start was killed at

An operation is what Python does to a path in out_dir: open to write, flush, rename, make or remove. It is told from others by that and
its path, checkpoints' steps included, and the rank. SEEN is a file with a line for each that was met; every N-th is killed.
"""

import argparse
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
NUMBERS = re.compile(r"[0-9a-f]{32}|(?<=tfevents).*|\.[^./]+\.\d+(?=\.incomplete)")  # names that differ from start to start


class Killer:
    """Ends this rank at the first operation that is not in `seen`, and adds it there; only notes those between two of `every`."""

    def __init__(self, seen: Path, every: int, out_dir: str):
        self.seen, self.every, self.out_dir = seen, every, f"{Path(out_dir).resolve()}/"
        self.rank, self.inside = os.environ["RANK"], False
        flush = os.fsync

        def flushed(handle) -> None:
            self.meet("flush", os.readlink(f"/proc/self/fd/{handle if isinstance(handle, int) else handle.fileno()}"))
            flush(handle)

        os.fsync = flushed
        sys.addaudithook(self.audit)

    def audit(self, event: str, arguments: tuple) -> None:
        if self.inside:
            return
        if event == "open" and isinstance(arguments[0], str | os.PathLike) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self.meet("open", arguments[0])
        elif event in CHANGES:
            self.meet(event, arguments[0])

    def meet(self, what: str, path) -> None:
        place = os.path.abspath(path)
        if not f"{place}/".startswith(self.out_dir):
            return
        self.inside = True
        name = f"{self.rank} {what} {NUMBERS.sub('', place.removeprefix(self.out_dir.rstrip('/')))}"
        met = self.seen.read_text().splitlines()
        if name not in met:
            with self.seen.open("a") as file:
                file.write(f"{name}\n")
            if len(met) % self.every == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        self.inside = False


def campaign(folder: Path, every: int) -> tuple[list[str], str]:
    """Return the operations that were met, and what of the result differs from the undisturbed run's: nothing, if all is well."""
    import faults
    import warm
    from conftest import start
    from tiny import make_tiny

    make_tiny(folder)
    seen = folder / "seen"
    seen.touch()
    runs = []
    for name in ("undisturbed", "killed"):
        (folder / name).mkdir()
        run = faults.Round(folder / name, folder, random.Random(0), forked=True)
        run.arguments += ["--max_iters=4", "--save_interval=2", "--eval_interval=2", "--keep_checkpoints=1", "--samples=1"]
        runs.append(run)
    undisturbed, run = runs
    faults.finish(undisturbed)
    while True:
        met, began = len(seen.read_text().splitlines()), time.monotonic()
        process: warm.Started = start("tests/kills.py", str(seen), str(every), "sft", *run.arguments, outputs=[run.log])
        while process.poll() is None:
            time.sleep(0.02)
            if any(not alive(pid) for pid in process.pids):
                process.kill()  # the other rank, too
        operations = seen.read_text().splitlines()
        if process.returncode == 0:
            break
        if len(operations) == met:
            return operations, f"a start ended with {process.returncode}: {run.tail()}"
        print(f"{time.monotonic() - began:>4.0f} s  killed before {operations[-1]}", flush=True)
    expected, found = faults.outcome(undisturbed.out), faults.outcome(run.out)
    wrong = [name for name in expected if found[name] != expected[name]]
    wrong += sorted(files_of(undisturbed.out) ^ files_of(run.out))
    return operations, ", ".join(wrong)


def files_of(folder: Path) -> set[str]:
    """Return the paths of a run's files, but TensorBoard's, of which each start makes one."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "tfevents" not in path.name}


def alive(pid: int) -> bool:
    """Whether a process is there, and not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="posttrain_kills_"))
    operations, wrong = campaign(folder, options.every)
    print(f"{len(operations)} operations, {-(-len(operations) // options.every)} of them killed: {wrong or 'equal'}")
    if wrong:
        print(f"kept: {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    if "RANK" not in os.environ:
        sys.exit(main())
    from posttrain.parallel.script import run_script
    from posttrain.training import command

    local_rank, seen, every, kind, *settings = sys.argv[1:]
    (out_dir,) = (word.partition("=")[2] for word in settings if word.startswith("--out_dir="))
    Killer(Path(seen), int(every), out_dir)
    sys.argv[1:] = [local_rank, *settings]
    run_script(command.sft if kind == "sft" else command.dpo)
