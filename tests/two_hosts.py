"""The work of two_hosts.sh: makes the two hosts, runs SFT and DPO over them, and lets things fail. Prints a line for each claim."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import launch, metrics  # noqa: E402
from hosts import ADDRESSES, NAMES, Host, Hosts  # noqa: E402
from tiny import make_tiny  # noqa: E402

WATCHDOG = 30  # seconds
PATIENCE = 240


class World:
    """The hosts, the tiny world, and the runs on it."""

    def __init__(self, hosts: Hosts):
        self.hosts, self.folder = hosts, hosts.folder
        self.tiny = make_tiny(self.folder)

    def sft(self, out: str, *more: str) -> list[str]:
        paths = [f"--checkpoint_path={self.tiny.base}", f"--sft_data_dir={self.tiny.sft}", f"--out_dir={self.folder / out}"]
        numbers = ["--max_iters=6", "--global_batch_size=8", "--learning_rate=1e-2", "--max_tokens_per_gpu=400", "--dtype=float32"]
        how = ["--ds_config=ds_configs/zero3.json", "--save_interval=2", f"--watchdog_seconds={WATCHDOG}"]
        return [*paths, *numbers, *how, "--warmup_iters=2", "--eval_interval=3", *more]

    def dpo(self, out: str, model: str) -> list[str]:
        paths = [f"--sft_checkpoint_path={self.folder / model}/final", f"--dpo_data_dir={self.tiny.dpo}", f"--out_dir={self.folder / out}"]
        numbers = ["--max_iters=4", "--global_batch_size=8", "--learning_rate=3e-3", "--max_tokens_per_gpu=400", "--dtype=float32"]
        return [*paths, *numbers, "--min_lr=0", "--warmup_iters=0", "--ds_config=ds_configs/zero3.json", f"--watchdog_seconds={WATCHDOG}"]

    def hostfile(self, slots: int, *others: str) -> str:
        path = self.folder / f"hosts_{slots}_{len(others)}"
        path.write_text("".join(f"{name} slots={slots}  # as in hostfile.example\n" for name in (*NAMES, *others)))
        return str(path)

    def curve(self, out: str) -> list[float]:
        return [record[name] for record in metrics(self.folder / out) for name in ("loss", "grad_norm")]

    def yardstick(self) -> list[float]:
        """The curve of one host."""
        if not (self.folder / "one_host").exists():
            self.on_one_host("sft", *self.sft("one_host"))
        return self.curve("one_host")

    def on_one_host(self, script: str, *arguments: str) -> None:
        done = launch(f"posttrain/{script}.py", *arguments)
        assert done.returncode == 0, done.stdout


def end(process: subprocess.Popen) -> tuple[int, str]:
    output, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, output


def equal(seen: list[float], expected: list[float]) -> None:
    assert len(seen) == len(expected)
    off = max(abs(a - b) / max(1, abs(b)) for a, b in zip(seen, expected, strict=True))
    assert off < 1e-5, (off, seen, expected)


def sft_and_dpo_over_two_hosts(world: World) -> None:
    a, _ = world.hosts.hosts
    code, output = end(a.start("sft_multinode.sh", *world.sft("by_ssh"), HOSTFILE=world.hostfile(1)))
    assert code == 0, output
    equal(world.curve("by_ssh"), world.yardstick())
    world.on_one_host("dpo", *world.dpo("dpo_one_host", "one_host"))
    code, output = end(a.start("dpo_multinode.sh", *world.dpo("dpo_by_ssh", "by_ssh"), HOSTFILE=world.hostfile(2)))
    assert code == 0, output
    equal(world.curve("dpo_by_ssh"), world.curve("dpo_one_host"))


def without_ssh(world: World) -> None:
    """The same command on each host, two ranks on each."""
    started = [
        host.start("sft_multinode.sh", *world.sft("no_ssh"), HOSTFILE=world.hostfile(2), NODE_RANK=str(number))
        for number, host in enumerate(world.hosts.hosts)
    ]
    for code, output in map(end, started):
        assert code == 0, output
    equal(world.curve("no_ssh"), world.yardstick())


def wait_for_step(world: World, out: str, step: int, process: subprocess.Popen) -> None:
    deadline, file = time.monotonic() + PATIENCE, world.folder / out / "metrics.jsonl"
    while not file.is_file() or len(file.read_bytes().splitlines()) < step:
        assert process.poll() is None, end(process)[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def nothing_is_left(host: Host, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while left := host.shell("pgrep -af '[l]ocal_rank=' || true"):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


LONG = ("--max_iters=80", "--save_interval=10", "--eval_interval=0")


def a_link_that_goes_down(world: World) -> None:
    a, b = world.hosts.hosts
    process = a.start("sft_multinode.sh", *world.sft("link", *LONG), HOSTFILE=world.hostfile(1))
    wait_for_step(world, "link", 25, process)
    b.shell(f"ip link set {b.link} down")
    started = time.monotonic()
    code, output = end(process)
    print(f"    ended {time.monotonic() - started:.0f} s after the link")
    assert code != 0
    assert "rank 1 (node-b, pid" in output, output
    nothing_is_left(b, 3 * WATCHDOG)
    b.shell(f"ip link set {b.link} up")
    a.shell(f"for _ in {{1..60}}; do ssh -o ConnectTimeout=2 {b.name} true && exit; sleep 0.5; done; exit 1")  # it takes a moment
    code, output = end(a.start("sft_multinode.sh", *world.sft("link", *LONG), HOSTFILE=world.hostfile(1)))
    assert code == 0, output
    assert "continuing after step" in output
    world.on_one_host("sft", *world.sft("link_one_host", *LONG))
    equal(world.curve("link"), world.curve("link_one_host"))


def a_signal_saves(world: World) -> None:
    a, b = world.hosts.hosts
    process = a.start("sft_multinode.sh", *world.sft("stopped", *LONG), HOSTFILE=world.hostfile(1))
    wait_for_step(world, "stopped", 12, process)
    a.shell("pkill -TERM -f launch/multinode.py")
    code, output = end(process)
    assert code == 0, output
    assert "the same command goes on with step" in output, output
    for host in (a, b):
        nothing_is_left(host, 5)


def a_signal_while_ranks_start(world: World) -> None:
    """It is not lost: the run ends, and nothing is left."""
    a, b = world.hosts.hosts
    process = a.start("sft_multinode.sh", *world.sft("early", *LONG), HOSTFILE=world.hostfile(1))
    while "deepspeed.launcher.runner" not in a.shell("ps ax -o args"):
        time.sleep(0.1)
    a.shell("pkill -TERM -f launch/multinode.py")
    end(process)
    for host in (a, b):
        nothing_is_left(host, 5)
    seen = metrics(world.folder / "early") if (world.folder / "early" / "metrics.jsonl").exists() else []
    assert len(seen) < 80


def a_launcher_that_is_killed(world: World) -> None:
    a, b = world.hosts.hosts
    process = a.start("sft_multinode.sh", *world.sft("killed", *LONG), HOSTFILE=world.hostfile(1))
    wait_for_step(world, "killed", 12, process)
    a.shell("pkill -KILL -f '[m]ultinode.py|[l]auncher.runner|^pdsh|^ssh '")
    for host in (a, b):
        nothing_is_left(host, 2 * WATCHDOG)
    newest = max(path.name for path in (world.folder / "killed" / "checkpoints").glob("step_*"))
    assert newest == f"step_{metrics(world.folder / 'killed')[-1]['step']:06}", newest  # it was saved when it stopped


def refused(world: World, *expected: str, host: int = 0, code: int | None = None, **environment: str) -> None:
    """The run ends with each of these patterns in what it prints, without a trace of it left."""
    started = time.monotonic()
    process = world.hosts.hosts[host].start("sft_multinode.sh", *world.sft("refused"), **environment)
    seen, output = end(process)
    print(f"    ended after {time.monotonic() - started:.0f} s")
    assert seen == code if code is not None else seen != 0, (seen, output)
    for text in expected:
        assert re.search(text, output), output
    assert not (world.folder / "refused").exists()
    for one in world.hosts.hosts:
        nothing_is_left(one, 2 * WATCHDOG)


def a_host_that_cannot_be_reached(world: World) -> None:
    refused(world, "node-c cannot be reached by ssh", code=2, HOSTFILE=world.hostfile(1, "node-c"))


def a_host_that_was_not_started(world: World) -> None:
    expected = f"rank 1 (node-b) of 2 ranks did not connect to 10.77.0.1:29500 within {WATCHDOG} s; those of node-a did"
    refused(world, re.escape(expected), HOSTFILE=world.hostfile(1), NODE_RANK="0")


def a_first_host_that_was_not_started(world: World) -> None:
    expected = f"rank 1 on node-b cannot reach rank 0 at 10.77.0.1:29500 within {WATCHDOG} s. Start the same command on node-a"
    refused(world, expected, host=1, HOSTFILE=world.hostfile(1), NODE_RANK="1")


def a_host_with_other_code(world: World) -> None:
    b, code = world.hosts.hosts[1], ROOT / "posttrain" / "data" / "batches.py"
    (world.folder / "batches.py").write_text(code.read_text() + "\n# changed\n")
    b.shell(f"mount --bind {world.folder}/batches.py {code}")
    expected = "error: ranks [1] (on node-b) differ from rank 0 (on node-a) in their code, recipe or prepared data: 1 of"
    refused(world, re.escape(expected), "first code: posttrain/data/batches.py", HOSTFILE=world.hostfile(1))
    b.shell(f"umount {code}")


def a_wrong_interface(world: World) -> None:
    """One that does not exist, and one over which no other host can be reached."""
    for name, expected in (("eth9", "on node-a cannot connect to the other ranks"), ("lo", r"rank [01] \(node-[ab], pid")):
        refused(world, expected, "as in GLOO_SOCKET_IFNAME=eth0", HOSTFILE=world.hostfile(1), GLOO_SOCKET_IFNAME=name)


def slurm(world: World) -> None:
    """A cluster of the two hosts: munge, a slurmd on each, slurmctld on the first."""
    folder = world.folder / "slurm"
    folder.mkdir()
    lines = [
        *("ClusterName=posttrain", f"SlurmctldHost={NAMES[0]}", "SlurmUser=root", "AuthType=auth/munge", "MpiDefault=none"),
        *("ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "SelectType=select/linear", "ReturnToService=2"),
        *(
            f"StateSaveLocation={folder}",
            f"SlurmdSpoolDir={folder}/%n",
            f"SlurmdLogFile={folder}/%n.log",
            f"SlurmctldLogFile={folder}/ctld.log",
        ),
        *("SlurmctldPidFile=/run/slurmctld.pid", "SlurmdPidFile=/run/slurmd.pid", "PartitionName=all Nodes=ALL Default=YES"),
        *(f"NodeName={name} NodeAddr={address} CPUs=2" for name, address in zip(NAMES, ADDRESSES, strict=True)),
    ]
    (folder / "slurm.conf").write_text("".join(f"{line}\n" for line in lines))
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    for host, daemons in zip(world.hosts.hosts, ("slurmctld && slurmd", "slurmd"), strict=True):
        host.shell(f"mkdir -p /run/munge /etc/slurm; mount --bind {folder} /etc/slurm")
        files = f"--key-file={folder}/munge.key --log-file={folder}/munge_{host.name}.log --seed-file=/run/munge/seed"
        host.shell(f"munged --force {files} --pid-file=/run/munge/pid")
        host.shell(daemons)


def a_slurm_job(world: World) -> None:
    """sbatch as the script's head says: the curve of one host; a signal five minutes before the end, as scancel sends it, saves."""
    slurm(world)
    a, _ = world.hosts.hosts

    def submit(out: str, ranks: int, *arguments: str) -> subprocess.Popen:
        options = ["--wait", f"--output={world.folder}/{out}.log", "--nodes=2", f"--chdir={ROOT}"]
        environment = ["env", f"NUM_GPUS={ranks}", "OMP_NUM_THREADS=1", "DS_ACCELERATOR=cpu"]
        scripts = [f"{ROOT}/launch/slurm.sh", "launch/sft_multinode.sh"]
        command = a.command(*environment, "sbatch", *options, *scripts, *world.sft(out, *arguments))
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)

    code, output = end(submit("by_slurm", 2))
    assert code == 0, output + (world.folder / "by_slurm.log").read_text()
    equal(world.curve("by_slurm"), world.yardstick())
    process = submit("slurm_stopped", 1, *LONG)
    wait_for_step(world, "slurm_stopped", 12, process)
    a.shell("scancel --signal=USR1 $(squeue --noheader --format=%i)")
    code, output = end(process)
    log = (world.folder / "slurm_stopped.log").read_text()
    assert code == 0, output + log
    assert "the same command goes on with step" in log, log
    for host in world.hosts.hosts:
        nothing_is_left(host, 5)


