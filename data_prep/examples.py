"""Makes training examples of conversations: token ids, what of them is trained, and why a conversation is refused or changed.

The two kinds, SFT and DPO, differ in what is encoded and in how it becomes columns; all else in preparation is common to them.
"""

import json
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from data_prep.proof import UNPROVEN, Proven, answer_texts, encode, is_prefix, proof, span_texts
from data_prep.shapes.messages import Chat, Document, Pair
from data_prep.shapes.thinking import answered
from posttrain.data.chat import ChatFormat, document_parts, encode_parts
from posttrain.data.encoded import Row
from posttrain.data.parts import IGNORE, Refused, Text, trained_range
from posttrain.data.thinking import only_trained

SEVERAL = "trained as several examples: the template writes an answer otherwise once another follows it"


class Settings(NamedTuple):
    """The options that decide the ids of a row; max_length is in tokens."""

    max_length: int
    too_long: str = "drop"
    system_prompt: str | None = None
    thinking: str = "keep"


class Example(NamedTuple):
    """A row of the prepared data, and what deciding about it needs."""

    columns: dict[str, np.ndarray]  # token ids or labels, as they are stored, (tokens,) int32
    length: int  # tokens that the example takes
    trained: int  # tokens with a loss
    prompt: str  # examples that share it go to the same split
    text: str  # prompt and answers, by which examples are compared
    proof: int  # hash of the trained texts


