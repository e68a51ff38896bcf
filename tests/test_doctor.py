"""launch/doctor.sh: what it says of hosts as they may be; over two real hosts it runs in two_hosts.sh."""

import copy
import importlib
import itertools
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, free_port, launch_script

sys.path[:0] = [str(ROOT / "launch"), str(ROOT / "launch" / "doctor")]
doctor, judge, wire = (importlib.import_module(name) for name in ("examine", "judge", "wire"))

GPU = {
    "uuid": "",
    "name": "NVIDIA B200",
    "driver_version": "580.82.07",
    "memory.used": "0",
    "temperature.gpu": "41",
    "mig.mode.current": "Disabled",
    "ecc.errors.uncorrected.volatile.total": "0",
    "clocks_throttle_reasons.hw_slowdown": "Not Active",
    "clocks_throttle_reasons.sw_thermal_slowdown": "[N/A]",
}
EIGHT = [{**GPU, "index": str(index), "uuid": f"GPU-{index}"} for index in range(8)]


def hosts(count: int = 3) -> list:
    """Well ones, of eight GPUs each."""
    found = []
    for number in range(count):
        said = {
            "hostname": f"node-{number}",
            "own_address": f"10.0.0.{number}",
            "python": "3.12.3",
            "packages": {"torch": "2.13.0", "numpy": "2.4.6"},
            "code": {"posttrain/sft.py": "10 bytes, aa"},
            "folders": {
                "data": {"manifest.json": "20 bytes, bb"},
                "model": {"model.safetensors": "4000000000 bytes, cc", "pytorch_model.bin": "4000000000 bytes, dd"},
            },
            "free": {what: {"path": what, "bytes": 10**12, "writable": True} for what in ("out_dir", "/tmp", "/dev/shm")},
            "limits": {"NOFILE": 65536, "MEMLOCK": -1},
            "cores": 224,
            "gpus": copy.deepcopy(EIGHT),
            "gpu_processes": [],
            "nvidia_smi": None,
            "torch": {"cuda": "13.0", "gpus": 8, "nccl": "2.28.9"},
            "infiniband": {f"mlx5_{port}:1": "4: ACTIVE" for port in range(8)},
            "interfaces": {
                name: {"address": address, "netmask": mask, "mtu": 9000}
                for name, address, mask in (
                    ("lo", "127.0.0.1", "255.0.0.0"),
                    ("eth0", f"10.0.0.{number}", "255.255.255.0"),
                    ("docker0", f"172.{17 + number}.0.1", "255.255.0.0"),
                    ("ib1", f"10.1.0.{number}", "255.255.255.0"),
                )
            },
            "routes": {f"10.0.0.{other}": "eth0" for other in range(count) if other != number},
            "memory": {"available": 10**12, "total": 2 * 10**12},
        }
        found.append(judge.Host(f"node-{number}", 8, f"10.0.0.{number}", 0.01, said))
    found[0].found["port"] = {"holder": None, "free": 29500}
    return found


def wrong(changed: list, **environment: str) -> list[str]:
    return [str(problem) for problem in judge.what_is_wrong(changed, environment, 29500)]


def test_nothing_is_said_of_hosts_that_are_well():
    for interface in (
        {},
        {"NCCL_SOCKET_IFNAME": "eth"},
        {"NCCL_SOCKET_IFNAME": "^lo,docker"},
        {"NCCL_SOCKET_IFNAME": "=eth0"},
        {"NCCL_SOCKET_IFNAME": "ib1"},
    ):
        assert wrong(hosts(), **interface) == []
    assert wrong(hosts(1)) == []
    said = judge.same_on_all(hosts())
    assert said[0] == "Python 3.12.3"
    assert "GPUs NVIDIA B200, 580.82.07" in said


