"""Rows of any known shape -> conversations. One small reader per shape; a row's shape is told by its columns.

A reader returns messages [{role, content}] for SFT, {"text": ...} for a plain document, or (prompt messages, chosen, rejected) for
preferences. It raises Refused with the cause when the row cannot be used; the caller counts causes.
"""

import itertools
import json
import math
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple


class Refused(ValueError):
    """A row that cannot be trained on; its text is the cause, counted in the ledger."""


class Pair(NamedTuple):
    prompt: list[dict]  # messages, the last one from the user
    chosen: str
    rejected: str


class Hub(NamedTuple):
    name: str
    train: str
    validation: str | None = None


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
TREE_COLUMNS = {"message_id", "parent_id", "role", "text"}
SHAREGPT_ROLES = {"prompter": "user", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def read_rows(source: str | None, hub: Hub | None, split: str) -> Iterator[dict]:
    """Rows of a local JSON, JSONL, CSV or Parquet file (or a folder of them), else of the hub dataset. Raises ValueError or OSError.

    Rows that are single messages of conversation trees (oasst1) come as one row a tree, its best-ranked path.
    """
    rows = _stored_rows(source, hub, split)
    first = next(rows, None)
    if first is None:
        return
    rows = itertools.chain([first], rows)
    yield from best_paths(rows) if TREE_COLUMNS.issubset(first) else rows


def best_paths(rows: Iterable[dict]) -> Iterator[dict]:
    """oasst1's messages -> {messages} of each tree: from its root always on to the best-ranked reply, up to the last assistant's."""
    children, roots = defaultdict(list), []
    for row in rows:
        (children[row["parent_id"]] if row["parent_id"] else roots).append(row)
    for root in roots:
        path = [root]
        while replies := [reply for reply in children[path[-1]["message_id"]] if not reply.get("deleted")]:
            path.append(min(replies, key=lambda reply: math.inf if reply.get("rank") is None else reply["rank"]))
        while path and path[-1]["role"] != "assistant":
            path.pop()
        yield {"messages": [{"role": row["role"], "content": row["text"]} for row in path]}


def _stored_rows(source: str | None, hub: Hub | None, split: str) -> Iterator[dict]:
    import datasets  # slow to import, and only needed here
    import pyarrow

    if source is None:
        try:
            yield from datasets.load_dataset(hub.name, split=split)
        except (ConnectionError, datasets.exceptions.DatasetNotFoundError, OSError) as error:
            raise ValueError(f"{hub.name} cannot be loaded from the hub ({error}); give the same rows with --source FILE_OR_DIR") from error
        return
    for path in _files(Path(source)):
        name = path.name.removesuffix(".gz")
        try:
            if name.endswith((".json", ".jsonl")):
                yield from _json_rows(path)
            else:
                yield from datasets.load_dataset("csv" if name.endswith(".csv") else "parquet", data_files=str(path), split="train")
        except (EOFError, zlib.error, UnicodeDecodeError, OSError, pyarrow.ArrowInvalid, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"{path} cannot be read to its end, is it whole? ({type(error).__name__}: {error})") from error


def sft_reader(columns: set[str]) -> Callable[[dict], list[dict] | dict]:
    """The reader for rows with these columns. Raises ValueError with what was seen and what is expected."""
    for name in ("messages", "conversations"):
        if name in columns:
            return lambda row, n=name: _system(row) + _messages(row[n], n)
    for question, context, answer in (
        ("instruction", "context", "response"),  # dolly
        ("instruction", "input", "output"),  # alpaca
        ("prompt", None, "response"),
        ("prompt", None, "completion"),
        ("question", None, "answer"),
    ):
        if question in columns and answer in columns:
            return lambda row, q=question, c=context, a=answer: _single_turn(row, q, c, a)
    if "text" in columns:
        return lambda row: {"text": _text(row, "text")}
    raise ValueError(
        f"rows have the columns {sorted(columns)}; expected messages, conversations, instruction + output (and input), "
        "instruction + response (and context), prompt + response, question + answer, or text"
    )


def dpo_reader(columns: set[str]) -> Callable[[dict], Pair]:
    """The reader for preference rows with these columns. Raises ValueError with what was seen and what is expected."""
    if {"input", "preferred_output", "non_preferred_output"} <= columns:
        return lambda row: _answers(_messages(row["input"]["messages"], "input"), row["preferred_output"], row["non_preferred_output"])
    if {"conversations", "chosen", "rejected"} <= columns:
        return lambda row: _answers(_system(row) + _messages(row["conversations"], "conversations"), [row["chosen"]], [row["rejected"]])
    if {"chosen", "rejected"} <= columns:
        for question, context in (("question", None), ("prompt", None), ("instruction", "input")):
            if question in columns:
                return lambda row, q=question, c=context: _pair(row, q, c)
        return lambda row: _pair(row, None, None)
    raise ValueError(
        f"rows have the columns {sorted(columns)}; expected chosen and rejected (text or messages) with prompt, question, "
        "instruction or conversations; chosen and rejected alone as messages or as Human/Assistant transcripts; or input, "
        "preferred_output and non_preferred_output"
    )


def _single_turn(row: dict, question: str, context: str | None, answer: str) -> list[dict]:
    return [*_question(row, question, context), {"role": "assistant", "content": _text(row, answer)}]


def _question(row: dict, question: str, context: str | None) -> list[dict]:
    content = _text(row, question)
    if context and row.get(context):
        content += "\n\n" + _text(row, context)
    return [*_system(row), {"role": "user", "content": content}]


def _system(row: dict) -> list[dict]:
    """The system message of a row's own column, if it has one."""
    return [{"role": "system", "content": _text(row, "system")}] if row.get("system") else []


def _pair(row: dict, question: str | None, context: str | None) -> Pair:
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        if question is None:
            return _answers([], _transcript(chosen), _transcript(rejected))
        prompt = _messages(row[question], question) if isinstance(row[question], list) else _question(row, question, context)
        pair = Pair(prompt, _text(row, "chosen"), _text(row, "rejected"))
        return _checked(pair)
    # without turns before the answer the prompt is in its own column
    alone = isinstance(chosen, list) and len(chosen) == 1 and question is not None
    return _answers(_question(row, question, context) if alone else [], chosen, rejected)


def _answers(prompt: list[dict], chosen, rejected) -> Pair:
    """Two message lists that agree up to their last message, the answer; what they share is the prompt, after the one given."""
    chosen, rejected = _messages(chosen, "chosen"), _messages(rejected, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise Refused("chosen and rejected differ before their last message")
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise Refused("the last message of chosen or rejected is not the assistant's")
    return _checked(Pair(prompt + chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]))


def _checked(pair: Pair) -> Pair:
    if not pair.prompt or pair.prompt[-1]["role"] != "user":
        raise Refused("the prompt does not end with a user message")
    if pair.chosen == pair.rejected:
        raise Refused("chosen equals rejected")
    return pair


def _transcript(text: str) -> list[dict]:
    """Messages of a transcript in the form of Anthropic's HH data; all turns are kept."""
    before, *turns = re.split(r"\n\n(Human|Assistant):", text)
    if before.strip() or not turns:
        raise Refused("chosen and rejected are texts without a prompt")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[turns[i]], "content": turns[i + 1].strip()} for i in range(0, len(turns), 2)]


