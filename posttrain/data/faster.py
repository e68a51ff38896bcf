"""Encodes by fastokens, which takes a fraction of the time, wherever it gives the ids of the tokenizers library.

That is proven twice: for each tokenizer with texts that are made to tell two encoders apart, before the first row; and with a share of
every data set's own texts, which both encode. The first difference raises Differs, and whoever encodes begins again without it.
"""

import itertools
import random
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import numpy as np

from posttrain.common.errors import first_line
from posttrain.data.encoding import Flat, encode_plainly
from posttrain.data.spelling import spelling_of

try:
    import fastokens
except ImportError:  # there is no wheel of it for every machine
    fastokens = None

COMPARED_FIRST, COMPARED_EVERY = 200, 200  # texts of a data set that both encode: so many of its first ones, and one of so many after them
SIGNS = (
    *(
        " ",
        "  ",
        " " * 9,
        " " * 130,
        "\n",
        "\n\n",
        "\r\n",
        "\r",
        "\t",
        "\t\t ",
        " \n ",
        "\x0b",
        "\x0c",
        "\x85",
        "\u2028",
        "\u00a0",
        "\u3000",
    ),
    *("\u200b", "\u200d", "\u2060", "\ufeff", "\u00ad", "\u202e", "\x00", "\x01", "\x1b[0m", "\x7f", "\ue000", "\uffff", "\U0010ffff"),
    *("e\u0301", "\u00e9", "a\u0328\u0301", "a\u0301\u0328", "\u1112\u1161\u11ab", "\ud55c", "\u0958", "\u0915\u093c", "\u2126", "\ufb01"),
    *("\u0130", "\u0131", "\u00df", "\u1e9e", "\u01c5", "\u017f", "\u212a", "\U0001d400", "\u2160", "\u00bd", "\u00b2", "\u0663", "\u4e03"),
    *(
        "🙂",
        "👩\u200d👧\u200d👦",
        "🏳\ufe0f\u200d🌈",
        "👍🏽",
        "🇩🇪🇫🇷",
        "1\ufe0f\u20e3",
        "日本語",
        "中文",
        "한국어",
        "ไทย",
        "العربية",
        "עברית",
    ),
    *(
        "हिन्दी",
        "Ελληνικά",
        "Русский",
        "ñandú",
        "tiếng Việt",
        "a",
        "I",
        "the",
        "Hello",
        " world",
        "UPPER",
        "miXed",
        "x1",
        "1x",
        "snake_case",
    ),
    *(
        "'s",
        "'S",
        "'re",
        "'LL",
        "\u2019s",
        "'",
        '"',
        "''",
        "don't",
        "0",
        "12",
        "1234567",
        "3.14",
        "1,000",
        "0x1F",
        "9" * 60,
        "-",
        "--",
        "_" * 40,
    ),
    *(
        ".",
        "...",
        "!?",
        "=" * 70,
        "->",
        "://",
        "()",
        "[]{}",
        "\\n",
        "\\",
        "/",
        "<",
        ">",
        "<|",
        "|>",
        "</",
        "<0x0A>",
        "▁",
        "▁▁",
        "Ġ",
        "Ċ",
        "##",
    ),
)  # what two encoders may cut in two ways, alone and beside each other
UNKNOWN = ("Cn", "Cs", "Co")  # Unicode's categories of characters that are none (yet), or somebody's own


class Differs(Exception):
    """A text of a data set to which the two encoders give other ids."""


