"""The warm process of the tests: what it forks is as DeepSpeed's launcher would start it, serves this code only, and leaves nothing."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import warm
import warm_server
from conftest import ROOT, launch, launch_with_deepspeed, python, start

pytestmark = pytest.mark.slow
SHOW = """
import json, os, signal, sys, threading
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "CROSS_RANK", "CROSS_SIZE", "OMP_NUM_THREADS", "DS_ACCELERATOR")
facts = {name: os.environ.get(name) for name in names} | {"port": "MASTER_PORT" in os.environ, "argv": sys.argv, "path": sys.path[0]}
facts |= {"cwd": os.getcwd(), "name": __name__, "file": __file__, "threads": len(os.listdir("/proc/self/task"))}
facts |= {name: str(signal.getsignal(getattr(signal, name))) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGCHLD", "SIGPIPE")}
facts |= {"terminal": sys.stdout.isatty(), "buffered": not sys.stdout.write_through, "encoding": sys.stdout.encoding}
os.write(1, ("facts " + json.dumps(facts) + "\\n").encode())
"""
FAIL = "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(3)\ntime.sleep(600)"


def script(folder: Path, text: str) -> Path:
    (folder / "script.py").write_text(text)
    return folder / "script.py"


def are_gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 60
    while (left := [pid for pid in pids if psutil.pid_exists(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not left


def test_a_forked_rank_is_as_the_launchers(tmp_path):
    shown = []
    for way in (launch, launch_with_deepspeed):
        done = way(script(tmp_path, SHOW), "--key=value", "two words")
        assert done.returncode == 0, done.stdout
        shown.append(sorted(re.findall("^facts (.*)$", done.stdout, re.MULTILINE)))
    assert shown[0] == shown[1]
    assert [json.loads(facts)["RANK"] for facts in shown[0]] == ["0", "1"]


def test_a_rank_that_fails_ends_the_others(tmp_path):
    process = start(script(tmp_path, FAIL))
    assert process.wait(60) == 3
    assert are_gone(process.pids)


def test_a_rank_that_is_killed_is_told_by_its_signal(tmp_path):
    process = start(script(tmp_path, "import time\ntime.sleep(600)"))
    os.kill(process.pids[1], 9)
    assert process.wait(60) == -9


def test_what_takes_too_long_is_ended_with_all_it_started(tmp_path):
    text = (
        f"import subprocess\nprocess = subprocess.Popen(['sleep', '600'])\nprint(process.pid, file=open({str(tmp_path / 'pid')!r}, 'w'))\n"
    )
    process = python(script(tmp_path, text + "process.poll()"))
    assert process.returncode == 0
    os.kill(int((tmp_path / "pid").read_text()), 9)  # an orphan of one that ended well stays, as under the launcher
    with pytest.raises(subprocess.TimeoutExpired):
        python(script(tmp_path, text + "process.wait()"), timeout=3)
    assert are_gone([int((tmp_path / "pid").read_text())])


def test_exit_codes_and_streams_are_those_of_the_interpreter(tmp_path):
    for text, code, out, errors in (
        ("import sys\nprint('said')\nsys.exit()", 0, "said\n", ""),
        ("import sys\nsys.exit('a reason')", 1, "", "a reason\n"),
        ("import atexit\natexit.register(print, 'at the end')", 0, "at the end\n", ""),
    ):
        path = script(tmp_path, text)
        done, real = python(path, separate=True), subprocess.run([sys.executable, path], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (real.returncode, real.stdout, real.stderr) == (code, out, errors)
    done = python(script(tmp_path, "raise KeyError('x')"), separate=True)
    assert done.returncode == 1
    assert done.stderr.endswith("KeyError: 'x'\n")


def test_other_code_is_not_served(tmp_path, monkeypatch):
    """A mutated copy gets a process of its own; with this one's address it is refused."""
    nothing = script(tmp_path, "")
    with pytest.raises(RuntimeError, match="OMP_NUM_THREADS may be read while libraries are imported"):
        launch(nothing, env=os.environ | warm.ON_CPU | {"OMP_NUM_THREADS": "2"})
    monkeypatch.setattr(warm, "ROOT", tmp_path)
    with pytest.raises(RuntimeError, match=f"has imported the code of {ROOT}, and does not serve {tmp_path}"):
        launch(nothing)


def test_a_file_that_has_changed_is_noticed(tmp_path):
    shutil.copy(ROOT / "posttrain" / "common" / "errors.py", tmp_path)
    path = str(tmp_path / "errors.py")
    request, imported = {"root": str(ROOT), "env": dict(os.environ)}, {path: warm_server._state(path)}
    assert warm_server.why_not(request, imported) is None
    with open(path, "a") as file:
        file.write("\n")
    assert warm_server.why_not(request, imported) == f"{path} has changed since the warm process imported it: start the tests anew"
    os.unlink(path)
    assert "has changed" in warm_server.why_not(request, imported)


def test_nothing_outlives_the_owner(tmp_path, monkeypatch):
    """Here of a server that has imported nothing."""
    with contextlib.ExitStack() as stack:
        owner = stack.enter_context(subprocess.Popen(["sleep", "600"]))
        code = f"import warm_server, pathlib; warm_server.serve(pathlib.Path({str(tmp_path)!r}), {owner.pid}, {{}})"
        server = stack.enter_context(subprocess.Popen([sys.executable, "-c", code], cwd=ROOT / "tests", env=os.environ | warm.ON_CPU))
        monkeypatch.setenv(warm.OWNER, f"{owner.pid}:{tmp_path}")
        while not (tmp_path / "socket").exists():
            time.sleep(0.05)
        process = start(script(tmp_path, "import time\ntime.sleep(600)"))
        assert all(map(psutil.pid_exists, process.pids))
        owner.kill()
        assert server.wait(60) == 0
        assert are_gone(process.pids)
