"""Proves that a row's trained tokens read as the texts that they were made from, and hashes the texts by which rows are compared."""

import hashlib
import itertools
from collections.abc import Iterable
from typing import NamedTuple

from posttrain.data.chat import ChatFormat, encode_parts
from posttrain.data.encoded import Encoded, Row, rows_of, trained_spans
from posttrain.data.encoding import decode_after, decode_texts, encode_text
from posttrain.data.parts import Part
from posttrain.data.spelling import spelling_of

UNPROVEN = "its trained tokens do not read as its text"
LACKING = "the vocabulary lacks characters of it"
LACKING_READ = f"{LACKING}: in what is read, not trained"
APART = "white space at an answer's start kept apart from the template's"  # apply_chat_template would give it other ids
REFUSED = (LACKING, UNPROVEN)
FLAWS = (*REFUSED, LACKING_READ, APART)


class Proven(NamedTuple):
    """A conversation's row, and what is known about it."""

    row: Row
    texts: list[str]  # what its trained tokens read as, a text for each part
    flaws: tuple[str, ...] = ()  # some of FLAWS; with one of REFUSED it is not trained


def encode(chat: ChatFormat, conversations: Iterable[list[Part]]) -> list[Proven]:
    """Encode conversations, and prove them."""
    encoded = encode_parts(chat, conversations)
    read = zip(rows_of(encoded), prove(chat, encoded), strict=True)
    proven = [Proven(row, [], (UNPROVEN,)) if texts is None else Proven(row, texts) for row, texts in read]
    if any(part.lacks or part.apart for parts in encoded for part in parts):  # of hardly any block, which saves asking each conversation
        proven = [one._replace(flaws=_flaws(one, parts)) for one, parts in zip(proven, encoded, strict=True)]
    return proven


def _flaws(proven: Proven, parts: list[Encoded]) -> tuple[str, ...]:
    found = {*proven.flaws}
    for part in parts:
        if part.lacks:
            found.add(LACKING if part.trained else LACKING_READ)
        if part.apart:
            found.add(APART)
    return tuple(flaw for flaw in FLAWS if flaw in found)


def prove(chat: ChatFormat, conversations: list[list[Encoded]]) -> list[list[str] | None]:
    """The texts that each conversation's trained tokens read as; None where one does not read as what it was made from.

    It must be that text, or that text as the tokenizer normalises it (NFC, say): decode(encode(text)).
    """
    spelling = spelling_of(chat.tokenizer)
    bodies = [part for encoded in conversations for part in encoded if part.text is not None]
    texts = [part.text for part in bodies]
    same = spelling.reads_as([part.ids for part in bodies], texts) if spelling else [False] * len(bodies)
    others = [part for part, is_same in zip(bodies, same, strict=True) if not is_same]
    decoded = iter(decode_after(chat.tokenizer, [part.header.tolist() for part in others], [part.ids.tolist() for part in others]))
    read = iter(texts if not others else [text if is_same else next(decoded) for text, is_same in zip(texts, same, strict=True)])
    result: list[list[str] | None] = []
    for encoded in conversations:
        made = [part.text for part in encoded if part.text is not None]
        mine = list(itertools.islice(read, len(made)))
        sound = not [part for part in encoded if not part.sound] and (
            mine == made or all(text == one or text == _normalised(chat.tokenizer, one) for one, text in zip(made, mine, strict=True))
        )
        result.append(mine if sound else None)
    return result


def _normalised(tokenizer, text: str) -> str:
    """The text as it comes back from the tokenizer."""
    return decode_texts(tokenizer, [encode_text(tokenizer, text)])[0]


def span_texts(chat: ChatFormat, ids: list[int], labels: list[int]) -> list[str]:
    """What a stored row's trained tokens read as: a text for each run of them without special tokens."""
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
    """The answers without their end tokens."""
    return [answer[:-1] if answer[-1] == chat.end_id else answer for answer in answers]


def _since_special(ids: list[int], specials: set[int]) -> list[int]:
    """The ids after the last special token."""
    start = len(ids)
    while start and ids[start - 1] not in specials:
        start -= 1
    return ids[start:]


def is_prefix(cut: str, whole: str) -> bool:
    """Whether a cut text starts the whole one. A cut may fall inside a character of several bytes, which then reads as U+FFFD."""
    return whole.startswith(cut) or whole.startswith(cut.rstrip("\ufffd"))


def proof(texts: list[str]) -> int:
    """64 bits that change when one of the trained texts does: the column `proof`."""
    return text_hash("\0".join(texts))


def text_hash(text: str) -> int:
    """64 bits of a text's BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