OTHERS = {"gpu_uuid": "GPU-5", "pid": "7", "process_name": "python"}
FAULTS = {  # what is changed of node-1, and what is said of it, alone
    "python": (lambda f: f.update(python="3.11.9"), "Python: Python is 3.11.9, elsewhere 3.12.3"),
    "a package": (lambda f: f["packages"].update(torch="2.12.0"), "packages: torch is 2.12.0, elsewhere 2.13.0"),
    "a missing package": (lambda f: f["packages"].pop("numpy"), "packages: numpy is none, elsewhere 2.4.6"),
    "code": (
        lambda f: f["code"].update({"posttrain/sft.py": "11 bytes, dd"}),
        "code: posttrain/sft.py is 11 bytes, dd, elsewhere 10 bytes, aa",
    ),
    "no data": (lambda f: f["folders"].update(data=None), "data is missing"),
    "no model": (lambda f: f["folders"].update(model=None), "model is missing"),
    "a driver": (lambda f: f["gpus"][0].update(driver_version="570.1"), "GPUs: driver is 570.1, elsewhere 580.82.07"),
    "NCCL": (lambda f: f["torch"].update(nccl="2.27.3"), "CUDA: nccl is 2.27.3, elsewhere 2.28.9"),
    "a lost GPU": (lambda f: f["torch"].update(gpus=7), "7 GPUs are usable, the hostfile says slots=8"),
    "an old driver": (
        lambda f: f.update(torch={"error": "The NVIDIA driver is too old", "cuda": None, "gpus": 0, "unusable": True}),
        "torch cannot use the GPUs (driver 580.82.07): The NVIDIA driver is too old",
    ),
    "nvidia-smi": (lambda f: f.update(nvidia_smi="nvidia-smi fails: GPU is lost"), "nvidia-smi fails: GPU is lost"),
    "no port": (lambda f: f.update(infiniband={"mlx5_0:1": "2: INIT"}), "no InfiniBand port is active"),
    "torch": (
        lambda f: f.update(torch={"error": "libcudart.so.13: cannot open", "cuda": None, "gpus": 0}),
        "torch cannot be loaded: libcudart.so.13",
    ),
    "memory errors": (
        lambda f: f["gpus"][3].update({"ecc.errors.uncorrected.volatile.total": "2"}),
        "GPU 3 has 2 uncorrected memory errors",
    ),
    "MIG": (lambda f: f["gpus"][3].update({"mig.mode.current": "Enabled"}), "GPU 3 is split by MIG"),
    "a slowdown": (lambda f: f["gpus"][2].update({"clocks_throttle_reasons.hw_slowdown": "Active"}), "GPU 2 is slowed down, at 41 degrees"),
    "heat": (lambda f: f["gpus"][2].update({"temperature.gpu": "91"}), "GPU 2 is at 91 degrees"),
    "another's memory": (
        lambda f: (f["gpus"][5].update({"memory.used": "90000"}), f["gpu_processes"].append(OTHERS)),
        "90000 MiB of GPU 5 are taken: pid 7 (python)",
    ),
    "a port down": (lambda f: f["infiniband"].update({"mlx5_3:1": "1: DOWN"}), "InfiniBand ports mlx5_3:1 are active elsewhere, not there"),
    "locked memory": (lambda f: f["limits"].update(MEMLOCK=65536), "a process may lock 65536 bytes, too few for InfiniBand"),
    "open files": (lambda f: f["limits"].update(NOFILE=256), "a process may open 256 files"),
    "memory": (lambda f: f["memory"].update(available=8e9), "8.0 GB of memory are available to 8 ranks, 2.0 GB a rank are needed"),
    "a disk": (lambda f: f["free"]["out_dir"].update(bytes=5e10), "50.0 GB are free in out_dir, 56.0 GB are needed by two checkpoints"),
    "no right": (lambda f: f["free"]["out_dir"].update(writable=False), "out_dir cannot be written to"),
    "a container": (lambda f: f["free"]["/dev/shm"].update(bytes=2**26), "67 MB are free in /dev/shm, 537 MB are needed"),
    "a route": (lambda f: f["routes"].pop("10.0.0.2"), "it has no route to node-2"),
    "packets": (lambda f: f["interfaces"]["eth0"].update(mtu=1500), "packets of eth0 have at most 1500 bytes, elsewhere 9000"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_its_host_and_nothing_else_is(fault):
    change, expected = FAULTS[fault]
    changed = hosts()
    change(changed[1].found)
    (said,) = wrong(changed)
    assert said.startswith(f"node-1: {expected}"), said
    assert len(said.splitlines()) == 2  # what, and what to do


def test_the_faults_that_are_not_in_what_a_host_says():
    late = hosts()
    late[2] = judge.Host("node-2", 8, "10.0.0.2", -40.0, late[2].found)
    assert wrong(late) == ["node-2: its clock is 40 s behind\n    -> let chrony or systemd-timesyncd set it"]
    taken = hosts()
    taken[0].found["port"] = {"holder": "pid 5 (python)", "free": 29501}
    assert wrong(taken) == ["node-0: port 29500, where ranks are to meet, is taken by pid 5 (python)\n    -> MASTER_PORT=29501, or end it"]
    for name, said in (("docker", "which does not lead to the other hosts"), ("ib0", "and it has docker0, eth0, ib1, lo")):
        found = wrong(hosts(), NCCL_SOCKET_IFNAME=name)
        assert found == [f"node-{n}: NCCL_SOCKET_IFNAME={name}, {said}\n    -> NCCL_SOCKET_IFNAME=eth0" for n in range(3)]
    from_the_hub = hosts()
    for number, host in enumerate(from_the_hub):
        listing = host.found["folders"].pop("model")
        host.found["folders"]["model of the hub, org/name,"] = listing if number else None
    (said,) = wrong(from_the_hub)
    assert said.startswith("node-0: model of the hub, org/name, is missing\n    -> hf download org/name there")
    without = hosts()
    for host in without:
        host.found.update(gpus=[], torch={"cuda": None, "gpus": 0}, infiniband={})
    without[1].found["own_address"] = "127.0.1.1"  # as Debian's installer leaves it
    (said,) = wrong(without)
    assert said.startswith("node-1: its own name, node-1, means 127.0.1.1 there, where no other host can reach it")


def test_a_model_of_the_hub_is_its_local_copy_and_what_rank_0_alone_keeps_beside_data_is_not_compared(tmp_path):
    snapshot, data = tmp_path / "hub" / "models--org--name" / "snapshots" / "abc", tmp_path / "data"
    for file in (snapshot / "config.json", snapshot.parent.parent / "refs" / "main", data / "manifest.json", data / "reference/0/a.npz"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("abc")
    folders = {"data": str(data), "there": "org/name", "not there": "org/other"}
    spec = {"root": str(ROOT), "folders": folders, "places": {}, "peers": [], "port": None}
    command = [sys.executable, ROOT / "launch" / "doctor" / "probe.py", json.dumps(spec)]
    done = subprocess.run(command, env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub")}, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)["folders"]
    assert {what: sorted(listing or ()) for what, listing in found.items()} == {
        "data": ["manifest.json"],
        "there": ["config.json"],
        "not there": [],
    }


@pytest.mark.parametrize("slots", [[1], [2], [3], [1, 1], [2, 2], [8, 8, 8], [2, 3], [4, 4, 4, 4, 4]])
def test_each_pair_sends_once_and_each_rank_in_one_pair_at_a_time(slots):
    rounds = wire.pairs_of(slots)
    for one in rounds:
        assert len(set(itertools.chain(*one))) == 2 * len(one)
    place = [(host, local) for host, count in enumerate(slots) for local in range(count)]
    expected = {
        (a, b)
        for a, b in itertools.combinations(range(sum(slots)), 2)
        if place[a][0] == place[b][0] or place[a][1] == place[b][1]  # within a host all, between hosts those of the same number
    }
    assert sorted(itertools.chain(*rounds)) == sorted(expected)


def test_a_slow_pair_is_named(capsys):
    pairs = [(a, b, 45.0) for a, b in itertools.chain(*wire.pairs_of([8, 8, 8]))]
    slow = pairs.index((3, 11, 45.0))
    pairs[slow] = (3, 11, 4.5)
    (said,) = doctor.show_sent({"backend": "nccl", "sizes": [(2**30, 0.01, 190.0)], "pairs": pairs}, hosts())
    assert said.host == "node-0"
    assert said.what == "4.50 GB/s between its rank 3 and rank 3 of node-1, where pairs between hosts usually have 45.00"
    shown = capsys.readouterr().out
    assert "1 GB       10.00 ms    190.00 GB/s" in shown
    assert next(line.split() for line in shown.splitlines() if line.startswith("node-")) == ["node-0", "45.00", "4.50", "45.00"]


@pytest.mark.slow
def test_this_machine_alone_and_mistakes(tmp_path):
    done = launch_script("doctor.sh", f"--out_dir={tmp_path}/a run", MASTER_PORT=str(free_port()))
    assert done.stdout.splitlines()[-1] == "all is well", done.stdout
    assert done.returncode == 0
    assert "all-reduce of 2 ranks over gloo" in done.stdout
    for arguments, expected in ((["nowhere"], "there is no hostfile at nowhere"), (["--out_dri=x"], "out_dri")):
        done = launch_script("doctor.sh", *arguments)
        assert done.returncode == 2
        assert expected in done.stdout
