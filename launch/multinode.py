"""Starts a training script on every host of a hostfile: python launch/multinode.py SCRIPT [RECIPE] [--key=value ...]

Environment:
  HOSTFILE (launch/hostfile)   a line a host: NAME slots=GPUS; see hostfile.example. Without it in a Slurm job: the job's nodes
  NUM_GPUS                     of each host, where that is not what the hostfile says
  MASTER_ADDR, MASTER_PORT     where the ranks meet: an address of the first host, and 29500
  NODE_RANK                    0 on the first host, 1 on the second, ...: the same command on every host, without ssh between them

What the ranks need of this environment (PASSED_ON) goes with them. Repository, environment, data and models are at the same paths on all
hosts. A signal goes to the ranks, which save and stop.
"""

import ipaddress
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from typing import NamedTuple

from supervise import MISTAKE, Supervisor, split_restarts

ROOT = Path(__file__).resolve().parents[1]
PASSED_ON = ("NCCL_", "GLOO_", "TORCH_", "TORCHINDUCTOR_", "OMP_", "DS_ACC", "POSTTRAIN_", "HF_", "TRITON_", "WANDB_", "CUDA_HOME")
KEEP_ALIVE = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3"]
STARTING = 120  # seconds that ranks may take to be there
PLAIN = re.compile(r"[\w@%+=:,./~-]*")  # what no shell changes


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots by host, in order. Raises ValueError for a line that is none, a host that comes twice, or no host."""
    if not path.is_file():
        raise ValueError(f"there is no hostfile at {path}. Copy launch/hostfile.example there, or name one with HOSTFILE=PATH")
    hosts: dict[str, int] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = re.fullmatch(r"(\S+)\s+slots=(\d+)", text)
        if not found or int(found[2]) == 0:
            raise ValueError(f"line {number} of {path} should read NAME slots=GPUS, saw {text!r}")
        if found[1] in hosts:
            raise ValueError(f"line {number} of {path} names {found[1]} again; give each host one line with all its slots")
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise ValueError(f"{path} names no host; a line a host: NAME slots=GPUS")
    return hosts


def the_hosts() -> tuple[dict[str, int], str | None]:
    """Slots by host, of HOSTFILE, or of the Slurm job that this is; and which of them this one is, unless all are started from here."""
    slots, file, rank = environment_number("NUM_GPUS"), os.environ.get("HOSTFILE"), os.environ.get("NODE_RANK")
    if not file and os.environ.get("SLURM_JOB_NODELIST"):
        names = _nodes_of_the_job()
        return dict.fromkeys(names, slots or _gpus_of_the_job(len(names))), rank or os.environ.get("SLURM_NODEID")
    hosts = read_hostfile(Path(file or ROOT / "launch" / "hostfile"))
    return dict.fromkeys(hosts, slots) if slots else hosts, rank


def _nodes_of_the_job() -> list[str]:
    try:
        names = subprocess.check_output(["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]], text=True).split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"Slurm does not tell the nodes of this job ({error}); name them in a file, with HOSTFILE=PATH") from None
    if os.environ.get("SLURM_STEP_NUM_NODES") != str(len(names)):
        raise ValueError(f"this is no task on each of the job's {len(names)} nodes: use launch/slurm.sh, or give HOSTFILE=PATH")
    return names


def _gpus_of_the_job(nodes: int) -> int:
    """Of each node."""
    gpus = (os.environ.get("SLURM_GPUS_PER_NODE") or os.environ.get("SLURM_GPUS_ON_NODE") or "").rpartition(":")[2]  # of b200:8, too
    total = os.environ.get("SLURM_GPUS", "").rpartition(":")[2]
    if not gpus.isdigit() or (total.isdigit() and int(total) != nodes * int(gpus)):
        raise ValueError(
            "as many GPUs are needed on each of the job's nodes: ask for them with sbatch --gpus-per-node=8 (or, without any, set "
            "NUM_GPUS, the ranks of each node)"
        )
    return int(gpus)


class Answer(NamedTuple):
    """Of a shell command on a host: exit code (255: ssh itself failed, or no answer came), what it printed, and when that was here."""

    code: int
    output: str
    errors: str
    came: float  # time.time()


def ask(host: str | None, command: str, script: str = "", timeout: float = 30) -> Answer:
    """Run a shell command there, by ssh, or where host is None here, with a script as its input."""
    words = ["bash", "-c", command] if host is None else ["ssh", *KEEP_ALIVE, host, command]
    try:
        done = subprocess.run(words, input=script, capture_output=True, text=True, timeout=timeout)
        return Answer(done.returncode, done.stdout, done.stderr, time.time())
    except subprocess.TimeoutExpired:
        return Answer(255, "", f"no answer within {timeout:.0f} s", time.time())


def ask_all(commands: dict[str, str], script: str = "", timeout: float = 30, over_ssh: bool = True) -> dict[str, Answer]:
    """Each host its command, all at once."""
    with ThreadPoolExecutor(len(commands)) as threads:
        asked = {host: threads.submit(ask, host if over_ssh else None, command, script, timeout) for host, command in commands.items()}
        return {host: answer.result() for host, answer in asked.items()}


def check_hosts(hosts: list[str], script: Path) -> None:
    """Raises ValueError naming every host that cannot be reached, or has no environment or no script where this one has them."""
    wanted = "; ".join(f"test -e {path} || {{ echo {path}; exit 1; }}" for path in map(shlex.quote, (sys.executable, str(script))))
    problems = []
    for host, answer in ask_all(dict.fromkeys(hosts, wanted)).items():
        if answer.code == 255:
            problems.append(f"{host} cannot be reached by ssh: {' '.join(answer.errors.split()) or 'no reason given'}")
        elif answer.code:
            where = " ".join(answer.output.split())
            problems.append(f"{host} has no {where}: the repository and its environment must be at the same path on every host")
    if problems:
        raise ValueError("\n".join(problems))


def meeting_point(host: str, over_ssh: bool) -> str:
    """An address of the first host, by which the others reach it."""
    return os.environ.get("MASTER_ADDR") or address_of(host, over_ssh)


def address_of(host: str, over_ssh: bool) -> str:
    """As this machine, or ssh here, knows it. Raises ValueError where it does not, or means itself by that name."""
    name = host.rpartition("@")[2]
    if over_ssh:  # a name may be known to ssh only
        settings = subprocess.check_output(["ssh", "-T", "-G", host], text=True)
        name = re.search(r"^hostname (.+)$", settings, re.M)[1]
    try:
        address = socket.getaddrinfo(name, None, family=socket.AF_INET, type=socket.SOCK_STREAM)[0][4][0]
    except socket.gaierror as error:
        raise ValueError(f"{name} has no address here ({error}); give that of the first host with MASTER_ADDR=ADDRESS") from None
    if ipaddress.ip_address(address).is_loopback:
        raise ValueError(
            f"{name} resolves to {address} here, which other hosts cannot reach; give the first host's address with MASTER_ADDR=ADDRESS"
        )
    return address


def passed_on() -> dict[str, str]:
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(PASSED_ON)}


def for_pdsh(argument: str) -> str:
    """As the remote shell should read it. DeepSpeed 0.19.8 puts an argument with a space between double quotes, others nowhere."""
    return _within_quotes(argument) if " " in argument else shlex.quote(argument)


def _within_quotes(text: str) -> str:
    return re.sub(r"([\\$`])", r"\\\1", text)


def over_ssh(hosts: dict[str, int], script: Path, arguments: list[str], environment_file: Path) -> list[str]:
    """The command that starts the script on all hosts. Raises ValueError for what DeepSpeed's launcher cannot do."""
    for tool, package in (("ssh", "openssh-client"), ("pdsh", "pdsh")):
        if not shutil.which(tool):
            raise ValueError(f"{tool} is not installed here (Debian: {package}); or give NODE_RANK=0, 1, ... and start it on every host")
    for what, path in (("the current folder", Path.cwd()), ("the repository", ROOT)):
        if not PLAIN.fullmatch(str(path)):
            raise ValueError(
                f"{what}, {path}, has characters in its name that pdsh's remote shell would split; run from another, or give "
                "NODE_RANK=0, 1, ... and start it on every host"
            )
    check_hosts(list(hosts), script)
    os.environ["POSTTRAIN_OVER_SSH"] = "1"  # for posttrain/parallel/stopping.py, as is the time from which a job's limit counts
    os.environ.setdefault("POSTTRAIN_STARTED", str(time.time()))
    # DeepSpeed puts each value between double quotes where it has special characters
    environment_file.write_text("".join(f"{name}={_within_quotes(value)}\n" for name, value in passed_on().items()))
    os.environ["DS_ENV_FILE"] = str(environment_file)
    os.environ["PDSH_SSH_ARGS_APPEND"] = " ".join([os.environ.get("PDSH_SSH_ARGS_APPEND", ""), *KEEP_ALIVE]).strip()
    return ["--force_multi", "--no_ssh_check", str(script), *map(for_pdsh, arguments)]


