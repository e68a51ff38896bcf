"""Reads rows with two answers, or with several that are ranked or scored, as preference pairs."""

from collections.abc import Callable

from data_prep.shapes.beside import asked, options_of, with_system
from data_prep.shapes.calls import tools_of
from data_prep.shapes.columns import USUAL, Columns, Row, UnknownShape
from data_prep.shapes.messages import (
    Pair,
    as_context,
    check_order,
    clean,
    conversation,
    message_columns,
    messages_in,
    messages_of,
    transcript,
)
from data_prep.shapes.ratings import number_of, refuse_contrary
from data_prep.shapes.structures import json_of
from data_prep.shapes.thinking import whole_text
from data_prep.shapes.two_answers import best_and_worst, best_of_columns, list_of_answers, more_answers, two_answers
from posttrain.data.parts import Refused


def pair_of(row: Row, columns: Columns) -> Pair:
    """Read a row with two answers. Raises Refused."""
    for shape, read in SHAPES:
        if shape(row):
            pair = read(row, columns)
            if read not in (_two, _several, _shp):  # which find out themselves which answer is the better one
                refuse_contrary(row)
            return pair
    if missing := [name for name in ("chosen", "rejected") if name in row.empty]:
        raise Refused(f"{missing[0]} is null")
    raise UnknownShape(f"its columns are of no known shape: {', '.join(sorted(row.shown.values()))}")


def _has(*names: str) -> Callable[[Row], bool]:
    return lambda row: all(name in row for name in names)


def _chosen(row: Row, columns: Columns) -> Pair:
    """Read chosen and rejected, as texts or messages; the prompt stands in columns of its own, or before the answers."""
    better, worse = row.find("chosen"), row.find("rejected")
    texts, both = [row.take(name) for name in (better, worse)], [messages_in(row, name) for name in (better, worse)]
    if any(isinstance(one, str) for one in both):  # JSON that is no list of messages, or one answer of which only looks so, is text
        both = texts
    both = [_only_text(one, name) for one, name in zip(both, (better, worse), strict=True)]
    asked = _prompt_columns(row, columns)
    if all(isinstance(one, str) for one in both):
        chosen, rejected = both
        if all(one.startswith(("\n\nHuman:", "Human:")) and "\n\nAssistant:" in one for one in both):
            return _answers([], transcript(chosen), transcript(rejected), row, before=asked)
        if asked is None and (empty := row.found("prompt")):
            raise Refused(f"{empty[0]} is empty")
        if asked is None:
            return _answers([], transcript(chosen), transcript(rejected), row)
        return _checked(asked, clean(chosen, better), clean(rejected, worse), row)
    chosen, rejected = (messages_of(one, name, columns) for one, name in zip(both, (better, worse), strict=True))
    pair = _answers([], chosen, rejected, row, before=asked)
    _copy_of_answer(row, pair, columns)
    return pair


def _only_text(value, name: str):
    """The text of a list that holds one; any other value as it is. Raises Refused for several texts."""
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        return value
    if len(value) > 1:
        raise Refused(f"{name} holds {len(value)} texts, of which one can be trained: write the answer as one text")
    return value[0]


def _prompt_columns(row: Row, columns: Columns) -> list[dict] | None:
    """The messages of the prompt in columns of its own, with the system message; None without any.

    With a prompt column, messages beside it are looked at later: they are a copy, or refused.
    """
    names = row.found("prompt", full=True)
    if not names and (messages := conversation(row, columns)) is not None:
        return with_system(row, messages)
    if not names:
        return with_system(row, []) or None
    messages, _ = asked(row, names, columns)
    return with_system(row, messages)


def _copy_of_answer(row: Row, pair: Pair, columns: Columns) -> None:
    """Count a messages column as used that repeats the prompt, with or without an answer to it."""
    asked = [message["content"] for message in pair.prompt if message["role"] != "system"]
    for name in message_columns(row, full=True):
        if name in row.taken:
            continue
        seen = [message["content"] for message in messages_of(row.values[name], name, columns) if message["role"] != "system"]
        if seen[: len(asked)] == asked and len(seen) <= len(asked) + 1:
            row.take_all([name])