class SFT:
    """Examples with the columns input_ids and labels, which are IGNORE where a token is not trained."""

    name = "sft"
    columns = ("input_ids", "labels")

    def __init__(self, chat: ChatFormat, settings: Settings):
        self.chat, self.settings = chat, settings

    def parts(self, item: Document | Chat) -> list[list]:
        """Split a row into what is to be encoded, a list for each of its examples. Raises Refused."""
        if isinstance(item, Document):
            return [document_parts(self.chat, item.text)]
        return [self.chat.parts(messages, item.tools, item.options) for messages in self._groups(item)]

    def _groups(self, item: Chat) -> list[list[dict]]:
        """The conversations that a row is trained as: several where the template writes earlier turns otherwise."""
        groups = self.chat.groups(item.messages, item.tools, item.options)
        return groups[-1:] if self.settings.thinking == "template" else groups

    def with_system(self, item: Document | Chat) -> Document | Chat:
        """The row with the system prompt of the settings, where it has none of its own."""
        prompt = self.settings.system_prompt
        if prompt is None:
            return item
        if isinstance(item, Document):
            raise ValueError("--system_prompt has no place in plain documents (rows with a text column); leave it out")
        return item if item.messages[0]["role"] == "system" else item._replace(messages=[_system(prompt), *item.messages])

    def examples(self, item: Document | Chat, proven: list[Proven], changes: Counter[str]) -> Iterator[Example]:
        """Yield the row's examples: one, or with split_turns several; `changes` counts what was done to it. Raises Refused.

        `proven`: the conversations of `parts`, encoded.
        """
        too_long = [len(one.row.input_ids) > self.settings.max_length for one in proven]
        if True in too_long and self.settings.too_long != "cut":
            if self.settings.too_long == "drop":
                raise Refused(f"longer than --max_length {self.settings.max_length}")
            if isinstance(item, Document):
                raise Refused(f"a document longer than --max_length {self.settings.max_length}")
            yield from self._split(item, changes)
            return
        if len(proven) > 1:
            changes[SEVERAL] += 1
        found, refused = [], []
        for one, is_too_long, shown in zip(proven, too_long, self._shown(item, len(proven)), strict=True):
            if not is_too_long:
                found.append(self._example(item, one.row, one.texts, shown))
                continue
            try:
                found.append(self._cut(item, one, shown, changes))
            except Refused as cause:
                refused.append(str(cause))
        if not found:
            raise Refused(refused[0])
        for cause in refused:
            changes[f"one of several answers left out: {cause}"] += 1
        yield from found

    def _shown(self, item: Document | Chat, count: int) -> list[list[dict]]:
        """The messages that each of a row's examples adds to those before it, by which it is compared."""
        if isinstance(item, Document):
            return [[]]
        if count == 1:
            return [item.messages]
        ends = [len(messages) for messages in self._groups(item)]
        return [item.messages[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def _example(self, item, row: Row, texts: list[str], shown: list[dict]) -> Example:
        """The example of a row that is not too long. Raises Refused where nothing is trained."""
        if not row.trained:
            raise Refused("nothing to train on")
        if isinstance(item, Document):
            prompt = text = item.text
        else:
            prompt, text = _asked(item.messages), "\n".join(_texts(shown))
        columns = {"input_ids": row.input_ids, "labels": row.labels}
        return Example(columns, len(row.input_ids), row.trained, prompt, text, proof(texts))

    def _cut(self, item, proven: Proven, shown: list[dict], changes: Counter[str]) -> Example:
        """The example of the first max_length tokens. The answer at the edge loses its end token: it is not taught to stop there."""
        row = proven.row.cut(self.settings.max_length)
        if (row.labels == IGNORE).all():
            raise Refused("nothing trained is left within --max_length")
        read = span_texts(self.chat, row.input_ids.tolist(), row.labels.tolist())
        if not all(is_prefix(cut, whole) for cut, whole in zip(read, proven.texts, strict=False)):
            raise Refused("its tokens, once cut, do not read as the start of its text")
        example = self._example(item, row, read, shown)
        changes["cut to --max_length"] += 1
        return example

    def _split(self, item: Chat, changes: Counter[str]) -> Iterator[Example]:
        """Yield examples of as many whole exchanges as fit, each with the system message; every answer is trained once."""
        system = item.messages[:1] if item.messages[0]["role"] == "system" else []
        exchanges: list[list[dict]] = []
        for message in item.messages[len(system) :]:
            if message["role"] == "user":
                exchanges.append([])
            exchanges[-1].append(message)
        held: list[dict] = []
        pieces: list[list[dict]] = []
        for exchange in exchanges:
            if held and self._length(item._replace(messages=system + held + exchange)) > self.settings.max_length:
                pieces.append(held)
                held = []
            held = held + exchange
        pieces.append(held)
        examples = []
        for piece in pieces:
            if not any(message["role"] == "assistant" and message.get("train", True) for message in piece):
                continue
            part = item._replace(messages=system + piece)
            proven = encode(self.chat, self.parts(part))
            for one, shown in zip(proven, self._shown(part, len(proven)), strict=True):
                if len(one.row.input_ids) > self.settings.max_length:
                    raise Refused(f"one exchange is longer than --max_length {self.settings.max_length}")
                if UNPROVEN in one.flaws:
                    raise Refused(UNPROVEN)
                examples.append(self._example(part, one.row, one.texts, shown))
        changes["split at turns"] += 1
        yield from examples

    def _length(self, item: Chat) -> int:
        """How many tokens a conversation takes, or the longest of the examples that it is made into."""
        return max(sum(len(part.ids) for part in parts) for parts in encode_parts(self.chat, self.parts(item)))


class DPO:
    """Examples with the columns prompt, chosen and rejected; both answers continue the same prompt."""

    name = "dpo"
    columns = ("prompt", "chosen", "rejected")

    def __init__(self, chat: ChatFormat, settings: Settings):
        if settings.too_long == "split_turns":
            raise ValueError("--too_long split_turns is for conversations; pairs can be dropped or cut")
        self.chat, self.settings = chat, settings

    def with_system(self, item: Pair) -> Pair:
        """The pair with the system prompt of the settings, where it has none of its own."""
        prompt = self.settings.system_prompt
        return item if prompt is None or item.prompt[0]["role"] == "system" else item._replace(prompt=[_system(prompt), *item.prompt])

    def parts(self, item: Pair) -> list[list]:
        """Split a pair into the prompt with the chosen answer, and the rejected answer with its end. Raises Refused."""
        context = only_trained(item.prompt, set())
        chosen, rejected = (
            self.chat.parts([*context, answered(self.chat, item, answer, self.settings.thinking)], item.tools, item.options)
            for answer in (item.chosen, item.rejected)
        )
        (start, end), (other_start, other_end) = trained_range(chosen), trained_range(rejected)
        first, other = chosen[start], rejected[other_start]
        headers = [part.before if isinstance(part, Text) else "" for part in (first, other)]
        if chosen[:start] != rejected[:other_start] or headers[0] != headers[1]:
            raise Refused("the template writes another prompt for the rejected answer than for the chosen one")
        return [chosen[:end], rejected[other_start:other_end]]

    def examples(self, item: Pair, proven: list[Proven], changes: Counter[str]) -> Iterator[Example]:
        """Yield the pair as one example; `changes` counts what was done to it. Raises Refused.

        `proven`: the conversations of `parts`, encoded.
        """
        first = proven[0].row
        prompt = first.input_ids[first.labels == IGNORE]
        chosen, rejected = (one.row.input_ids[one.row.labels != IGNORE] for one in proven)
        answers = [one.texts[0] for one in proven]
        if any(len(one.texts) > 1 for one in proven):  # special tokens stand between the texts of an answer
            answers = self._answers(prompt, chosen, rejected)
        limit = self.settings.max_length
        if len(prompt) + max(len(chosen), len(rejected)) > limit:
            if self.settings.too_long == "drop":
                raise Refused(f"prompt and longer answer exceed --max_length {limit}")
            room = limit - len(prompt)
            if room < 1:
                raise Refused(f"the prompt alone fills --max_length {limit}")
            chosen, rejected = chosen[:room], rejected[:room]
            kept = self._answers(prompt, chosen, rejected)
            if not all(map(is_prefix, kept, answers)):
                raise Refused("its tokens, once cut, do not read as the start of its text")
            answers = kept
            if np.array_equal(chosen, rejected):
                raise Refused("chosen equals rejected once cut")
            changes["cut to --max_length"] += 1
        if np.array_equal(chosen, rejected):
            raise Refused("chosen equals rejected once tokenized")
        context = "\n".join(message["content"] for message in item.prompt)
        columns = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        length = len(prompt) + len(chosen) + len(rejected)
        text = "\n".join([context, item.chosen, item.rejected])
        yield Example(columns, length, len(chosen) + len(rejected), _asked(item.prompt), text, proof(answers))

    def _answers(self, prompt: np.ndarray, *answers: np.ndarray) -> list[str]:
        """What answers read as after their prompt."""
        return answer_texts(self.chat, prompt.tolist(), [answer.tolist() for answer in answers])


KINDS = {kind.name: kind for kind in (SFT, DPO)}


def _texts(messages: list[dict]) -> list[str]:
    """What messages say: the thinking of each, its text and its calls, as far as it has them."""
    texts = []
    for message in messages:
        calls = message.get("tool_calls")
        texts += [message.get("reasoning_content"), message["content"], json.dumps(calls) if calls else None]
    return [text for text in texts if text]


def _system(prompt: str) -> dict:
    return {"role": "system", "content": prompt}


def _asked(messages: list[dict]) -> str:
    """The first user message: conversations that begin alike go to the same split, also where one goes on further."""
    return next(message["content"] for message in messages if message["role"] == "user")
