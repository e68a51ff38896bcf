"""The JSON of requests: OpenAI's names and ranges. A field that would not be read is an error, not ignored.

Source: OpenAI's API reference for chat completions and completions; top_k and repetition_penalty as vLLM adds them.
"""

import secrets
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, model_validator

from posttrain.serving.sampling import Sampling

MAX_STOPS, MAX_STOP_LENGTH = 16, 256
MAX_MESSAGES = 2048  # of a conversation, as OpenAI's
DEFAULT_ANSWER = 1024  # tokens of a chat answer whose request names no limit
DEFAULT_COMPLETION = 16  # tokens of a completion whose request names no limit; OpenAI's default


def _is_unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is not a character") from None
    return text


def _one_prompt(given) -> str | list[int]:
    """Return the prompt: a text, or token ids. Some clients send a list of one of these."""
    if isinstance(given, list) and len(given) == 1 and isinstance(given[0], (str, list)):
        given = given[0]
    if isinstance(given, str):
        return _is_unicode(given)
    if isinstance(given, list) and all(type(token) is int for token in given):
        return given
    raise ValueError("expected one prompt: a text, or a list of token ids. Send several in a request each")


Text = Annotated[str, AfterValidator(_is_unicode)]


class Strict(BaseModel):
    """A JSON object without unknown fields; a field that is null counts as absent, as clients leave fields out in this way."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given):
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


class TextPart(Strict):
    """A part of a message's content; images and sounds are not taken."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]

    def plain(self) -> dict:
        """Return the message as ChatFormat takes it: role and text."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class StreamOptions(Strict):
    """What a stream holds besides the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False  # accepted, and nothing is added: it pads events against eavesdroppers


class ResponseFormat(Strict):
    """The form of the answer, of which only free text is supported."""

    type: Literal["text"]


class GenerationRequest(Strict):
    """The fields that chat and completion requests share."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)  # 0 and -1: off
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: Text | list[Text] | None = None
    # clients send these; they are accepted at the value that changes nothing
    n: Literal[1] = 1
    presence_penalty: Literal[0] = 0
    frequency_penalty: Literal[0] = 0
    logit_bias: Annotated[dict, Field(max_length=0)] | None = None
    # about the caller, not about the answer
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] = False
    service_tier: Literal["auto", "default"] = "auto"

    def stops(self) -> list[str]:
        """Return the texts that end the answer. Raises ValueError for too many, or one that is empty or too long."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MAX_STOPS or any(not 0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
            raise ValueError(f"stop: at most {MAX_STOPS} texts of 1 to {MAX_STOP_LENGTH} characters")
        return stops

    def limit(self) -> tuple[int | None, int]:
        """Return the most tokens that the answer may have, where the request names them, and else."""
        return self.max_tokens, DEFAULT_COMPLETION

    def sampling(self, prompt: int, context: int) -> Sampling:
        """Return how to sample the answer to a prompt of `prompt` tokens, by a model that reads `context` tokens in all.

        Raises ValueError where no answer has room, or not the one that is asked for, as vLLM does: it would end early, unasked.
        """
        if prompt >= context:
            raise ValueError(f"the prompt has {prompt:,} tokens; this model reads {context:,}, and the answer needs some of them")
        asked, otherwise = self.limit()
        if asked and asked > context - prompt:
            raise ValueError(
                f"max_tokens is {asked:,}, and the prompt has {prompt:,} tokens; this model reads {context:,} tokens in all: ask for at "
                f"most {context - prompt:,}, or leave it out"
            )
        return Sampling(
            max_tokens=asked or min(otherwise, context - prompt),
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(self.top_k or 0, 0),
            top_p=1.0 if self.top_p is None else self.top_p,
            repetition_penalty=self.repetition_penalty or 1.0,
            seed=secrets.randbits(63) if self.seed is None else self.seed % 2**63,  # vLLM keeps seeds in 64 bits with a sign
        )


class ChatRequest(GenerationRequest):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1)  # OpenAI's newer name of max_tokens
    response_format: ResponseFormat | None = None
    logprobs: Literal[False] = False
    tools: Annotated[list, Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] = "none"  # without tools both mean the same

    def limit(self) -> tuple[int | None, int]:
        return self.max_completion_tokens or self.max_tokens, DEFAULT_ANSWER


class CompletionRequest(GenerationRequest):
    """The body of /v1/completions."""

    prompt: Annotated[str | list[int], PlainValidator(_one_prompt)]
    echo: Literal[False] = False
    best_of: Literal[1] = 1


class Vote(Strict):
    """The body of /votes: which of two answers to the same messages was preferred."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    chosen: Text = Field(min_length=1)
    rejected: Text = Field(min_length=1)
    chosen_model: str
    rejected_model: str