def _azure(row: Row, columns: Columns) -> Pair:
    """Read a row in the form of Azure's preference data: input.messages, preferred_output and non_preferred_output."""
    given = row.take("input")
    if not isinstance(given, dict) or "messages" not in given:
        raise Refused("input has no messages")
    prompt = messages_of(given["messages"], "input.messages", columns)
    chosen, rejected = (messages_of(row.structure(name), name, columns) for name in ("preferred_output", "non_preferred_output"))
    return _answers(prompt, chosen, rejected, row, tools=tools_of(Row(given, USUAL)))


def _shp(row: Row, columns: Columns) -> Pair:
    """Read SHP's human_ref_A and human_ref_B; labels is 1 where A is the better one."""
    label, answers = number_of(row.take("labels")), [clean(row.take(name), name) for name in ("human_ref_a", "human_ref_b")]
    if label not in (0, 1):
        raise Refused(f"labels is {label!r}; expected 0 or 1")
    if row.values.get("score_a") is not None and number_of(row.values["score_a"]) == number_of(row.values.get("score_b")):
        raise Refused("tied: score_A equals score_B")
    prompt = [{"role": "user", "content": clean(row.take("history"), "history")}]
    chosen, rejected = answers if label else answers[::-1]
    return _checked(prompt, chosen, rejected, row)


def _paired(row: Row, columns: Columns) -> Pair:
    """Read stack-exchange-paired's response_j, which has more votes, and response_k."""
    chosen, rejected = (clean(row.take(name), name) for name in ("response_j", "response_k"))
    return _checked(_needed(row, columns), chosen, rejected, row)


def _two(row: Row, columns: Columns) -> Pair:
    """Read two answers, or conversations that end with one, in columns of their own, and what says which is the better one."""
    found = two_answers(row)
    if several := more_answers(row, found):
        names = best_of_columns(row, found, several)
    else:
        names = (found.first, found.second)[:: -1 if found.winner(row) else 1]
    chosen, rejected = (messages_in(row, name) for name in names)
    if isinstance(chosen, list) and isinstance(rejected, list):
        chosen, rejected = (messages_of(one, name, columns) for one, name in zip((chosen, rejected), names, strict=True))
        return _answers([], chosen, rejected, row, before=_prompt_columns(row, columns))
    has_prompt = row.found("prompt", full=True) or message_columns(row)
    prompt = _prompt_columns(row, columns) if has_prompt else _context(row, columns)
    if not prompt:
        raise Refused("there is no prompt")
    texts = [prompt[-1]["content"], clean(chosen, names[0]), clean(rejected, names[1])]
    turns = [json_of(text) for text in texts]  # as the arena's tables have them
    if all(isinstance(one, list) and one and all(isinstance(text, str) for text in one) for one in turns):
        if any(len(one) > 1 for one in turns):
            raise Refused(f"{names[0]} and {names[1]} differ before their last message")
        texts = [clean(one, "a message") for (one,) in turns]
        prompt = [*prompt[:-1], prompt[-1] | {"content": texts[0]}]
    return _checked(prompt, *texts[1:], row)


def _context(row: Row, columns: Columns) -> list[dict]:
    """The prompt of HelpSteer3's context, messages or a text."""
    context = row.structure("context")
    is_text = not isinstance(context, list)
    prompt = [{"role": "user", "content": clean(context, "context")}] if is_text else messages_of(context, "context", columns)
    return with_system(row, prompt)


def _several(row: Row, columns: Columns) -> Pair:
    """Read a list of answers with a rank or a score each: the best beside the worst."""
    chosen, rejected = best_and_worst(row, list_of_answers(row))
    return _checked(_needed(row, columns), chosen, rejected, row)


def _ranking(row: Row, columns: Columns) -> Pair:
    """Read LLaMA-Factory's older form: output is [better, worse]."""
    name, answers = "output", row.take("output")
    if len(answers) != 2:
        raise Refused(f"{name} holds {len(answers)} answers; expected the better and the worse one")
    chosen, rejected = (clean(text, name) for text in answers)
    return _checked(_needed(row, columns), chosen, rejected, row)


def _trajectory(row: Row, columns: Columns) -> Pair:
    """Read UltraInteract's trajectory, the turns before the answers chosen and rejected."""
    prompt = messages_of(row.structure("trajectory"), "trajectory", columns)
    chosen, rejected = (clean(row.take(name), name) for name in ("chosen", "rejected"))
    return _checked(with_system(row, prompt), chosen, rejected, row)


def _needed(row: Row, columns: Columns) -> list[dict]:
    """The prompt in columns of its own. Raises Refused without one."""
    prompt = _prompt_columns(row, columns)
    if prompt is None:
        raise Refused("there is no prompt")
    return prompt


