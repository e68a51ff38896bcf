"""The warm process of warm.py: imports everything once and forks what is asked for. warm_server.py FOLDER OWNER_PID

A request is answered by a process of its own, the launcher, which forks the ranks, ends the others soon after one has failed, as
DeepSpeed's launcher does, and reaps all. Nothing outlives its parent: the kernel kills the launchers with this process and the ranks
with their launcher.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import pkgutil
import random
import runpy
import select
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
# what libraries import only once it is used
LATE = """setuptools torch.utils.cpp_extension torch.utils.tensorboard torch.utils.serialization torch.profiler._cupti_monitor
torch._dynamo.repro.after_dynamo torch._inductor.compile_fx torch._inductor.compiler_bisector tensorboard.plugins.hparams.api_pb2
rich._emoji_codes transformers.models.qwen3.modeling_qwen3 transformers.models.llama.modeling_llama deepspeed.comm.mori deepspeed.ops.adam
deepspeed.runtime.zero.stage3 deepspeed.runtime.zero.stage_1_and_2 deepspeed.runtime.zero.muon.muon_optimizer
deepspeed.module_inject.auto_ep_layer data_prep.prepare"""
# beginnings of the names of environment variables that libraries read as they are imported: a script that needs another value needs a
# process of its own
READ_EARLY = ("OMP_", "MKL_", "GOMP_", "DS_", "HF_", "TRANSFORMERS_", "TORCH", "CUDA_", "LD_", "PYTHON")
SOON = 0.5  # seconds from a rank's failure to the end of the others; DeepSpeed's launcher looks once a second
AT_START = dict(os.environ)
GRACE = 30  # seconds from SIGTERM to SIGKILL, as DeepSpeed's launcher gives


def import_everything() -> dict[str, tuple[int, int]]:
    """Import libraries and all of posttrain; returns the state of each file of the repository that was imported."""
    import deepspeed  # noqa: F401
    import psutil  # noqa: F401

    import posttrain

    assert Path(posttrain.__file__).parent == ROOT / "posttrain", f"posttrain is that of {posttrain.__file__}, expected {ROOT}"
    for module in pkgutil.walk_packages(posttrain.__path__, "posttrain."):
        with contextlib.suppress(ImportError):  # vLLM, which may not be there
            importlib.import_module(module.name)
    for name in LATE.split():
        importlib.import_module(name)
    importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")  # the first builds those of all
    return {module.__file__: _state(module.__file__) for module in list(sys.modules.values()) if _is_ours(module)}


def _is_ours(module) -> bool:
    file = getattr(module, "__file__", None)
    return bool(file) and Path(file).is_relative_to(ROOT) and ".venv" not in file


def _state(file: str) -> tuple[int, int]:
    facts = os.stat(file)
    return facts.st_mtime_ns, facts.st_size


def why_not(request: dict, imported: dict[str, tuple[int, int]]) -> str | None:
    """Why this process must not serve a request; None where it may."""
    if request["root"] != str(ROOT):
        return f"the warm process has imported the code of {ROOT}, and does not serve {request['root']}"
    if changed := [file for file, state in imported.items() if not Path(file).exists() or _state(file) != state]:
        return f"{changed[0]} has changed since the warm process imported it: start the tests anew"
    names = [name for name in sorted(AT_START.keys() | request["env"].keys()) if name.startswith(READ_EARLY)]
    if other := [name for name in names if request["env"].get(name) not in (AT_START.get(name), os.environ.get(name))]:
        return f"{', '.join(other)} may be read while libraries are imported: use a process that is started anew"
    return None


def die_with(parent: int) -> None:
    """Let the kernel kill this process with its parent."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it has ended before
        os._exit(1)


def fork(work: Callable[[], NoReturn]) -> int:
    """Fork a process that does `work` and dies with this one; returns its id."""
    parent = os.getpid()
    if pid := os.fork():
        return pid
    try:
        die_with(parent)
        work()
    finally:
        os._exit(1)


