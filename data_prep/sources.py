"""Finds where rows come from: local files, or datasets of the hub, as --dataset and --source name them."""

import glob
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from data_prep.catalogue import HUBS, Hub
from data_prep.folders import Wanted, find_files
from data_prep.formats.opening import File, kind_of, unpacked_name
from data_prep.formats.remote import Address, is_address, shown_address
from data_prep.shapes.columns import USUAL, Columns
from posttrain.common.errors import nearest
from posttrain.common.hub import is_hub_name
from posttrain.common.places import command

if TYPE_CHECKING:
    from data_prep.formats.rows import Row

COLUMNS_FILE = ".columns.yaml"  # the end of the name of a file that says what the columns of one beside it hold


class Source(NamedTuple):
    """Files here, or a split of a hub dataset."""

    label: str  # names its rows in the ledger and in the data
    weight: float = 1.0
    files: tuple[File, ...] = ()
    hub: Hub | None = None
    split: str = ""
    revision: str | None = None
    columns: Columns = USUAL  # what they hold, where they have other names than usual
    txt: str = "line"  # what is a row of plain text
    notes: tuple[str, ...] = ()  # what was decided for the user as they were found

    @property
    def identity(self) -> list:
        """A list that changes when the rows may have changed."""
        where = [self.hub.name, self.hub.config, self.hub.folder] if self.hub else []
        said = [self.label, self.weight, where, self.split, self.revision, self.txt, asdict(self.columns)]
        return [*said, *map(facts_of, self.files)]

    def rows(self) -> "Iterator[Row]":
        """Yield the rows. Raises ValueError for a source that cannot be read."""
        if self.hub:
            from data_prep.formats.hub import hub_rows

            yield from hub_rows(self.hub, self.split, self.revision)
            return
        from data_prep.formats.rows import file_rows

        for file in self.files:
            yield from file_rows(file, self.txt)


def facts_of(file: File) -> list:
    """Return what changes when a file does."""
    if isinstance(file, Address):
        return [file.address, file.facts()]
    return [str(file), file.stat().st_size, file.stat().st_mtime_ns]


class Sources(NamedTuple):
    """What a preparation reads."""

    training: list[Source]
    held_out: list[Source]  # the upstream's own validation or test rows

    def with_columns(self, given: Columns) -> "Sources":
        """Return the sources with what the user says of their columns: on the command line, and in FILE.columns.yaml beside a file.

        Raises ValueError for such a file that is wrong.
        """
        held_out = [_with_columns(source, replace(given, held_out=True)) for source in self.held_out]
        return Sources([_with_columns(source, given) for source in self.training], held_out)


def _with_columns(source: Source, given: Columns) -> Source:
    here = [file for file in source.files if isinstance(file, Path)]
    beside = {path.with_name(path.name + COLUMNS_FILE) for path in here} | {path.parent / COLUMNS_FILE[1:] for path in here}
    found = sorted(path for path in beside if path.is_file())
    if len(here) > 1 and (of_one := [path for path in found if path.name != COLUMNS_FILE[1:]]):
        raise ValueError(
            f"{of_one[0]} says what the columns of one file hold, and {source.label} has {len(here)}: call it {COLUMNS_FILE[1:]} if it is "
            "meant for all, or give the files apart"
        )
    if len(found) > 1:
        raise ValueError(f"{source.label}: {', '.join(map(str, found))} say what its columns hold; keep one, or give the files apart")
    return source._replace(columns=Columns.read(found[0], given) if found else given)


