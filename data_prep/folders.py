"""Finds the files of rows at a place: a file, a folder, a clone from the hub, a pattern, or an address; and what they are for.

The splits of a folder are those of its dataset card (README.md) or of save_to_disk; else those that the names of files and folders say,
by the rules of the datasets library. Splits are never merged in silence.
"""

import glob
import json
import re
from pathlib import Path
from typing import NamedTuple

from data_prep.cards import files_of_card
from data_prep.formats.opening import KINDS, NO_DATA, READ, File, advice, kind_of, refuse_pointer, unpacked_name
from data_prep.formats.remote import is_address, listed, shown_address
from data_prep.splits import MANY, SHARD_NUMBER, choose, listing, split_of, stem
from posttrain.common.errors import shown
from posttrain.common.hub import snapshot_in

CACHED = re.compile(r"cache-[0-9a-f]+(_\d+_of_\d+)?\.arrow")  # what map() of datasets keeps beside the rows
BESIDE = re.compile(r".*\.(md|py|ipynb|yaml|yml|toml|cfg|lock|sh|png|jpg|jpeg|gif|svg|html|pdf)", re.IGNORECASE)  # what lies beside rows
MOST_SHARDS = 10_000  # of which names are looked for
ABOUT = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}  # files that describe the rows


class Wanted(NamedTuple):
    """What of a folder is asked for."""

    kind: str = "sft"
    config: str | None = None
    split: str | None = None  # names, separated by commas; or all


class Found(NamedTuple):
    """The files at a place."""

    training: tuple[File, ...]
    held_out: tuple[File, ...] = ()  # what the upstream holds out
    notes: tuple[str, ...] = ()  # what was decided for the user


def find_files(place: str, wanted: Wanted | None = None) -> Found:
    """Find the files of rows at a place; without `wanted` all of them, whatever split they belong to.

    Raises FileNotFoundError where there are none, ValueError where it has to be said which.
    """
    entries, inside = _entries(place)
    asked = wanted or Wanted()
    if not inside:
        if asked.config or asked.split:
            raise ValueError(f"{place} is a file: --config and --split choose in a folder, or in a dataset of the hub")
        return Found(tuple(entries.values()))
    names = _rows_among(place, entries)
    card = files_of_card(place, entries, names, asked.config) if wanted else None
    if asked.config and not card:
        names = _of_config(place, names, asked.config)
    groups, unnamed = card or (_by_name(entries, names), [])
    if not wanted:
        return Found(tuple(entries[name] for several in groups.values() for name in several))
    training, held_out, notes = choose(place, groups, wanted.kind, wanted.split)
    _refuse_twins(place, [*training, *held_out])
    for name in (*training, *held_out):
        refuse_pointer(entries[name])
    notes += [f"{place}: {shown(unnamed[:MANY])} left out, which its card does not name"] if unnamed else []
    notes += _left_out(place, entries, names)
    if lacking := listing(_lacking([*training, *held_out])):
        if not glob.has_magic(place):
            raise ValueError(f"{place} lacks {lacking}, as other names say: download the rest, or give those that are there by a pattern")
        notes.append(f"{place}: {lacking} not among them, as their names say")
    if len(parts := _parts(training)) > 1 and not card:
        notes.append(f"{place}: the rows of its folders {listing(parts)} are taken together; --config NAME takes one")
    if held_out:
        notes.append(f"{place}: held out for validation, {'by its card' if card else 'by their names'}: {listing(held_out)}")
    return Found(tuple(entries[name] for name in training), tuple(entries[name] for name in held_out), tuple(notes))


