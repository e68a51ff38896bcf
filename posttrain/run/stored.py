"""Reads what a run's directory holds about the run, and says which file, and which line of it, is damaged. Imports no torch."""

import json
import os
import re
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, Field, model_validator

from posttrain.common import files
from posttrain.common.records import Record, check_record

ADVICE = "Restore it from a copy. Without one, start a new run with another --out_dir; it can begin from this one's final/ or a checkpoint"
Step = Annotated[int, Field(ge=0, lt=2**63)]
Moment = Annotated[str, AfterValidator(datetime.fromisoformat)]


def _inside(name: str) -> str:
    """Refuse the name of a file of a folder that would lead out of it; whoever reads run.json writes and reads under these names."""
    if os.path.isabs(name) or ".." in Path(name).parts or os.path.normpath(name) != name or name == "." or "\0" in name:
        raise ValueError("expected the path of a file within the folder, without '..'")
    return name


Written = dict[Annotated[str, AfterValidator(_inside)], dict]  # size and checksum of each file of a folder, by its path there


class _Start(Record):
    """A start of the run."""

    when: Moment
    ranks: int
    device: str
    ds_config: str
    states: dict[str, float]


class _Fitted(Record):
    """The value that max_tokens_per_gpu: auto has found, and the setting in which it was."""

    setting: dict = Field(alias="as")
    max_tokens_per_gpu: int


class _Layout(Record):
    """What ds_config: auto and activation_checkpointing: auto have chosen, and the setting in which it was."""

    setting: dict = Field(alias="as")
    ds_config: str
    activation_checkpointing: Literal["none", "selective", "full", "offload"]
    max_tokens_per_gpu: int | Literal["auto"]


class _Facts(Record):
    """run.json."""

    kind: Literal["sft", "dpo"] = "sft"
    inputs: dict[str, str] = Field({})
    packages: dict[str, str] = Field({})
    total_steps: Step = 0
    warmup_iters: Step | None = None
    starts: list[_Start] = Field([])
    ended: Moment = ""
    finished: dict[str, float | None] = Field({})
    extended: list[dict] = Field([])
    model_files: Written = Field({})
    final_files: Written = Field({})
    fitted: _Fitted | None = None
    layout: _Layout | None = None


class _Recipe(Record):
    """recipe.yaml, which is flat."""

    global_batch_size: int | None = None
    max_iters: int | None = None
    epochs: float | None = None
    lr_decay_iters: int | None = None
    sample_prompts: str | None = None
    checkpoint_path: str = ""
    sft_checkpoint_path: str = ""
    __pydantic_extra__: dict[str, bool | int | float | str | None]  # ty: ignore[incompatible-mutable-override]


class _Manifest(Record):
    """data.json, as far as it is shown."""

    class _Entry(Record):
        rows: int

    class _Tokens(Record):
        per_epoch: int
        trained_per_epoch: int
        longest: int

    counts: dict[str, Step]
    rows: Step
    sources: list[str]
    tokens: _Tokens
    template_name: str = ""
    ledger: dict[str, _Entry]
    changes: dict[str, int]
    notes: list[str]


class _Metrics(Record):
    """A line of metrics.jsonl; None stands for a number that was not finite."""

    step: Step
    split: Literal["train", "eval"]

    @model_validator(mode="after")
    def _is_whole(self):
        """Refuse a training step without what the health checks look at, when a run goes on."""
        if self.split == "train" and not {"loss", "grad_norm"} <= (self.model_extra or {}).keys():
            raise ValueError("a training step has loss and grad_norm")
        return self

    __pydantic_extra__: dict[str, float | None]  # ty: ignore[incompatible-mutable-override]


class _Samples(Record):
    """A line of samples.jsonl."""

    class _Sample(Record):
        prompt: str
        answer: str
        tokens: int

    step: Step
    samples: list[_Sample]


class _Finding(Record):
    """A line of health.jsonl."""

    step: Step
    name: str
    what: str
    todo: str


class _BadBatch(Record):
    """A line of bad_batches.jsonl."""

    step: Step


LOGS = {"metrics.jsonl": _Metrics, "samples.jsonl": _Samples, "health.jsonl": _Finding, "bad_batches.jsonl": _BadBatch}


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's: it has run.json, which may be damaged."""
    return os.path.lexists(folder / "run.json")


def read_facts(run: Path, *needed: str) -> dict:
    """Return what run.json holds; the keys `needed` are there. Raises ValueError, with what to do, if it is missing or damaged."""
    facts = _read(run / "run.json", _Facts, needed)
    written = facts.pop("checksum", None)  # versions before 0.2 wrote none
    if written not in (None, files.checksum(facts)):
        raise ValueError(f"{run / 'run.json'} is damaged: it is not what was written (its checksum differs). {ADVICE}")
    return facts


