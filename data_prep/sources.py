"""Rows of any known shape -> conversations. One small reader per shape; a row's shape is told by its columns.

A reader returns a Document, a Chat or a Pair, or raises Refused with the cause when the row cannot be used; the caller counts causes.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from data_prep.files import Row
from posttrain.data.chat import Refused


class Document(NamedTuple):
    """Plain text, every token trained: continued pre-training."""

    text: str


class Chat(NamedTuple):
    """A conversation that ends with an answer. Messages are {role, content}, and tool_calls where an assistant calls tools."""

    messages: list[dict]
    tools: list[dict] | None = None


class Pair(NamedTuple):
    """Two answers to one conversation."""

    prompt: list[dict]  # messages, the last one from the user or a tool
    chosen: str
    rejected: str
    tools: list[dict] | None = None


class Hub(NamedTuple):
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
TREE_COLUMNS = {"message_id", "parent_id", "role", "text"}
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "ipython"), "tool"),
    "system": "system",
}
# which role may follow which; None is the start
MAY_FOLLOW = {
    "system": {None},
    "user": {None, "system", "assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
SURROGATE = re.compile("[\ud800-\udfff]")
RATINGS = (("chosen-rating", "rejected-rating"), ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"))


def conversations(kind: str, rows: Iterable[Row]) -> Iterator[Document | Chat | Pair | Refused]:
    """What each row says, in order. The first row's columns decide how all are read; ValueError if they are of no known shape.

    Rows that are single messages of conversation trees (oasst1) give one conversation a tree, its best-ranked path.
    """
    reader, columns = None, set()
    rows = iter(rows)
    for row in rows:
        if isinstance(row, Refused):
            yield row
            continue
        if reader is None:
            if kind == "sft" and TREE_COLUMNS.issubset(row):
                yield from _trees([row, *rows])
                return
            reader, columns = (sft_reader if kind == "sft" else dpo_reader)(set(row)), set(row)
        try:
            yield reader(row)
        except Refused as cause:
            yield Refused(str(cause))  # without the traceback, which holds the row
        except KeyError as missing:
            yield Refused(f"column {missing} is missing; the first row has {', '.join(sorted(columns))}")


def sft_reader(columns: set[str]) -> Callable[[dict], Chat | Document]:
    """The reader for rows with these columns. Raises ValueError with what was seen and what is expected."""
    for name in ("messages", "conversations"):
        if name in columns:
            return lambda row, n=name: _chat(_system(row) + _messages(row[n], n), row)
    if {"instruction", "output"} <= columns and "history" in columns:
        return lambda row: _chat([*_history(row), *_single_turn(row, "instruction", "input", "output")], row)
    for question, context, answer in (
        ("instruction", "context", "response"),  # dolly
        ("instruction", "input", "output"),  # alpaca
        ("prompt", None, "response"),
        ("prompt", None, "completion"),
        ("question", None, "answer"),
    ):
        if question in columns and answer in columns:
            return lambda row, q=question, c=context, a=answer: _chat(_system(row) + _single_turn(row, q, c, a), row)
    if "text" in columns:
        return lambda row: Document(_text(row, "text"))
    hint = ". These look like preference pairs: use data_prep/prepare_dpo.py" if columns & {"chosen", "preferred_output"} else ""
    raise ValueError(
        f"rows have the columns {', '.join(sorted(columns))}; expected messages, conversations, instruction + output (and input), "
        f"instruction + response (and context), prompt + response, question + answer, or text{hint}"
    )


def dpo_reader(columns: set[str]) -> Callable[[dict], Pair]:
    """The reader for preference rows with these columns. Raises ValueError with what was seen and what is expected."""
    if {"input", "preferred_output", "non_preferred_output"} <= columns:
        return _azure_pair
    if {"chosen", "rejected"} <= columns:
        for name in ("conversations", "messages"):
            if name in columns:
                return lambda row, n=name: _answers(
                    _system(row) + _messages(row[n], n), _as_list(row["chosen"]), _as_list(row["rejected"]), row
                )
        for question, context in (("question", None), ("prompt", None), ("instruction", "input")):
            if question in columns:
                return lambda row, q=question, c=context: _pair(row, q, c)
        return lambda row: _pair(row, None, None)
    raise ValueError(
        f"rows have the columns {', '.join(sorted(columns))}; expected chosen and rejected (text or messages) with prompt, question, "
        "instruction or conversations; chosen and rejected alone as messages or as Human/Assistant transcripts; or input, "
        "preferred_output and non_preferred_output. For rows with one answer use data_prep/prepare_sft.py"
    )


def _trees(rows: list[Row]) -> Iterator[Chat | Refused]:
    """A conversation for each tree of messages, and a Refused for each row that belongs to none."""
    sound, known = [], {row["message_id"] for row in rows if isinstance(row, dict) and isinstance(row.get("message_id"), str)}
    for row in rows:
        if isinstance(row, Refused):
            yield row
        elif not isinstance(row.get("message_id"), str) or not isinstance(row.get("rank"), int | float | None):
            yield Refused("a message of a tree without message_id, or whose rank is not a number")
        elif row.get("parent_id") is not None and row["parent_id"] not in known:
            yield Refused("a message of a tree whose parent is not there")
        else:
            sound.append(row)
    for path in best_paths(sound):
        if not path:
            yield Refused("a tree without an answer")
            continue
        try:
            yield _chat(_messages([{"role": row.get("role"), "content": row.get("text")} for row in path], "tree"), {})
        except Refused as cause:
            yield Refused(str(cause))


def best_paths(rows: Iterable[dict]) -> Iterator[list[dict]]:
    """oasst1's messages -> the path of each tree: from its root always on to the best-ranked reply, up to the last assistant's."""
    children, roots = defaultdict(list), []
    for row in rows:
        (roots if row.get("parent_id") is None else children[row["parent_id"]]).append(row)
    for root in roots:
        path = [root]
        while replies := [reply for reply in children.pop(path[-1]["message_id"], []) if not reply.get("deleted")]:
            path.append(min(replies, key=lambda reply: math.inf if reply.get("rank") is None else reply["rank"]))
        while path and path[-1].get("role") not in ("assistant", "gpt"):
            path.pop()
        yield path


def _single_turn(row: dict, question: str, context: str | None, answer: str) -> list[dict]:
    content = _text(row, question)
    if context and row.get(context):
        content += "\n\n" + _text(row, context)
    return [{"role": "user", "content": content}, {"role": "assistant", "content": _text(row, answer)}]


def _history(row: dict) -> list[dict]:
    """Earlier exchanges of a LLaMA-Factory row: [[question, answer], ...]."""
    exchanges = row["history"] or []
    if not isinstance(exchanges, list) or not all(
        isinstance(e, list) and len(e) == 2 and all(isinstance(text, str) for text in e) for e in exchanges
    ):
        raise Refused("history is not a list of [question, answer]")
    turns = [{"role": role, "content": text} for exchange in exchanges for role, text in zip(("user", "assistant"), exchange, strict=True)]
    return _system(row) + [{**turn, "content": _clean(turn["content"], "history")} for turn in turns]


def _system(row: dict) -> list[dict]:
    """The system message of a row's own column, if it has one."""
    return [{"role": "system", "content": _text(row, "system")}] if row.get("system") else []


