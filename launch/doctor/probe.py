"""Examines the host that it runs on: python probe.py SPEC prints what it found as JSON.

It is sent to each host as text, so it imports the environment's packages and nothing of this repository; it writes nothing.

SPEC, JSON: root (the repository's path), folders (paths to compare, by what they are; a relative one is a name on the Hugging Face hub,
and its local copy is examined), places (paths that a run writes to, by what they are), peers (addresses of the other hosts), port (which
must be free on the first host; null on others).
"""

import contextlib
import hashlib
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "transformers", "deepspeed", "datasets", "numpy", "tokenizers", "liger-kernel", "triton", "nvidia-nccl-cu13")
CODE = ("posttrain/**/*.py", "launch/*.py", "ds_configs/*.json", "posttrain/ds_configs/*.json")
WHOLE, SAMPLE = 64 * 2**20, 2**20  # bytes; of a file larger than WHOLE, SAMPLE bytes of beginning, middle and end are hashed
GPU = (
    *("index", "uuid", "name", "driver_version", "memory.used", "temperature.gpu", "mig.mode.current"),
    *("ecc.errors.uncorrected.volatile.total", "clocks_throttle_reasons.hw_slowdown", "clocks_throttle_reasons.sw_thermal_slowdown"),
)
PROCESS = ("gpu_uuid", "pid", "process_name")


def main(spec: dict) -> dict:
    """What there is on this host, by name, as judge.py reads it."""
    root = Path(spec["root"])
    return {
        "hostname": socket.gethostname(),
        "own_address": _address_of(socket.gethostname()),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "code": {str(file.relative_to(root)): _hash(file) for pattern in CODE for file in sorted(root.glob(pattern))},
        "folders": {what: _listing(Path(path)) for what, path in spec["folders"].items()},
        "free": {what: _free(Path(path)) for what, path in spec["places"].items()},
        "limits": {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[0] for name in ("NOFILE", "MEMLOCK")},
        "cores": len(os.sched_getaffinity(0)),
        **_gpus(),
        "torch": _torch(),
        "infiniband": _infiniband(),
        **_network(spec["peers"]),
        **(_port(spec["port"]) if spec["port"] else {}),
        **_memory(),
    }


def _version(name: str) -> str | None:
    with contextlib.suppress(PackageNotFoundError):
        return version(name)


def _hash(file: Path) -> str:
    """Size and hash of a file's content, or of samples of it."""
    size, digest = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as opened:
        for start in [0] if size <= WHOLE else (0, size // 2, size - SAMPLE):
            opened.seek(start)
            digest.update(opened.read(size if size <= WHOLE else SAMPLE))
    return f"{size} bytes, {digest.hexdigest()[:16]}"


def _listing(path: Path) -> dict[str, str] | None:
    """Hashes of a folder's files, or of a file; None if it does not exist. reference/ is left out: rank 0 alone writes and reads it."""
    if not path.is_absolute():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(str(path), "config.json")
        path = Path(found).parent if isinstance(found, str) else path
    if not path.exists():
        return None
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    names = {file: str(file.relative_to(path)) if file != path else file.name for file in files}
    return {name: _hash(file) for file, name in names.items() if not name.startswith("reference/")}


def _free(path: Path) -> dict:
    """Free bytes for a path that may not exist yet, and whether it can be written: those of the nearest folder above that exists."""
    while not path.exists():
        path = path.parent
    usage = shutil.disk_usage(path)
    return {"path": str(path), "bytes": usage.free, "writable": os.access(path, os.W_OK)}


def _memory() -> dict:
    import psutil

    memory = psutil.virtual_memory()
    return {"memory": {"available": memory.available, "total": memory.total}}


def _query(kind: str, names: tuple[str, ...]) -> tuple[list[dict[str, str]], str | None]:
    """What nvidia-smi says: its rows, between which it may print warnings, and why it failed (None: it did not)."""
    try:
        command = ["nvidia-smi", f"--query-{kind}={','.join(names)}", "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return [], None
    except subprocess.TimeoutExpired:
        return [], "nvidia-smi does not answer within 60 s"
    rows = [[word.strip() for word in line.split(",")] for line in done.stdout.splitlines()]
    failed = f"nvidia-smi fails: {' '.join((done.stderr or done.stdout).split())[-200:]}" if done.returncode else None
    return [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names)], failed


def _gpus() -> dict:
    gpus, failed = _query("gpu", GPU)
    processes, _ = _query("compute-apps", PROCESS)
    return {"gpus": gpus, "nvidia_smi": failed, "gpu_processes": processes}


def _torch() -> dict:
    try:
        import torch

        if not torch.version.cuda:
            return {"cuda": None, "gpus": 0}
        torch.cuda.init()  # device_count() also counts GPUs that an old driver or a stopped fabric manager makes unusable
        return {"cuda": torch.version.cuda, "gpus": torch.cuda.device_count(), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    except (ImportError, OSError, RuntimeError) as error:  # a broken installation, or GPUs that cannot be used
        said = {"error": str(error).splitlines()[0], "cuda": None, "gpus": 0}
        return said | ({} if isinstance(error, ImportError) else {"unusable": True})


def _infiniband() -> dict[str, str]:
    """The state of each InfiniBand port by CARD:PORT, for example `4: ACTIVE`."""
    found = {}
    for port in sorted(Path("/sys/class/infiniband").glob("*/ports/*")):
        with contextlib.suppress(OSError):
            found[f"{port.parts[-3]}:{port.name}"] = (port / "state").read_text(encoding="utf-8").strip()
    return found


def _address_of(name: str) -> str | None:
    with contextlib.suppress(OSError):
        return socket.gethostbyname(name)


def _network(peers: list[str]) -> dict:
    """Interfaces with an IPv4 address, and routes: the interface by which each peer would be reached."""
    import psutil

    stats, interfaces = psutil.net_if_stats(), {}
    for name, addresses in psutil.net_if_addrs().items():
        for entry in addresses:
            if entry.family == socket.AF_INET:
                interfaces[name] = {"address": entry.address, "netmask": entry.netmask, "mtu": stats[name].mtu}
    routes = {}
    for peer in peers:
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((peer, 9))  # sends nothing
            mine = probe.getsockname()[0]
            routes[peer] = next((name for name, entry in interfaces.items() if entry["address"] == mine), None)
    return {"interfaces": interfaces, "routes": routes}


def _port(port: int) -> dict:
    """Who listens on the port (None: nobody), and the next port that is free."""
    free = next(one for one in range(port, 2**16) if _can_listen(one))
    return {"port": {"holder": None if free == port else _listener(port), "free": free}}


def _can_listen(port: int) -> bool:
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("", port))
        probe.listen(1)
        return True
    return False


def _listener(port: int) -> str:
    """The process that listens on the port, in words."""
    import psutil

    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.laddr.port == port and connection.pid:
                return f"pid {connection.pid} ({psutil.Process(connection.pid).name()})"
    return "another user's process"


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
