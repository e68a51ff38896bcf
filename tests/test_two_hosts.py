"""Part of two_hosts.sh, where it can run: root on Linux, and network namespaces that a cable can join."""

import os
import shutil
import subprocess

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow
CABLE = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "sh", "-c", "ip link add name one type veth peer name other"]
CHOSEN = ["sft_and_dpo_over_two_hosts", "a_host_that_cannot_be_reached"]


def _can_run() -> bool:
    if os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "ip", "apt-get"))):
        return False
    return subprocess.run(CABLE, capture_output=True).returncode == 0


def test_the_hosts_do_as_one_and_faults_are_named():
    if not _can_run():
        pytest.skip("needs root, apt-get, and leave to join network namespaces; elsewhere: bash tests/two_hosts.sh")
    done = subprocess.run(["bash", ROOT / "tests" / "two_hosts.sh", *CHOSEN], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    for claim in CHOSEN:
        assert claim.replace("_", " ") in done.stdout