def signal_ranks(hosts: list[str], port: int, number: int) -> None:
    """To the children of DeepSpeed's inner launchers: the launchers themselves would end the ranks before they have saved.

    Where there are none yet, as soon as there are, for STARTING seconds.
    """
    deadline = time.monotonic() + STARTING
    launcher = rf"^[^ ]*python[^ ]* -u -m deepspeed.launcher.launch .*--master_port={port}( |$)"
    while hosts and time.monotonic() < deadline:
        answers = ask_all(dict.fromkeys(hosts, f"pkill -{number} -P $(pgrep -d, -f {shlex.quote(launcher)})"))
        hosts = [host for host, answer in answers.items() if answer.code]
        time.sleep(1)


def environment_number(name: str) -> int | None:
    value = os.environ.get(name)
    if value and not value.isdigit():
        raise ValueError(f"{name} should be a number, saw {value!r}")
    return int(value) if value else None


def main(arguments: list[str]) -> int:
    try:
        restarts, (script, *rest) = split_restarts(arguments)
        hosts, rank = the_hosts()
        port = environment_number("MASTER_PORT") or 29500
        if rank is not None and not (rank.isdigit() and int(rank) < len(hosts)):
            raise ValueError(f"NODE_RANK should be 0 to {len(hosts) - 1}, the place of this host in the hostfile, saw {rank!r}")
        address = meeting_point(next(iter(hosts)), over_ssh=rank is None)
        os.environ["POSTTRAIN_HOSTS"] = ",".join(f"{host}:{slots}" for host, slots in hosts.items())
        with tempfile.TemporaryDirectory(prefix="posttrain_multinode_") as folder:
            hostfile = Path(folder) / "hostfile"  # as it was read: DeepSpeed's reader takes fewer forms
            hostfile.write_text("".join(f"{host} slots={slots}\n" for host, slots in hosts.items()))
            command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--hostfile", str(hostfile)]
            command += ["--master_addr", address, "--master_port", str(port)]
            if rank is not None:
                return Supervisor([*command, "--no_ssh", "--node_rank", rank, script, *rest], restarts).run()
            command += over_ssh(hosts, Path(script).resolve(), rest, Path(folder) / "environment")

            def reach(number: int) -> None:  # in a thread, since it may wait for ranks that are still being started
                Thread(target=signal_ranks, args=(list(hosts), port, number), daemon=True).start()

            return Supervisor(command, restarts, reach).run()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
