"""Cuts the output of a tokenizer's own Jinja template into parts, so that what is trained of it is known.

Where a message stands in the output is never searched for: the template is also rendered with a placeholder for every message, and the
output must equal that skeleton with each placeholder replaced by its message (or its stripped form). A template that rewrites a message
beyond that is refused for that row.
"""

import inspect
import re
from collections.abc import Iterator
from typing import NamedTuple

from jinja2 import Environment, TemplateError
from transformers import PreTrainedTokenizerBase

from posttrain.common.errors import first_line
from posttrain.common.limits import memory_limit, time_limit
from posttrain.data.encoding import special_tokens
from posttrain.data.parts import Encoded, Part, Refused, Text

# What a template that asks for today is told (Llama-3.1's default), so that ids do not depend on the day
TODAY = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
RENDER_SECONDS = 5.0  # how long a template may take for a conversation; Jinja bounds a loop, but no loop in a loop
RENDER_BYTES = 4 * 2**30  # how much memory it may take meanwhile, with what other threads take; 'a' * 10**10 is one short expression
MOST_WRITTEN = 16 * 2**20  # characters that it may write of its own
# arguments of apply_chat_template that are not the template's
ARGUMENTS = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"} - {"documents"}
STRIPPED = (lambda text: text, str.strip, str.lstrip, str.rstrip)  # what templates do to a message


class _Piece(NamedTuple):
    """A stretch of the template's output."""

    text: str
    fixed: bool  # the template's own text, in which special tokens are recognised
    answer: bool  # an assistant's turn starts here


class OwnTemplate:
    """The tokenizer's own template, and the special token that ends an assistant's turn in it.

    Raises ValueError for a tokenizer without a template, or one whose assistant turns have no end token.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.specials = tokenizer, special_tokens(tokenizer)
        self.jinja = tokenizer.chat_template
        if isinstance(self.jinja, dict):  # several by name
            names, self.jinja = ", ".join(self.jinja), self.jinja.get("default")
            if not isinstance(self.jinja, str):
                raise ValueError(
                    f"the tokenizer has chat templates named {names}, and transformers finds none named default, which says how plain "
                    "conversations are written: put it into chat_template.jinja beside the tokenizer; or use --template chatml"
                )
        if not isinstance(self.jinja, str):
            raise ValueError(
                "the tokenizer has no chat template of its own: use --template chatml, or put it, as text, into chat_template.jinja beside "
                "tokenizer_config.json"
            )
        self.names = _names(self.jinja)
        self.end_id = self._find_end()

    def parts(self, messages: list[dict], tools: list | None, options: dict | None) -> list[Part]:
        """Split a conversation into parts, as the template writes it. Raises Refused for one that it cannot write, or rewrites."""
        pieces = self._pieces(messages, tools, options or {})
        return [_space_to_body(part) for part in _parts(pieces, self.specials, self.end_id)]

    def _pieces(self, messages, tools, options) -> list[_Piece]:
        """Cut the template's output at the borders of the messages' contents and at the start of each answer."""
        self._refuse_unread(messages, tools, options)
        called = [message for message in messages if message.get("tool_calls")]
        if any(token in text for text in _strings([tools, options, [m["tool_calls"] for m in called]]) for token in self.specials):
            raise Refused("a tool call, a description of tools or an argument for the template spells a special token")
        marks = {i: f"\ue000{i}\ue001" for i, message in enumerate(messages) if message["content"]}
        if any("\ue000" in message["content"] for message in messages):
            raise Refused("a message contains the private-use character U+E000")
        real = self._render(messages, tools, **options)
        skeleton = self._render([{**m, "content": marks.get(i, "")} for i, m in enumerate(messages)], tools, **options)
        fixed, order = re.split("\ue000\\d+\ue001", skeleton), [int(i) for i in re.findall("\ue000(\\d+)\ue001", skeleton)]
        if order != sorted(marks):
            raise Refused("the template leaves out, repeats or reorders a message")
        contents = _decompose(real, fixed, [messages[i]["content"] for i in order])
        if contents is None:
            raise Refused("the template rewrites a message, so what is trained cannot be proven")
        pieces, at = [], 0
        wordless = [i for i in _trained(messages) if messages[i].get("tool_calls") and not messages[i]["content"]]
        starts = {self._call_start(real, messages[:i], tools, options) for i in wordless}
        for text, content, index in zip(fixed, [*contents, ""], [*order, None], strict=True):
            inner = sorted(start - at for start in starts if at <= start < at + len(text))
            for begin, end in zip([0, *inner], [*inner, len(text)], strict=True):
                pieces.append(_Piece(text[begin:end], True, begin in inner))
            at += len(text) + len(content)
            if content:
                pieces.append(_Piece(content, False, index in _trained(messages)))
        return pieces

    def _refuse_unread(self, messages, tools, options: dict) -> None:
        """Raise Refused where the template neither names an argument nor writes anything else for it."""
        for name in options:
            if name in ARGUMENTS:
                raise Refused(f"chat_template_kwargs {name} is an argument of transformers' own, which no row can set")
            rest = {other: value for other, value in options.items() if other != name}
            if name not in self.names and self._render(messages, tools, **rest) == self._render(messages, tools, **options):
                raise Refused(f"chat_template_kwargs {name} is not read by the template, so it would be lost")

    def _call_start(self, real: str, before: list[dict], tools, options) -> int:
        """Where a turn of tool calls without text begins in the output: after what the template writes before any answer."""
        prompt = self._render(before, tools, **options, add_generation_prompt=True)
        if not real.startswith(prompt):
            raise Refused("the template writes another prompt before a tool call than it does when asked for one")
        return len(prompt)

    def _render(self, messages, tools, **options) -> str:
        """The template's output. Raises Refused where the template raises anything, takes too much, or writes too much."""
        messages = [{key: value for key, value in message.items() if key != "train"} for message in messages]
        try:
            with time_limit(RENDER_SECONDS), memory_limit(RENDER_BYTES):
                output = self.tokenizer.apply_chat_template(
                    messages, tools=tools, tokenize=False, chat_template=TODAY + self.jinja, **options
                )
        except MemoryError as error:
            raise Refused("the template takes too much memory for it") from error
        except Exception as error:  # whatever a template's code raises
            raise Refused(f"the template refuses it: {first_line(error)}") from error
        if len(output) > MOST_WRITTEN + 10 * sum(map(len, _strings([messages, tools, options]))):
            raise Refused(f"the template writes {len(output):,} characters for it")
        return output

    def _find_end(self) -> int:
        """Find the special token that ends an assistant's turn. Raises ValueError where the template writes none."""
        try:
            pieces = self._pieces([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], None, {})
        except Refused as error:
            raise ValueError(f"the tokenizer's chat template cannot be used: {error}") from error
        after = "".join(piece.text for piece in pieces[1 + max(i for i, piece in enumerate(pieces) if piece.answer) :])
        found = _splitter(self.specials).search(after)
        if not found:
            raise ValueError(
                f"the tokenizer's chat template writes {after!r} after an answer, no special token: a model trained on it "
                "would never stop. Use --template chatml"
            )
        return self.specials[found.group()]