def write_facts(run: Path, facts: dict) -> None:
    """Write run.json, with a checksum of `facts`."""
    files.write_whole(run / "run.json", json.dumps(facts | {"checksum": files.checksum(facts)}, indent=2) + "\n")


def read_recipe(run: Path, *needed: str) -> dict:
    """Return recipe.yaml, the value of every key; the keys `needed` are there. Raises as `read_facts` does."""
    recipe, path = _read(run / "recipe.yaml", _Recipe, needed), run / "recipe.yaml"
    written = re.search(r"^# .*checksum: (\w+)$", files.read_whole(path), re.M)  # versions before 0.2 wrote none
    if written and written[1] != files.checksum(recipe):
        raise ValueError(f"{path} is damaged: it is not what was written (its checksum differs). {ADVICE}")
    return recipe


def write_recipe(run: Path, recipe: dict) -> None:
    """Write recipe.yaml, with a checksum of the values in a comment."""
    text = yaml.safe_dump(recipe, sort_keys=False)
    note = f"# The run goes on with these values only; copy the file to change them for another. checksum: {files.checksum(recipe)}\n"
    files.write_whole(run / "recipe.yaml", text + note)


def read_data(run: Path) -> dict | None:
    """Return data.json, the manifest of the run's data; None for runs that keep none. Raises as `read_facts` does."""
    return _read(run / "data.json", _Manifest, ()) if (run / "data.json").exists() else None


def read_log(run: Path, name: str) -> list[dict]:
    """Return the records of one of LOGS, none if it is not there. Raises ValueError naming a damaged line."""
    return files.read_json_lines(run / name, lambda record: check_record(record, LOGS[name]))


def cut_log(run: Path, name: str, first_step: int) -> list[int]:
    """Cut off the records of one of LOGS from `first_step` on; a start at step 1 leaves none. Returns the numbers of damaged lines.

    They are moved to NAME.damaged, so that nothing is lost and all others can be read. A last line without a line end was cut by a crash.
    """
    path = run / name
    if not os.path.lexists(path):
        return []
    files.require_file(path)
    kept, damaged = [], {}
    for number, line in enumerate(files.lines_of(path) if first_step > 1 else (), 1):
        try:
            record = files.parse_line(line, lambda record: check_record(record, LOGS[name]))
        except ValueError:
            damaged |= {number: line} if line.endswith(b"\n") else {}
        else:
            kept += [line.removesuffix(b"\n") + b"\n"] if record["step"] < first_step else []
    if damaged:
        aside = path.with_name(f"{name}.damaged")
        if os.path.lexists(aside):
            files.require_file(aside)
        with files.naming(aside), aside.open("ab") as file:
            file.write(b"".join(damaged.values()))
    files.write_whole(path, b"".join(kept))
    return list(damaged)


def files_in(folder: Path) -> dict[str, dict]:
    """Return size and checksum of every file in a folder of the run, model/ or final/, by its path there."""
    return {str(path.relative_to(folder)): files.file_facts(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def model_problem(run: Path) -> str | None:
    """Return what is wrong with the run's model/, None if it is what the run wrote. Runs of older versions did not note what that was."""
    if not (run / "model" / "config.json").is_file():
        return f"{run / 'model' / 'config.json'} is missing"
    return _problem(run / "model", read_facts(run).get("model_files", {}))


def final_problem(run: Path) -> str | None:
    """Return what is wrong with the run's final/, as `model_problem` does of model/."""
    return _problem(run / "final", read_facts(run).get("final_files", {}))


def _problem(folder: Path, written: dict[str, dict]) -> str | None:
    """Return which file of a folder is missing, or is not what was `written`; None if all are."""
    for path, facts in ((folder / name, facts) for name, facts in written.items()):
        if not path.is_file():
            return f"{path} is missing"
        if files.file_facts(path) != facts:
            return f"{path} is not what was written"
    return None


def _read(path: Path, form: type[Record], needed: tuple[str, ...]) -> dict:
    """Return the object of a file. Raises ValueError if it is missing or damaged, lacks a key, or has a value of another type."""
    try:
        found = files.read_object(path)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{error}. {ADVICE}") from error
    try:
        check_record(found, form)
        if missing := [name for name in needed if name not in found]:
            raise ValueError(f"it lacks {' and '.join(missing)}")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. {ADVICE}") from error
    return found
