"""Two hosts on one machine: network namespaces that a virtual cable joins, each with processes, mounts, a name and a sshd of its own."""

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMES, ADDRESSES, CABLE = ("node-a", "node-b"), ("10.77.0.1", "10.77.0.2"), "posttrain"


class Host:
    """Namespaces for network, processes, mounts and name; a sshd; a hosts file and keys of its own."""

    def __init__(self, number: int, folder: Path):
        self.name, self.address, self.folder = NAMES[number], ADDRESSES[number], folder
        self.link = f"{CABLE}{number}"
        separate = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.holder = subprocess.Popen([*separate, "sleep", "infinity"])
        while not (children := Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children").read_text().split()):
            time.sleep(0.02)
        self.pid = int(children[0])
        self.shell(f"hostname {self.name}; mount -t tmpfs tmpfs /dev/shm; mount -t tmpfs tmpfs /run; mkdir /run/sshd; ip link set lo up")
        self.shell(f"mount --bind {folder}/hosts /etc/hosts; mkdir -p /root/.ssh; mount --bind {folder}/ssh /root/.ssh")

    def command(self, *words: str) -> list[str]:
        return ["nsenter", "--target", str(self.pid), "--net", "--uts", "--mount", "--pid", *words]

    def shell(self, text: str) -> str:
        return subprocess.check_output(self.command("bash", "-euc", text), text=True)

    def serve(self, **environment: str) -> None:
        """Answer ssh, with an environment for what it starts."""
        self.shell("pkill -x sshd || true")
        settings = ["UsePAM=no", "PasswordAuthentication=no", f"ListenAddress={self.address}"]
        settings += ["SetEnv " + " ".join(f"{name}={value}" for name, value in environment.items())] * bool(environment)
        options = [word for setting in settings for word in ("-o", setting)]
        subprocess.run(self.command("/usr/sbin/sshd", "-f", "/dev/null", "-h", f"{self.folder}/ssh/id", *options), check=True)

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen:
        """A launch script, as a user of this host."""
        merged = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        clean = {"PATH": os.environ["PATH"], "HOME": "/root", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | environment
        command = self.command("bash", str(ROOT / "launch" / script), *map(str, arguments))
        return subprocess.Popen(command, env=clean, cwd=self.folder, start_new_session=True, **merged)


class Hosts:
    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="posttrain_two_hosts_"))
        keys = self.folder / "ssh"
        keys.mkdir(mode=0o700)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", keys / "id"], check=True)
        public = (keys / "id.pub").read_text()
        (keys / "authorized_keys").write_text(public)
        (keys / "known_hosts").write_text("".join(f"{name},{address} {public}" for name, address in zip(NAMES, ADDRESSES, strict=True)))
        (keys / "config").write_text(f"IdentityFile {keys}/id\n")
        for file in keys.iterdir():
            file.chmod(0o600)
        lines = [f"{address} {name}\n" for name, address in zip(NAMES, ADDRESSES, strict=True)]
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines) + "10.77.0.9 node-c\n")  # which does not exist
        self.hosts = [Host(number, self.folder) for number in range(2)]
        a, b = self.hosts
        subprocess.run(
            ["ip", "link", "add", a.link, "netns", str(a.pid), "type", "veth", "peer", "name", b.link, "netns", str(b.pid)], check=True
        )
        for host in self.hosts:
            host.shell(f"ip address add {host.address}/24 dev {host.link}; ip link set {host.link} up")
            host.serve()

    def close(self) -> None:
        for host in self.hosts:
            host.holder.kill()  # and with it, all that runs there
            host.holder.wait()
        shutil.rmtree(self.folder)
