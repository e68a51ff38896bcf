"""Brings the thinking before an answer into one form, reasoning_content, wherever a row has it, and does with it what --thinking asks.

An answer that begins with <think>...</think> says the same as one with reasoning_content.
"""

import re

from data_prep.shapes.messages import Chat, Document, Pair
from posttrain.data.chat import ChatFormat
from posttrain.data.parts import Refused
from posttrain.data.thinking import CLOSE, CONTENT, HEADER, OPEN, OWN, reasoning_of, thought

BLOCK = re.compile(r"\s*<think>(.*?)</think>(\s*)(.*)", re.DOTALL)
KEPT = {
    OWN: "thinking trained, as the template writes it",
    CONTENT: "thinking trained, written into the answer as <think>...</think>",
    HEADER: "thinking trained, written as <think>...</think> after the header of an answer: the template leaves it out",
}
DROPPED = "thinking left out (--thinking drop)"
EMPTY = "an empty <think></think> taken out of an answer: the template writes it, or nobody"


def split_thinking(message: dict, opened: bool) -> tuple[dict, str | None]:
    """Return an answer with its thinking as reasoning_content, and a note where an empty one was taken out.

    `opened`: the template opens the thinking in the header of an answer, so the answer itself need not. Raises Refused for thinking
    without an end or a beginning, or without an answer after it.
    """
    content, given = message["content"], (message.get("reasoning_content") or "").strip("\n")
    rest = {key: value for key, value in message.items() if key != "reasoning_content"}
    found, inner, note = BLOCK.fullmatch(content), "", None
    if found:
        inner, space, content = found.group(1).strip("\n"), found.group(2), found.group(3)
        content = space.rpartition("\n")[2] + content if "\n" in space else content
        note = None if inner.strip() else EMPTY
    elif content.lstrip().startswith(OPEN):
        raise Refused(f"an answer opens {OPEN} and does not close it")
    elif CLOSE in content and OPEN not in content:
        if not opened and not given:
            raise Refused(f"an answer has {CLOSE} without {OPEN}, and the template's header of an answer does not open it")
        inner, _, content = content.partition(CLOSE)
        inner, content = inner.strip("\n"), content.lstrip("\n")
    inner = inner if inner.strip() else ""
    if given.strip() and (CLOSE in content or (inner and given.strip() != inner.strip())):
        raise Refused("an answer has thinking in a field of its own and other thinking in its text")
    reasoning = given if given.strip() else inner
    if not content.strip() and (found or reasoning) and not message.get("tool_calls"):
        raise Refused("an answer is nothing but thinking")
    return {**rest, "content": content} | ({"reasoning_content": reasoning} if reasoning else {}), note


def with_thinking(chat: ChatFormat, item: Document | Chat | Pair, mode: str) -> Document | Chat | Pair:
    """Return a row with the thinking of its answers in one form, kept or dropped, and with notes about that.

    `mode` is one of keep, drop and template. Of a pair this is the prompt; `answered` reads the answers. Raises Refused.
    """
    if isinstance(item, Document):
        return item
    messages = item.messages if isinstance(item, Chat) else item.prompt
    answers = [] if isinstance(item, Chat) else [_answer(item.chosen), _answer(item.rejected)]
    if not any(_has_thinking(message) for message in (*messages, *answers)):
        return item
    opened = chat.syntax.opens_thinking(item.tools, item.options)
    notes, changed = set(), []
    for number, message in enumerate((*messages, *answers)):
        note = None
        if message["role"] == "assistant":
            message, note = split_thinking(message, opened)
        if note:
            notes.add(note)
        if reasoning_of(message):
            is_read = number >= len(messages) or (isinstance(item, Chat) and message.get("train", True))
            if is_read or mode == "drop":
                notes.add(_note(chat, item, mode))
            message = _kept(message, mode)
        changed.append(message)
    notes = (*item.notes, *sorted(notes))
    if isinstance(item, Chat):
        return item._replace(messages=changed, notes=notes)
    return item._replace(prompt=changed[: len(messages)], notes=notes)


def answered(chat: ChatFormat, item: Pair, answer: str, mode: str) -> dict:
    """Return the message of one of a pair's answers, its thinking kept or dropped. Raises Refused."""
    message = _answer(answer)
    if not _has_thinking(message):
        return message
    message, _ = split_thinking(message, chat.syntax.opens_thinking(item.tools, item.options))
    return _kept(message, mode)


def whole_text(message: dict) -> str:
    """Return an answer's text with its thinking in it. Raises Refused where it says other thinking, too."""
    if not reasoning_of(message):
        return message["content"]
    message, _ = split_thinking(message, opened=True)
    return thought(message["reasoning_content"], message["content"])


def _answer(text: str) -> dict:
    return {"role": "assistant", "content": text}


def _has_thinking(message: dict) -> bool:
    content = message["content"]
    return message["role"] == "assistant" and ("reasoning_content" in message or CLOSE in content or content.lstrip().startswith(OPEN))


def _kept(message: dict, mode: str) -> dict:
    return {key: value for key, value in message.items() if key != "reasoning_content"} if mode == "drop" else message


def _note(chat: ChatFormat, item: Chat | Pair, mode: str) -> str:
    """What is told of a row's thinking. Raises Refused where the template is to decide, and would lose it."""
    form = chat.syntax.form(item.tools, item.options)
    if mode == "drop":
        return DROPPED
    if mode == "template" and form != OWN:
        raise Refused("the template knows no thinking, so it would be lost: use --thinking keep or drop")
    return KEPT[form]
