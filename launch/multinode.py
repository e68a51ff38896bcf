"""Starts a training script on every host of a hostfile: python launch/multinode.py SCRIPT [RECIPE] [--key=value ...]

Environment:
  HOSTFILE (launch/hostfile)   a line a host: NAME slots=GPUS; see hostfile.example. Without it, in a Slurm job: the job's nodes
  NUM_GPUS                     GPUs of each host, if not those of the hostfile
  MASTER_ADDR, MASTER_PORT     where the ranks meet: an address of the first host, and 29500
  NODE_RANK                    0 on the first host, 1 on the second, ...: the same command on every host, without ssh between them

Environment variables of PASSED_ON are set for all ranks; tokens and keys among them go by ssh into a file that only their owner may read,
and not onto a command line, which all users of a host see. Repository, environment, data and models must lie at the same paths on all
hosts.
A signal goes to the ranks, which save and stop.
"""

import ipaddress
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from typing import NamedTuple

if __name__ == "__main__" and sys.argv[1:2] == ["--help"]:  # it needs no package
    print(__doc__.strip())
    sys.exit()

from supervise import MISTAKE, Supervisor, split_restarts

ROOT = Path(__file__).resolve().parents[1]
PASSED_ON = (
    *("NCCL_", "GLOO_", "FI_", "UCX_", "LD_LIBRARY_PATH"),  # networks; clusters' own plug-ins, such as AWS's, lie on the library path
    *("TORCH_", "TORCHINDUCTOR_", "PYTORCH_", "TRITON_", "CUBLAS_", "CUDA_HOME", "CUDA_DEVICE_", "OMP_", "DS_ACC"),
    *("POSTTRAIN_", "HF_", "WANDB_"),
)
SECRET = re.compile("KEY|TOKEN|SECRET|PASSWORD")  # in the names of variables that no other user may read
KEEP_ALIVE = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3"]
STARTING = 120  # seconds within which ranks have started
SECRETS = "POSTTRAIN_SECRETS"  # names the file of `place_secrets`, which posttrain/parallel/script.py reads
NOT_PASSED_ON = ("POSTTRAIN_API_KEY", SECRETS)  # the key is a server's
PLAIN = re.compile(r"[\w@%+=:,./~-]*")  # a text that every shell takes as it is


def read_hostfile(path: Path) -> dict[str, int]:
    """Read a hostfile: slots of each host, in its order. Raises ValueError for a malformed line, a host named twice, or no host."""
    path = path.expanduser()
    if not path.is_file():
        raise ValueError(f"there is no hostfile at {path}. Copy launch/hostfile.example there, or name one with HOSTFILE=PATH")
    hosts: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
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
    """Slots of each host, from HOSTFILE or else the Slurm job; and this host's place among them, None if all are started from here."""
    slots, file, rank = environment_number("NUM_GPUS"), os.environ.get("HOSTFILE"), os.environ.get("NODE_RANK")
    if not file and os.environ.get("SLURM_JOB_NODELIST"):
        names = _nodes_of_the_job()
        return dict.fromkeys(names, slots or _gpus_of_the_job(len(names))), rank or os.environ.get("SLURM_NODEID")
    hosts = read_hostfile(Path(file or ROOT / "launch" / "hostfile"))
    return dict.fromkeys(hosts, slots) if slots else hosts, rank


