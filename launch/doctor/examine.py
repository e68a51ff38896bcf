"""Examines every host of a hostfile, as doctor.py describes: each by itself, then all together."""

import json
import os
import shlex
import sys
from collections import Counter
from pathlib import Path

from judge import Host, Problem, interfaces, same_on_all, what_is_wrong
from multinode import Answer, address_of, ask_all, environment_number, meeting_point, passed_on, read_hostfile

from posttrain.common import places
from posttrain.common.hub import is_hub_name
from posttrain.recipes.keys import Recipe
from posttrain.recipes.reading import load_recipe_of_either_kind

HERE = Path(__file__).resolve().parent
ROOT = places.PACKAGE.parent
LOOKING, SENDING = 300, 3600  # seconds that a host may take for each part; ranks without progress end by themselves
WITHOUT_PROGRESS = 60  # seconds, after which ranks that wait for others give up


def look(slots: dict[str, int], recipe: Recipe, port: int, over_ssh: bool) -> tuple[list[Host], list[Problem]]:
    """Let every host examine itself (probe.py): what each found, and a problem for each that could not be asked."""
    addresses = {host: _address(host, over_ssh) for host in slots} if over_ssh else dict.fromkeys(slots, "127.0.0.1")
    # absolute paths, as a run started from here would have
    model = {"model": os.path.abspath(recipe.model_path)}
    if is_hub_name(recipe.model_path):
        model = {f"model of the hub, {recipe.model_path},": recipe.model_path}
    folders = {"data": os.path.abspath(recipe.data_dir), **model}
    places = {"out_dir": os.path.abspath(recipe.out_dir), "/tmp": "/tmp", "/dev/shm": "/dev/shm"}
    commands = {}
    for number, host in enumerate(slots):
        peers = [address for other, address in addresses.items() if other != host and address]
        spec = {"root": str(ROOT), "folders": folders, "places": places, "peers": peers, "port": port if number == 0 else None}
        python = shlex.quote(sys.executable)
        commands[host] = f"test -x {python} || exit 3; {python} -B - {shlex.quote(json.dumps(spec))} && date +%s.%N"
    hosts, problems = [], []
    for host, answer in ask_all(commands, (HERE / "probe.py").read_text(encoding="utf-8"), LOOKING, over_ssh).items():
        if answer.code == 0:
            found, its_time = answer.output.splitlines()[-2:]
            hosts.append(Host(host, slots[host], addresses[host], float(its_time) - answer.came, json.loads(found)))
        else:
            problems.append(Problem(host, *_why_not(host, answer)))
    return hosts, problems


def _address(host: str, over_ssh: bool) -> str | None:
    """The host's address, None if there is none that other hosts could use."""
    try:
        return address_of(host, over_ssh)
    except ValueError:
        return None  # reported later: for the first host by _try_the_network, for others by ssh


def _why_not(host: str, answer: Answer) -> tuple[str, str]:
    """Why a host could not be asked, and what to do about it."""
    said = " ".join(answer.errors.split()) or "no reason given"
    if answer.code == 3:
        how = f"put the repository at {ROOT} there, too, and in it `source launch/env.sh`"
        return f"there is no {sys.executable}", how if places.is_checkout() else "install posttrain there as it is here, in the same place"
    if answer.code != 255:
        broken = "ImportError" in said or "ModuleNotFoundError" in said
        todo = f"in {ROOT} there: rm -r .venv; source launch/env.sh" if broken else "fix what is said there, and run the doctor again"
        return f"examining it fails: {said[-300:]}", todo
    hints = {
        "Host key verification failed": f"log in once by hand, and accept its key: ssh {host}",
        "Permission denied": f"ssh-copy-id {host}",
        "Could not resolve": "correct its name in the hostfile, or give it a HostName in ~/.ssh/config",
    }
    hint = next((todo for text, todo in hints.items() if text in said), f"see that it is up and that `ssh {host} true` works")
    return f"cannot be reached by ssh: {said}", hint


def send(hosts: list[Host], port: int, address: str, over_ssh: bool) -> tuple[dict | None, list[str]]:
    """Let the ranks of all hosts meet and send each other data: returns what rank 0 measured, or None and the errors."""
    world, names = sum(host.slots for host in hosts), ",".join(f"{host.name}:{host.slots}" for host in hosts)
    passed = [f"{name}={value}" for name, value in passed_on().items()]
    commands, first = {}, 0
    for host in hosts:
        spec = {"first": first, "slots": host.slots, "world": world, "hosts": names, "address": address, "port": port}
        words = ["env", *passed, "PYTHONDONTWRITEBYTECODE=1", sys.executable, str(HERE / "wire.py")]
        commands[host.name] = shlex.join([*words, json.dumps(spec | {"seconds": WITHOUT_PROGRESS})])
        first += host.slots
    answers = ask_all(commands, "", SENDING, over_ssh)
    found = [line.removeprefix("FOUND ") for line in answers[hosts[0].name].output.splitlines() if line.startswith("FOUND ")]
    if found and all(answer.code == 0 for answer in answers.values()):
        return json.loads(found[0]), []
    lines = [line for answer in answers.values() for line in answer.errors.splitlines()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return None, list(dict.fromkeys(errors)) or [lines[-1] if lines else "the ranks ended without an error message"]


def show_hosts(hosts: list[Host]) -> None:
    """Print the table of hosts: ranks, GPUs, free memory and disk, clock, address, interface."""
    rows, first = [("host", "ranks", "gpus", "memory free", "out_dir free", "clock", "address", "interface")], 0
    for host in hosts:
        memory, gpus = host.found["memory"], Counter(gpu["name"] for gpu in host.found["gpus"])
        rows.append(
            (
                host.name,
                f"{first}-{first + host.slots - 1}",
                ", ".join(f"{count} x {name}" for name, count in gpus.items()) or f"none ({host.found['cores']} cores)",
                f"{memory['available'] / 1e9:.0f} of {memory['total'] / 1e9:.0f} GB",
                f"{host.found['free']['out_dir']['bytes'] / 1e9:.0f} GB",
                f"{host.clock:+.1f} s",
                host.address or "?",
                host.interface or ("" if len(hosts) == 1 else "?"),
            )
        )
        first += host.slots
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip())


