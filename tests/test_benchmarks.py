"""The benchmarks still run, and count as they say. What they measure is no test's business."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import dpo, models, sft  # noqa: E402
from benchmarks.side_by_side import as_text, committed, make_world, model_flops, run_once, summarise, table  # noqa: E402


def test_flops_of_qwen3_1_7b():
    """11.03 GFLOP a token at 2,048 tokens, by hand: 1.409 billion weights in 28 layers, 0.311 in the head, and attention."""
    assert model_flops(sft.QWEN3_1_7B, 2048) == pytest.approx(11.03e9, rel=1e-3)
    assert model_flops(sft.QWEN3_1_7B, 0) == 6 * (1_409_286_144 + 311_164_928)


def test_ratios_are_taken_within_a_round():
    mine, theirs = ([{"tokens_per_second": rate, "peak_mb": 1.0} for rate in rates] for rates in ((10, 20, 30), (5, 5, 10)))
    assert summarise(mine, theirs, "tokens_per_second")["times_faster"] == [3.0, 2.0, 4.0]
    assert summarise([], theirs, "tokens_per_second") == {"tokens_per_second": 5, "peak_mb": 1.0}
    assert as_text({"runs": [{"step_seconds": [0.1, 2]}]}) == '{\n  "runs": [\n    {\n      "step_seconds": [0.1, 2]\n    }\n  ]\n}\n'


def test_the_table_of_model_folders_is_that_of_its_file():
    cases = json.loads((ROOT / "benchmarks" / "results" / "model_folders.json").read_text())["cases"]
    text = (ROOT / "docs" / "correctness.md").read_text()
    rows = "\n".join(f"| {case['case']} | {case['before']} | {case['after']} |" for case in cases)
    assert f"| folder | before | now |\n|---|---|---|\n{rows}\n\n" in text


def test_the_table_of_families_is_that_of_its_file():
    rows = json.loads((ROOT / "benchmarks" / "results" / "models.json").read_text())["families"]
    assert models.BEGIN + models.table(rows) + models.END in (ROOT / "docs" / "models.md").read_text()
    numbers = [models.verdict(row) for row in rows]
    assert numbers.count("packed") >= 90
    assert numbers.count("packed") + numbers.count("a row at a time") >= 105


@pytest.mark.slow
def test_families_are_tried_through_the_real_commands(tmp_path):
    """One whose text part has no class of its own, and one that is not packed."""
    command = [sys.executable, str(ROOT / "benchmarks" / "models.py"), "--out", str(tmp_path), "qwen2_5_vl", "bloom"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=500)
    assert done.returncode == 0, done.stdout
    rows = json.loads((tmp_path / "models.json").read_text())["families"]
    assert {row["family"]: models.verdict(row) for row in rows} == {"bloom": "a row at a time", "qwen2_5_vl": "packed"}
    assert all(row["pairs_differ"] < models.CURVE for row in rows)


def test_the_tables_in_the_texts_are_those_of_the_result_files():
    files = committed()
    assert files
    assert table(files) in (ROOT / "docs" / "speed.md").read_text()
    speed = (ROOT / "README.md").read_text().split("## Speed")[1].split("## Layout")[0]
    rows = [row.removeprefix("| ").removesuffix(" |").split(" | ") for row in re.findall("^\\| [SD].*$", speed, re.M)]
    long = [row.split(" | ") for row in table(files).splitlines()[2:]]
    assert len(rows) == len(files)
    for results in files:  # a row of the README: posttrain beside TRL's fastest setting
        unit = "pairs_per_second" if results["race"]["kind"] == "dpo" else "tokens_per_second"
        fastest = max((name for name in results["summary"] if name.startswith("trl")), key=lambda name: results["summary"][name][unit])
        settings = [results["contestants"][name]["settings"] for name in (next(iter(results["summary"])), fastest)]
        (_, _, mine, _, _), (_, _, theirs, _, factor) = [
            row for one in settings for row in long if row[0][2:] == results["race"]["shown"] and row[1] == one
        ]
        assert any(row[1:3] == [mine, theirs] and row[3].startswith(factor.split(")")[0]) for row in rows), (mine, theirs, factor)
    failed = {**files[0], "runs": {**files[0]["runs"], "ours": []}}
    failed["summary"] = {name: {k: v for k, v in values.items() if k != "times_faster"} for name, values in files[0]["summary"].items()}
    assert "nan" in table([failed])  # ours did not run, and the rest is shown all the same


@pytest.mark.slow
@pytest.mark.parametrize(
    ("race", "contestants"),
    [(sft.RACES["dry"], [sft.ON_GPU_CONTESTANTS[0], sft.TRL]), (dpo.RACES["ultrafeedback_dry"], [dpo.SMALL])],
    ids=["sft", "dpo"],
)
def test_a_dry_race_comes_through(race, contestants, tmp_path):
    make_world(race, tmp_path)
    for contestant in contestants:
        result = run_once(race, contestant, tmp_path)
        assert isinstance(result, dict), result
        assert len(result["step_seconds"]) == race.steps - 1


@pytest.mark.slow
def test_a_rival_that_packs_its_rows_into_fewer_steps_is_measured_all_the_same(tmp_path):
    race = replace(sft.RACES["dry"], steps=5)
    make_world(race, tmp_path)
    packs = next(one for one in sft.CONTESTANTS["cpu"] if one.name == "trl_packing")
    result = run_once(race, replace(packs, options=packs.options | {"per_device_train_batch_size": 6}), tmp_path)
    assert isinstance(result, dict), result
    assert 2 <= len(result["step_seconds"]) < race.steps - 1