def _chat(messages: list[dict], row: dict) -> Chat:
    _check_order(messages)
    if messages[-1]["role"] != "assistant":
        raise Refused("the last message is not the assistant's")
    return Chat(messages, _tools(row))


def _azure_pair(row: dict) -> Pair:
    if not isinstance(row["input"], dict) or "messages" not in row["input"]:
        raise Refused("input has no messages")
    prompt = _messages(row["input"]["messages"], "input.messages")
    return _answers(prompt, row["preferred_output"], row["non_preferred_output"], {**row, "tools": row["input"].get("tools")})


def _pair(row: dict, question: str | None, context: str | None) -> Pair:
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        if question is None:
            return _answers([], _transcript(chosen), _transcript(rejected), row)
        return _checked(_prompt(row, question, context), _text(row, "chosen"), _text(row, "rejected"), row)
    if question is None:
        return _answers(_system(row), chosen, rejected, row)
    prompt = _prompt(row, question, context)
    if isinstance(chosen, list) and len(chosen) == 1:  # without turns before the answer the prompt is in its own column
        return _answers(prompt, chosen, rejected, row)
    pair = _answers(_system(row), chosen, rejected, row)
    asked = [message for message in pair.prompt if message["role"] != "system"]
    if isinstance(row[question], list):
        if asked != [message for message in prompt if message["role"] != "system"]:
            raise Refused(f"{question} disagrees with the messages before the answer")
        return pair if pair.prompt[0]["role"] == "system" else pair._replace(prompt=prompt)
    if all(message["content"].strip() != prompt[-1]["content"].strip() for message in asked):
        raise Refused(f"{question} disagrees with the messages before the answer")
    return pair


def _prompt(row: dict, question: str, context: str | None) -> list[dict]:
    if isinstance(row[question], list):
        return _system(row) + _messages(row[question], question)
    content = _text(row, question)
    if content.startswith("\n\nHuman:"):
        turns = _transcript(content.removesuffix("\n\nAssistant:"))
        return _system(row) + turns
    if context and row.get(context):
        content += "\n\n" + _text(row, context)
    return [*_system(row), {"role": "user", "content": content}]