def _entries(place: str) -> tuple[dict[str, File], bool]:
    """Return the files at a place by their names in it, and whether it is a folder or a pattern. Raises FileNotFoundError for none."""
    entries: dict[str, File] = {}
    if is_address(place) and not place.startswith("file://"):
        there, inside = listed(place)
        entries.update(there)
        seen = "holds no file"
    else:
        path = Path(snapshot_in(place.removeprefix("file://")))
        root, found, seen = _local(path)
        inside = not path.is_file()
        entries |= {one.relative_to(root).as_posix(): one for one in found if one.is_file()}
    if entries and not inside and kind_of(file := next(iter(entries.values()))) is None:
        raise FileNotFoundError(f"{file} {advice(file)}")
    if not entries:
        raise FileNotFoundError(f"{shown_address(place)} {seen}; expected a {READ}, or a folder of them")
    return entries, inside


def _local(path: Path) -> tuple[Path, list[Path], str]:
    """Return what lies at a path here, the folder in which it has its names, and what to say where there is no file."""
    if path.is_dir():
        found = sorted(path.rglob("*"))
        _refuse_broken_links(found)
        return path, found, "holds nothing"
    if path.exists() or path.is_symlink():
        return path.parent, [path], "is a pipe or a device" if path.exists() else "is a link that leads nowhere"
    if not glob.has_magic(str(path)):
        return path, [], "does not exist"
    found = sorted(map(Path, glob.glob(str(path), recursive=True)))
    _refuse_broken_links(found)
    root = Path(*path.parts[: next(at for at, part in enumerate(path.parts) if glob.has_magic(part))])
    return root, found, "fits no file"


def _refuse_broken_links(paths: list[Path]) -> None:
    """Raise FileNotFoundError for a link to rows that are not there, which would be missed in silence."""
    for path in paths:
        if path.is_symlink() and not path.exists() and unpacked_name(path.name).lower().endswith(tuple(KINDS)):
            raise FileNotFoundError(f"{path} is a link that leads nowhere: have the file made available, or remove the link")


def _rows_among(place: str, entries: dict[str, File]) -> list[str]:
    """Return the names of the files that hold rows. Raises FileNotFoundError for none, ValueError for a folder of another kind."""
    if "manifest.json" in entries and "tokenizer/tokenizer_config.json" in entries:
        raise ValueError(f"{place} is a prepared folder: train on it, or give the rows from which it was made")
    saved = _saved(place, entries)
    names = []
    for name, file in entries.items():
        folder, _, last = name.rpartition("/")
        if _is_hidden(name) or last in ABOUT:
            continue
        if folder in saved and (last not in saved[folder]):
            continue  # of an earlier state of the folder
        if CACHED.fullmatch(last):
            continue
        if kind_of(file):
            names.append(name)
    texts = [name for name in names if unpacked_name(name).lower().endswith(".txt")]
    names = names if len(texts) == len(names) else [name for name in names if name not in texts]
    if not names:
        raise FileNotFoundError(f"{shown_address(place)} holds {listing(list(entries))}; expected a {READ}")
    return names


def _is_hidden(name: str) -> bool:
    """Whether a name, or a folder in it, begins so that programs take it for no data: ._rows.jsonl, .cache, __MACOSX, _SUCCESS."""
    return any(part.startswith((".", "_")) for part in name.split("/"))


def _saved(place: str, entries: dict[str, File]) -> dict[str, list[str]]:
    """Return the files of each folder that Dataset.save_to_disk wrote, in their order. Raises ValueError where one is not there."""
    found = {}
    for name, file in entries.items():
        folder, _, last = name.rpartition("/")
        if last != "state.json":
            continue
        state = _read(file)
        if not isinstance(state.get("_data_files"), list):
            continue
        listed_files = [str(one.get("filename")) for one in state["_data_files"] if isinstance(one, dict)]
        lost = [one for one in listed_files if f"{folder}/{one}".lstrip("/") not in entries]
        if lost or state.get("_indices_data_files"):
            why = f"lacks {listing(lost)}, which its state.json names" if lost else "is of an old version of datasets: save it again"
            raise ValueError(f"{place}{'/' + folder if folder else ''}, made by save_to_disk, {why}")
        found[folder] = listed_files
    return found