def _swift(row: Row, columns: Columns) -> Pair:
    """Read ms-swift's messages, which end with the better answer, or its query and response, and the worse one in rejected_response."""
    rejected = clean(row.take("rejected_response"), "rejected_response")
    if not message_columns(row):
        name = row.find("answer")
        return _checked(_needed(row, columns), clean(row.take(name), name), rejected, row)
    messages = conversation(row, columns)
    if messages[-1]["role"] != "assistant":
        raise Refused("the last message is not the assistant's")
    return _checked(with_system(row, messages[:-1]), whole_text(messages[-1]), rejected, row)


def _swift_messages(row: Row, columns: Columns) -> Pair:
    """Read ms-swift's messages, which end with the better answer, and rejected_messages, which end with the worse one."""
    rejected = messages_of(row.structure("rejected_messages"), "rejected_messages", columns)
    return _answers(with_system(row, []), conversation(row, columns), rejected, row)


def _is_ranking(row: Row) -> bool:
    value = row.values.get("output")
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


SHAPES: tuple[tuple[Callable[[Row], bool], Callable[[Row, Columns], Pair]], ...] = (
    (_has("input", "preferred_output", "non_preferred_output"), _azure),
    (_has("trajectory", "chosen", "rejected"), _trajectory),
    (lambda row: bool(row.find("chosen") and row.find("rejected")), _chosen),
    (_has("human_ref_a", "human_ref_b", "labels", "history"), _shp),
    (_has("response_j", "response_k"), _paired),
    (lambda row: two_answers(row) is not None, _two),
    (lambda row: "rejected_messages" in row and bool(message_columns(row)), _swift_messages),
    (lambda row: "rejected_response" in row and bool(message_columns(row) or row.find("answer")), _swift),
    (lambda row: list_of_answers(row) is not None, _several),
    (_is_ranking, _ranking),
)


def _answers(
    prompt: list[dict],
    chosen: list[dict],
    rejected: list[dict],
    row: Row,
    *,
    before: list[dict] | None = None,
    tools: list[dict] | None = None,
) -> Pair:
    """The Pair of two message lists that agree up to their last message, the answer; what they share goes after `prompt`.

    `before` are the messages of a prompt column, which must not contradict what the lists share.
    """
    chosen, rejected = as_context(chosen, row), as_context(rejected, row)
    if chosen[:-1] != rejected[:-1]:
        raise Refused("chosen and rejected differ before their last message")
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise Refused("the last message of chosen or rejected is not the assistant's")
    if "tool_calls" in chosen[-1] or "tool_calls" in rejected[-1]:
        raise Refused("chosen or rejected is a tool call")
    if "name" in chosen[-1] or "name" in rejected[-1]:
        row.notes.append("a name of an answer left out: pairs have none")
    shared = chosen[:-1]
    if before is not None:
        before = as_context(before, row)
        shared = _agreeing(before, shared)
    return _checked(prompt + shared, whole_text(chosen[-1]), whole_text(rejected[-1]), row, tools=tools)


def _agreeing(before: list[dict], shared: list[dict]) -> list[dict]:
    """The prompt that a column and the messages before the answers say together. Raises Refused where they contradict each other."""
    if not shared:  # the column alone has the prompt
        return before
    system, asked = ([m for m in messages if m["role"] == "system"] for messages in (before, shared))
    rest, said = ([m for m in messages if m["role"] != "system"] for messages in (before, shared))
    if not said:
        return [*(asked or system), *rest]
    texts = [m["content"].strip() for m in said]
    # a prompt column that is a text repeats any one of the messages: the first in some datasets, the last in others
    if rest and rest != said and not (len(rest) == 1 and rest[0]["content"].strip() in texts):
        raise Refused("the column of the prompt disagrees with the messages before the answer")
    return [*(asked or system), *said]


def _checked(prompt: list[dict], chosen: str, rejected: str, row: Row, *, tools=None) -> Pair:
    """The Pair, unless roles are out of order, or the answers equal."""
    prompt = as_context(prompt, row)
    if not prompt or prompt[-1]["role"] not in ("user", "tool"):
        raise Refused("the prompt does not end with a user message")
    check_order(prompt)
    if chosen == rejected:
        raise Refused("chosen equals rejected")
    return Pair(prompt, chosen, rejected, tools or tools_of(row, prompt), options_of(row))
