"""A part of tests/faults.py for every CI run: each way of being hit, once."""

import os
import subprocess

import faults
import pytest

pytestmark = pytest.mark.slow


def can_mount(tmp_path) -> bool:
    """Whether the small file system of full_disk can be made here."""
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], capture_output=True).returncode:
        return False
    return subprocess.run(["umount", str(tmp_path)]).returncode == 0


def test_every_run_ends_as_the_undisturbed_one(tmp_path):
    (tmp_path / "mount").mkdir()
    chosen = [fault for fault in faults.FAULTS if fault is not faults.full_disk or can_mount(tmp_path / "mount")]
    results = faults.campaign(len(chosen), seed=7, folder=tmp_path, faults=chosen)
    assert [result for result in results if result["wrong"]] == []
