"""Finds what is wrong with hosts, from what each found of itself (probe.py): differences between them, and what would stop a run on one."""

import ipaddress
import shlex
from collections import Counter
from dataclasses import dataclass

from posttrain.common import places
from posttrain.parallel.launched import SHARED_MEMORY

CLOCK = 2.0  # seconds by which a clock may differ from this machine's
PER_RANK = 2e9  # bytes of memory that torch and DeepSpeed take before there is a model
TEMPORARY = 1e9  # bytes that must be free in /tmp
LEAST_DISK = 1e9  # bytes that must be free in out_dir, whatever the model
CHECKPOINT = 7  # size of a checkpoint over that of the bfloat16 weights: these, float32 weights and two moments, see engine/checkpoints.py
OPEN_FILES = 1024  # fewer that a process may open are too few
HOT = 85  # degrees Celsius above which a GPU is reported
TAKEN = 1024  # MiB of a GPU's memory in use that are reported
ROOT = places.PACKAGE.parent
MAKE_ENVIRONMENT = "source launch/env.sh"


@dataclass(frozen=True)
class Host:
    """A host, and what it found of itself."""

    name: str  # as in the hostfile
    slots: int
    address: str | None  # at which it is reached from here
    clock: float  # seconds by which its clock is ahead of this machine's
    found: dict  # what probe.py printed

    @property
    def interface(self) -> str | None:
        """The network interface by which it reaches all other hosts, None if there are several or none."""
        names = set(self.found["routes"].values())
        return names.pop() if len(names) == 1 else None


@dataclass(frozen=True)
class Problem:
    """Something to fix: on which host, what was seen, and what to do."""

    host: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.host}: {self.what}\n    -> {self.fix}"


def what_is_wrong(hosts: list[Host], environment: dict[str, str], port: int) -> list[Problem]:
    """All problems of the hosts, in the order in which to fix them; `port` is where the ranks are to meet."""
    found = [problem for host in hosts for problem in _alone(host)]
    found += [problem for host in hosts for problem in _gpus(host)]
    found += _differences(hosts)
    if len(hosts) > 1:
        found += [problem for host in hosts for problem in _network(host, hosts, environment)]
    if holder := hosts[0].found.get("port", {}).get("holder"):
        free = hosts[0].found["port"]["free"]
        found.append(
            Problem(hosts[0].name, f"port {port}, where ranks are to meet, is taken by {holder}", f"MASTER_PORT={free}, or end it")
        )
    return found


def _alone(host: Host) -> list[Problem]:
    """Problems of one host with disk, memory, limits and clock, which have nothing to do with the other hosts."""
    free, memory, problems = host.found["free"], host.found["memory"]["available"], []

    def say(what: str, fix: str) -> None:
        problems.append(Problem(host.name, what, fix))

    model = next(listing or {} for what, listing in host.found["folders"].items() if what.startswith("model"))
    formats = [[int(entry.split()[0]) for name, entry in model.items() if name.endswith(kind)] for kind in (".safetensors", ".bin", ".pt")]
    weights = max(map(sum, formats))  # the folder may hold the same weights in two formats
    needed = max(LEAST_DISK, 2 * CHECKPOINT * weights)  # a checkpoint is complete before the previous one is removed
    for what, least, why in (
        ("out_dir", needed, "two checkpoints of this model" if needed > LEAST_DISK else "any run"),
        ("/tmp", TEMPORARY, "the launcher and compiled kernels"),
        ("/dev/shm", SHARED_MEMORY, "NCCL; a container's 64 MB are too few"),
    ):
        place = free[what]
        where = what if what == place["path"] else f"{place['path']} ({what})"
        if not place["writable"]:
            say(f"{where} cannot be written to", "give this user the right to, or name another folder")
        elif place["bytes"] < least:
            fix = "docker run --shm-size=16g, or remount it larger" if what == "/dev/shm" else "free some, or name another folder"
            say(f"{_size(place['bytes'])} are free in {where}, {_size(least)} are needed by {why}", fix)
    if memory < host.slots * PER_RANK:
        say(
            f"{_size(memory)} of memory are available to {host.slots} ranks, {_size(PER_RANK)} a rank are needed",
            "end what else runs there",
        )
    if 0 <= host.found["limits"]["NOFILE"] < OPEN_FILES:
        say(f"a process may open {host.found['limits']['NOFILE']} files", f"ulimit -n {64 * OPEN_FILES} (for good: limits.conf)")
    if abs(host.clock) > CLOCK:
        say(f"its clock is {abs(host.clock):.0f} s {'ahead' if host.clock > 0 else 'behind'}", "let chrony or systemd-timesyncd set it")
    return problems