def doctor(world: World, *arguments: str, **environment: str) -> tuple[int, str]:
    paths = [f"--checkpoint_path={world.tiny.base}", f"--sft_data_dir={world.tiny.sft}", f"--out_dir={world.folder}/runs/one"]
    return end(world.hosts.hosts[0].start("doctor.sh", *arguments, *paths, **environment))


def files_below(*folders: Path) -> dict[Path, int]:
    return {path: path.lstat().st_mtime_ns for folder in folders for path in folder.rglob("*") if ".git" not in path.parts}


def the_doctor_finds_nothing_and_changes_nothing(world: World) -> None:
    hostfile, before = world.hostfile(2), files_below(ROOT, world.folder)
    code, output = doctor(world, hostfile)
    assert code == 0, output
    print("".join(f"    {line}\n" for line in output.splitlines()), end="")
    assert output.splitlines()[-1] == "all is well"
    for text in ("node-a  0-1", "node-b  2-3", "10.77.0.2  posttrain1", "files of data", "all-reduce of 4 ranks over gloo", "32 MB"):
        assert text in output, (text, output)
    after = files_below(ROOT, world.folder)
    assert after == before, [str(path) for path in before.keys() | after.keys() if before.get(path) != after.get(path)]


def the_doctor_names_what_is_wrong(world: World) -> None:
    """Many at once, on two hosts and a third that does not exist; then a wrong interface, which the ranks run into."""
    a, b = world.hosts.hosts
    (code,), (package,) = (
        (ROOT / "posttrain" / "data").glob("batches.py"),
        Path(sys.prefix).glob("lib/python*/site-packages/numpy-*/METADATA"),
    )
    data = next(path for path in sorted(Path(world.tiny.sft).rglob("*")) if path.is_file())
    for path in (code, package, data):
        changed = world.folder / f"changed_{path.name}"
        changed.write_bytes(path.read_bytes().replace(b"Version: ", b"Version: 9.") + b"\n")
        b.shell(f"mount --bind {changed} {path}")
    b.shell(f"mkdir -p {world.folder}/runs; mount -t tmpfs -o size=2m tmpfs {world.folder}/runs; mount -o remount,size=64m /dev/shm")
    b.shell(f"ip link set {b.link} mtu 1400")
    library = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    b.serve(LD_PRELOAD=str(library), FAKETIME="+3600s", FAKETIME_DONT_FAKE_MONOTONIC="1")
    taken = subprocess.Popen(a.command(sys.executable, "-c", "import socket; s = socket.create_server(('', 29500)); s.accept()"))
    exit_code, output = doctor(world, world.hostfile(2, "node-c"))
    a.shell("pkill -f [c]reate_server")
    taken.wait()
    b.serve()
    b.shell(f"ip link set {b.link} mtu 1500; umount {world.folder}/runs {code} {package} {data}; mount -o remount,size=50% /dev/shm")
    print("".join(f"    {line}\n" for line in output.splitlines()), end="")
    assert exit_code == 1
    for text in (
        "node-c: cannot be reached by ssh",
        "node-b: code: posttrain/data/batches.py is ",
        "node-b: packages: numpy is 9.",
        f"node-b: data: {data.relative_to(world.tiny.sft)} is ",
        f"node-b: 2 MB are free in {world.folder}/runs (out_dir)",
        "node-b: 67 MB are free in /dev/shm",
        "node-b: its clock is 3600 s ahead",
        "node-b: packets of posttrain1 have at most 1400 bytes, elsewhere 1500",
        "node-a: port 29500, where ranks are to meet, is taken by pid",
        "9 to fix, first on node-c: see that it is up",
    ):
        assert text in output, (text, output)
    exit_code, output = doctor(world, HOSTFILE=world.hostfile(2), GLOO_SOCKET_IFNAME="lo")
    print("".join(f"    {line}\n" for line in output.splitlines()), end="")
    assert exit_code == 1
    for text in ("node-a: GLOO_SOCKET_IFNAME=lo, which does not lead to the other hosts", "node-a: the ranks cannot work together: rank"):
        assert text in output, (text, output)
    assert "3 to fix, first on node-a: unset GLOO_SOCKET_IFNAME" in output.splitlines()[-1], output


CLAIMS = [
    *(sft_and_dpo_over_two_hosts, without_ssh, a_link_that_goes_down, a_signal_saves, a_signal_while_ranks_start),
    *(a_launcher_that_is_killed, a_host_that_cannot_be_reached, a_host_that_was_not_started, a_first_host_that_was_not_started),
    *(a_host_with_other_code, a_wrong_interface, a_slurm_job, the_doctor_finds_nothing_and_changes_nothing, the_doctor_names_what_is_wrong),
]


def main(names: list[str]) -> None:
    hosts = Hosts()
    try:
        world = World(hosts)
        for claim in CLAIMS:
            if not names or claim.__name__ in names:
                started = time.monotonic()
                claim(world)
                print(f"{time.monotonic() - started:>5.0f} s  {claim.__name__.replace('_', ' ')}", flush=True)
    finally:
        hosts.close()


if __name__ == "__main__":
    main(sys.argv[1:])