def _of_config(place: str, names: list[str], config: str) -> list[str]:
    """Return the files of a config, where no card says which they are: those of the folder of its name. Raises ValueError for none."""
    inside = [name for name in names if name.startswith(f"{config}/")]
    if not inside:
        raise ValueError(f"{place} has no config {config!r}: neither a README.md that names it, with its files, nor a folder of that name")
    return inside


def _parts(names: list[str]) -> list[str]:
    """Return the folders that each have splits of their own, as of the configs of a dataset without a card."""
    return sorted({name.split("/")[0] for name in names if "/" in name and split_of(name) and not split_of(f"{name.split('/')[0]}/x")})


def _by_name(entries: dict[str, File], names: list[str]) -> dict[str | None, list[str]]:
    """Group files by the split that their names say; None for those that say none."""
    groups: dict[str | None, list[str]] = {}
    named = _dict_splits(entries)
    for name in names:
        split = next((split for folder, split in named.items() if name.startswith(folder)), None) or split_of(name)
        groups.setdefault(split, []).append(name)
    return groups


def _dict_splits(entries: dict[str, File]) -> dict[str, str]:
    """Return the splits of each DatasetDict that save_to_disk wrote, by their folders."""
    found = {}
    for name in entries:
        if name.rpartition("/")[2] == "dataset_dict.json" and isinstance(splits := _read(entries[name]).get("splits"), list):
            found |= {f"{name.removesuffix('dataset_dict.json')}{split}/": str(split) for split in splits}
    return found


def _read(file: File) -> dict:
    """Return the object of a small JSON file; an empty one where it holds none."""
    try:
        with file.open("rb") as opened:
            content = json.load(opened)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _refuse_twins(place: str, names: list[str]) -> None:
    """Raise ValueError for two files that differ in their kind only: they may well hold the same rows."""
    seen: dict[str, str] = {}
    for name in names:
        folder, _, last = name.rpartition("/")
        end = last[len(stem(last)) :].lower()
        key = f"{'' if folder == 'data' else folder}/{re.sub(SHARD_NUMBER, '', stem(last))}"
        other = seen.setdefault(key, name)
        if not other.lower().endswith(end):
            raise ValueError(
                f"{place}: {other} and {name} look like the same rows in two forms: give one of them as --dataset, or both, each apart"
            )


def _left_out(place: str, entries: dict[str, File], names: list[str]) -> list[str]:
    """Return a note about files that may hold rows and are not read."""
    texts = [name for name in entries if unpacked_name(name).lower().endswith(".txt") and not _is_hidden(name) and name not in names]
    marked = [name for name in entries if re.search(r"(^|/)_(?!_|SUCCESS)", name) and unpacked_name(name).lower().endswith(tuple(KINDS))]
    known = {*names, *texts, *marked}
    others = [name for name in entries if name not in known and not _is_hidden(name) and not _is_beside(name.rpartition("/")[2])]
    notes = [f"{place}: {listing(texts)} not read: a text beside other rows is not taken for data"] if texts else []
    notes += [f"{place}: {listing(marked)} not read: a name that begins with _ is not taken for data"] if marked else []
    return notes + ([f"{place}: {listing(others)} not read: of no kind that is read"] if others else [])


def _is_beside(last: str) -> bool:
    """Whether a file is of the kinds that people keep beside rows: a licence, code, pictures, what describes or caches rows."""
    return last in ABOUT or bool(CACHED.fullmatch(last)) or last.lower() in NO_DATA or bool(BESIDE.fullmatch(last))


def _lacking(names: list[str]) -> list[str]:
    """Return the names of files that are not there, of those that say how many there are, as train-00001-of-00003.parquet does."""
    shards: dict[tuple[str, str, str], set[int]] = {}
    for name in names:
        if found := re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})(.*)", name):
            shards.setdefault((found[1], found[3], found[4]), set()).add(int(found[2]))
    return [
        f"{start}{number:05d}-of-{of}{end}"
        for (start, of, end), seen in shards.items()
        for number in range(min(int(of), MOST_SHARDS))
        if number not in seen
    ]
