"""Conversations -> training examples, a chunk at a time: ids, what is trained, the ledger of what was dropped or changed.

The two kinds differ in what is encoded and in how it becomes columns; everything else about preparation is common to them.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from data_prep.sources import Chat, Document, Pair
from posttrain.data.chat import (
    IGNORE,
    ChatFormat,
    Encoded,
    Refused,
    Rendered,
    decode_after,
    document_parts,
    encode_parts,
    joined,
    last_answer,
    prove,
    trained_spans,
)

TOO_LONG = ("drop", "cut", "split_turns")


class Settings(NamedTuple):
    """What decides the ids of a row."""

    max_length: int
    too_long: str = "drop"
    system_prompt: str | None = None


class Example(NamedTuple):
    columns: dict[str, list[int]]  # what is stored of it: token ids, or labels
    length: int  # tokens that the example takes
    trained: int  # tokens with a loss
    prompt: str  # examples that share it are on the same side of the split
    text: str  # prompt and answers, for comparing examples
    proof: int  # hash of the trained texts


class Changes(Counter):
    """Rows changed, by what was done."""


class SFT:
    """input_ids and labels, which are IGNORE where a token is not trained."""

    name = "sft"
    columns = ("input_ids", "labels")

    def __init__(self, chat: ChatFormat, settings: Settings):
        self.chat, self.settings = chat, settings

    def parts(self, item: Document | Chat) -> list[list]:
        """What to encode for one row. Raises Refused."""
        if isinstance(item, Document):
            return [document_parts(self.chat, item.text)]
        return [self.chat.parts(item.messages, item.tools)]

    def with_system(self, item: Document | Chat) -> Document | Chat:
        prompt = self.settings.system_prompt
        if prompt is None:
            return item
        if isinstance(item, Document):
            raise ValueError("--system_prompt has no place in plain documents (rows with a text column); leave it out")
        return item if item.messages[0]["role"] == "system" else item._replace(messages=[_system(prompt), *item.messages])

    def examples(self, item: Document | Chat, encoded: list[list[Encoded]], texts: list[list[str]], changes: Changes) -> Iterator[Example]:
        """The row's examples: one, or with split_turns several. Raises Refused."""
        row = joined(encoded[0])
        if len(row.input_ids) <= self.settings.max_length:
            yield self._example(item, row, texts[0])
        elif self.settings.too_long == "cut":
            yield self._cut(item, row, texts[0], changes)
        elif self.settings.too_long == "split_turns":
            if isinstance(item, Document):
                raise Refused(f"a document longer than --max_length {self.settings.max_length}")
            yield from self._split(item, changes)
        else:
            raise Refused(f"longer than --max_length {self.settings.max_length}")

    def _example(self, item, row: Rendered, texts: list[str]) -> Example:
        length = len(row.input_ids)
        trained = length - 1 - row.labels[1:].count(IGNORE)  # nothing predicts a row's first token
        if trained <= 0:
            raise Refused("nothing to train on")
        if isinstance(item, Document):
            prompt = text = item.text
        else:
            prompt = _asked(item.messages)
            text = "\n".join([m["content"] for m in item.messages])
        return Example(row._asdict(), length, trained, prompt, text, proof(texts))

    def _cut(self, item, row: Rendered, texts: list[str], changes: Changes) -> Example:
        """The first max_length tokens. The answer at the edge loses its end token: it is not taught to stop there."""
        row = Rendered(*(column[: self.settings.max_length] for column in row))
        if row.labels.count(IGNORE) == len(row.labels):
            raise Refused("nothing trained is left within --max_length")
        read = span_texts(self.chat, *row)
        if not all(_is_prefix(cut, whole) for cut, whole in zip(read, texts, strict=False)):
            raise Refused("its tokens, once cut, do not read as the start of its text")
        example = self._example(item, row, read)
        changes["cut to --max_length"] += 1
        return example

    def _split(self, item: Chat, changes: Changes) -> Iterator[Example]:
        """As many whole exchanges to an example as fit, each with the system message; every answer is trained once."""
        system = item.messages[:1] if item.messages[0]["role"] == "system" else []
        exchanges: list[list[dict]] = []
        for message in item.messages[len(system) :]:
            if message["role"] == "user":
                exchanges.append([])
            exchanges[-1].append(message)
        held: list[dict] = []
        pieces: list[list[dict]] = []
        for exchange in exchanges:
            if held and self._length(system + held + exchange, item.tools) > self.settings.max_length:
                pieces.append(held)
                held = []
            held = held + exchange
        pieces.append(held)
        examples = []
        for piece in pieces:
            part = Chat(system + piece, item.tools)
            encoded = encode_parts(self.chat, [self.chat.parts(part.messages, part.tools)])
            row = joined(encoded[0])
            texts = prove(self.chat, encoded)[0]
            if len(row.input_ids) > self.settings.max_length:
                raise Refused(f"one exchange is longer than --max_length {self.settings.max_length}")
            if texts is None:
                raise Refused(UNPROVEN)
            examples.append(self._example(part, row, texts))
        changes["split at turns"] += 1
        yield from examples

    def _length(self, messages: list[dict], tools) -> int:
        return sum(len(part.ids) for part in encode_parts(self.chat, [self.chat.parts(messages, tools)])[0])


