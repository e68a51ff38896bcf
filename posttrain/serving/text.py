"""Turns tokens into text as they come: whole characters only, and nothing of a stop text or behind it."""

BROKEN = "\ufffd"  # what bytes that make no whole character decode to
LONGEST = 16  # tokens that may wait for the rest of a character, or be looked back at


class TextStream:
    """The text of one answer, as its tokens come."""

    def __init__(self, tokenizer, prompt: list[int], stops: list[str]):
        self.stops = [stop for stop in stops if stop]
        # transformers' own decode calls this, with as much work around it as the decoding is
        self.backend = tokenizer.backend_tokenizer.decode if tokenizer.is_fast else None
        self.tokenizer = tokenizer
        # Decoding looks back at tokens whose text has been given: some decoders treat the first token of a text in another way, and none
        # reads the rest of a character whose first bytes it does not see.
        self.window = next(
            (prompt[-n:] for n in range(4, LONGEST) if (text := self._decode(prompt[-n:])) and not text.startswith(BROKEN)),
            prompt[-LONGEST:],
        )
        self.given, self.piece = self._decode(self.window), len(self.window)  # the window's text so far; where its last piece begins
        self.held = ""  # text that may be the beginning of a stop text
        self.stopped = False  # a stop text was found

    def feed(self, tokens: list[int]) -> str:
        """Return the text that is certain after some more tokens; in sum it is the same whether they come one by one or together."""
        return "".join(self._feed(token) for token in tokens)

    def _feed(self, token: int) -> str:
        if self.stopped:
            return ""
        self.window.append(token)
        text = self._decode(self.window)
        if text.endswith(BROKEN) and len(self.window) - self.piece < LONGEST:  # half a character; after LONGEST tokens it is meant
            return ""
        delta = text[len(self.given) :]
        if self._decode(self.window[self.piece :]):
            self.window = self.window[self.piece :]
        self.piece, self.given = len(self.window), self._decode(self.window)
        return self._until_stop(delta)

    def end(self) -> str:
        """Return the text that was held back, as the answer is complete."""
        rest = self._decode(self.window)[len(self.given) :]
        text, self.held = (self.held + rest, "") if not self.stopped else ("", "")
        return text

    def _until_stop(self, delta: str) -> str:
        """Return new text up to a stop text, and hold back an end that may be the beginning of one."""
        text = self.held + delta
        found = min((at for stop in self.stops if (at := text.find(stop)) >= 0), default=None)
        if found is not None:
            self.stopped, self.held = True, ""
            return text[:found]
        lengths = (n for stop in self.stops for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n]))
        hold = max(lengths, default=0)
        text, self.held = text[: len(text) - hold], text[len(text) - hold :]
        return text

    def _decode(self, ids: list[int]) -> str:
        if self.backend:
            return self.backend(ids, skip_special_tokens=True)
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