def _names(jinja: str) -> set[str]:
    """The names that a template uses; empty for one that Jinja cannot read."""
    try:
        return {value for _, kind, value in Environment().lex(jinja) if kind == "name"}
    except TemplateError:
        return set()


def _trained(messages: list[dict]) -> list[int]:
    """The numbers of the messages that are trained: answers, unless they say otherwise."""
    return [i for i, message in enumerate(messages) if message["role"] == "assistant" and message.get("train", True)]


def _parts(pieces: list[_Piece], specials: dict[str, int], end_id: int) -> list[Part]:
    """Join pieces to parts: fixed text is split at its special tokens, and what stands between two of them is one Text."""
    parts: list[Part] = []
    before, body, trained = "", "", False
    for piece in pieces:
        if trained and (piece.answer or not piece.fixed):
            raise Refused("the template gives an assistant's turn no end token of its own, so the next turn would be trained, too")
        trained = trained or piece.answer
        for is_special, text in _split_specials(piece.text, specials) if piece.fixed else [(False, piece.text)]:
            if not is_special:
                before, body = (before, body + text) if trained else (before + text, body)
                continue
            if before or body:
                parts.append(Text(before, body, bool(body)))
            before = body = ""
            parts.append(Encoded([specials[text]], trained))
            trained = trained and specials[text] != end_id
    if before or body:
        parts.append(Text(before, body, bool(body)))
    if trained:
        raise Refused("an assistant's turn has no end token")
    return parts


def _space_to_body(part: Part) -> Part:
    """Move a space that the template writes between header and answer to the answer: most vocabularies have it in the first token."""
    if isinstance(part, Encoded) or not part.trained:
        return part
    before = part.before.rstrip(" ")
    return Text(before, part.before[len(before) :] + part.body, True)


def _split_specials(text: str, specials: dict[str, int]) -> Iterator[tuple[bool, str]]:
    """Yield the stretches of a text, and whether each is a special token."""
    at = 0
    for found in _splitter(specials).finditer(text):
        if found.start() > at:
            yield False, text[at : found.start()]
        yield True, found.group()
        at = found.end()
    if at < len(text):
        yield False, text[at:]


def _splitter(specials: dict[str, int]) -> re.Pattern:
    """A pattern that finds special tokens, the longest first where one starts another."""
    return re.compile("|".join(re.escape(token) for token in sorted(specials, key=len, reverse=True)) or r"(?!)")


def _decompose(real: str, fixed: list[str], contents: list[str]) -> list[str] | None:
    """The contents as rendered, such that real == fixed[0] + contents[0] + fixed[1] + ...; None if they were changed beyond STRIPPED."""
    found, at = [], len(fixed[0])
    if not real.startswith(fixed[0]):
        return None
    for content, after in zip(contents, fixed[1:], strict=True):
        text = next((text for text in (change(content) for change in STRIPPED) if real.startswith(text + after, at)), None)
        if text is None:
            return None
        found.append(text)
        at += len(text) + len(after)
    return found if at == len(real) else None


def _strings(value) -> Iterator[str]:
    """Yield every text inside nested lists and dicts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield name
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
