"""The built-in template, ChatML: <|im_start|>user\\nHow are you?<|im_end|>\\n<|im_start|>assistant\\nFine.<|im_end|>\\n"""

from posttrain.data.encoding import encode_text
from posttrain.data.parts import Fixed, Part, Refused, Text
from posttrain.data.pieces import Piece, Specials, join_pieces
from posttrain.data.thinking import CLOSE, CONTENT, OPEN, is_trained, reasoning_of

IM_START, IM_END = "<|im_start|>", "<|im_end|>"


class ChatML:
    """ChatML written with a tokenizer; `prefix` is its begin-of-text token in a list, empty where it adds none.

    Raises ValueError for a tokenizer without <|im_start|> and <|im_end|>.
    """

    def __init__(self, tokenizer, prefix: list[int]):
        self.specials = Specials(tokenizer)
        self.start_id, self.end_id = (_token_id(tokenizer, token) for token in (IM_START, IM_END))
        to_next = (*encode_text(tokenizer, "\n"), self.start_id)
        self.start = Fixed((*prefix, self.start_id), False)
        self.after_answer = [Fixed((self.end_id,), True), Fixed(to_next, False)]
        self.after_other = [Fixed((self.end_id, *to_next), False)]
        bos = "{{ bos_token }}" if prefix else ""
        self.jinja = (
            bos + "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
        )

    def parts(self, messages: list[dict], tools: list | None, options: dict | None) -> list[Part]:
        """Split a conversation into parts. Raises Refused for one with tools or arguments for a template, which ChatML cannot write."""
        if options:
            raise Refused(f"chat_template_kwargs {min(options)} is not read by ChatML, so it would be lost")
        if tools or any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
            raise Refused("tool calls need the tokenizer's own template (--template tokenizer)")
        parts: list[Part] = [self.start]
        for message in messages:
            trained, answer, content = is_trained(message), message["role"] == "assistant", message["content"]
            if reasoning := reasoning_of(message):
                thinking = [Piece(f"{OPEN}\n", True, 0, True, trained), Piece(reasoning, False, 0), Piece(f"\n{CLOSE}\n\n")]
                pieces = [Piece("assistant\n"), *thinking, Piece(content, False, 0), Piece(IM_END)]
                parts += [*join_pieces(pieces, self.specials, self.end_id)[:-1]]
            else:
                parts.append(Text(message["role"] + "\n", content, trained, answer and not trained))
            parts += self.after_answer if trained else self.after_other
        parts[-1] = Fixed(parts[-1].ids[:-1], False)  # no turn follows
        return parts

    def form(self, tools: list | None, options: dict | None) -> str:
        """How thinking is written: as a part of the answer's text."""
        return CONTENT

    def opens_thinking(self, tools: list | None, options: dict | None) -> bool:
        """Whether the header of an answer opens its thinking."""
        return False

    def groups(self, messages: list[dict], tools: list | None, options: dict | None) -> list[list[dict]]:
        """Return the conversation as one: ChatML leaves nothing out of earlier turns."""
        return [messages]


def _token_id(tokenizer, token: str) -> int:
    ids = tokenizer.convert_tokens_to_ids([token])
    if ids[0] is None or ids[0] == tokenizer.unk_token_id:
        raise ValueError(f"the tokenizer has no {token} token; load it with posttrain.data.tokenization.load_tokenizer, which adds it")
    return ids[0]