def show_sent(sent: dict, hosts: list[Host]) -> list[Problem]:
    """Print the tables of bandwidths; returns a problem for each pair of ranks at less than half of the usual one."""
    ranks = sum(host.slots for host in hosts)
    print(f"\nall-reduce of {ranks} ranks over {sent['backend']}; GB/s over the bus")
    for size, seconds, speed in sent["sizes"]:
        print(f"{_size(size):>8} {1e3 * seconds:>11.2f} ms {speed:>9.2f} GB/s")
    where = [(number, local) for number, host in enumerate(hosts) for local in range(host.slots)]
    between, within = {}, {}
    for a, b, speed in sent["pairs"]:
        (host_a, local_a), (host_b, local_b) = where[a], where[b]
        (within if host_a == host_b else between)[host_a, local_a, host_b, local_b] = speed
    if sent["pairs"]:
        print("\nslowest pair of ranks between two hosts, and within one; GB/s one way")
        width = max(8, *(len(host.name) for host in hosts))
        print(" ".join([" " * width, *(host.name.rjust(width) for host in hosts)]))
        for a, host in enumerate(hosts):
            cells = []
            for b in range(len(hosts)):
                speeds = [speed for (x, _, y, _), speed in (between | within).items() if {x, y} == {a, b}]
                cells.append(f"{min(speeds):.2f}" if speeds else "-")
            print(" ".join([host.name.ljust(width), *(cell.rjust(width) for cell in cells)]))
    problems = []
    for kind, speeds in (("between hosts", between), ("within a host", within)):
        usual = sorted(speeds.values())[len(speeds) // 2] if speeds else 0.0
        for (a, x, b, y), speed in speeds.items():
            if speed < usual / 2 and len(speeds) > 2:
                what = f"{speed:.2f} GB/s between its rank {x} and rank {y} of {hosts[b].name}, where pairs {kind} usually have {usual:.2f}"
                problems.append(Problem(hosts[a].name, what, "look at the network card, cable and PCIe slot of these two"))
    return problems


def _size(size: int) -> str:
    """A number of bytes in the largest unit, a factor of 1024 each, that leaves it at least 1."""
    for unit in ("B", "KB", "MB"):
        if size < 1024:
            return f"{size} {unit}"
        size //= 1024
    return f"{size} GB"


def examine(arguments: list[str]) -> int:
    """Look at all hosts and print what to fix; returns the exit code. Raises ValueError for a mistake in the command."""
    files = [word for word in arguments[:1] if not word.startswith("--")]
    recipe = load_recipe_of_either_kind([*filter(None, [os.environ.get("RECIPE")]), *arguments[len(files) :]])
    named = files[0] if files else os.environ.get("HOSTFILE")
    number = environment_number("NUM_GPUS")
    slots = read_hostfile(Path(named)) if named else {"this machine": number or _gpus_here()}
    if number:
        slots = dict.fromkeys(slots, number)
    over_ssh, port = bool(named), environment_number("MASTER_PORT") or 29500
    hosts, problems = look(slots, recipe, port, over_ssh)
    if hosts:
        show_hosts(hosts)
        print("\nthe same on all:" if len(hosts) > 1 else "\nhere:", "; ".join(same_on_all(hosts)))
        problems += what_is_wrong(hosts, dict(os.environ), port)
    if len(hosts) == len(slots):
        problems += _try_the_network(hosts, port, over_ssh, problems)
    elif hosts:
        print("\nno data was sent: not all hosts could be asked")
    print()
    for problem in problems:
        print(problem)
    if problems:
        print(f"{len(problems)} to fix, first on {problems[0].host}: {problems[0].fix}")
    else:
        print("all is well")
    return 1 if problems else 0


def _try_the_network(hosts: list[Host], port: int, over_ssh: bool, before: list[Problem]) -> list[Problem]:
    """Let the ranks send each other data and print what they measured; `before`: problems found so far, which may be the cause."""
    holder = hosts[0].found["port"]
    try:
        address = meeting_point(hosts[0].name, over_ssh) if over_ssh else "127.0.0.1"
    except ValueError as error:
        return [Problem(hosts[0].name, str(error), "give its address: MASTER_ADDR=...")]
    sent, errors = send(hosts, holder["free"] if holder["holder"] else port, address, over_ssh)
    if sent:
        return show_sent(sent, hosts)
    said = errors[0].partition(". The run cannot go on")[0]
    return [Problem(hosts[0].name, f"the ranks cannot work together: {said}", "fix what is above first" if before else interfaces(hosts))]


def _gpus_here() -> int:
    """GPUs of this machine, or 2, the ranks that runs have here by default without any."""
    import torch

    return torch.cuda.device_count() or 2
