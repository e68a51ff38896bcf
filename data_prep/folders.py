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
from data_prep.formats.opening import KINDS, READ, File, advice, kind_of, refuse_pointer, unpacked_name
from data_prep.formats.remote import is_address, listed, shown_address
from posttrain.common.errors import nearest, shown
from posttrain.common.hub import snapshot_in

TRAINING = "training|train"  # the longer words first
HELD_OUT = "validation|valid|val|dev|testing|test|evaluation|eval"
EDGE = r"[-._ 0-9]"  # what stands beside such a word in a name
WORD = re.compile(rf"(?:^|.*?{EDGE})({TRAINING}|{HELD_OUT})(?:$|{EDGE})", re.IGNORECASE)
SHARD_NUMBER = r"-\d{5}-of-\d{5}[^/]*"
SHARD = re.compile(rf"(?:.*/)?data/(?:.*/)?([^/]+?){SHARD_NUMBER}")
FAMILY = re.compile(rf"(?:{TRAINING}|{HELD_OUT})_(sft|gen|prefs)", re.IGNORECASE)  # splits of HuggingFaceH4's datasets
CACHED = re.compile(r"cache-[0-9a-f]+(_\d+_of_\d+)?\.arrow")  # what map() of datasets keeps beside the rows
MINE = {"sft": "sft", "dpo": "prefs"}  # whose splits of a family each command takes
ABOUT = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}  # files that describe the rows
MANY = 8  # names in a message


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
    groups, unnamed = card or (_by_name(entries, names), [])
    if not wanted:
        return Found(tuple(entries[name] for several in groups.values() for name in several))
    training, held_out, notes = _choose(place, groups, wanted)
    _refuse_twins(place, [*training, *held_out])
    for name in (*training, *held_out):
        refuse_pointer(entries[name])
    notes += [f"{place}: {shown(unnamed[:MANY])} left out, which its card does not name"] if unnamed else []
    notes += _left_out(place, entries, names)
    if held_out:
        notes.append(f"{place}: held out for validation, by their names: {_list(held_out)}")
    return Found(tuple(entries[name] for name in training), tuple(entries[name] for name in held_out), tuple(notes))


def _entries(place: str) -> tuple[dict[str, File], bool]:
    """Return the files at a place by their names in it, and whether it is a folder or a pattern. Raises FileNotFoundError for none."""
    if is_address(place) and not place.startswith("file://"):
        entries, inside = listed(place)
        seen = "holds no file" if not entries else ""
    else:
        path = Path(snapshot_in(place.removeprefix("file://")))
        inside = not path.is_file()
        if inside and not path.exists() and glob.has_magic(str(path)):
            found = sorted(one for one in map(Path, glob.glob(str(path), recursive=True)) if one.is_file())
            root = Path(*path.parts[: next(at for at, part in enumerate(path.parts) if glob.has_magic(part))])
            entries, seen = {one.relative_to(root).as_posix(): one for one in found}, "fits no file"
        else:
            found = sorted(path.rglob("*")) if path.is_dir() else [path] if path.exists() else []
            entries = {one.relative_to(path).as_posix() if inside else one.name: one for one in found if one.is_file()}
            seen = "holds nothing" if path.is_dir() else "is a pipe or a device" if path.exists() else "does not exist"
    if entries and not inside and kind_of(file := next(iter(entries.values()))) is None:
        raise FileNotFoundError(f"{file} {advice(file)}")
    if not entries:
        raise FileNotFoundError(f"{shown_address(place)} {seen}; expected a {READ}, or a folder of them")
    return entries, inside


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
        raise FileNotFoundError(f"{shown_address(place)} holds {_list(list(entries))}; expected a {READ}")
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
            why = f"lacks {_list(lost)}, which its state.json names" if lost else "is of an old version of datasets: load and save it again"
            raise ValueError(f"{place}{'/' + folder if folder else ''}, made by save_to_disk, {why}")
        found[folder] = listed_files
    return found


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


def split_of(name: str) -> str | None:
    """Return the split that the name of a file, with its folders, says; None where it says none."""
    if sharded := SHARD.fullmatch(name):
        return sharded[1]
    *folders, last = name.split("/")
    for part in [*folders, _stem(last)]:
        if FAMILY.fullmatch(part):
            return part
        if word := WORD.match(part):
            return role_of(word[1])
    return None


def _stem(name: str) -> str:
    """Return the name of a file without what says its kind."""
    bare = unpacked_name(name)
    return next((bare[: -len(end)] for end in KINDS if bare.lower().endswith(end)), bare)


