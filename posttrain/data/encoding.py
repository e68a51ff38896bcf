"""Turns texts into token ids and back, without anything that a tokenizer would add or leave out."""

import threading

_settings_lock = threading.Lock()


def encode_texts(tokenizer, texts: list[str]) -> list[list[int]]:
    """The ids of texts as text: nothing is added around them, and no special token is recognised inside them."""
    if not tokenizer.is_fast:
        return [tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in texts]
    backend = tokenizer.backend_tokenizer
    with _settings_lock:  # the settings are the tokenizer's, not the call's: another thread's call must not see them change
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        try:
            encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        finally:
            backend.encode_special_tokens = False
    return [encoding.ids for encoding in encodings]


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
    with _settings_lock:  # a call of the tokenizer sets its settings back while another thread encodes
        first = tokenizer("")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def special_tokens(tokenizer) -> dict[str, int]:
    """The id of each special token, by its text."""
    return {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
