"""How an answer's thinking is written: in the template's own form, inside the answer's text, or after a header that opens it."""

import re

OPEN, CLOSE = "<think>", "</think>"
# the forms: the template writes reasoning_content; it writes a content with <think> as it is; it writes neither
OWN, CONTENT, HEADER = "own", "content", "header"
EMPTY_THINKING = re.compile(r"<think>\s*</think>\s*")
EMPTY_BLOCK = re.compile(r"\s*" + EMPTY_THINKING.pattern)
OPENED = re.compile(r"<think>\s*$")  # a header after which the answer is thinking
CLOSED = re.compile(r"</think>\s*$")  # one after which it is not
OPENED_OR_EMPTY = re.compile(r"<think>\s*(</think>\s*)?$")


def thought(reasoning: str, answer: str) -> str:
    """Return an answer's text with its thinking in it."""
    return f"{OPEN}\n{reasoning}\n{CLOSE}\n\n{answer}"


def is_trained(message: dict) -> bool:
    """Whether a message is trained: an answer, unless it says otherwise."""
    return message["role"] == "assistant" and message.get("train", True)


def reasoning_of(message: dict) -> str:
    """The thinking before an answer; empty without any."""
    return message.get("reasoning_content") or "" if message["role"] == "assistant" else ""


def only_trained(messages: list[dict], trained: set[int]) -> list[dict]:
    """The messages, with train: False at answers whose number is not among those."""
    return [
        message | {"train": False} if message["role"] == "assistant" and i not in trained else message for i, message in enumerate(messages)
    ]
