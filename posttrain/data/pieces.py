"""Cuts a template's output into pieces, and joins them to parts: a special token each, or the text between two of them."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from tokenizers import AddedToken

from posttrain.data.parts import Fixed, Part, Refused, Text
from posttrain.data.thinking import EMPTY_BLOCK, is_trained

# what such tokens take away: Unicode's white space, which is less than Python's
SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"


class Piece(NamedTuple):
    """A stretch of a template's output."""

    text: str
    fixed: bool = True  # the template's own text, in which special tokens are recognised
    turn: int | None = None  # number of the message that it is a text of, or that starts here
    starts: bool = False  # an assistant's turn starts here
    trained: bool = False  # that turn is trained


class Specials:
    """A tokenizer's special tokens: their ids, and which of them take the white space beside them away."""

    def __init__(self, tokenizer):
        tokens: dict[str, tuple[int, AddedToken]] = {
            str(token): (index, token) for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self.ids = {text: index for text, (index, _) in tokens.items()}
        self.strips_left = {text for text, (_, token) in tokens.items() if token.lstrip}
        self.strips_right = {text for text, (_, token) in tokens.items() if token.rstrip}
        # the longest first where one starts another
        self.pattern = re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or r"(?!)")

    def split(self, text: str) -> Iterator[tuple[bool, str]]:
        """Yield the stretches of a text, and whether each is a special token."""
        at = 0
        for found in self.pattern.finditer(text):
            if found.start() > at:
                yield False, text[at : found.start()]
            yield True, found.group()
            at = found.end()
        if at < len(text):
            yield False, text[at:]


def cut_output(real: str, fixed: list[str], texts: list[str], slots: list[tuple[int, dict]], starts: dict[int, int]) -> list[Piece]:
    """Cut the output at the borders of the messages' texts and at the starts of turns; `slots` are the texts' numbers and messages."""
    pieces, at = [], 0
    thinking, waiting = {n // 2 for n, _ in slots if n % 2 == 0}, sorted((start, turn) for turn, start in starts.items())
    for number, text in enumerate(fixed):
        end, begins, cuts = at + len(text), None, []
        while waiting and waiting[0][0] <= end:
            start, turn = waiting.pop(0)
            if start < at:
                raise Refused("the template writes another prompt before an answer than it does when asked for one")
            empty = EMPTY_BLOCK.match(real, start, end) if turn not in thinking else None  # which the template puts there
            start = empty.end() if empty else start
            begins = turn if start == end else begins
            cuts.append((start, turn))
        pieces.append(Piece(real[at : cuts[0][0] if cuts else end]))
        for (start, turn), stop in zip(cuts, [*(start for start, _ in cuts[1:]), end], strict=False):
            if start < stop:
                pieces.append(Piece(real[start:stop], turn=turn, starts=True, trained=True))
        if number < len(texts) and texts[number]:
            slot, message = slots[number]
            turn, trained = slot // 2, is_trained(message)
            own = message["role"] == "assistant" and turn not in starts and slot % 2 == 1 and (trained or turn not in thinking)
            pieces.append(Piece(texts[number], False, turn, own or begins == turn, trained))
        at = end + (len(texts[number]) if number < len(texts) else 0)
    return [piece for piece in pieces if piece.text]


class _Joining:
    """What has been joined so far: finished parts, and the text since the last special token."""

    def __init__(self, specials: Specials):
        self.specials, self.parts = specials, []
        self.before, self.body = "", ""
        self.turn: int | None = None  # the answer that goes on
        self.trained = False  # it is trained
        self.strips = False  # the last special token takes white space after it away

    def text(self, text: str) -> None:
        """Add a text without special tokens."""
        if self.strips:
            text = text.lstrip(SPACE)
        if text:
            self.strips = False
            if self.turn is None:
                self.before += text
            else:
                self.body += text

    def special(self, token: str, end_id: int) -> None:
        """Add a special token; the one that ends an answer ends it."""
        if token in self.specials.strips_left:
            self.body = self.body.rstrip(SPACE)
            self.before = self.before if self.body else self.before.rstrip(SPACE)
        self.flush()
        self.parts.append(Fixed((self.specials.ids[token],), self.trained))
        self.strips = token in self.specials.strips_right
        if self.specials.ids[token] == end_id:
            self.turn, self.trained = None, False

    def flush(self) -> None:
        """Finish the text since the last special token."""
        if self.before or self.body:
            trained = self.trained and bool(self.body)
            self.parts.append(_space_to_body(Text(self.before, self.body, trained, not trained and bool(self.body))))
        self.before = self.body = ""


def join_pieces(pieces: list[Piece], specials: Specials, end_id: int) -> list[Part]:
    """Join pieces to parts. Raises Refused where what is trained of an answer has no end."""
    joining = _Joining(specials)
    for piece in pieces:
        if joining.turn is not None and (piece.starts or piece.turn not in (None, joining.turn)):
            if joining.trained:
                raise Refused("the template gives an assistant's turn no end token of its own, so the next turn would be trained, too")
            joining.before, joining.body, joining.turn = joining.before + joining.body, "", None
        if piece.starts:
            joining.turn, joining.trained = piece.turn, piece.trained
        for is_special, text in specials.split(piece.text) if piece.fixed else [(False, piece.text)]:
            if is_special:
                joining.special(text, end_id)
            else:
                joining.text(text)
    joining.flush()
    if joining.trained:
        raise Refused("an assistant's turn has no end token")
    return joining.parts


def _space_to_body(part: Text) -> Text:
    """Move a space that the template writes between header and answer to the answer: most vocabularies have it in the first token."""
    if not part.trained and not part.answer:
        return part
    before = part.before.rstrip(" ")
    return part._replace(before=before, body=part.before[len(before) :] + part.body)
