"""Says which split a file belongs to, by the rules of the datasets library, and which splits are trained on and held out."""

import re
from collections.abc import Sequence

from data_prep.formats.opening import KINDS, unpacked_name
from posttrain.common.errors import nearest

TRAINING = "training|train"  # the longer words first
HELD_OUT = "validation|valid|val|dev|testing|test|evaluation|eval"
EDGE = r"[-._ 0-9]"  # what stands beside such a word in a name
WORD = re.compile(rf"(?:^|.*?{EDGE})({TRAINING}|{HELD_OUT})(?:$|{EDGE})", re.IGNORECASE)
SHARD_NUMBER = r"-\d{5}-of-\d{5}[^/]*"
SHARD = re.compile(rf"(?:.*/)?data/(?:.*/)?([^/]+?){SHARD_NUMBER}")
FAMILY = re.compile(rf"(?:{TRAINING}|{HELD_OUT})_(sft|gen|prefs)", re.IGNORECASE)  # splits of HuggingFaceH4's datasets
MINE = {"sft": "sft", "dpo": "prefs"}  # whose splits of a family each command takes
MANY = 8  # names in a message


def split_of(name: str) -> str | None:
    """Return the split that the name of a file, with its folders, says; None where it says none."""
    if sharded := SHARD.fullmatch(name):
        return sharded[1]
    *folders, last = name.split("/")
    for part in [*folders, stem(last)]:
        if FAMILY.fullmatch(part):
            return part
        if word := WORD.match(part):
            return role_of(word[1])
    return None


def stem(name: str) -> str:
    """Return the name of a file without what says its kind."""
    bare = unpacked_name(name)
    return next((bare[: -len(end)] for end in KINDS if bare.lower().endswith(end)), bare)


def role_of(split: str) -> str | None:
    """Return train, validation or test for the name of a split; None where it says neither."""
    if not (word := WORD.match(split)):
        return None
    found = word[1].lower()
    return "train" if found in TRAINING.split("|") else "validation" if found[0] in "vd" else "test"


def choose(place: str, groups: dict[str | None, list[str]], kind: str, asked: str | None) -> tuple[list[str], list[str], list[str]]:
    """Return the files to train on, those held out, and notes, for sft or dpo; `asked` is what --split says.

    Raises ValueError where it has to be said which.
    """
    splits = [name for name in groups if name is not None]
    if asked:
        return _choose_named(place, groups, asked)
    notes = []
    if families := {name for name in splits if FAMILY.fullmatch(name)}:
        mine = [name for name in families if name.lower().endswith(f"_{MINE[kind]}")]
        if not any(role_of(name) == "train" for name in mine):
            raise _which(place, splits, f"none of which is for prepare_{kind}")
        if left := [name for name in splits if name not in mine]:
            notes.append(f"{place}: of its splits {listing(sorted(mine))} taken, {listing(left)} not")
        groups = {name: groups[name] for name in groups if name in mine}
    train = [name for name in groups if name is None or role_of(name) == "train"]
    held = [name for name in groups if name is not None and role_of(name) in ("validation", "test")]
    other = [name for name in groups if name not in train and name not in held]
    if not train:
        train, other, held = (other, [], held) if other else (held, [], [])
    if len(train) > 1 and not set(train) <= {None, "train"}:
        raise _which(place, [name or "(none)" for name in train], "which may not belong together")
    if other:
        notes.append(f"{place}: of its splits {listing([name or 'those without' for name in train])} taken, {listing(other)} not")
    return _names(groups, train), _names(groups, held), notes


def _choose_named(place: str, groups: dict[str | None, list[str]], asked: str) -> tuple[list[str], list[str], list[str]]:
    """Return the files of the splits that --split names, and what the upstream holds out of them."""
    splits = [name for name in groups if name is not None]
    chosen = list(groups) if asked == "all" else list(dict.fromkeys(name.strip() for name in asked.split(",") if name.strip()))
    if not chosen:
        raise ValueError(f"--split {asked!r} names no split; {place} has {listing(splits) or 'none'}")
    for name in chosen:
        if name not in groups:
            raise ValueError(f"{place} has no split {name!r}.{nearest(str(name), splits)} It has {listing(splits) or 'none'}")
    kin = {re.sub(TRAINING, "", name) for name in chosen if name and role_of(name) == "train"}
    held = [name for name in splits if name not in chosen and role_of(name) in ("validation", "test") and re.sub(HELD_OUT, "", name) in kin]
    return _names(groups, chosen), _names(groups, held), []


def _names(groups: dict[str | None, list[str]], splits: Sequence[str | None]) -> list[str]:
    return [name for split in splits for name in groups[split]]


def _which(place: str, splits: list[str], why: str) -> ValueError:
    return ValueError(f"{place} has the splits {listing(splits)}, {why}: name those to train on with --split NAME,... or --split all")


def listing(names: Sequence[str | None]) -> str:
    """Return names for a message, not more than MANY."""
    rest = len(names) - MANY
    return ", ".join(map(str, names[:MANY])) + (f" and {rest} more" if rest > 0 else "")