def _messages(value, column: str) -> list[dict]:
    """[{role, content}] or ShareGPT's [{from, value}]."""
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise Refused(f"{column} is not a list of messages")
    messages = []
    for message in value:
        name, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        role = SHAREGPT_ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise Refused(f"unknown role {name!r}")
        if not isinstance(content, str) or not content.strip():
            raise Refused("a message is empty")
        messages.append({"role": role, "content": content})
    return messages


def _text(row: dict, column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise Refused(f"{column} is not text")
    if not value.strip():
        raise Refused(f"{column} is empty")
    return value


def _files(source: Path) -> list[Path]:
    endings = (".json", ".jsonl", ".csv", ".parquet")
    candidates = [source] if source.is_file() else sorted(source.rglob("*"))
    found = [path for path in candidates if path.name.removesuffix(".gz").endswith(endings)]
    if not found:
        raise FileNotFoundError(f"--source {source}: expected a JSON, JSONL(.gz), CSV or Parquet file, or a folder of them")
    return found


def _json_rows(path: Path) -> Iterator[dict]:
    """Rows of a JSON list or of JSON lines, gzipped or not."""
    import gzip

    with gzip.open(path, "rt", encoding="utf-8") if path.name.endswith(".gz") else path.open(encoding="utf-8") as file:
        first = file.read(1)
        while first.isspace():
            first = file.read(1)
        rest = file.read() if first == "[" else None
        if rest is not None:
            try:
                rows = json.loads(first + rest)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: not valid JSON: {error}") from None
        else:
            rows = _lines(path, first, file)
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict):
                raise ValueError(f"{path}: row {number} is a {type(row).__name__}; expected an object with named columns")
            yield row


def _lines(path: Path, first: str, file) -> Iterator:
    for number, line in enumerate(file, 1):
        text = (first + line if number == 1 else line).strip()
        if text:
            try:
                yield json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: line {number} is not valid JSON: {error}") from None
