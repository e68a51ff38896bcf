"""Finds where rows come from: local files, or datasets of the hub, as --dataset and --source name them."""

import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from data_prep.shapes.columns import USUAL, Columns
from posttrain.common.errors import nearest
from posttrain.common.hub import is_hub_name
from posttrain.common.places import command

if TYPE_CHECKING:
    from data_prep.formats.rows import Row

ENDINGS = (".json", ".jsonl", ".csv", ".parquet")
COLUMNS_FILE = ".columns.yaml"  # the end of the name of a file that says what the columns of one beside it hold
HELD_OUT = re.compile(r"(test|val|valid|validation|eval|dev)(\b|_)", re.IGNORECASE)


class Hub(NamedTuple):
    """A dataset of the hub that is known by a short name."""

    name: str
    train: str
    validation: str | None = None  # a split that the upstream holds out


SFT_HUB = {
    "alpaca": Hub("tatsu-lab/alpaca", "train"),
    "alpaca_cleaned": Hub("yahma/alpaca-cleaned", "train"),
    "dolly": Hub("databricks/databricks-dolly-15k", "train"),
    "ultrachat": Hub("HuggingFaceH4/ultrachat_200k", "train_sft", "test_sft"),
    "slimorca": Hub("Open-Orca/SlimOrca", "train"),
    "oasst1": Hub("OpenAssistant/oasst1", "train", "validation"),
}
DPO_HUB = {
    "ultrafeedback": Hub("argilla/ultrafeedback-binarized-preferences-cleaned", "train"),
    "hh_rlhf": Hub("Anthropic/hh-rlhf", "train", "test"),
    "orca_dpo": Hub("Intel/orca_dpo_pairs", "train"),
    "distilabel_capybara": Hub("argilla/distilabel-capybara-dpo-7k-binarized", "train"),
}
HUBS = {"sft": SFT_HUB, "dpo": DPO_HUB}


