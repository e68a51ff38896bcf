"""max_tokens_per_gpu: auto, on two ranks of which one has less memory."""

import json
import re

import pytest
from conftest import launch, rank_environment

from posttrain.training import auto_batch

pytestmark = pytest.mark.slow
ZERO3 = ("--ds_config=ds_configs/zero3.json", "--activation_checkpointing=none")


def fitted(wide: list[str], out, memory: float, *more: str):
    """Run SFT where one rank may take so many bytes more than it has at its start."""
    environment = rank_environment() | {"MORE": str(memory)}
    return launch("tests/fitted.py", *wide, *ZERO3, f"--out_dir={out}", "--max_tokens_per_gpu=auto", *more, env=environment)


def test_all_ranks_take_what_the_one_with_the_least_memory_can(wide, tmp_path):
    done = fitted(wide, tmp_path / "run", 0.7e9)
    assert done.returncode == 0, done.stdout
    tokens, taken, usable = re.search(
        r"auto: ([\d,]+) tokens \(the planner estimated [\d,]+\), which take ([\d.]+) of ([\d.]+) GB", done.stdout
    ).groups()
    tokens, taken, usable = int(tokens.replace(",", "")), float(taken), float(usable)
    assert (
        usable - 0.7 < taken <= usable
    )  # of which a CPU leaves some unused where other work makes its resident memory jump (0.7 seen, twice)
    assert tokens % auto_batch.STEP == 0 and tokens > 60  # the longest row; 1,536 on a quiet machine
    assert f"micro-batches of at most {tokens:,}" in done.stdout
    kept = json.loads((tmp_path / "run" / "run.json").read_text())["fitted"]
    assert kept["max_tokens_per_gpu"] == tokens
    assert kept["as"]["ranks"] == 2

    longer = fitted(
        wide, tmp_path / "run", 0.4e9, "--max_iters=4", "--lr_decay_iters=4", "--extend"
    )  # as found, although less would fit now
    assert longer.returncode == 0, longer.stdout
    assert "memory     max_tokens_per_gpu" not in longer.stdout
    assert f"micro-batches of at most {tokens:,}" in longer.stdout


def test_memory_that_is_never_enough(wide, tmp_path):
    refused = fitted(wide, tmp_path / "none", -1e12)
    assert refused.returncode == 2, refused.stdout
    assert "GB, and a rank has 0.0. Shard more (ds_config)" in refused.stdout
    assert not (tmp_path / "none").exists()


def test_what_is_found_is_whole_and_within_what_there_is():
    assert auto_batch._round_tokens(5000.0, 900, 8000) == 4992
    assert auto_batch._round_tokens(500.0, 900, 8000) == 900  # the longest example must fit
    assert auto_batch._round_tokens(9000.0, 900, 8000) == 8000


def test_small_trials_that_say_that_a_token_takes_nothing_do_not_lower_the_number_to_the_longest_row():
    held, a_token = 1e9, 250e3
    measured = [(450, held), (900, held + 50)]  # other memory was freed between the two
    tokens = tried = 1800
    while (peak := held + a_token * tokens) > held + a_token * 1500:
        tokens = auto_batch._round_tokens(auto_batch._fewer(tried, peak, held + a_token * 1500, measured), 60, 1800)
        assert tokens < tried
        tried = tokens
    assert tokens >= 1200
    assert auto_batch._fewer(1800, 2e9, 0.9e9, measured) == 900  # where none fitted, half as many
