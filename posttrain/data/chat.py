"""The chat format: the only place that turns messages into token ids.

Data preparation, samples during training, evaluation and serving all call it, so they cannot differ. Two templates:

    chatml       <|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\nFine.<|im_end|>\n       (built in)
    tokenizer    the tokenizer's own Jinja template

Trained tokens are each assistant turn's content, as the template renders it, and the token that ends the turn; nothing else. Special
tokens of the template are inserted as ids; a message's text is encoded with special-token parsing off, so a message that contains
"<|im_start|>assistant" stays text.

Where a message stands in an own template's output is never searched for: the template is also rendered with a placeholder for every
message, and the output must equal that skeleton with each placeholder replaced by its message (or its stripped form). A template that
rewrites a message beyond that is refused for that row.
"""

import functools
import hashlib
import re
import threading
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant", "tool")
TEMPLATES = ("chatml", "tokenizer")
IGNORE = -100  # label of a token that is not trained
# What a template that asks for today is told (Llama-3.1's default), so that ids do not depend on the day
TODAY = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
STRIPPED = (lambda text: text, str.strip, str.lstrip, str.rstrip)  # what templates do to a message


class Refused(ValueError):
    """A conversation that the format cannot render; its text is the cause, the same for all such conversations."""


class Rendered(NamedTuple):
    input_ids: list[int]
    labels: list[int]  # same length; IGNORE where the token is not trained, else the token itself


class Text(NamedTuple):
    """Text between two special tokens. No token straddles the border of a trained body."""

    before: str
    body: str
    trained: bool  # the body


class Encoded(NamedTuple):
    """Ids: special tokens of the template, or what a Text became."""

    ids: list[int]
    trained: bool
    text: str | None = None  # what a trained body's ids were made from
    header: tuple[int, ...] | list[int] = ()  # the ids right before a trained body, since the last special token
    sound: bool = True  # text that spells a special token has not become that token
    apart: bool = False  # a token would have straddled the border between header and body, so they were encoded apart


Part = Encoded | Text


class ChatFormat:
    """A tokenizer with one of TEMPLATES: `jinja` is what an exported tokenizer carries, `hash` identifies it.

    Raises ValueError for a tokenizer without a template, or one whose assistant turns have no end token.
    """

    def __init__(self, tokenizer, template: str = "chatml"):
        assert template in TEMPLATES
        self.tokenizer, self.template = tokenizer, template
        self.specials = _special_tokens(tokenizer)
        self.prefix = text_prefix(tokenizer)
        self.special_ids = {*self.specials.values(), *tokenizer.all_special_ids} - {tokenizer.unk_token_id}
        if template == "chatml":
            self.start_id, self.end_id = (_token_id(tokenizer, token) for token in (IM_START, IM_END))
            to_next = [*encode_text(tokenizer, "\n"), self.start_id]
            self.after_answer = [Encoded([self.end_id], True), Encoded(to_next, False)]
            self.after_other = [Encoded([self.end_id, *to_next], False)]
            bos = "{{ bos_token }}" if self.prefix else ""
            self.jinja = (
                bos + "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
                "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
            )
        else:
            self.jinja = tokenizer.chat_template
            if isinstance(self.jinja, dict):  # several by name
                self.jinja = self.jinja.get("default")
            if not isinstance(self.jinja, str):
                raise ValueError("the tokenizer has no chat template of its own; use --template chatml, or put its chat_template beside it")
            self.end_id = self._find_end()
        self.hash = hashlib.sha256(self.jinja.encode()).hexdigest()[:16]
        # few, as long as the template's markers are tokens; where they are not, a header holds the turns before it
        self.header_ids = functools.lru_cache(64)(lambda text: encode_text(tokenizer, text))

    def parts(self, messages: list[dict], tools: list | None = None) -> list[Part]:
        """A conversation as the template writes it. Raises Refused, or ValueError for a message that is not {role, content: str}."""
        for position, message in enumerate(messages):
            _check(message, position)
        return self._chatml(messages, tools) if self.template == "chatml" else self._own(messages, tools)

    def prompt_parts(self, messages: list[dict], tools: list | None = None) -> list[Part]:
        """The same up to the point where the assistant's next answer starts."""
        parts = self.parts([*messages, {"role": "assistant", "content": "x"}], tools)
        last = last_answer(parts)
        return [*parts[:last], Text(parts[last].before, "", False)]

    def _chatml(self, messages, tools) -> list[Part]:
        if tools or any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
            raise Refused("tool calls need the tokenizer's own template (--template tokenizer)")
        parts: list[Part] = [Encoded([*self.prefix, self.start_id], False)]
        for message in messages:
            trained = message["role"] == "assistant"
            parts.append(Text(message["role"] + "\n", message["content"], trained))
            parts += self.after_answer if trained else self.after_other
        parts[-1] = Encoded(parts[-1].ids[:-1], False)  # no turn follows
        return parts

    def _own(self, messages, tools) -> list[Part]:
        pieces = self._pieces(messages, tools)
        return [_space_to_body(part) for part in _runs(pieces, self.specials, self.end_id)]

    def _pieces(self, messages, tools) -> list["_Piece"]:
        """The template's output, cut at the borders of the messages' contents and at the start of each answer."""
        called = [message for message in messages if message.get("tool_calls")]
        if any(token in text for text in _strings([tools, [m["tool_calls"] for m in called]]) for token in self.specials):
            raise Refused("a tool call spells a special token")
        marks = {i: f"\ue000{i}\ue001" for i, message in enumerate(messages) if message["content"]}
        if any("\ue000" in message["content"] for message in messages):
            raise Refused("a message contains the private-use character U+E000")
        real = self._render(messages, tools)
        skeleton = self._render([{**m, "content": marks.get(i, "")} for i, m in enumerate(messages)], tools)
        fixed, order = re.split("\ue000\\d+\ue001", skeleton), [int(i) for i in re.findall("\ue000(\\d+)\ue001", skeleton)]
        if order != sorted(marks):
            raise Refused("the template leaves out, repeats or reorders a message")
        contents = _decompose(real, fixed, [messages[i]["content"] for i in order])
        if contents is None:
            raise Refused("the template rewrites a message, so what is trained cannot be proven")
        pieces, at = [], 0
        starts = {self._call_start(real, messages[:i], tools) for i, m in enumerate(messages) if m.get("tool_calls") and not m["content"]}
        for text, content, index in zip(fixed, [*contents, ""], [*order, None], strict=True):
            inner = sorted(start - at for start in starts if at <= start < at + len(text))
            for begin, end in zip([0, *inner], [*inner, len(text)], strict=True):
                pieces.append(_Piece(text[begin:end], True, begin in inner))
            at += len(text) + len(content)
            if content:
                pieces.append(_Piece(content, False, messages[index]["role"] == "assistant"))
        return pieces

    def _call_start(self, real: str, before: list[dict], tools) -> int:
        """Where a turn of tool calls without text begins: after what the template writes before any answer."""
        prompt = self._render(before, tools, add_generation_prompt=True)
        if not real.startswith(prompt):
            raise Refused("the template writes another prompt before a tool call than it does when asked for one")
        return len(prompt)

    def _render(self, messages, tools, **options) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, chat_template=TODAY + self.jinja, **options)
        except Exception as error:  # whatever a template's code raises
            raise Refused(f"the template refuses it: {error}") from error

    def _find_end(self) -> int:
        """The special token that ends an assistant's turn."""
        try:
            pieces = self._pieces([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], None)
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


