"""Reads rows of any known shape as conversations: one small reader for each shape, which the columns tell.

A reader returns a Document, a Chat or a Pair, or raises Refused with the cause when the row cannot be used; the caller counts causes.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

from data_prep.files import Row
from data_prep.messages import Chat, Document, Pair, check_order, clean, exchange, messages_of, system_message, text_of, tools_of
from data_prep.pairs import dpo_reader
from posttrain.common.places import in_this_form
from posttrain.data.parts import Refused

TREE_COLUMNS = {"message_id", "parent_id", "role", "text"}


def conversations(kind: str, rows: Iterable[Row]) -> Iterator[Document | Chat | Pair | Refused]:
    """Yield what each row says, or why it cannot be used, in the order of the rows.

    The first row's columns decide how all are read; raises ValueError if they are of no known shape. Rows that are single messages of
    conversation trees (oasst1) give one conversation for each tree, its best-ranked path.
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
    """Return the reader for rows with these columns. Raises ValueError with what was seen and what is expected."""
    for name in ("messages", "conversations"):
        if name in columns:
            return lambda row, n=name: _chat(system_message(row) + messages_of(row[n], n), row)
    if {"instruction", "output"} <= columns and "history" in columns:
        return lambda row: _chat([*_history(row), *exchange(row, "instruction", "input", "output")], row)
    for question, context, answer in (
        ("instruction", "context", "response"),  # dolly
        ("instruction", "input", "output"),  # alpaca
        ("prompt", None, "response"),
        ("prompt", None, "completion"),
        ("question", None, "answer"),
    ):
        if question in columns and answer in columns:
            return lambda row, q=question, c=context, a=answer: _chat(system_message(row) + exchange(row, q, c, a), row)
    if "text" in columns:
        return lambda row: Document(text_of(row, "text"))
    is_pair = columns & {"chosen", "preferred_output"}
    hint = in_this_form(". These look like preference pairs: use data_prep/prepare_dpo.py") if is_pair else ""
    raise ValueError(
        f"rows have the columns {', '.join(sorted(columns))}; expected messages, conversations, instruction + output (and input), "
        f"instruction + response (and context), prompt + response, question + answer, or text{hint}"
    )


def _trees(rows: list[Row]) -> Iterator[Chat | Refused]:
    """Yield a conversation for each tree of messages, and a Refused for each row that belongs to none."""
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
            yield _chat(messages_of([{"role": row.get("role"), "content": row.get("text")} for row in path], "tree"), {})
        except Refused as cause:
            yield Refused(str(cause))


def best_paths(rows: Iterable[dict]) -> Iterator[list[dict]]:
    """Yield a path for each tree of oasst1's messages: from the root always on to the best-ranked reply, up to the last assistant's."""
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


def _history(row: dict) -> list[dict]:
    """The system message and earlier exchanges of a LLaMA-Factory row, whose history is [[question, answer], ...]."""
    exchanges = row["history"] or []
    if not isinstance(exchanges, list) or not all(
        isinstance(e, list) and len(e) == 2 and all(isinstance(text, str) for text in e) for e in exchanges
    ):
        raise Refused("history is not a list of [question, answer]")
    turns = [{"role": role, "content": text} for exchange in exchanges for role, text in zip(("user", "assistant"), exchange, strict=True)]
    return system_message(row) + [{**turn, "content": clean(turn["content"], "history")} for turn in turns]


def _chat(messages: list[dict], row: dict) -> Chat:
    """The Chat of some messages and the row's tools. Raises Refused unless the roles alternate and an answer is the last."""
    check_order(messages)
    if messages[-1]["role"] != "assistant":
        raise Refused("the last message is not the assistant's")
    return Chat(messages, tools_of(row))
