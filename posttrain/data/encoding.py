"""Turns texts into token ids and back, without anything that a tokenizer would add or leave out."""

import contextlib
import itertools
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

# How many threads encode with each backend, by its id(). What is special in a text is a setting of the tokenizer's, not of a call's: it is
# changed by the first of them and set back by the last, so that a short text need not wait for a long one.
_encoding: Counter[int] = Counter()
_changed = threading.Condition()
# Encoders that give the same ids in less time, by their tokenizer (see posttrain.data.faster)
_faster: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class Flat(NamedTuple):
    """The ids of several texts, one after another."""

    ids: np.ndarray  # (tokens,) int32
    bounds: np.ndarray  # (texts + 1,) int64: where each text's ids begin, and where the last one's end

    @classmethod
    def of(cls, lists: list[list[int]]) -> "Flat":
        """Join lists of ids."""
        bounds = np.cumsum([0, *map(len, lists)])
        return cls(np.fromiter(itertools.chain.from_iterable(lists), np.int32, bounds[-1]), bounds)

    def lists(self) -> list[list[int]]:
        """The ids of each text as a list."""
        ids = self.ids.tolist()
        return [ids[begin:end] for begin, end in pairwise(self.bounds.tolist())]


def encode_flat(tokenizer, texts: list[str]) -> Flat:
    """The ids of texts as text: nothing is added around them, and no special token is recognised inside them."""
    if (faster := _faster.get(tokenizer)) is not None:
        return faster(texts)
    return Flat.of(encode_plainly(tokenizer, texts))


def encode_texts(tokenizer, texts: list[str]) -> list[list[int]]:
    """The ids of texts as encode_flat gives them, as a list for each."""
    return encode_flat(tokenizer, texts).lists()


def encode_plainly(tokenizer, texts: list[str]) -> list[list[int]]:
    """The ids of texts as encode_flat gives them, by the tokenizer itself, also where a faster encoder stands in for it."""
    if not tokenizer.is_fast:
        return [tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in texts]
    with _as_text(tokenizer.backend_tokenizer) as backend:
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


@contextlib.contextmanager
def encoding_by(tokenizer, faster: Callable[[list[str]], Flat] | None) -> Iterator[None]:
    """Let encode_flat call `faster` in the place of this tokenizer within the block; None changes nothing."""
    if faster is not None:
        _faster[tokenizer] = faster
    try:
        yield
    finally:
        _faster.pop(tokenizer, None)


@contextlib.contextmanager
def _as_text(backend) -> Iterator:
    """Let a tokenizer's backend take special tokens in texts for text."""
    with _changed:
        if not _encoding[id(backend)]:
            backend.no_truncation()
            backend.no_padding()
            backend.encode_special_tokens = True
        _encoding[id(backend)] += 1
    try:
        yield backend
    finally:
        with _changed:
            _encoding[id(backend)] -= 1
            if not _encoding[id(backend)]:
                backend.encode_special_tokens = False
                del _encoding[id(backend)]
                _changed.notify_all()


def encode_text(tokenizer, text: str) -> list[int]:
    """The ids of one text, as encode_texts gives them; for many texts one call of that is faster."""
    return encode_texts(tokenizer, [text])[0]


def decode_texts(tokenizer, ids: list[list[int]]) -> list[str]:
    """What each list of ids reads as, special tokens included."""
    if tokenizer.is_fast:
        return tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=False)
    return [tokenizer.decode(line, skip_special_tokens=False, clean_up_tokenization_spaces=False) for line in ids]


def decode_after(tokenizer, headers: list[list[int]], bodies: list[list[int]]) -> list[str]:
    """What each body reads as after its header: some decoders treat the first token of a text in another way."""
    starts = decode_texts(tokenizer, headers)
    texts = decode_texts(tokenizer, [[*header, *body] for header, body in zip(headers, bodies, strict=True)])
    return [text.removeprefix(start) for text, start in zip(texts, starts, strict=True)]


def text_prefix(tokenizer) -> list[int]:
    """The begin-of-text token as a list, empty for a tokenizer that adds none (Qwen)."""
    backend = id(tokenizer.backend_tokenizer) if tokenizer.is_fast else None
    with _changed:  # a call of the tokenizer sets its settings back, which other threads encode with
        _changed.wait_for(lambda: backend not in _encoding)
        first = tokenizer("")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def special_tokens(tokenizer) -> dict[str, int]:
    """The id of each special token, by its text."""
    return {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