class DPO:
    """prompt, chosen and rejected; both answers continue the same prompt."""

    name = "dpo"
    columns = ("prompt", "chosen", "rejected")

    def __init__(self, chat: ChatFormat, settings: Settings):
        if settings.too_long == "split_turns":
            raise ValueError("--too_long split_turns is for conversations; pairs can be dropped or cut")
        self.chat, self.settings = chat, settings

    def with_system(self, item: Pair) -> Pair:
        prompt = self.settings.system_prompt
        return item if prompt is None or item.prompt[0]["role"] == "system" else item._replace(prompt=[_system(prompt), *item.prompt])

    def parts(self, item: Pair) -> list[list]:
        """Prompt with the chosen answer, and the end of the same with the rejected one."""
        chosen, rejected = (
            self.chat.parts([*item.prompt, {"role": "assistant", "content": answer}], item.tools) for answer in (item.chosen, item.rejected)
        )
        last = last_answer(chosen)
        if chosen[:last] != rejected[:last] or chosen[last].before != rejected[last].before:
            raise Refused("the template writes another prompt for the rejected answer than for the chosen one")
        return [chosen[: last + 2], rejected[last : last + 2]]

    def examples(self, item: Pair, encoded: list[list[Encoded]], texts: list[list[str]], changes: Changes) -> Iterator[Example]:
        """The pair as one example. Raises Refused."""
        prompt = [token for part in encoded[0][:-2] for token in part.ids]
        chosen, rejected = ([token for part in parts[-2:] for token in part.ids] for parts in encoded)
        answers = [texts[0][-1], texts[1][-1]]
        limit = self.settings.max_length
        if len(prompt) + max(len(chosen), len(rejected)) > limit:
            if self.settings.too_long == "drop":
                raise Refused(f"prompt and longer answer exceed --max_length {limit}")
            room = limit - len(prompt)
            if room < 1:
                raise Refused(f"the prompt alone fills --max_length {limit}")
            chosen, rejected = chosen[:room], rejected[:room]
            kept = answer_texts(self.chat, prompt, [chosen, rejected])
            if not all(map(_is_prefix, kept, answers)):
                raise Refused("its tokens, once cut, do not read as the start of its text")
            answers = kept
            if chosen == rejected:
                raise Refused("chosen equals rejected once cut")
            changes["cut to --max_length"] += 1
        if chosen == rejected:
            raise Refused("chosen equals rejected once tokenized")
        context = "\n".join(message["content"] for message in item.prompt)
        columns = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        length = len(prompt) + len(chosen) + len(rejected)
        text = "\n".join([context, item.chosen, item.rejected])
        yield Example(columns, length, len(chosen) + len(rejected), _asked(item.prompt), text, proof(answers))


KINDS = {kind.name: kind for kind in (SFT, DPO)}
APART = "white space at an answer's start kept apart from the template's"  # apply_chat_template would give it other ids
UNPROVEN = "its trained tokens do not read as its text"


class Planned(NamedTuple):
    """Rows of a chunk before encoding: a conversation's parts, or why the row was refused."""

    numbers: list[int]
    items: list[Document | Chat | Pair | Refused]
    parts: list[list[list]]  # of each item; empty for a refused one
    given: set[int]  # numbers of the rows that were given the system prompt