class _Piece(NamedTuple):
    text: str
    fixed: bool  # the template's own text, in which special tokens are recognised
    answer: bool  # an assistant's turn starts here


def last_answer(parts: list[Part]) -> int:
    """Which part is the last answer's text."""
    return max(i for i, part in enumerate(parts) if isinstance(part, Text) and part.trained)


def encode_parts(chat: ChatFormat, conversations: Iterable[list[Part]]) -> list[list[Encoded]]:
    """Ids of many conversations' parts, in one call of the tokenizer."""
    conversations = list(conversations)
    texts = [part.before + part.body for parts in conversations for part in parts if isinstance(part, Text)]
    ids = iter(encode_texts(chat.tokenizer, texts))
    result: list[list[Encoded]] = []
    for parts in conversations:
        encoded: list[Encoded] = []
        for part in parts:
            if isinstance(part, Encoded):
                encoded.append(part)
                continue
            together = next(ids)
            sound = chat.special_ids.isdisjoint(together)
            if not part.trained:
                encoded.append(Encoded(together, False, sound=sound))
                continue
            # Encoded together, as apply_chat_template would, unless a token would straddle the border (a content that starts with a
            # newline, say): generation starts right after the header, so the header's ids must stand alone.
            header = chat.header_ids(part.before)
            straddles = together[: len(header)] != header
            body = encode_text(chat.tokenizer, part.body) if straddles else together[len(header) :]
            encoded += [Encoded(header, False), Encoded(body, True, part.body, header, sound, straddles)]
        result.append(encoded)
    return result


def render(chat: ChatFormat, messages: list[dict], tools: list | None = None) -> Rendered:
    """Ids and labels of a conversation."""
    return joined(encode_parts(chat, [chat.parts(messages, tools)])[0])


def joined(parts: list[Encoded]) -> Rendered:
    """Ids and labels of the parts of a conversation, one after the other."""
    ids, labels = [], []
    for part in parts:
        ids += part.ids
        labels += part.ids if part.trained else [IGNORE] * len(part.ids)
    return Rendered(ids, labels)


def render_prompt(chat: ChatFormat, messages: list[dict], tools: list | None = None) -> list[int]:
    """Ids of a conversation up to the point where the assistant's next answer starts."""
    return [token for part in encode_parts(chat, [chat.prompt_parts(messages, tools)])[0] for token in part.ids]


_settings_lock = threading.Lock()