def _gpus(host: Host) -> list[Problem]:
    """Problems of one host with its driver, torch, GPUs and InfiniBand."""
    found, gpus, torch, problems = host.found, host.found["gpus"], host.found["torch"], []

    def say(what: str, fix: str) -> None:
        problems.append(Problem(host.name, what, fix))

    if found["nvidia_smi"]:
        say(found["nvidia_smi"], "reboot it, or reload the driver; where it names a GPU, have that one looked at")
    if torch.get("unusable"):
        if gpus or found["nvidia_smi"]:  # else it is a machine without GPUs
            driver = gpus[0]["driver_version"] if gpus else "?"
            say(
                f"torch cannot use the GPUs (driver {driver}): {torch['error']}", "a newer driver, or start nvidia-fabricmanager, or reboot"
            )
    elif "error" in torch:
        say(f"torch cannot be loaded: {torch['error']}", f"rm -r .venv; {MAKE_ENVIRONMENT}")
    elif gpus and not torch["cuda"]:
        say("torch is a build without CUDA, and there are GPUs", f"rm -r .venv, and without an index of CPU builds {MAKE_ENVIRONMENT}")
    elif (gpus or torch["gpus"]) and torch["gpus"] < host.slots:
        say(
            f"{torch['gpus']} GPUs are usable, the hostfile says slots={host.slots}", "correct the hostfile, or repair the GPU (nvidia-smi)"
        )
    for gpu in gpus[: host.slots]:
        name = f"GPU {gpu['index']}"
        if _number(gpu["ecc.errors.uncorrected.volatile.total"]):
            say(f"{name} has {gpu['ecc.errors.uncorrected.volatile.total']} uncorrected memory errors", "reset it, or have it replaced")
        if gpu["mig.mode.current"] == "Enabled":
            say(f"{name} is split by MIG", f"nvidia-smi -i {gpu['index']} -mig 0, or take whole GPUs")
        if "Active" in (gpu["clocks_throttle_reasons.hw_slowdown"], gpu["clocks_throttle_reasons.sw_thermal_slowdown"]):
            say(f"{name} is slowed down, at {gpu['temperature.gpu']} degrees", "look at its cooling and power")
        elif _number(gpu["temperature.gpu"]) > HOT:
            say(f"{name} is at {gpu['temperature.gpu']} degrees", "look at its cooling")
        if _number(gpu["memory.used"]) > TAKEN:
            there = [one for one in found["gpu_processes"] if one["gpu_uuid"] == gpu["uuid"]]
            who = ", ".join(f"pid {one['pid']} ({one['process_name']})" for one in there) or "a process of another container"
            say(f"{gpu['memory.used']} MiB of {name} are taken: {who}", "end it, or leave that host out")
    ports = host.found["infiniband"]
    if ports and 0 <= host.found["limits"]["MEMLOCK"] < 2**32:
        say(f"a process may lock {host.found['limits']['MEMLOCK']} bytes, too few for InfiniBand", "ulimit -l unlimited (limits.conf)")
    if ports and not _active(host):
        say("no InfiniBand port is active", "look at cables, switch and subnet manager (ibstat)")
    return problems


def _active(host: Host) -> set[str]:
    """The host's InfiniBand ports that are active."""
    return {name for name, state in host.found["infiniband"].items() if "ACTIVE" in state}