def plan(kind: SFT | DPO, numbered: Iterable[tuple[int, Document | Chat | Pair | Refused]]) -> Planned:
    planned = Planned([], [], [], set())
    for number, item in numbered:
        parts: list[list] = []
        if not isinstance(item, Refused):
            try:
                asked, item = item, kind.with_system(item)
                parts = kind.parts(item)
                if item is not asked:
                    planned.given.add(number)
            except Refused as cause:
                item = Refused(str(cause))  # without the traceback, which holds this frame and with it the whole chunk
        planned.numbers.append(number)
        planned.items.append(item)
        planned.parts.append(parts)
    return planned


def encode(chat: ChatFormat, planned: Planned) -> tuple[list[list[Encoded]], list[list[str] | None]]:
    """The slow half, which runs beside the reading of the next chunk: the tokenizer's own code holds no lock."""
    encoded = encode_parts(chat, (parts for several in planned.parts for parts in several))
    return encoded, prove(chat, encoded)


def finish(kind: SFT | DPO, planned: Planned, encoded, texts, changes: Changes) -> Iterator[tuple[int, Example | Refused]]:
    """(row number, example or why there is none) in the order of the rows."""
    at = 0
    for number, item, parts in zip(planned.numbers, planned.items, planned.parts, strict=True):
        mine = slice(at, at + len(parts))
        at += len(parts)
        if isinstance(item, Refused):
            yield number, item
            continue
        if None in texts[mine]:
            yield number, Refused(UNPROVEN)
            continue
        try:
            examples = list(kind.examples(item, encoded[mine], texts[mine], changes))
            if any(part.apart for parts in encoded[mine] for part in parts):
                changes[APART] += 1
            yield from ((number, example) for example in examples)
            if number in planned.given:
                changes["given --system_prompt"] += 1
        except Refused as cause:
            yield number, Refused(str(cause))


def span_texts(chat: ChatFormat, ids: list[int], labels: list[int]) -> list[str]:
    """What a row's trained tokens read as: a text for each run without special tokens."""
    specials = chat.special_ids | {chat.end_id, chat.tokenizer.eos_token_id}
    headers, bodies = [], []
    for start, end in trained_spans(labels):
        border, header = start, _since_special(ids[:start], specials)
        for at in range(start, end + 1):
            if at == end or ids[at] in specials:
                if at > border:
                    headers.append(header if border == start else [])
                    bodies.append(ids[border:at])
                border = at + 1
    return decode_after(chat.tokenizer, headers, bodies)


def answer_texts(chat: ChatFormat, prompt: list[int], answers: list[list[int]]) -> list[str]:
    """What answers read as after their prompt, without their end tokens; a cut answer has none."""
    bodies = without_ends(chat, answers)
    return decode_after(chat.tokenizer, [_since_special(prompt, chat.special_ids)] * len(bodies), bodies)


def without_ends(chat: ChatFormat, answers: list[list[int]]) -> list[list[int]]:
    return [answer[:-1] if answer[-1] == chat.end_id else answer for answer in answers]


def _since_special(ids: list[int], specials: set[int]) -> list[int]:
    """The ids after the last special token."""
    start = len(ids)
    while start and ids[start - 1] not in specials:
        start -= 1
    return ids[start:]


def proof(texts: list[str]) -> int:
    """64 bits that change when one of the trained texts does."""
    return number_of("\0".join(texts))


def number_of(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def row_hashes(columns: list[pa.ListArray]) -> np.ndarray:
    """One uint64 a row, equal for rows with the same ids in all columns."""
    flat = [(column.values.to_numpy(), column.offsets.to_numpy()) for column in columns]
    hashes = np.empty(len(columns[0]), np.uint64)
    for row in range(len(hashes)):
        digest = hashlib.blake2b(digest_size=8)
        for values, starts in flat:
            digest.update(values[starts[row] : starts[row + 1]].tobytes() + b"|")
        hashes[row] = int.from_bytes(digest.digest(), "little")
    return hashes


def _system(prompt: str) -> dict:
    return {"role": "system", "content": prompt}


def _asked(messages: list[dict]) -> str:
    """The first user message: conversations that begin alike are on the same side of the split, also where one goes on further."""
    return next(message["content"] for message in messages if message["role"] == "user")


def _is_prefix(cut: str, whole: str) -> bool:
    """A cut may fall inside a character of several bytes, which then reads as U+FFFD."""
    return whole.startswith(cut) or whole.startswith(cut.rstrip("\ufffd"))