def find_sources(kind: str, options) -> Sources:
    """Find the sources that --dataset and --source name. Raises ValueError for a name that is neither a dataset nor a file."""
    hub, training, held_out = HUBS[kind], [], []
    if len(options.dataset or []) > 1 and (options.config or options.split):
        raise ValueError("--config and --split choose in one dataset, and several are given: name their files, as in 'DIR/train_sft-*'")
    for given in options.dataset or [""]:
        name, weight = _weighted(given)
        place = options.source or (name if name not in hub else None)
        if place is None:
            here, apart = _of_hub(name, hub[name], options)
            training.append(here._replace(weight=weight))
            held_out += apart
            continue
        if not options.source and not is_address(place) and not Path(place).exists() and not glob.has_magic(place):
            raise ValueError(f"--dataset {name}: {_advice(kind, name)}")
        known = hub.get(name)
        if known and known.folder and (Path(place) / known.folder).is_dir():
            place = str(Path(place) / known.folder)
        found = find_files(place, _wanted(kind, options, known, place))
        last, names = _last(place), [_last(_weighted(other)[0]) for other in options.dataset or []]
        label = name if options.source and name else shown_address(place) if names.count(last) > 1 else last
        training.append(Source(label, weight, found.training, txt=options.txt or "line", notes=found.notes))
        if found.held_out:
            held_out.append(Source(f"{label}/held out", files=found.held_out, txt=options.txt or "line"))
    return _checked(Sources(training, held_out), options)


def _last(place: str) -> str:
    """Return the last part of a place, which names its rows."""
    if is_address(place):
        return shown_address(place).rpartition("/")[2]
    return place if glob.has_magic(place) and not Path(place).exists() else Path(place).name


def _wanted(kind: str, options, known: Hub | None, place: str) -> Wanted:
    """Return what of a folder is asked for; of a clone of a dataset with a short name, its config."""
    config = options.config or (known.config if known and (Path(place) / "README.md").is_file() else None)
    takes_all = known and known.train == "all" and Path(place).is_dir()
    return Wanted(kind, config, options.split or ("all" if takes_all else None))


def _of_hub(name: str, dataset: Hub, options) -> tuple[Source, list[Source]]:
    """Return the source of a dataset with a short name, and what the upstream holds out of it."""
    dataset = dataset._replace(config=options.config or dataset.config)
    split = options.split.replace(",", "+") if options.split else dataset.train
    here = Source(name, hub=dataset, split=split, revision=options.revision)
    if options.split or options.config or not dataset.validation:
        return here, []
    return here, [here._replace(label=f"{name}/{dataset.validation}", split=dataset.validation)]


def _checked(sources: Sources, options) -> Sources:
    """Return the sources. Raises ValueError where an option would change nothing, or two have the same name."""
    files = [file for several in sources for source in several for file in source.files]
    if options.revision and not any(source.hub for source in sources.training):
        raise ValueError("--revision names a version of a hub dataset, and no row comes from the hub; leave it out")
    if options.txt and not any(kind_of(file) == "txt" for file in files):
        raise ValueError("--txt says what is a row of a .txt file, and there is none; leave it out")
    labels = [source.label for source in sources.training]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise ValueError(f"two sources are called {' and '.join(sorted(twice))}, so their rows could not be told apart; give each once")
    return sources


def _advice(kind: str, name: str) -> str:
    """Return what a --dataset may have meant that is neither a file here nor one of the hub's datasets with a short name."""
    other, known = "dpo" if kind == "sft" else "sft", f"short names of datasets of the hub: {', '.join(HUBS[kind])}"
    if name in HUBS[other]:
        return f"it is a dataset for the other command, {command(f'prepare-{other}')}; {known}"
    if is_hub_name(name):
        folder = f"data/{name.partition('/')[2]}"
        how = f"hf download --repo-type dataset {name} --local-dir {folder}"
        there = f"there is no such file. If it is a dataset of the hub, give --dataset hf://datasets/{name}, or download it and give"
        return f"{there} --dataset {folder}:\n    {how}\n{known}"
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


def count_rows(source: Source, most: int | None) -> int | None:
    """How many rows there will be, `most` at most; None where that takes long to know. For a progress bar."""
    import pyarrow.parquet

    total = 0
    for file in source.files:
        kind, packed = kind_of(file), unpacked_name(file.name) != file.name
        if isinstance(file, Address) or packed:
            return None
        if kind == "parquet":
            try:
                total += pyarrow.parquet.read_metadata(file).num_rows
            except (OSError, pyarrow.ArrowException):
                return None  # the reader will say what is wrong with it
        elif file.name.lower().endswith((".jsonl", ".ndjson", ".csv", ".tsv")):
            with file.open("rb") as opened:
                total += sum(block.count(b"\n") for block in iter(lambda: opened.read(1 << 20), b""))
        else:
            return None
    return min(total, most or total) or None
