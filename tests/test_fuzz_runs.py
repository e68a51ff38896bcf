"""Files of a run, damaged at random: what opens the run goes on with the same, says what was lost, or names the file in one sentence."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import launch
from fuzzed import damage, ended, files_of, process_group, put, restore, tries
from hypothesis import given
from hypothesis import strategies as st

from posttrain.common import terminal
from posttrain.data import tokenization
from posttrain.engine.checkpoints import Checkpoints
from posttrain.model import assistant
from posttrain.model.convert import _history
from posttrain.model.forms import newest
from posttrain.model.weights import digest, hash_weights
from posttrain.recipes.reading import load_recipe_of
from posttrain.run import report, stored
from posttrain.run.directory import Run
from posttrain.run.health import Facts
from posttrain.run.resume import already_finished, resolve

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """The folder of a run, its command line, and its files when it was half done and when it was finished."""
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    (folder.parent / "prompts").write_text("pa ke\nmu\n")
    paths = [f"--checkpoint_path={tiny.base}", f"--sft_data_dir={tiny.sft}", f"--out_dir={folder}"]
    numbers = ["--max_iters=4", "--batch_size=4", "--gradient_accumulation_steps=2", "--learning_rate=1e-2", "--dtype=float32"]
    arguments = [*paths, *numbers, "--eval_interval=2", "--save_interval=2", f"--sample_prompts={folder.parent}/prompts"]
    done = launch("posttrain/sft.py", *arguments, ranks=1)
    assert done.returncode == 0, done.stdout
    for path in folder.glob("tensorboard/*"):
        path.unlink()
    finished = files_of(folder)
    facts = stored.read_facts(folder)
    stored.write_facts(folder, {name: value for name, value in facts.items() if name not in ("finished", "ended")})
    shutil.rmtree(folder / "final")
    return SimpleNamespace(folder=folder, arguments=arguments, half=files_of(folder), finished=finished)


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory):
    """A process group of one, and no words of libraries."""
    assistant.quiet_libraries()
    with process_group(tmp_path_factory.mktemp("fuzz")):
        yield


def go_on(runs) -> tuple:
    """Do what the same command does before its first step; return what decides the rest of the run, and what was said."""
    said: list[str] = []
    terminal.console = terminal._Terminal(highlight=False, soft_wrap=True)
    recipe = resolve(load_recipe_of("sft", runs.arguments), 1)
    assert not already_finished(recipe, 0)
    run = Run(recipe, 0, runs.inputs)
    checkpoints = Checkpoints(SimpleNamespace(), runs.folder / "checkpoints", 2, said.append, {})
    found = checkpoints.newest()
    checkpoints.forget_after(found.facts["step"])

    def describe(folder: Path) -> None:
        for name, content in runs.half.items():
            if name.startswith("model/"):
                (runs.folder / name).write_bytes(content)

    manifest = {"counts": {"train": 1, "validation": 0}, "rows": 1, "sources": [], "ledger": {}, "changes": {}, "notes": []}
    manifest["tokens"] = {"per_epoch": 1, "trained_per_epoch": 1, "longest": 1}
    run.say = said.append
    run.start(found.facts["step"] + 1, 4, describe_model=describe, manifest=manifest, facts=Facts(1, 1, 0, 1.0, 1.0), states={})
    run.has_looked(2)
    run.close()
    return (recipe.model_dump(), found.facts, stored.files_in(runs.folder / "model")), said


def ask(runs) -> tuple:
    """Load what is served of the run, and return what decides its answers."""
    place = newest(str(runs.folder))
    one = assistant.load(place)
    _history(Path(place))
    about = (one.system_prompt, one.stops, one.context, one.has_template, one.chat and one.chat.hash)
    return digest(hash_weights(one.model)), tokenization.fingerprint(one.tokenizer), about


def show(runs) -> None:
    """Read what the report does."""
    (run,) = report.read_runs([runs.folder])
    report.table([run]), report.cost(run), report.differences([run]), report.answers([run])
    assert run.state and run.steps >= 0


@pytest.fixture(scope="module")
def whole(runs) -> dict:
    """What the undamaged run gives."""
    restore(runs.folder, runs.half)
    runs.inputs = stored.read_facts(runs.folder)["inputs"]
    expected = {"go_on": go_on(runs)[0]}
    for form in ("half", "finished"):
        restore(runs.folder, getattr(runs, form))
        show(runs)
        expected[form] = ask(runs)
    return expected


def outcome(runs, form: str, action, name: str, *how):
    """Return what an action gives with a damaged file; None where that was told, or is no damage."""
    files = getattr(runs, form)
    restore(runs.folder, files)
    put(runs.folder, files, name, *how)
    return None if (runs.folder / name).read_bytes() == files[name] else ended(lambda: action(runs), runs.folder)


@given(st.data())
@tries(500)
def test_a_damaged_run_goes_on_alike_or_is_named(runs, whole, data):
    form, action = data.draw(st.sampled_from([("half", go_on), ("half", go_on), ("half", ask), ("finished", ask), ("finished", show)]))
    name, *how = data.draw(damage({name: content for name, content in getattr(runs, form).items() if not name.startswith("tensorboard")}))
    found = outcome(runs, form, action, name, *how)
    if action is ask and found is not None:
        assert found == whole[form], f"{name} is damaged, and another answer is served without a word"
    elif action is go_on and found is not None:
        state, said = found
        lost = [line for line in said if "damaged" in line or "was written anew" in line or "cannot be read" in line]
        assert state == whole["go_on"] or lost, f"{name} is damaged, and the run goes on otherwise"


def test_a_changed_value_that_decides_the_result_is_named(runs, whole):
    """One that nothing else would show: the command does not say it, and what is read is right of its kind."""
    content = runs.half["recipe.yaml"]
    place = content.index(b"global_batch_size: 8") + len(b"global_batch_size: ")
    assert outcome(runs, "half", go_on, "recipe.yaml", "flip", place, 0) is None  # 9
    weights = len(runs.finished["final/model.safetensors"]) - 1
    assert outcome(runs, "finished", ask, "final/model.safetensors", "flip", weights, 0) is None
    assert outcome(runs, "finished", ask, "final/config.json", ("rms_norm_eps",), 0.5) is None
