"""A part of tests/faults.py for every CI run: a signal under the real launcher, the others on ranks that are forked.

All killed and a rank that hangs have tests of their own (test_runs, test_planted).
"""

import os
import subprocess

import faults
import kills
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


def test_killed_at_its_file_operations_a_run_ends_as_the_undisturbed_one(tmp_path):
    """At every sixth of them; python tests/kills.py takes them all."""
    operations, wrong = kills.campaign(tmp_path, 6)
    assert not wrong
    assert len(operations) > 100
    assert {name.split()[0] for name in operations} == {"0", "1"}  # both ranks write
