"""What --dataset and --source name: datasets of the hub and places of one's own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.folders import find_files

ROOT = Path(__file__).resolve().parents[1]


def test_a_source_that_is_not_there_says_what_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; expected a JSON"):
        find_files(str(tmp_path / "nowhere"))
    (tmp_path / "notes.md").write_text("hello")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(FileNotFoundError, match=r"pipe.jsonl is a pipe or a device; expected a JSON"):
        find_files(str(tmp_path / "pipe.jsonl"))
    (tmp_path / "pipe.jsonl").unlink()
    for place, seen in ((tmp_path, "holds notes.md; expected"), (tmp_path / "notes.md", "has a name of no known kind; expected a JSON")):
        with pytest.raises(FileNotFoundError, match=seen):
            find_files(str(place))


@pytest.mark.slow
def test_a_hub_that_is_out_of_reach_is_one_message(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    arguments = ["--dataset", "alpaca", "--tokenizer", str(ROOT / "launch/quickstart/base"), "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "data_prep/prepare_sft.py"), *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "tatsu-lab/alpaca (train) cannot be loaded from the local cache, and the hub cannot be reached" in done.stderr
    assert "give the same rows with --source" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
