"""A part of tests/faults.py for every CI run: a signal under the real launcher, the others on ranks that are forked.

All killed and a rank that hangs have tests of their own (test_runs, test_planted).
"""

import os
import subprocess

import faults
import pytest

pytestmark = pytest.mark.slow


CHOSEN = (faults.one_rank_killed, faults.sigterm, faults.full_disk, faults.damaged_file, faults.closed_stdout)


def can_mount(tmp_path) -> bool:
    """Whether the small file system of full_disk can be made here."""
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], capture_output=True).returncode:
        return False
    return subprocess.run(["umount", str(tmp_path)]).returncode == 0


def test_every_run_ends_as_the_undisturbed_one(tmp_path):
    (tmp_path / "mount").mkdir()
    chosen = [fault for fault in CHOSEN if fault is not faults.full_disk or can_mount(tmp_path / "mount")]
    results = faults.campaign(len(chosen), seed=7, folder=tmp_path, faults=chosen, forked=True)
    assert [result for result in results if result["wrong"]] == []
