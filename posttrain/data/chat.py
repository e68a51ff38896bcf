"""The chat format: the only place that turns messages into token ids.

Data preparation, samples during training, evaluation and serving all call it, so they cannot differ. Two templates:

    chatml       <|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\nFine.<|im_end|>\n       (built in)
    tokenizer    the tokenizer's own Jinja template

Trained tokens are each assistant turn's content, as the template renders it, and the token that ends the turn; nothing else. Special
tokens of the template are inserted as ids; a message's text is encoded with special-token parsing off, so a message that contains
"<|im_start|>assistant" stays text.
"""

import functools
import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

from posttrain.data.chatml import ChatML
from posttrain.data.encoded import Encoded, Rendered, counted, joined
from posttrain.data.encoding import Flat, encode_flat, encode_text, special_tokens, text_prefix
from posttrain.data.manifest import TEMPLATES
from posttrain.data.own_template import TODAY, OwnTemplate
from posttrain.data.parts import Fixed, Part, Text, trained_range
from posttrain.data.thinking import CLOSE, OPEN, only_trained

THINKS = "asked_to_think"  # in tokenizer_config.json: the model was trained to think before it answers
WITHOUT_THINKING = "{%- set enable_thinking = false -%}"
ROLES = ("system", "user", "assistant", "tool")


class ChatFormat:
    """A tokenizer with one of TEMPLATES: `jinja` is what an exported tokenizer carries, `hash` identifies it, `end_id` ends an answer.

    Raises ValueError for a tokenizer without a template, or one whose assistant turns have no end token.
    """

    def __init__(self, tokenizer, template: str = "chatml"):
        assert template in TEMPLATES
        self.tokenizer, self.template, self.prefix = tokenizer, template, text_prefix(tokenizer)
        self.syntax = ChatML(tokenizer, self.prefix) if template == "chatml" else OwnTemplate(tokenizer)
        self.jinja, self.end_id = self.syntax.jinja, self.syntax.end_id
        spelled = special_tokens(tokenizer)
        self.special = re.compile("|".join(re.escape(text) for text in sorted(spelled, key=len, reverse=True)) or r"(?!)")
        self.special_starts = {text[:2] for text in spelled}  # in hardly any text, and found much faster
        self.special_ids = {*special_tokens(tokenizer).values(), *tokenizer.all_special_ids} - {tokenizer.unk_token_id}
        unknown = tokenizer.unk_token_id  # a token that stands for others, too, is in ids for their sake
        self.unknown_ids = [] if unknown in (None, tokenizer.eos_token_id, tokenizer.bos_token_id, self.end_id) else [unknown]
        self.thinking_ids = {index for text, index in special_tokens(tokenizer).items() if text in (OPEN, CLOSE)}
        self.thinks = bool(tokenizer.init_kwargs.get(THINKS))  # answers begin with thinking, so they are asked for where it begins
        self.hash = hashlib.sha256(self.jinja.encode()).hexdigest()[:16]
        # few, as long as the template's markers are tokens; where they are not, a header holds the turns before it
        self.header = functools.lru_cache(64)(lambda text: self.alone(encode_text(tokenizer, text)))
        self.fixed = functools.lru_cache(256)(lambda part: self.alone(part.ids, part.trained))

    def spells_special(self, text: str) -> bool:
        """Whether a text spells a special token; it stays text."""
        return any(start in text for start in self.special_starts) and bool(self.special.search(text))

    def alone(self, ids: Sequence[int], trained: bool = False) -> Encoded:
        """Ids that do not depend on what is around them, as a part of a conversation."""
        return Encoded(np.array(ids, np.int32), trained, lacks=not set(self.unknown_ids).isdisjoint(ids))

    def parts(self, messages: list[dict], tools: list | None = None, options: dict | None = None) -> list[Part]:
        """Split a conversation into parts, as the template writes it with `options`, its arguments. An answer with train: False is context.

        Raises Refused for one that it cannot write, ValueError for a message that is not {role, content: str}.
        """
        for position, message in enumerate(messages):
            _check(message, position)
        return self.syntax.parts(messages, tools, options)

    def prompt_parts(self, messages: list[dict], tools: list | None = None, options: dict | None = None) -> list[Part]:
        """Split a conversation as parts does, up to the point where the assistant's next answer starts.

        That is an answer without thinking, unless the model `thinks`, or `options` ask the template for another header.
        """
        context = only_trained(messages, set())
        if (options or self.thinks) and self.template != "chatml":
            for position, message in enumerate(messages):
                _check(message, position)
            return self.syntax.prompt_parts(context, tools, options or {})
        parts = self.parts([*context, {"role": "assistant", "content": "x"}], tools, options)
        first, _ = trained_range(parts)
        return [*parts[:first], Text(parts[first].before, "", False)]

    @property
    def asking_jinja(self) -> str:
        """The template for programs that fill it in themselves, such that they ask with the ids of render_prompt."""
        ask = [{"role": "user", "content": "a"}]
        for jinja in (TODAY + self.jinja, TODAY + WITHOUT_THINKING + self.jinja):
            ids = self.tokenizer.apply_chat_template(ask, chat_template=jinja, add_generation_prompt=True, return_dict=False)
            if ids == render_prompt(self, ask):
                return jinja
        return TODAY + self.jinja

    def groups(self, messages: list[dict], tools: list | None = None, options: dict | None = None) -> list[list[dict]]:
        """Divide a conversation into several where the template leaves thinking out of earlier turns: each answer is trained once."""
        return self.syntax.groups(messages, tools, options)


