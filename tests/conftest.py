"""Fixtures shared by the tests."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data, at $POSTTRAIN_SHARED_DATA or ../shared/data; tests that need it are skipped where it is missing."""
    folder = Path(os.environ.get("POSTTRAIN_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}; set POSTTRAIN_SHARED_DATA")
    return folder
