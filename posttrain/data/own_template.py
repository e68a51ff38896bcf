"""Cuts the output of a tokenizer's own Jinja template into parts, so that what is trained of it is known.

Where a message stands in the output is never searched for: the template is also rendered with a placeholder for every text, and the
output must equal that skeleton with each placeholder replaced by its text (or its stripped form). A template that rewrites an answer
beyond that is refused for that row; what it makes of other messages is context. An answer with thinking or tool calls starts where the
template ends when it is asked for the next answer.
"""

import functools
import inspect
import json

from jinja2 import Environment, TemplateError
from transformers import PreTrainedTokenizerBase

from posttrain.common.errors import first_line
from posttrain.common.limits import memory_limit, time_limit
from posttrain.data.parts import Part, Refused
from posttrain.data.pieces import Piece, Specials, cut_output, join_pieces
from posttrain.data.skeleton import PRIVATE, Slot, find_texts, placeholder, split_skeleton
from posttrain.data.template_checks import refuse_lost_calls, strings, writes_tools
from posttrain.data.thinking import (
    CLOSE,
    CLOSED,
    CONTENT,
    EMPTY_THINKING,
    HEADER,
    OPEN,
    OPENED,
    OPENED_OR_EMPTY,
    OWN,
    is_trained,
    only_trained,
    reasoning_of,
    thought,
)

# What a template that asks for today is told (Llama-3.1's default), so that ids do not depend on the day
TODAY = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
RENDER_SECONDS = 5.0  # how long a template may take for a conversation; Jinja bounds a loop, but no loop in a loop
RENDER_BYTES = 4 * 2**30  # how much memory it may take meanwhile, with what other threads take; 'a' * 10**10 is one short expression
MOST_WRITTEN = 16 * 2**20  # characters that it may write of its own
# arguments of apply_chat_template that are not the template's
ARGUMENTS = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"} - {"documents"}