class Source(NamedTuple):
    """Files here, or a split of a hub dataset."""

    label: str  # names its rows in the ledger and in the data
    weight: float = 1.0
    files: tuple[Path, ...] = ()
    hub: str = ""
    split: str = ""
    revision: str | None = None
    columns: Columns = USUAL  # what they hold, where they have other names than usual

    @property
    def identity(self) -> list:
        """A list that changes when the rows may have changed."""
        said = [*self._replace(files=())[:-1], asdict(self.columns)]
        return [*said, *((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in self.files)]

    def rows(self) -> "Iterator[Row]":
        """Yield the rows. Raises ValueError for a source that cannot be read."""
        from data_prep.formats.rows import file_rows, hub_rows

        if self.hub:
            yield from hub_rows(self.hub, self.split, self.revision)
            return
        for path in self.files:
            yield from file_rows(path)


class Sources(NamedTuple):
    """What a preparation reads."""

    training: list[Source]
    held_out: list[Source]  # the upstream's own validation or test rows

    def with_columns(self, given: Columns) -> "Sources":
        """Return the sources with what the user says of their columns: on the command line, and in FILE.columns.yaml beside a file.

        Raises ValueError for such a file that is wrong.
        """
        return Sources(*([_with_columns(source, given) for source in sources] for sources in self))


def _with_columns(source: Source, given: Columns) -> Source:
    beside = {path.with_name(path.name + COLUMNS_FILE) for path in source.files} | {path.parent / COLUMNS_FILE[1:] for path in source.files}
    found = sorted(path for path in beside if path.is_file())
    if len(found) > 1:
        raise ValueError(f"{source.label}: {', '.join(map(str, found))} say what its columns hold; keep one, or give the files apart")
    return source._replace(columns=Columns.read(found[0], given) if found else given)


def find_sources(kind: str, options) -> Sources:
    """The sources that --dataset and --source name. Raises ValueError for a name that is neither a dataset nor a file."""
    hub, training, held_out = HUBS[kind], [], []
    for given in options.dataset or [""]:
        name, weight = _weighted(given)
        place = options.source or (name if name not in hub else None)
        if place is None:
            dataset = hub[name]
            training.append(Source(name, weight, hub=dataset.name, split=dataset.train, revision=options.revision))
            if split := dataset.validation:
                held_out.append(Source(f"{name}/{split}", hub=dataset.name, split=split, revision=options.revision))
            continue
        if not options.source and not Path(place).exists():
            raise ValueError(f"--dataset {name}: {_advice(kind, name)}")
        files, test_files = find_files(place)
        names = [Path(_weighted(other)[0]).name for other in options.dataset or []]
        label = name if options.source and name else place if names.count(Path(place).name) > 1 else Path(place).name
        training.append(Source(label, weight, files))
        if test_files:
            held_out.append(Source(f"{label}/held out", files=test_files))
    if options.revision and not any(source.hub for source in training):
        raise ValueError("--revision names a version of a hub dataset, and no row comes from the hub; leave it out")
    labels = [source.label for source in training]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise ValueError(f"two sources are called {' and '.join(sorted(twice))}, so their rows could not be told apart; give each once")
    return Sources(training, held_out)


def _advice(kind: str, name: str) -> str:
    """Return what a --dataset may have meant that is neither a file here nor one of the hub's datasets with a short name."""
    other, known = "dpo" if kind == "sft" else "sft", f"short names of datasets of the hub: {', '.join(HUBS[kind])}"
    if name in HUBS[other]:
        return f"it is a dataset for the other command, {command(f'prepare-{other}')}; {known}"
    if is_hub_name(name):
        folder = f"data/{name.partition('/')[2]}"
        how = f"hf download --repo-type dataset {name} --local-dir {folder}"
        return f"there is no such file. If it is a dataset of the hub, download it and give --dataset {folder}:\n    {how}\n{known}"
    return f"no such file.{nearest(name, HUBS[kind])} {known[0].upper()}{known[1:]}"


def _weighted(given: str) -> tuple[str, float]:
    """Split NAME:WEIGHT; a name without a weight has 1. Raises ValueError for a weight of 0 or less."""
    name, colon, weight = given.rpartition(":")
    if not colon or Path(given).exists():
        return given, 1.0
    try:
        value = float(weight)
    except ValueError:
        return given, 1.0
    if not 0 < value < float("inf"):
        raise ValueError(f"--dataset {given}: the weight should be above 0")
    return name, value


def find_files(place: str) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """The training files at a place, and those that the upstream holds out (test*, validation*, ...), which a folder may hold beside them.

    Raises FileNotFoundError where there are none.
    """
    path = Path(place)
    candidates = [path] if path.is_file() else sorted(path.rglob("*"))
    found = [file for file in candidates if file.name.removesuffix(".gz").endswith(ENDINGS) and file.is_file()]
    if not found:
        seen = f"holds {', '.join(sorted(p.name for p in candidates)[:8]) or 'nothing'}"
        if not path.is_dir() and not path.is_file():
            seen = "is a pipe or a device" if path.exists() else "does not exist"
        raise FileNotFoundError(
            f"{place} {seen}; expected a JSON, JSONL, CSV or Parquet file (or one of them gzipped), or a folder of them"
        )
    held_out = [] if path.is_file() else [file for file in found if any(map(HELD_OUT.match, file.relative_to(path).parts))]
    training = [file for file in found if file not in held_out]
    return (tuple(training), tuple(held_out)) if training else (tuple(held_out), ())


def count_rows(source: Source, most: int | None) -> int | None:
    """How many rows there will be, `most` at most; None where that takes long to know. For a progress bar."""
    import pyarrow.parquet

    total = 0
    for path in source.files:
        if path.name.endswith(".parquet"):
            try:
                total += pyarrow.parquet.read_metadata(path).num_rows
            except (OSError, pyarrow.ArrowException):
                return None  # the reader will say what is wrong with it
        elif path.name.endswith((".jsonl", ".csv")):
            with path.open("rb") as file:
                total += sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
        else:
            return None
    return min(total, most or total) or None