def _nodes_of_the_job() -> list[str]:
    """Names of the Slurm job's nodes, on each of which this must be a task. Raises ValueError."""
    try:
        names = subprocess.check_output(["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]], text=True).split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"Slurm does not tell the nodes of this job ({error}); name them in a file, with HOSTFILE=PATH") from None
    if os.environ.get("SLURM_STEP_NUM_NODES") != str(len(names)):
        raise ValueError(f"this is no task on each of the job's {len(names)} nodes: use launch/slurm.sh, or give HOSTFILE=PATH")
    return names


def _gpus_of_the_job(nodes: int) -> int:
    """GPUs that the Slurm job has on each of its nodes. Raises ValueError if they are not as many on all."""
    gpus = (os.environ.get("SLURM_GPUS_PER_NODE") or os.environ.get("SLURM_GPUS_ON_NODE") or "").rpartition(":")[2]  # may be b200:8
    total = os.environ.get("SLURM_GPUS", "").rpartition(":")[2]
    if not gpus.isdigit() or (total.isdigit() and int(total) != nodes * int(gpus)):
        raise ValueError(
            "as many GPUs are needed on each of the job's nodes: ask for them with sbatch --gpus-per-node=8 (or, without any, set "
            "NUM_GPUS, the ranks of each node)"
        )
    return int(gpus)


class Answer(NamedTuple):
    """What a shell command on a host gave: exit code (255: ssh failed, or no answer came), output, and when the output was here."""

    code: int
    output: str
    errors: str
    came: float  # time.time()


def ask(host: str | None, command: str, script: str = "", timeout: float = 30) -> Answer:
    """Run a shell command on a host by ssh, or on this machine if `host` is None; `script` is its standard input."""
    words = ["bash", "-c", command] if host is None else ["ssh", *KEEP_ALIVE, host, command]
    try:
        done = subprocess.run(words, input=script, capture_output=True, text=True, timeout=timeout)
        return Answer(done.returncode, done.stdout, done.stderr, time.time())
    except subprocess.TimeoutExpired:
        return Answer(255, "", f"no answer within {timeout:.0f} s", time.time())


def ask_all(commands: dict[str, str], script: str = "", timeout: float = 30, over_ssh: bool = True) -> dict[str, Answer]:
    """Run each host's own command, all at once, at most `timeout` seconds; returns the answers by host."""
    with ThreadPoolExecutor(len(commands)) as threads:
        asked = {host: threads.submit(ask, host if over_ssh else None, command, script, timeout) for host, command in commands.items()}
        return {host: answer.result() for host, answer in asked.items()}


def check_hosts(hosts: list[str], script: Path) -> None:
    """Raises ValueError naming every host that ssh cannot reach, or that lacks the environment or the script at this machine's path."""
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
    """The address at which ranks meet: MASTER_ADDR, or else the first host's."""
    return os.environ.get("MASTER_ADDR") or address_of(host, over_ssh)


def address_of(host: str, over_ssh: bool) -> str:
    """A host's IPv4 address, by ssh's settings or this machine's name service. Raises ValueError if unknown or only local (127.x)."""
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
    """The environment variables that ranks on all hosts get."""
    names = [name for name in sorted(os.environ) if name.startswith(PASSED_ON) and name not in NOT_PASSED_ON]
    return {name: os.environ[name] for name in names}


def place_secrets(hosts: list[str], secrets: dict[str, str]) -> str:
    """Write variables into a new file on every host, which its owner alone may read; returns its path. Raises ValueError."""
    path = f"/tmp/.posttrain-{uuid.uuid4().hex}"
    answers = ask_all(dict.fromkeys(hosts, f"umask 077; set -C; cat > {path}"), json.dumps(secrets))
    if failed := [f"{host}: {' '.join(answer.errors.split())}" for host, answer in answers.items() if answer.code]:
        raise ValueError(f"{', '.join(secrets)} could not be written to {path} on every host ({'; '.join(failed)})")
    return path


def for_pdsh(argument: str) -> str:
    """Quote an argument for the remote shell; DeepSpeed 0.19.8 itself puts those with a space, and no others, between double quotes."""
    return _within_quotes(argument) if " " in argument else shlex.quote(argument)


def _within_quotes(text: str) -> str:
    """Escape what a shell would replace between double quotes."""
    return re.sub(r"([\\$`])", r"\\\1", text)


def over_ssh(hosts: dict[str, int], script: Path, arguments: list[str], environment_file: Path) -> list[str]:
    """The launcher's further arguments for all hosts over ssh; checks the hosts, and sets what pdsh reads. Raises ValueError."""
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
    variables = passed_on()
    if secrets := {name: variables.pop(name) for name in list(variables) if SECRET.search(name)}:
        variables[SECRETS] = os.environ[SECRETS] = place_secrets(list(hosts), secrets)
    # DeepSpeed puts each value between double quotes where it has special characters
    environment_file.write_text("".join(f"{name}={_within_quotes(value)}\n" for name, value in variables.items()), encoding="utf-8")
    os.environ["DS_ENV_FILE"] = str(environment_file)
    os.environ["PDSH_SSH_ARGS_APPEND"] = " ".join([os.environ.get("PDSH_SSH_ARGS_APPEND", ""), *KEEP_ALIVE]).strip()
    return ["--force_multi", "--no_ssh_check", str(script), *map(for_pdsh, arguments)]


def signal_ranks(hosts: list[str], port: int, number: int) -> None:
    """Send a signal to the ranks on all hosts; on a host without any, as soon as there are, for STARTING seconds.

    It goes to the children of DeepSpeed's inner launchers: the launchers themselves would end the ranks before they have saved.
    """
    deadline = time.monotonic() + STARTING
    launcher = rf"^[^ ]*python[^ ]* -u -m deepspeed.launcher.launch .*--master_port={port}( |$)"
    while hosts and time.monotonic() < deadline:
        answers = ask_all(dict.fromkeys(hosts, f"pkill -{number} -P $(pgrep -d, -f {shlex.quote(launcher)})"))
        hosts = [host for host, answer in answers.items() if answer.code]
        time.sleep(1)


def environment_number(name: str) -> int | None:
    """An environment variable as a number, None if it is unset or empty. Raises ValueError for another value."""
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
            hostfile = Path(folder) / "hostfile"  # written anew: DeepSpeed's reader takes fewer forms
            hostfile.write_text("".join(f"{host} slots={slots}\n" for host, slots in hosts.items()), encoding="utf-8")
            command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--hostfile", str(hostfile)]
            command += ["--master_addr", address, "--master_port", str(port)]
            if rank is not None:
                return Supervisor([*command, "--no_ssh", "--node_rank", rank, script, *rest], restarts).run()
            command += over_ssh(hosts, Path(script).resolve(), rest, Path(folder) / "environment")

            def reach(number: int) -> None:  # in a thread, since it may wait for ranks that are still being started
                Thread(target=signal_ranks, args=(list(hosts), port, number), daemon=True).start()

            try:
                return Supervisor(command, restarts, reach).run()
            finally:
                if path := os.environ.get(SECRETS):
                    ask_all(dict.fromkeys(hosts, f"rm -f {path}"))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