def _number(text: str) -> float:
    """A value of nvidia-smi as a number, 0 for one that it does not know."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def _compared(host: Host) -> dict[str, dict[str, str]]:
    """What must be the same on all hosts: values by kind (packages, code, data, ...) and name."""
    found, gpus = host.found, host.found["gpus"]
    parts = {"Python": {"Python": found["python"]}, "packages": found["packages"], "code": found["code"]}
    parts |= {what: listing for what, listing in found["folders"].items() if listing is not None}
    if gpus:
        parts["GPUs"] = {"model": " and ".join(sorted({gpu["name"] for gpu in gpus})), "driver": gpus[0]["driver_version"]}
    if found["torch"].get("cuda"):
        parts["CUDA"] = {name: str(found["torch"].get(name)) for name in ("cuda", "nccl")}
    return parts


def _differences(hosts: list[Host]) -> list[Problem]:
    """A problem for each kind in which a host differs from most hosts, or if there is no majority from the first."""
    compared, problems = {host.name: _compared(host) for host in hosts}, []
    for kind in dict.fromkeys(kind for parts in compared.values() for kind in parts):
        forms = Counter(repr(sorted(parts.get(kind, {}).items())) for parts in compared.values())
        most = forms.most_common(1)[0][0]  # the first of several that are equally common
        usual = next(parts.get(kind, {}) for parts in compared.values() if repr(sorted(parts.get(kind, {}).items())) == most)
        for name, parts in compared.items():
            mine = parts.get(kind, {})
            different = sorted(part for part in usual.keys() | mine.keys() if usual.get(part) != mine.get(part))
            if different and (mine or kind != "CUDA"):  # a missing GPU or a broken torch has been reported already
                problems.append(Problem(name, _difference(kind, different, mine, usual), _how_to_align(kind, name, usual)))
    return problems


def _difference(kind: str, different: list[str], mine: dict, usual: dict) -> str:
    """One line about how a host's values (`mine`) differ from the `usual` ones; `different` names those that do."""
    part = different[0]
    seen, expected = (values.get(part) or "none" for values in (mine, usual))
    more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
    if not mine or not usual:
        return f"{kind} is {'missing' if usual else 'there alone'}"
    return f"{kind}: {part} is {seen}, elsewhere {expected}{more}"


def _how_to_align(kind: str, host: str, usual: dict) -> str:
    """What to do so that the host has the `usual` values of this kind."""
    if kind == "Python":
        return f"rm -r .venv there, and PYTHON=python{usual['Python'].rpartition('.')[0]}; {MAKE_ENVIRONMENT}"
    if kind in ("packages", "CUDA"):
        return f"{MAKE_ENVIRONMENT} there: all hosts then have the versions of constraints.txt"
    if kind == "GPUs":
        return "leave the host out, or give all the same driver: the slowest GPU sets the pace"
    if kind == "code" and not places.is_checkout():
        return "install the same wheel of posttrain there"
    if kind == "code":
        return f"rsync -a --delete --exclude=.venv {shlex.quote(str(ROOT))}/ {host}:{shlex.quote(str(ROOT))}/"
    if kind.startswith("model of the hub"):
        return f"hf download {kind.partition(', ')[2].rstrip(',')} there, or let the run do it, as each of its hosts would"
    return f"copy that folder to {host} from one that has it right, with rsync -a --delete"


def same_on_all(hosts: list[Host]) -> list[str]:
    """What was compared and is the same on all hosts, in a few words each; and which folders exist on none."""
    compared, said = [_compared(host) for host in hosts], []
    for kind in dict.fromkeys(kind for parts in compared for kind in parts):
        values = compared[0].get(kind, {})
        if all(parts.get(kind, {}) == values for parts in compared):
            few = kind in ("Python", "CUDA", "GPUs")
            what = "packages" if kind == "packages" else f"files of {kind}"
            said.append(f"{kind} {', '.join(values.values())}" if few else f"{len(values)} {what}")
    said += [f"no {what} anywhere yet" for what in hosts[0].found["folders"] if all(host.found["folders"][what] is None for host in hosts)]
    return said