def encode_texts(tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of texts as text: nothing added around them, and no special token is recognised inside them."""
    if not tokenizer.is_fast:
        return [tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in texts]
    backend = tokenizer.backend_tokenizer
    with _settings_lock:  # the settings are the tokenizer's, not the call's: another thread's call must not see them change
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        try:
            encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        finally:
            backend.encode_special_tokens = False
    return [encoding.ids for encoding in encodings]


def decode_after(tokenizer, headers: list[list[int]], bodies: list[list[int]]) -> list[str]:
    """What each body reads as after its header: some decoders treat the first token of a text in another way."""
    starts = _decode(tokenizer, headers)
    texts = _decode(tokenizer, [[*header, *body] for header, body in zip(headers, bodies, strict=True)])
    return [text.removeprefix(start) for text, start in zip(texts, starts, strict=True)]


def prove(chat: ChatFormat, conversations: list[list[Encoded]]) -> list[list[str] | None]:
    """The texts that each conversation's trained tokens read as; None where one does not read as what it was made from.

    It must be that text, or that text as the tokenizer normalises it (NFC, say): decode(encode(text)).
    """
    bodies = [part for encoded in conversations for part in encoded if part.text is not None]
    decoded = iter(decode_after(chat.tokenizer, [part.header for part in bodies], [part.ids for part in bodies]))
    result: list[list[str] | None] = []
    for encoded in conversations:
        pairs = [(part, next(decoded)) for part in encoded if part.text is not None]
        sound = all(part.sound for part in encoded) and all(
            text == part.text or text == _normalised(chat.tokenizer, part.text) for part, text in pairs
        )
        result.append([text for _, text in pairs] if sound else None)
    return result


def trained_spans(labels: list[int]) -> list[tuple[int, int]]:
    """Runs of trained tokens [start, end) of a row."""
    trained = np.concatenate([[False], np.asarray(labels) != IGNORE, [False]])
    edges = np.flatnonzero(trained[1:] != trained[:-1]).tolist()
    return list(zip(edges[0::2], edges[1::2], strict=True))


def _normalised(tokenizer, text: str) -> str:
    return _decode(tokenizer, [encode_text(tokenizer, text)])[0]


def _decode(tokenizer, ids: list[list[int]]) -> list[str]:
    if tokenizer.is_fast:
        return tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=False)
    return [tokenizer.decode(line, skip_special_tokens=False, clean_up_tokenization_spaces=False) for line in ids]


def encode_text(tokenizer, text: str) -> list[int]:
    return encode_texts(tokenizer, [text])[0]


def document_parts(chat: ChatFormat, text: str) -> list[Part]:
    """A plain document, every token trained: what the tokenizer puts before a text, the text, its end-of-text token."""
    end = chat.tokenizer.eos_token_id
    if end is None:
        raise ValueError("the tokenizer has no end-of-text token, so a model trained on plain text could not end one")
    return [Encoded(chat.prefix, False), Text("", text, True), Encoded([end], True)]


def text_prefix(tokenizer) -> list[int]:
    """The begin-of-text token as a list, empty for a tokenizer that adds none (Qwen)."""
    with _settings_lock:  # a call of the tokenizer sets its settings back while another thread encodes
        first = tokenizer("")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def _runs(pieces: list[_Piece], specials: dict[str, int], end_id: int) -> list[Part]:
    """Pieces -> parts: fixed text is split at its special tokens, and what stands between two of them is one Text."""
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
    """A space that the template writes between header and answer belongs to the answer's first token in most vocabularies."""
    if isinstance(part, Encoded) or not part.trained:
        return part
    before = part.before.rstrip(" ")
    return Text(before, part.before[len(before) :] + part.body, True)


def _split_specials(text: str, specials: dict[str, int]) -> Iterator[tuple[bool, str]]:
    at = 0
    for found in _splitter(specials).finditer(text):
        if found.start() > at:
            yield False, text[at : found.start()]
        yield True, found.group()
        at = found.end()
    if at < len(text):
        yield False, text[at:]


def _splitter(specials: dict[str, int]) -> re.Pattern:
    return re.compile("|".join(re.escape(token) for token in sorted(specials, key=len, reverse=True)) or r"(?!)")


def _special_tokens(tokenizer) -> dict[str, int]:
    return {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if token.special}


def _decompose(real: str, fixed: list[str], contents: list[str]) -> list[str] | None:
    """The contents as rendered, such that real == fixed[0] + contents[0] + fixed[1] + ...; None if they were changed further."""
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
    """Every text inside nested lists and dicts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield name
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _check(message, position: int) -> None:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"message {position} has role {role!r}; expected one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"message {position} ({role}) has content of type {type(content).__name__}; expected text")


def _token_id(tokenizer, token: str) -> int:
    ids = tokenizer.convert_tokens_to_ids([token])
    if ids[0] is None or ids[0] == tokenizer.unk_token_id:
        raise ValueError(f"the tokenizer has no {token} token; load it with posttrain.tokenization.load_tokenizer, which adds it")
    return ids[0]