def role_of(split: str) -> str | None:
    """Return train, validation or test for the name of a split; None where it says neither."""
    if not (word := WORD.match(split)):
        return None
    found = word[1].lower()
    return "train" if found in TRAINING.split("|") else "validation" if found[0] in "vd" else "test"


def _choose(place: str, groups: dict[str | None, list[str]], wanted: Wanted) -> tuple[list[str], list[str], list[str]]:
    """Return the files to train on, those held out, and notes. Raises ValueError where it has to be said which."""
    splits = [name for name in groups if name is not None]
    if wanted.split:
        return _choose_named(place, groups, wanted.split)
    notes = []
    if families := {name for name in splits if FAMILY.fullmatch(name)}:
        mine = [name for name in families if name.lower().endswith(f"_{MINE[wanted.kind]}")]
        if not any(role_of(name) == "train" for name in mine):
            raise _which(place, splits, f"none of which is for prepare_{wanted.kind}")
        if left := [name for name in splits if name not in mine]:
            notes.append(f"{place}: of its splits {_list(sorted(mine))} taken, {_list(left)} not")
        groups = {name: groups[name] for name in groups if name in mine}
    train = [name for name in groups if name is None or role_of(name) == "train"]
    held = [name for name in groups if name is not None and role_of(name) in ("validation", "test")]
    other = [name for name in groups if name not in train and name not in held]
    if not train:
        train, other, held = (other, [], held) if other else (held, [], [])
    if len(train) > 1 and not set(train) <= {None, "train"}:
        raise _which(place, [name or "(none)" for name in train], "which may not belong together")
    if other:
        notes.append(f"{place}: of its splits {_list([name or 'those without' for name in train])} taken, {_list(other)} not")
    return _names(groups, train), _names(groups, held), notes


def _choose_named(place: str, groups: dict[str | None, list[str]], asked: str) -> tuple[list[str], list[str], list[str]]:
    """Return the files of the splits that --split names, and what the upstream holds out of them."""
    splits = [name for name in groups if name is not None]
    chosen = list(groups) if asked == "all" else [name.strip() for name in asked.split(",") if name.strip()]
    for name in chosen:
        if name not in groups:
            raise ValueError(f"{place} has no split {name!r}.{nearest(str(name), splits)} It has {_list(splits) or 'none'}")
    kin = {re.sub(TRAINING, "", name) for name in chosen if name and role_of(name) == "train"}
    held = [name for name in splits if name not in chosen and role_of(name) in ("validation", "test") and re.sub(HELD_OUT, "", name) in kin]
    return _names(groups, chosen), _names(groups, held), []


def _names(groups: dict[str | None, list[str]], splits: list[str | None]) -> list[str]:
    return [name for split in splits for name in groups[split]]


def _which(place: str, splits: list[str], why: str) -> ValueError:
    return ValueError(f"{place} has the splits {_list(splits)}, {why}: name those to train on with --split NAME,... or --split all")


def _refuse_twins(place: str, names: list[str]) -> None:
    """Raise ValueError for two files that differ in their kind only: they may well hold the same rows."""
    seen: dict[str, str] = {}
    for name in names:
        folder, _, last = name.rpartition("/")
        end = last[len(_stem(last)) :].lower()
        key = f"{'' if folder == 'data' else folder}/{re.sub(SHARD_NUMBER, '', _stem(last))}"
        other = seen.setdefault(key, name)
        if not other.lower().endswith(end):
            raise ValueError(
                f"{place}: {other} and {name} look like the same rows in two forms: give one of them as --dataset, or both, each apart"
            )


def _left_out(place: str, entries: dict[str, File], names: list[str]) -> list[str]:
    """Return a note about files that may hold rows and are not read."""
    texts = [name for name in entries if unpacked_name(name).lower().endswith(".txt") and not _is_hidden(name) and name not in names]
    marked = [name for name in entries if re.search(r"(^|/)_(?!_|SUCCESS)", name) and unpacked_name(name).lower().endswith(tuple(KINDS))]
    notes = [f"{place}: {_list(texts)} not read: a text beside other rows is not taken for data"] if texts else []
    return notes + ([f"{place}: {_list(marked)} not read: a name that begins with _ is not taken for data"] if marked else [])


def _list(names: list[str]) -> str:
    """Return names for a message, not more than MANY."""
    rest = len(names) - MANY
    return ", ".join(map(str, names[:MANY])) + (f" and {rest} more" if rest > 0 else "")
