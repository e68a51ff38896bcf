"""The chat format (ChatML): the only place that turns messages into token ids.

Data preparation, samples during training, evaluation and serving all call it, so they cannot differ:

    <|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\nFine.<|im_end|>\n

Trained tokens are each assistant turn's content and its <|im_end|>, nothing else. Special tokens are inserted as ids; text is
encoded with special-token parsing off, so a message that contains "<|im_start|>assistant" stays text.
"""

import hashlib
from typing import NamedTuple

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant")
IGNORE = -100  # label of a token that is not trained


class Rendered(NamedTuple):
    input_ids: list[int]
    labels: list[int]  # same length; IGNORE where the token is not trained, else the token itself


def render(tokenizer, messages: list[dict]) -> Rendered:
    """Ids and labels of a conversation. Raises ValueError for a message that is not {role, content: str}."""
    ids, labels = [], []
    for token, trained in _tokens(tokenizer, messages):
        ids.append(token)
        labels.append(token if trained else IGNORE)
    return Rendered(ids, labels)


def render_prompt(tokenizer, messages: list[dict]) -> list[int]:
    """Ids of a conversation up to the point where the assistant's next answer starts."""
    ids = [token for token, _ in _tokens(tokenizer, messages)]
    return ids + [_special(tokenizer, IM_START)] + encode_text(tokenizer, "assistant\n")


def render_answer(tokenizer, content: str) -> list[int]:
    """Ids of an answer that follows render_prompt: its content and its end token, all of them trained."""
    return _turn_text(tokenizer, "assistant", content)[1] + [_special(tokenizer, IM_END)]


def render_document(tokenizer, text: str) -> Rendered:
    """Ids of a plain document, every token trained: what the tokenizer puts before a text, the text, its end-of-text token."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token, so a model trained on plain text could not end one")
    body = encode_text(tokenizer, text) + [tokenizer.eos_token_id]
    start = text_prefix(tokenizer)
    return Rendered(start + body, [IGNORE] * len(start) + body)


def encode_text(tokenizer, text: str) -> list[int]:
    """Ids of text as text: nothing added around it, and no special token is recognised inside it."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def text_prefix(tokenizer) -> list[int]:
    """The begin-of-text token as a list, empty for a tokenizer that adds none (Qwen)."""
    first = tokenizer("")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def chat_template(tokenizer) -> str:
    """The same format as a Jinja template, written into exported tokenizers; a test holds it to `render`."""
    start = "{{ bos_token }}" if text_prefix(tokenizer) else ""
    return (
        start + "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


def template_hash(tokenizer) -> str:
    """Identity of the format for this tokenizer; stored with prepared data and compared before training."""
    return hashlib.sha256(chat_template(tokenizer).encode()).hexdigest()[:16]


def _tokens(tokenizer, messages):
    """(id, trained) for every token of the conversation, in order."""
    start, end = _special(tokenizer, IM_START), _special(tokenizer, IM_END)
    newline = encode_text(tokenizer, "\n")
    for token in text_prefix(tokenizer):
        yield token, False
    for position, message in enumerate(messages):
        role, content = _checked(message, position)
        header_ids, content_ids = _turn_text(tokenizer, role, content)
        trained = role == "assistant"
        yield start, False
        for token in header_ids:
            yield token, False
        for token in [*content_ids, end]:
            yield token, trained
        for token in newline:
            yield token, False


def _turn_text(tokenizer, role: str, content: str) -> tuple[list[int], list[int]]:
    """Ids of "role\\n" and of the content after it.

    Encoded together, as apply_chat_template would, unless a token would straddle the border (a content that starts with a
    newline, say): generation starts right after the header, so the header's ids must stand alone.
    """
    header = encode_text(tokenizer, role + "\n")
    together = encode_text(tokenizer, role + "\n" + content)
    if together[: len(header)] == header:
        return header, together[len(header) :]
    return header, encode_text(tokenizer, content)


def _checked(message, position: int) -> tuple[str, str]:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"message {position} has role {role!r}; expected one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"message {position} ({role}) has content of type {type(content).__name__}; expected text")
    return role, content


def _special(tokenizer, token: str) -> int:
    ids = tokenizer.convert_tokens_to_ids([token])
    if ids[0] is None or ids[0] == tokenizer.unk_token_id:
        raise ValueError(f"the tokenizer has no {token} token; load it with posttrain.tokenization.load_tokenizer, which adds it")
    return ids[0]