def encode_parts(chat: ChatFormat, conversations: Iterable[list[Part]]) -> list[list[Encoded]]:
    """Encode the parts of many conversations, in one call of the tokenizer."""
    conversations = list(conversations)
    texts = [part for parts in conversations for part in parts if isinstance(part, Text)]
    flat = encode_flat(chat.tokenizer, [part.before + part.body for part in texts])
    special, unknown = (counted(among, flat.ids) for among in ([*chat.special_ids], chat.unknown_ids))
    headers = [chat.header(part.before) if part.trained or part.answer else None for part in texts]
    straddled = _straddled(flat, headers)
    borders, sounds = flat.bounds.tolist(), (np.diff(special[flat.bounds]) == 0).tolist() if special is not None else [True] * len(texts)
    result: list[list[Encoded]] = []
    number = 0
    for parts in conversations:
        encoded: list[Encoded] = []
        for part in parts:
            if isinstance(part, Fixed):
                encoded.append(chat.fixed(part))
                continue
            begin, end, sound, header, apart = borders[number], borders[number + 1], sounds[number], headers[number], straddled[number]
            number += 1
            if header is not None:
                # Encoded together, as apply_chat_template would, unless a token would straddle the border (a content that starts with a
                # newline, say): generation starts right after the header, so the header's ids must stand alone.
                encoded.append(header)
                begin += len(header.ids)
            ids, lacks = flat.ids[begin:end], unknown is not None and bool(unknown[end] > unknown[begin])
            if apart:
                ids, *_, lacks = chat.alone(encode_text(chat.tokenizer, part.body))
            if part.trained and header is not None:
                encoded.append(Encoded(ids, True, part.body, header.ids, sound, apart, lacks))
            else:
                encoded.append(Encoded(ids, False, sound=sound, lacks=lacks))
        result.append(encoded)
    return result


def _straddled(flat: Flat, headers: list[Encoded | None]) -> list[bool]:
    """Whether the ids of each text do not begin with those of its header, where it has one."""
    answers = [number for number, header in enumerate(headers) if header is not None]
    result = np.zeros(len(headers), bool)
    if not answers:
        return result.tolist()
    wanted = [header.ids for header in headers if header is not None]
    expected, sizes = np.concatenate(wanted), np.array([*map(len, wanted)])
    begins, ends = flat.bounds[answers], flat.bounds[np.add(answers, 1)]
    before = np.cumsum(sizes) - sizes
    places = np.arange(len(expected)) + np.repeat(begins - before, sizes)
    differs = flat.ids[np.minimum(places, len(flat.ids) - 1)] != expected if len(flat.ids) else np.ones(len(expected), bool)
    wrong = np.concatenate([[0], np.cumsum(differs)])
    result[answers] = (wrong[before + sizes] > wrong[before]) | (begins + sizes > ends)
    return result.tolist()


def render(chat: ChatFormat, messages: list[dict], tools: list | None = None, options: dict | None = None) -> Rendered:
    """The ids and labels of a conversation. Raises as ChatFormat.parts does."""
    return joined(encode_parts(chat, [chat.parts(messages, tools, options)])[0])


def render_prompt(chat: ChatFormat, messages: list[dict], tools: list | None = None, options: dict | None = None) -> list[int]:
    """The ids of a conversation up to the point where the assistant's next answer starts. Raises as ChatFormat.parts does."""
    return [token for part in encode_parts(chat, [chat.prompt_parts(messages, tools, options)])[0] for token in part.ids]


def document_parts(chat: ChatFormat, text: str) -> list[Part]:
    """Split a plain document into what the tokenizer puts before a text, the text, and its end-of-text token; every token is trained.

    Raises ValueError for a tokenizer without an end-of-text token.
    """
    end = chat.tokenizer.eos_token_id
    if end is None:
        raise ValueError("the tokenizer has no end-of-text token, so a model trained on plain text could not end one")
    return [Fixed(tuple(chat.prefix), False), Text("", text, True), Fixed((end,), True)]


def _check(message, position: int) -> None:
    """Raise ValueError for a message without a known role or without a text."""
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"message {position} has role {role!r}; expected one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"message {position} ({role}) has content of type {type(content).__name__}; expected text")
