"""The bytes that each token of a byte-level tokenizer stands for: what its ids read as, without decoding them one text at a time."""

import json
import weakref
from itertools import pairwise

import numpy as np
import pyarrow as pa

_known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class _AsByte(dict):
    """The byte for which a character stands, by its code; for other characters a code that is no byte."""

    def __missing__(self, code: int) -> int:
        return 0xFFFF


class Spelling:
    """Reads ids of a tokenizer whose decoder joins the bytes of its tokens (GPT-2, Llama 3, Qwen and most since)."""

    def __init__(self, tokenizer):
        vocabulary = tokenizer.get_vocab()
        as_byte = _AsByte({ord(character): byte for byte, character in enumerate(_characters())})
        table = [b""] * (1 + max(vocabulary.values(), default=0))
        for token, index in vocabulary.items():
            try:
                table[index] = token.translate(as_byte).encode("latin-1")
            except UnicodeEncodeError:  # it has a character that stands for no byte: one of those added, which read as they are written
                table[index] = token.encode()
        self.tokens = pa.array(table, pa.large_binary())

    def reads_as(self, ids: list[np.ndarray], texts: list[str]) -> list[bool]:
        """Whether each line of ids, (tokens,) int32, reads as exactly its text."""
        if not ids:
            return []
        read = self.tokens.take(pa.array(np.concatenate(ids)))
        _, offsets, data = read.buffers()
        ends = np.frombuffer(offsets, np.int64)[np.cumsum([0, *map(len, ids)])].tolist()
        found = data.to_pybytes() if data else b""
        return [found[begin:end] == text.encode() for (begin, end), text in zip(pairwise(ends), texts, strict=True)]


def spelling_of(tokenizer) -> Spelling | None:
    """The spelling of a tokenizer's tokens, made once for each; None where they are read in another way than byte by byte."""
    if tokenizer not in _known:
        decoder = tokenizer.backend_tokenizer.decoder if tokenizer.is_fast else None
        joins_bytes = decoder is not None and json.loads(decoder.__getstate__()).get("type") == "ByteLevel"
        _known[tokenizer] = Spelling(tokenizer) if joins_bytes else None
    return _known[tokenizer]


def _characters() -> list[str]:
    """The character by which GPT-2 writes each byte: itself where it is seen, else one from U+0100 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256))
    return [chr(byte) if byte in seen else chr(256 + next(others)) for byte in range(256)]