def _network(host: Host, hosts: list[Host], environment: dict[str, str]) -> list[Problem]:
    """Problems of one host with routes, interfaces, names, InfiniBand and packet sizes, given the other hosts."""
    found, problems = host.found, []

    def say(what: str, fix: str) -> None:
        problems.append(Problem(host.name, what, fix))

    others = [other for other in hosts if other is not host]
    unreachable = [other.name for other in others if other.address and other.address not in found["routes"]]
    if unreachable:
        say(f"it has no route to {', '.join(unreachable)}", "look at its interfaces: ip address, ip route")
    variable = "NCCL_SOCKET_IFNAME" if found["gpus"] else "GLOO_SOCKET_IFNAME"
    common = host.interface
    if chosen := environment.get(variable):
        fix = interfaces(hosts)
        names = [name for name in found["interfaces"] if _is_chosen(name, chosen, nccl=bool(found["gpus"]))]
        if not names:
            say(f"{variable}={chosen}, and it has {', '.join(sorted(found['interfaces']))}", fix)
        elif common and not any(name == common or _joins(name, host, others) for name in names):
            say(f"{variable}={chosen}, which does not lead to the other hosts", fix)
    elif not found["gpus"] and found["own_address"] and ipaddress.ip_address(found["own_address"]).is_loopback:
        fix = f"in its /etc/hosts, give {found['hostname']} the address of {common or 'its interface to the others'}"
        say(f"its own name, {found['hostname']}, means {found['own_address']} there, where no other host can reach it", fix)
    missing = set.union(*map(_active, hosts)) - _active(host)  # NCCL leaves out a port that is active nowhere
    if missing and _active(host):
        say(f"InfiniBand ports {', '.join(sorted(missing))} are active elsewhere, not there", "look at their cables and switch (ibstat)")
    sizes = {other.found["interfaces"][other.interface]["mtu"] for other in hosts if other.interface}
    if common and len(sizes) > 1 and found["interfaces"][common]["mtu"] != max(sizes):
        say(f"packets of {common} have at most {found['interfaces'][common]['mtu']} bytes, elsewhere {max(sizes)}", "give all the same MTU")
    return problems


def _joins(name: str, host: Host, others: list[Host]) -> bool:
    """Whether every other host has an address in the network of this interface of the host."""
    entry = host.found["interfaces"][name]
    if not entry["netmask"] or ipaddress.ip_address(entry["address"]).is_loopback:
        return False
    network = ipaddress.ip_network(f"{entry['address']}/{entry['netmask']}", strict=False)
    there = [[ipaddress.ip_address(one["address"]) for one in other.found["interfaces"].values()] for other in others]
    return all(any(address in network for address in addresses) for addresses in there)


def interfaces(hosts: list[Host]) -> str:
    """What to set so that ranks use the network that joins the hosts. All hosts get one value, and gloo takes whole names only."""
    variable = "NCCL_SOCKET_IFNAME" if hosts[0].found["gpus"] else "GLOO_SOCKET_IFNAME"
    names = sorted({host.interface for host in hosts if host.interface})
    if len(names) == 1 or (names and hosts[0].found["gpus"]):
        return f"{variable}={','.join(names)}"
    return f"unset {variable}, and in each host's /etc/hosts give its own name the address by which the others reach it"


def _is_chosen(name: str, chosen: str, nccl: bool) -> bool:
    """Whether an interface is `chosen`. NCCL takes beginnings of names, =name for a whole one, ^ to exclude; gloo takes whole names."""
    if not nccl:
        return name in chosen.split(",")
    leaves_out, listed = chosen.startswith("^"), chosen.removeprefix("^").split(",")
    matches = any(name == one[1:] if one.startswith("=") else name.startswith(one) for one in listed)
    return matches != leaves_out


def _size(count: float) -> str:
    """Bytes in GB or MB, of powers of ten."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