class OwnTemplate:
    """The tokenizer's own template, and the special token that ends an assistant's turn in it.

    Raises ValueError for a tokenizer without a template, or one whose assistant turns have no end token.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.specials = tokenizer, Specials(tokenizer)
        self.jinja = self.tool_jinja = tokenizer.chat_template
        if isinstance(self.jinja, dict):  # several by name
            names, self.jinja, self.tool_jinja = ", ".join(self.jinja), self.jinja.get("default"), self.jinja.get("tool_use")
            if not isinstance(self.jinja, str):
                raise ValueError(
                    f"the tokenizer has chat templates named {names}, and transformers finds none named default, which says how plain "
                    "conversations are written: put it into chat_template.jinja beside the tokenizer; or use --template chatml"
                )
        if not isinstance(self.jinja, str):
            raise ValueError(
                "the tokenizer has no chat template of its own: use --template chatml, or put it, as text, into chat_template.jinja beside "
                "tokenizer_config.json"
            )
        self.tool_jinja = self.tool_jinja or self.jinja
        self.names = _names(self.jinja) | _names(self.tool_jinja)
        self._forms = functools.lru_cache(64)(self._find_form)
        self.end_id = self._find_end()

    def parts(self, messages: list[dict], tools: list | None, options: dict | None) -> list[Part]:
        """Split a conversation into parts, as the template writes it. Raises Refused for one that it cannot write, or rewrites."""
        return join_pieces(self._checked(messages, tools, options or {}), self.specials, self.end_id)

    def prompt_parts(self, messages: list[dict], tools: list | None, options: dict) -> list[Part]:
        """Split a conversation into parts, up to the header of an answer as the template writes it when it is asked for one."""
        return join_pieces(self._pieces(messages, tools, options, prompt=True), self.specials, self.end_id)

    def form(self, tools: list | None, options: dict | None) -> str:
        """How thinking is written: OWN, CONTENT or HEADER."""
        return self._forms(bool(tools), json.dumps(options or {}, sort_keys=True))

    def opens_thinking(self, tools: list | None, options: dict | None) -> bool:
        """Whether the header of an answer opens its thinking."""
        return bool(OPENED.search(self._render([{"role": "user", "content": "a"}], tools, options or {}, prompt=True)))

    def groups(self, messages: list[dict], tools: list | None, options: dict | None) -> list[list[dict]]:
        """Divide a conversation such that every answer is trained once, after what the model will have seen when it is used.

        A template that leaves thinking out of earlier turns, or describes tools only when it is asked for an answer, makes as many
        conversations necessary; each begins like the whole one.
        """
        if self._describes_late(messages, tools, options or {}):
            trained = [i for i, message in enumerate(messages) if is_trained(message)]
            return [only_trained(messages[: i + 1], {i}) for i in trained] or [messages]
        if not (thinks := any(map(reasoning_of, messages))) and not tools:
            return [messages]
        remaining, result = [i for i, message in enumerate(messages) if is_trained(message)], []
        while remaining:
            last = remaining[-1]
            whole = self._skeleton(messages[: last + 1], tools, options or {})
            mine = {i for i in remaining if i == last or self._goes_on(whole, messages[: i + 1], tools, options or {}, thinks=thinks)}
            result.append(only_trained(messages[: last + 1], mine))
            remaining = [i for i in remaining if i not in mine]
        return result[::-1] or [messages]

    def _describes_late(self, messages: list[dict], tools, options: dict) -> bool:
        """Whether the template describes the tools only when it is asked for an answer, and not once one is there."""
        if not tools:
            return False
        given = self._slots(messages, tools, options)[0]
        if writes_tools(lambda tools: self._render(given, tools, options), tools):
            return False
        asked = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        return any(writes_tools(lambda tools, i=i: self._render(given[:i], tools, options, prompt=True), tools) for i in asked)

    def _goes_on(self, whole: str, messages: list[dict], tools, options: dict, *, thinks: bool) -> bool:
        """Whether the skeleton of a longer conversation begins with these messages as they are written when the last one is new.

        Where nobody `thinks`, a block that says so, which templates leave out of earlier turns, makes no difference.
        """
        if reasoning_of(messages[-1]) and self.form(tools, options) == HEADER:
            return False
        alone = self._skeleton(messages, tools, options)
        if not thinks:
            whole, alone = (EMPTY_THINKING.sub("", text) for text in (whole, alone))
        before, token, _ = alone.rpartition(self.tokenizer.convert_ids_to_tokens(self.end_id))
        return bool(token) and whole.startswith(before + token)

    def _skeleton(self, messages: list[dict], tools, options: dict) -> str:
        return self._render(self._slots(messages, tools, options)[1], tools, options)

    def _slots(self, messages: list[dict], tools, options: dict) -> tuple[list[dict], list[dict], dict[int, Slot]]:
        """The messages as the template is given them, the same with placeholders, and the texts by the placeholders' numbers."""
        form = self.form(tools, options) if any(map(reasoning_of, messages)) else OWN
        real, skeleton, slots = [], [], {}
        for i, message in enumerate(messages):
            other = {key: value for key, value in message.items() if key not in ("train", "reasoning_content", "content")}
            texts = [reasoning_of(message) if form != HEADER else "", message["content"]]
            numbers = [2 * i, 2 * i + 1]
            slots |= {n: Slot(text, not is_trained(message)) for n, text in zip(numbers, texts, strict=True) if text}
            marks = [placeholder(n) if text else "" for n, text in zip(numbers, texts, strict=True)]
            for target, (reasoning, content) in ((real, texts), (skeleton, marks)):
                if not reasoning:
                    target.append({**other, "content": content})
                elif form == OWN:
                    target.append({**other, "content": content, "reasoning_content": reasoning})
                else:
                    target.append({**other, "content": thought(reasoning, content)})
        return real, skeleton, slots

    def _checked(self, messages: list[dict], tools, options: dict) -> list[Piece]:
        """The pieces of a conversation whose tools, calls and arguments the template writes. Raises Refused for others."""
        for name in options:
            if name in ARGUMENTS:
                raise Refused(f"chat_template_kwargs {name} is an argument of transformers' own, which no row can set")
        hidden = [{key: value for key, value in m.items() if key not in ("role", "content", "reasoning_content")} for m in messages]
        if any(token in text for text in strings([tools, options, hidden]) for token in self.specials.ids):
            raise Refused("a tool call, a description of tools or an argument for the template spells a special token")
        if any(PRIVATE in text for text in strings([messages, tools, options])):
            raise Refused("a message contains the private-use character U+E000")
        real = self._slots(messages, tools, options)[0]
        for name in set(options) - self.names:
            rest = {other: value for other, value in options.items() if other != name}
            if self._render(real, tools, rest) == self._render(real, tools, options):
                raise Refused(f"chat_template_kwargs {name} is not read by the template, so it would be lost")
        late = self._describes_late(messages, tools, options)
        refuse_lost_calls(lambda messages: self._render(messages, tools, options), real)
        if tools and not late and not writes_tools(lambda tools: self._render(real, tools, options), tools):
            raise Refused("the template does not write the tools")
        trained = [i for i, message in enumerate(messages) if is_trained(message)]
        thinking = [i for i in trained if reasoning_of(messages[i])] if late or self.form(tools, options) == HEADER else []
        if (trained if late else thinking) not in ([], [len(messages) - 1]):
            raise Refused("the template writes an answer that is to be trained otherwise once another follows it")
        if thinking or (late and trained):
            return self._after_header(messages, tools, options)
        return self._pieces(messages, tools, options)

    def _pieces(self, messages: list[dict], tools, options: dict, *, prompt: bool = False, late: bool = False) -> list[Piece]:
        """Cut the template's output at the borders of the messages' texts and at the start of each answer.

        `late`: what stands before the last answer may differ from what the template writes when it is asked for one.
        """
        given, with_marks, slots = self._slots(messages, tools, options)
        real = self._render(given, tools, options, prompt)
        fixed, order = split_skeleton(self._render(with_marks, tools, options, prompt))
        if order != sorted({*order}) or not {n for n in slots if n % 2} <= {*order}:
            raise Refused("the template leaves out, repeats or reorders a message")
        if any(n not in order and is_trained(messages[n // 2]) for n in slots):
            raise Refused("the template leaves out the thinking of an answer that is to be trained")
        texts = find_texts(real, fixed, [slots[n] for n in order], self.specials.ids)
        shown = [i for i, m in enumerate(messages) if is_trained(m) and (m.get("tool_calls") or 2 * i in order)]
        found = {i: self._start(real, given, i, tools, options, thinks=2 * i in order) for i in shown if not late}
        starts = {i: start for i, start in found.items() if start is not None}
        if late and (start := self._late_start(fixed, texts, order, with_marks[:-1], tools, options)) is not None:
            starts[len(messages) - 1] = start
        if late and len(messages) - 1 not in starts and not messages[-1]["content"]:
            raise Refused("the template writes another header of an answer than it does when asked for one")
        return cut_output(real, fixed, texts, [(n, messages[n // 2]) for n in order], starts)

    def _late_start(self, fixed: list[str], texts: list[str], order: list[int], before: list[dict], tools, options: dict) -> int | None:
        """Where the last answer begins: after the header that the prompt ends with, whatever is before that; None for another header."""
        prompt, shown = split_skeleton(self._render(before, tools, options, prompt=True))
        index = order.index(shown[-1]) + 1
        for header in (prompt[-1], OPENED_OR_EMPTY.sub("", prompt[-1])):
            if fixed[index].startswith(header):
                return sum(map(len, [*fixed[:index], *texts[:index], header]))
        return None

    def _start(self, real: str, given: list[dict], turn: int, tools, options: dict, *, thinks: bool) -> int | None:
        """Where a turn with thinking or tool calls begins in the output: after what the template writes before any answer.

        None for one that begins with its text. Raises Refused where the template writes another prompt when it is asked for one.
        """
        prompt = self._render(given[:turn], tools, options, prompt=True)
        if real.startswith(prompt):
            return len(prompt)
        bare = OPENED_OR_EMPTY.sub("", prompt)
        if not thinks and real.startswith(bare):
            return len(bare)
        if not thinks and given[turn]["content"]:
            return None
        what = "an answer's thinking" if thinks else "a tool call"
        raise Refused(f"the template writes another prompt before {what} than it does when asked for one")

    def _after_header(self, messages: list[dict], tools, options: dict) -> list[Piece]:
        """The pieces of a conversation whose last answer stands after the prompt that the template writes when asked for it.

        So it is where that prompt opens thinking, where the template writes thinking nowhere, or where it describes tools there only.
        """
        last, reasoning = len(messages) - 1, reasoning_of(messages[-1])
        prompt = self._pieces(messages[:-1], tools, options, prompt=True)
        whole = self._pieces([*messages[:-1], {**messages[-1], "reasoning_content": ""}], tools, options, late=True)
        tail = whole[next(i for i, piece in enumerate(whole) if piece.starts and piece.turn == last) :]
        header = "".join(piece.text for piece in prompt)
        if not reasoning:
            if OPENED.search(header):
                raise Refused("the template opens thinking in the header of an answer that has none")
            return [*prompt, *tail]
        if CLOSED.search(header):
            raise Refused("the template's arguments switch thinking off (the header closes it), and the answer has thinking")
        tail = tail if tail[0].text.strip() else tail[1:]  # a space before the answer, which now stands before its thinking
        opening = [] if OPENED.search(header) else [Piece(f"{OPEN}\n", turn=last, starts=True, trained=True)]
        thinking = Piece(reasoning, False, last, not opening, True)
        return [*prompt, *opening, thinking, Piece(f"\n{CLOSE}\n\n"), tail[0]._replace(starts=False), *tail[1:]]

    def _render(self, messages: list[dict], tools, options: dict, prompt: bool = False) -> str:
        """The template's output. Raises Refused where the template raises anything, takes too much, or writes too much."""
        jinja = self.tool_jinja if tools else self.jinja
        try:
            with time_limit(RENDER_SECONDS), memory_limit(RENDER_BYTES):
                output = self.tokenizer.apply_chat_template(
                    messages, tools=tools, tokenize=False, chat_template=TODAY + jinja, add_generation_prompt=prompt, **options
                )
        except MemoryError as error:
            raise Refused("the template takes too much memory for it") from error
        except Exception as error:  # whatever a template's code raises
            raise Refused(f"the template refuses it: {first_line(error)}") from error
        if len(output) > MOST_WRITTEN + 10 * sum(map(len, strings([messages, tools, options]))):
            raise Refused(f"the template writes {len(output):,} characters for it")
        return output

    def _find_form(self, tools: bool, options: str) -> str:
        """Find out how thinking is written, by an answer of placeholders."""
        given, marks = json.loads(options), [placeholder(0), placeholder(1)]
        described = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}] if tools else None
        ask = [{"role": "user", "content": "a"}]
        try:
            prompt = self._render(ask, described, given, prompt=True)
            answers = {
                OWN: {"content": marks[1], "reasoning_content": marks[0]},
                CONTENT: {"content": thought(*marks)},
            }
            for form, answer in answers.items():
                output = self._render([*ask, {"role": "assistant", **answer}], described, given)
                if all(output.count(mark) == 1 for mark in marks) and output.startswith(prompt) and not CLOSED.search(prompt):
                    return form
        except Refused:
            return HEADER
        return HEADER

    def _find_end(self) -> int:
        """Find the special token that ends an assistant's turn. Raises ValueError where the template writes none."""
        try:
            pieces = self._pieces([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], None, {})
        except Refused as error:
            raise ValueError(f"the tokenizer's chat template cannot be used: {error}") from error
        after = "".join(piece.text for piece in pieces[1 + max(i for i, piece in enumerate(pieces) if piece.starts) :])
        found = next((text for is_special, text in self.specials.split(after) if is_special), None)
        if found is None:
            raise ValueError(
                f"the tokenizer's chat template writes {after!r} after an answer, no special token: a model trained on it "
                "would never stop. Use --template chatml"
            )
        return self.specials.ids[found]


def _names(jinja: str) -> set[str]:
    """The names that a template uses; empty for one that Jinja cannot read."""
    try:
        return {value for _, kind, value in Environment().lex(jinja) if kind == "name"}
    except TemplateError:
        return set()
