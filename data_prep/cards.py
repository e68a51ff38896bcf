"""Reads what the dataset card of a clone, README.md, says of its files: configs, and the splits of each."""

import re

import yaml

from data_prep.formats.opening import File
from posttrain.common.errors import nearest

FRONT = re.compile(r"---\r?\n(.*?)\r?\n---(\r?\n|$)", re.DOTALL)
LARGEST = 2**20  # bytes of a card that are read


def files_of_card(
    place: str, entries: dict[str, File], names: list[str], config: str | None
) -> tuple[dict[str | None, list[str]], list[str]] | None:
    """Return the files of a config by their splits, and those that no config has; None where the card names no files that are there.

    Raises ValueError where there are several configs and none is named, or the named one is not there.
    """
    configs = {name: splits for name, splits in _configs(place, entries, names).items() if splits}
    if not configs:
        return None
    if config is None and len(configs) > 1:
        raise ValueError(f"{place} has the configs {', '.join(configs)}: name one with --config NAME")
    if config is not None and config not in configs:
        raise ValueError(f"{place} has no config {config!r}.{nearest(config, configs)} It has {', '.join(configs)}")
    chosen = configs[config] if config else next(iter(configs.values()))
    known = {name for splits in configs.values() for several in splits.values() for name in several}
    return chosen, [name for name in names if name not in known]


def _configs(place: str, entries: dict[str, File], names: list[str]) -> dict[str, dict[str | None, list[str]]]:
    """Return the files of each split of each config of the card. Raises ValueError for a card that is not valid."""
    if "README.md" not in entries:
        return {}
    with entries["README.md"].open("rb") as opened:
        text = opened.read(LARGEST).decode("utf-8-sig", errors="replace")
    front = FRONT.match(text)
    try:
        card = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError as error:
        raise ValueError(
            f"the head of {entries['README.md']} is not valid YAML ({str(error).splitlines()[0]}): mend it, or name the files by a pattern"
        ) from None
    configs = card.get("configs") if isinstance(card, dict) else None
    if not isinstance(configs, list):
        return {}
    found = {}
    for one in configs:
        if not isinstance(one, dict) or not (one.get("data_files") or one.get("data_dir")):
            continue
        folder = str(one.get("data_dir") or "").strip("./")
        found[str(one.get("config_name", "default"))] = _splits(one.get("data_files") or "**", folder, names)
    return found


def _splits(data_files, folder: str, names: list[str]) -> dict[str | None, list[str]]:
    """Return the files of each split of a config. Files without a split, as one pattern or a list of them, are those of train."""
    if isinstance(data_files, dict):
        pairs = list(data_files.items())
    elif isinstance(data_files, list) and all(isinstance(one, dict) for one in data_files):
        pairs = [(one.get("split", "train"), one.get("path")) for one in data_files]
    else:
        pairs = [("train", data_files)]
    splits: dict[str | None, list[str]] = {}
    for split, patterns in pairs:
        several = patterns if isinstance(patterns, list) else [patterns]
        matched = [name for name in names if any(_matches(name, "/".join(filter(None, (folder, str(one))))) for one in several)]
        if matched:
            splits.setdefault(str(split), []).extend(matched)
    return splits


def _matches(name: str, pattern: str) -> bool:
    """Whether the name of a file fits a pattern, where * stays in a folder and ** does not."""
    parts = re.split(r"(\*\*/?|\*|\?|\[[^]]*\])", pattern.removeprefix("./"))
    signs = {"**": ".*", "**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    regex = "".join(signs.get(part) or (part if part.startswith("[") else re.escape(part)) for part in parts)
    return bool(re.fullmatch(regex, name)) or name.startswith(pattern.rstrip("/") + "/")