class Faster:
    """Encodes texts in the place of a tokenizer, and compares some of them with what the tokenizer itself gives."""

    def __init__(self, tokenizer, quick: "fastokens.Tokenizer"):
        self.tokenizer, self.quick = tokenizer, quick
        self.first, self.seen = COMPARED_FIRST, 0
        self.name = f"fastokens {version('fastokens')}"

    def begin(self, first: bool) -> None:
        """Begin a chunk of a data set, its first or a later one; which texts are compared depends on nothing else."""
        self.first, self.seen = COMPARED_FIRST if first else 0, 0

    def __call__(self, texts: list[str]) -> Flat:
        """The ids of texts as text. Raises Differs."""
        try:
            flat = _encode(self.quick, texts)
        except BaseException as error:  # a panic of its Rust is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise Differs(f"of {len(texts)} that it cannot encode ({first_line(error)})") from None
        few = range(min(len(texts), max(0, self.first - self.seen)))
        some = [*few, *(at for at in range(-self.seen % COMPARED_EVERY, len(texts), COMPARED_EVERY) if at not in few)]
        self.seen += len(texts)
        for at, expected in zip(some, encode_plainly(self.tokenizer, [texts[at] for at in some]), strict=True):
            if flat.ids[flat.bounds[at] : flat.bounds[at + 1]].tolist() != expected:
                raise Differs(_shown(texts[at]))
        return flat


def plain_name(tokenizer) -> str:
    """The name and version of what encodes where nothing faster does."""
    return f"tokenizers {version('tokenizers')}" if tokenizer.is_fast else f"{type(tokenizer).__name__} of transformers"


def find(tokenizer) -> tuple[Faster | None, str]:
    """What encodes in the place of a tokenizer; or None, and why: it is not there, or gives other ids for one of the hard texts."""
    if fastokens is None:
        return None, "fastokens is not installed"
    if not tokenizer.is_fast:
        return None, "fastokens is for tokenizers of the tokenizers library"
    texts = list(hard_texts([str(token) for token in tokenizer.added_tokens_decoder.values()]))
    with ThreadPoolExecutor(1) as background:  # it takes a second for 150,000 tokens, and holds no lock
        building = background.submit(fastokens.Tokenizer.from_json_str, tokenizer.backend_tokenizer.to_str())
        spelling_of(tokenizer)  # is known from now on
        expected = encode_plainly(tokenizer, texts)
        try:
            quick = building.result()
            ids = _encode(quick, texts).lists()
        except Exception as error:  # of a kind of its own for each thing that it does not know
            return None, f"fastokens cannot encode with this tokenizer: {first_line(error)}"
    for text, mine, others in zip(texts, ids, expected, strict=True):
        if mine != others:
            return None, f"fastokens gives other ids for the text {_shown(text)}"
    return Faster(tokenizer, quick), ""


def _encode(quick, texts: list[str]) -> Flat:
    ids, bounds = quick.encode_batch_flat(texts, False, True)
    return Flat(np.frombuffer(ids, np.uint32).view(np.int32), np.frombuffer(bounds, np.uint64).astype(np.int64))


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 60 else text[:60] + "...")


def hard_texts(added: list[str]) -> Iterator[str]:
    """Yield texts that two encoders may treat in two ways; `added`: the texts of the tokenizer's own tokens. The same ones each time."""
    draw = random.Random(0)
    spelled = [part for token in added[:40] for part in (token, token[:-1], token[1:], token.upper(), f"{token} ", f" {token}") if part]
    yield from ("", *SIGNS, *spelled, *(f"a{token}b" for token in added[:1000]))
    for start in itertools.chain(range(0, 0x40000, 64), range(0xE0000, 0xE0200, 64)):  # a few characters of each of Unicode's blocks
        known = [chr(code) for code in draw.sample(range(start, start + 64), 6) if unicodedata.category(chr(code)) not in UNKNOWN]
        if known:
            yield "".join(known) + draw.choice(SIGNS) + " ".join(known)
    pieces = [*SIGNS, *spelled]
    for _ in range(1500):
        yield "".join(draw.choices(pieces, k=draw.randint(2, 9)))
    for length in (255, 256, 257, 1023, 1025, 4095, 4096, 4097, 8193):  # a long text is cut, and so is one without a space
        yield "".join(draw.choices("abcdefgh", k=length))
        yield "".join(draw.choices("ab é日\n", k=length))
        yield " ".join(draw.choices(("the", "cat's", "12", "日本", "e\u0301", "\n"), k=length // 3))
        for sign in ("a", " ", "é", "日"):
            yield sign * length
