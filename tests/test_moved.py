"""A run whose model or data was moved, or is gone, goes on bit for bit; one whose RUN/model is damaged is mended or refused."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import launch, metrics, python
from safetensors.torch import load_file, save_file

from posttrain.model.forms import find_model, newest

pytestmark = pytest.mark.slow
CURVE = ("step", "loss", "grad_norm", "learning_rate")


@pytest.fixture(scope="module")
def place(tiny, tmp_path_factory) -> Path:
    """A folder with a model, data of both kinds, a whole run of each kind, and the same runs stopped after step 2."""
    folder = tmp_path_factory.mktemp("moved")
    for name in ("base", "sft", "dpo"):
        shutil.copytree(getattr(tiny, name), folder / name)
    for kind in ("sft", "dpo"):
        done = train(folder, kind, f"{kind}_whole")
        assert done.returncode == 0, done.stdout
        half = Path(shutil.copytree(folder / f"{kind}_whole", folder / f"{kind}_half"))
        shutil.rmtree(half / "final")
        shutil.rmtree(half / "checkpoints" / "step_000004")
    return folder


def train(folder: Path, kind: str, name: str, *more: str):
    keys = {"sft": ("checkpoint_path", "sft_data_dir"), "dpo": ("sft_checkpoint_path", "dpo_data_dir")}[kind]
    given = dict(zip(keys, ("base", kind), strict=True)) | {"out_dir": name, "max_iters": "4", "global_batch_size": "8", "samples": "0"}
    given |= {"learning_rate": "1e-2", "dtype": "float32", "save_interval": "2", "eval_interval": "2"}
    given |= {"reference": "precompute"} if kind == "dpo" else {}
    given |= dict(option.split("=", 1) for option in more)
    return launch(f"posttrain/{kind}.py", *(f"--{key}={value}" for key, value in given.items()), ranks=1, cwd=folder)


@pytest.fixture
def half(place, tmp_path):
    """Makes a run of a kind, stopped after step 2, in a copy of the folder."""
    return lambda: Path(shutil.copytree(place, tmp_path / "place"))


def same_as_undisturbed(folder: Path, kind: str, done) -> None:
    """The run has gone on from its checkpoint to the curve and the weights of the whole one."""
    assert done.returncode == 0, done.stdout
    assert "continuing after step 2" in done.stdout
    runs = [folder / f"{kind}_{which}" for which in ("half", "whole")]
    for split in ("train", "eval"):
        mine, whole = ([[record.get(name) for name in CURVE] for record in metrics(run, split)] for run in runs)
        assert mine == whole
    mine, whole = (run / "final" / "model.safetensors" for run in runs)
    assert mine.read_bytes() == whole.read_bytes()


def test_paths_to_the_same_content_change_nothing(half):
    folder = half()
    (folder / "models").mkdir()
    (folder / "base").rename(folder / "models" / "qwen")
    done = train(folder, "sft", "sft_half", "checkpoint_path=models/qwen/", f"sft_data_dir={folder}/sft", "tokenizer=./models/qwen")
    same_as_undisturbed(folder, "sft", done)
    assert "moved      checkpoint_path: base -> models/qwen/, the same content" in done.stdout
    assert "moved      sft_data_dir" not in done.stdout  # only spelt otherwise
    assert f"sft_data_dir: {folder}/sft\n" in (folder / "sft_half" / "recipe.yaml").read_text()


def test_another_content_at_another_path_is_refused(half):
    folder = half()
    (folder / "base").rename(folder / "other")
    weights = load_file(folder / "other" / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, folder / "other" / "model.safetensors", metadata={"format": "pt"})
    done = train(folder, "sft", "sft_half", "checkpoint_path=other")
    assert done.returncode == 2
    assert "error: model changed since sft_half began (checkpoint_path: base -> other)" in done.stdout


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_run_goes_on_without_its_model(half, kind):
    """Weights, tokenizer and architecture are the run's own; DPO's reference is precomputed. A newer checkpoint is damaged."""
    folder = half()
    shutil.rmtree(folder / "base")
    damaged = shutil.copytree(folder / f"{kind}_whole" / "checkpoints" / "step_000004", folder / f"{kind}_half/checkpoints/step_000004")
    next(damaged.glob("*_optim_states.pt")).write_bytes(b"")
    done = train(folder, kind, f"{kind}_half")
    same_as_undisturbed(folder, kind, done)
    assert f"base is gone; the run goes on from {kind}_half/checkpoints/step_000002" in done.stdout
    assert "base" in (folder / f"{kind}_half" / "final" / "README.md").read_text()


def test_what_needs_the_model_that_is_gone_is_refused(half):
    folder = half()
    shutil.rmtree(folder / "base")
    for kind, name, more, message in (
        ("dpo", "dpo_half", ["reference=beside"], "the model at base is gone, and the reference needs its weights"),
        ("sft", "sft_half", ["replay_step=1"], "the model at base is gone, and there is no checkpoint before step 1"),
        ("sft", "new", [], "there is no model at base"),
    ):
        done = train(folder, kind, name, *more)
        assert done.returncode == 2, done.stdout
        assert f"error: {message}" in done.stdout


def test_a_run_without_its_checkpoints_does_not_begin_anew_without_a_word(half):
    folder = half()
    shutil.rmtree(folder / "sft_half" / "checkpoints" / "step_000002")
    before = (folder / "sft_half" / "metrics.jsonl").read_bytes()
    done = train(folder, "sft", "sft_half")
    assert done.returncode == 2, done.stdout
    assert "error: no checkpoint is left in sft_half/checkpoints, so the run would start again at step 1. Restore one" in done.stdout
    assert (folder / "sft_half" / "metrics.jsonl").read_bytes() == before


def test_a_damaged_description_of_the_model_is_mended_from_the_model_or_refused(half):
    folder = half()
    config = folder / "sft_half" / "model" / "config.json"
    written = config.read_text()
    config.write_text(written.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.5'))
    (folder / "base").rename(folder / "away")
    done = train(folder, "sft", "sft_half")
    assert done.returncode == 2
    assert f"error: {config.relative_to(folder)} is not what was written, and the model at base is gone" in done.stdout
    done = python("posttrain/convert.py", "sft_half/checkpoints/step_000002", "converted", cwd=folder)
    assert done.returncode == 2
    assert "config.json is not what was written" in done.stdout
    (folder / "away").rename(folder / "base")
    done = train(folder, "sft", "sft_half")
    same_as_undisturbed(folder, "sft", done)
    assert f"warning  {config.relative_to(folder)} is not what was written: sft_half/model was written anew" in done.stdout
    assert config.read_text() == written
    assert json.loads((folder / "sft_half" / "final" / "config.json").read_text())["rms_norm_eps"] == 1e-6


def test_a_checkpoint_may_be_named_by_a_link_and_its_folder_means_the_newest(half, monkeypatch):
    folder = half()
    monkeypatch.chdir(folder)
    Path("best_link").symlink_to("sft_half/checkpoints/step_000002")
    find_model("best_link", "")
    assert newest("sft_half/checkpoints") == "sft_half/checkpoints/step_000002"
    with pytest.raises(FileNotFoundError, match="name one of them, of which sft_half/checkpoints/step_000002 is the newest"):
        find_model("sft_half/checkpoints", "")
    done = python("posttrain/convert.py", "best_link", "converted", cwd=folder)
    assert done.returncode == 0, done.stdout
