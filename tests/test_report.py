"""The report of runs is complete from their files alone, and works in a browser."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import yaml
from conftest import python

from posttrain.run import charts
from posttrain.run.report import read_runs
from posttrain.run.report import write as write_report

STEPS = 60


def make_run(folder, name: str, lr: float, kind: str = "sft"):
    """Write a run's files with invented numbers; return the run's folder."""
    run = folder / name
    (run / "final").mkdir(parents=True)
    facts = {"kind": kind, "total_steps": STEPS, "finished": {}, "parameters": 3_200_000, "ended": "2026-01-01T00:02:00"}
    start = {"from_step": 1, "when": "2026-01-01T00:00:00", "ranks": 2, "device": "CPU", "ds_config": "zero1"}
    start["states"] = {"weights": 4e8, "gradients": 2e8, "optimizer": 0.0}
    (run / "run.json").write_text(json.dumps(facts | {"starts": [start]}))
    model = {"sft": "checkpoint_path", "dpo": "sft_checkpoint_path"}[kind]
    (run / "recipe.yaml").write_text(yaml.safe_dump({model: "base", "learning_rate": lr, "out_dir": str(run), "dtype": "float32"}))
    data = {"counts": {"train": 1234, "validation": 12}, "rows": 1300, "sources": ["rows.jsonl"], "notes": ["a note"], "changes": {}}
    data |= {"tokens": {"per_epoch": 99_999, "trained_per_epoch": 1, "longest": 77}, "template_name": "chatml"}
    data["ledger"] = {"an exact copy of another row": {"rows": 54, "first": "rows.jsonl:7"}}
    (run / "data.json").write_text(json.dumps(data))
    lines = []
    for step in range(1, STEPS + 1):
        metrics = {"loss": 2 - 100 * lr * step, "grad_norm": 1.0, "learning_rate": lr, "step_ms": 1000, "tokens_per_second": 500}
        lines.append({"step": step, "split": "train", **metrics, "memory_gb": 1.5})
        if step % 20 == 0:
            lines.append({"step": step, "split": "eval", "loss": 2.1 - 100 * lr * step, "runtime": 2.0})
    lines[5]["loss"] = None  # it was not finite
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sample = {"prompt": "<script>alert(1)</script>", "tokens": 3, "stopped": True}
    answers = [{"step": step, "samples": [{**sample, "answer": f"{name} at {step} <b>&"}]} for step in (0, 20, 40, 60)]
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answers))
    if lr > 0.005:
        finding = {"step": 3, "name": "loss rises", "what": "the loss rises", "todo": "Lower it"}
        (run / "health.jsonl").write_text(json.dumps(finding) + "\n")
    return run


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("some runs")
    first, second = make_run(folder, "slow", 0.001), make_run(folder, "fast", 0.01)
    results = {model: {"stops": {"value": v, "low": v / 2, "high": 1, "n": 9}} for model, v in (("base", 0.1), ("sft", 0.8))}
    results["base"]["stops"]["lower_is_better"] = True
    (folder / "results.json").write_text(json.dumps(results))
    done = write(first, second, f"--results={folder}/results.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"report: {folder}/report/report.html\n"
    return folder / "report" / "report.html"


def write(*arguments) -> subprocess.CompletedProcess:
    return python("posttrain/report.py", *arguments, separate=True, cwd="/")


def test_it_holds_everything_and_needs_nothing(page):
    html = page.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)', html)
    assert not re.findall(r"(?:https?:)?//(?!www\.w3\.org)[a-z]", re.sub(r"// (a click|empty cells).*", "", html))
    for expected in (
        "1,234 rows for training",
        "an exact copy of another row",
        "a note",
        "loss rises",
        "Lower it",
        "60 in 1:00",
        "weights 0.4, gradients 0.2",
    ):
        assert expected in html, expected
    assert "<td>stops <small>lower is better</small></td>" in html
    assert "(lower is better)" in html  # at the bars
    assert "3 in 0:06" in html  # validations
    assert "0:54" in html  # all else of 120 s
    assert "<script>alert" not in html
    assert "fast at 60 &lt;b&gt;&amp;" in html
    assert {path.name for path in page.parent.glob("*.png")} >= {"loss.png", "results.png", "learning_rate.png"}


def test_what_differs_between_recipes_comes_first_and_is_marked(page):
    rows = re.findall(r"<tr( class=\"differs\")?><td>(\w+)</td>", page.read_text().split("<h2>Recipe")[1])
    assert rows[0] == (' class="differs"', "learning_rate")
    assert [name for mark, name in rows if mark] == ["learning_rate"]


def test_ids_of_pictures_do_not_meet(page):
    html = page.read_text()
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    for used in re.findall(r'(?:xlink:href="|url\()#([^")]+)', html):
        assert used in ids


def test_a_curve_keeps_its_shape_when_thinned():
    steps = np.arange(1, 10_001.0)
    values = np.sin(steps / 1000)
    values[10] = np.nan
    few_steps, few = charts.thinned(steps, values)
    assert len(few) == charts.POINTS
    assert np.abs(few - np.sin(few_steps / 1000)).max() < 0.01
    assert charts.smoothed(np.array([1.0, 2, 3, 4]), 2).tolist() == [1, 1.5, 2.5, 3.5]


def test_mistakes_get_one_message(page, tmp_path):
    runs = page.parents[1]
    shutil.copytree(runs, tmp_path / "runs", ignore=shutil.ignore_patterns("report"))
    for arguments, expected in (
        ([tmp_path / "nowhere"], "nowhere is not a run: it has no run.json"),
        ([tmp_path / "runs"], "is not a run: it has no run.json; there are"),
        ([tmp_path / "runs" / "slow", f"--results={tmp_path}/runs/slow/run.json"], "where an object should be"),
    ):
        done = write(*arguments)
        assert done.returncode == 2
        assert expected in done.stderr
        assert "Traceback" not in done.stderr


def test_a_report_replaces_a_report_and_nothing_else(page, tmp_path):
    run, report, other = page.parents[1] / "slow", tmp_path / "report", tmp_path / "other"
    runs = read_runs([run])
    other.mkdir()
    (other / "report.html").write_text("<!doctype html>mine")
    (tmp_path / "file").write_text("mine")
    for output, said in ((other, "holds other things"), (run, "holds other things"), (tmp_path / "file", "is not a folder")):
        before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
        with pytest.raises(ValueError, match=f"{output} {said}.*give another --output"):
            write_report(runs, {}, output)
        assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    report.mkdir()
    for _ in range(2):
        assert write_report(runs, {}, report).is_file()


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_run_that_has_just_begun_has_a_report(tmp_path, kind):
    run = make_run(tmp_path, "young", 0.001, kind)
    for name in ("metrics.jsonl", "samples.jsonl", "data.json"):
        (run / name).unlink()
    (run / "final").rmdir()
    done = write(run)
    assert done.returncode == 0, done.stderr
    assert f"{kind.upper()} of base, 0 of 60 steps" in " ".join((tmp_path / "report" / "report.html").read_text().split())


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_in_a_browser(page, browser, width, scheme):
    tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: said.append(request.url) if not request.url.startswith(("file:", "data:")) else None)
    tab.goto(page.as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") <= width  # wide tables scroll by themselves
    assert tab.evaluate("[...document.querySelectorAll('svg')].every(svg => svg.getBoundingClientRect().width > 200)")

    rows = tab.locator("h2:has-text('Last measured') + .scroll tbody tr td:first-child")
    assert rows.all_inner_texts() == ["slow", "fast"]
    loss = tab.get_by_role("button", name="eval/loss")
    loss.click()
    assert rows.all_inner_texts() == ["fast", "slow"]
    loss.click()
    assert rows.all_inner_texts() == ["slow", "fast"]
    assert tab.locator("th[aria-sort=descending]").inner_text() == "eval/loss"

    between = tab.locator("summary:has-text('2 in between')").first
    hidden = tab.get_by_text("slow at 40").first
    assert not hidden.is_visible()
    between.click()
    assert hidden.is_visible()
    assert tab.locator("summary").first.inner_text() == "<script>alert(1)</script>"
    assert said == []
    tab.close()