def _answers(prompt: list[dict], chosen, rejected, row: dict) -> Pair:
    """Two message lists that agree up to their last message, the answer; what they share is the prompt, after the one given."""
    chosen, rejected = _messages(chosen, "chosen"), _messages(rejected, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise Refused("chosen and rejected differ before their last message")
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise Refused("the last message of chosen or rejected is not the assistant's")
    if "tool_calls" in chosen[-1] or "tool_calls" in rejected[-1]:
        raise Refused("chosen or rejected is a tool call")
    return _checked(prompt + chosen[:-1], chosen[-1]["content"], rejected[-1]["content"], row)


def _checked(prompt: list[dict], chosen: str, rejected: str, row: dict) -> Pair:
    if not prompt or prompt[-1]["role"] not in ("user", "tool"):
        raise Refused("the prompt does not end with a user message")
    _check_order(prompt)
    if chosen == rejected:
        raise Refused("chosen equals rejected")
    for better, worse in RATINGS:
        if row.get(better) is not None and row.get(better) == row.get(worse):
            raise Refused(f"tied: {better} equals {worse}")
    return Pair(prompt, chosen, rejected, _tools(row))


def _check_order(messages: list[dict]) -> None:
    before = None
    for message in messages:
        role = message["role"]
        if before not in MAY_FOLLOW[role]:
            raise Refused(f"wrong order of roles: {role} {'after ' + before if before else 'first'}")
        before = role


def _transcript(text: str) -> list[dict]:
    """Messages of a transcript in the form of Anthropic's HH data; all turns are kept."""
    before, *turns = re.split(r"\n\n(Human|Assistant):", text)
    if before.strip() or not turns:
        raise Refused("chosen and rejected are texts without a prompt")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[turns[i]], "content": _clean(turns[i + 1].strip(), "a message")} for i in range(0, len(turns), 2)]


def _messages(value, column: str) -> list[dict]:
    """[{role, content}] or ShareGPT's [{from, value}]; tool calls in OpenAI's form or as function_call turns."""
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise Refused(f"{column} is not a list of messages")
    return [_message(message) for message in value]


def _message(message: dict) -> dict:
    name, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise Refused(f"unknown role {name!r}")
    if message.get("weight", 1) != 1 or message.get("train", True) is not True:
        raise Refused("a message says that it is not to be trained (weight or train), which is not supported")
    if message.get("reasoning_content"):
        raise Refused("a message has reasoning_content, which would be lost: write it into the content")
    if isinstance(content, list):  # OpenAI's parts
        if not all(isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content):
            raise Refused("a message holds something other than text")
        content = "".join(part["text"] for part in content)
    if name == "function_call":
        return {"role": role, "content": "", "tool_calls": _calls(content)}
    if calls := message.get("tool_calls"):
        content = "" if content is None else content
        if not isinstance(content, str):
            raise Refused("a message is not text")
        return {"role": role, "content": _clean(content, "", empty=True), "tool_calls": _calls(calls)}
    return {"role": role, "content": _clean(content, "a message")}


def _calls(value) -> list[dict]:
    """[{type: function, function: {name, arguments}}] from that form, or from {name, arguments} as JSON text or object."""
    value = _parsed(value, "a tool call")
    calls = []
    for call in _as_list(value):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or "arguments" not in function:
            raise Refused("a tool call has no name or no arguments")
        arguments = _parsed(function["arguments"], "a tool call's arguments")
        calls.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    if not calls:
        raise Refused("a tool call is empty")
    return calls


def _tools(row: dict) -> list[dict] | None:
    tools = _parsed(row.get("tools") or None, "tools")
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Refused("tools is not a list of objects")
    return tools


def _parsed(value, what: str):
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise Refused(f"{what}: not valid JSON") from None


def _as_list(value) -> list:
    return value if isinstance(value, list) else [value]


def _text(row: dict, column: str) -> str:
    return _clean(row[column], column)


def _clean(value, what: str, empty: bool = False) -> str:
    """The text, if it is one that can be trained on."""
    if not isinstance(value, str):
        raise Refused(f"{what} is null" if value is None else f"{what} is a {type(value).__name__}, not text")
    if not empty and not value.strip():
        raise Refused(f"{what} is empty")
    if CONTROL.search(value):
        raise Refused(f"{what} holds control characters")
    if not value.isascii() and SURROGATE.search(value):
        raise Refused(f"{what} holds half a surrogate pair")
    return value