def serve(folder: Path, owner: int, imported: dict[str, tuple[int, int]]) -> None:
    """Answer requests until the owner has ended."""
    owned = os.pidfd_open(owner)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(folder / "socket"))
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # launchers are reaped by the system
    gc.collect()
    gc.freeze()  # forked processes share the memory of what is there
    while owned not in (ready := select.select([owned, listener], [], [])[0]):
        if listener in ready:
            connection, _ = listener.accept()
            with connection:
                answer(connection, [listener.fileno(), owned], imported)


def answer(connection: socket.socket, inner: list[int], imported: dict) -> None:
    content, files, _, _ = socket.recv_fds(connection, 1 << 20, 2)
    if not content:  # whoever asked has gone
        return
    request = json.loads(content)
    if reason := why_not(request, imported):
        connection.send(json.dumps({"error": reason}).encode())
    else:
        fork(lambda: launch(request, files, connection, inner))
    for file in files:
        os.close(file)


def launch(request: dict, files: list[int], connection: socket.socket, inner: list[int]) -> NoReturn:
    """Fork the ranks and stay until all have ended; all are killed where whoever asked for them goes."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for file in inner:
        os.close(file)
    ranks = range(request["ranks"] or 1)
    pids = [fork(lambda rank=rank: work(request, rank, files, connection.fileno())) for rank in ranks]
    connection.send(json.dumps({"pids": pids}).encode())
    alive, code = {os.pidfd_open(pid): pid for pid in pids}, 0
    deadlines: list[tuple[float, int]] = []  # when which signal goes to those that are left
    while alive:
        left = max(0.0, deadlines[0][0] - time.monotonic()) if deadlines else None
        ready = select.select([*alive, connection], [], [], left)[0]
        for file in alive.keys() & set(ready):
            ended = os.waitstatus_to_exitcode(os.waitpid(alive.pop(file), 0)[1])
            if ended and not code:
                code, now = ended, time.monotonic()
                deadlines = [(now + SOON, signal.SIGTERM), (now + SOON + GRACE, signal.SIGKILL)]
        if connection in ready:  # it says nothing: its other end was closed
            deadlines = [(0.0, signal.SIGKILL)]
        while deadlines and deadlines[0][0] <= time.monotonic():
            end_trees(list(alive.values()), deadlines.pop(0)[1])
        if connection in ready:
            break
    with contextlib.suppress(OSError):
        connection.send(json.dumps({"code": code}).encode())
    os._exit(0)


def end_trees(pids: list[int], number: int) -> None:
    """Signal processes and what they have started."""
    import psutil

    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            for one in [*process.children(recursive=True), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.send_signal(number)


def work(request: dict, rank: int, files: list[int], connection: int) -> NoReturn:
    """Be a rank: run the script as `python -u SCRIPT --local_rank=RANK ...` would, or `python SCRIPT ...`, and leave."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (files[0], 1), (files[1], 2)):
        os.dup2(source, target)
    for file in (nothing, connection, *files):
        os.close(file)
    arguments, environment = request["arguments"], request["env"]
    if count := request["ranks"]:
        arguments = [f"--local_rank={rank}", *arguments]
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_SIZE": str(count)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(request["port"]), "CROSS_RANK": "0", "CROSS_SIZE": "1"}
    os.chdir(request["cwd"])
    set_by_imports = {name: value for name, value in os.environ.items() if AT_START.get(name) != value}
    os.environ.clear()
    os.environ.update(set_by_imports | environment)
    sys.argv, sys.path[0] = [request["script"], *arguments], str(Path(request["script"]).parent)
    begin_anew()
    os._exit(run_as_main(request["script"]))


def begin_anew() -> None:
    """Make afresh what a process has of its own from its start: seeds, signals, its terminal, and who its parents are."""
    import numpy as np

    from posttrain.common import terminal
    from posttrain.parallel import stopping

    random.seed()
    np.random.seed()
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL), (signal.SIGHUP, signal.SIG_DFL)):
        signal.signal(number, handler)
    stopping.AT_START = stopping._ancestors()
    terminal.console = terminal._Terminal(highlight=False, soft_wrap=True)


def run_as_main(script: str) -> int:
    """The exit code of a script, which leaves as the interpreter would."""
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return code


def main(folder: Path, owner: int) -> None:
    imported = import_everything()
    threads = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
    assert len(threads) == 1, f"a process with threads cannot be forked: {threads}"
    try:
        serve(folder, owner, imported)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
