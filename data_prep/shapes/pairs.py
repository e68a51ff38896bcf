"""Reads rows with two answers, or with several that are ranked or scored, as preference pairs."""

from collections.abc import Callable
from decimal import Decimal

from data_prep.shapes.beside import asked, options_of, with_system
from data_prep.shapes.calls import tools_of
from data_prep.shapes.columns import USUAL, Columns, Row, UnknownShape
from data_prep.shapes.content_parts import text_of
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
from data_prep.shapes.structures import structure_of
from data_prep.shapes.thinking import whole_text
from posttrain.data.parts import Refused

# columns with the ratings of the chosen and the rejected answer
RATINGS = (
    *(("chosen-rating", "rejected-rating"), ("chosen_rating", "rejected_rating"), ("rating_chosen", "rating_rejected")),
    *(("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_avg_rating", "rejected_avg_rating")),
)
SCORES = ("overall_score", "score", "rating", "fine-grained_score", "pm_score")  # of one of several answers, the higher the better
ANSWERS = ("answer", "response", "text", "answer_text", "content", "completion", "output")  # keys of its text


def pair_of(row: Row, columns: Columns) -> Pair:
    """Read a row with two answers. Raises Refused."""
    for shape, read in SHAPES:
        if shape(row):
            return read(row, columns)
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
    _refuse_tie(row)
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
    chosen, rejected = (messages_of(_listed(one), name, columns) for one, name in zip(both, (better, worse), strict=True))
    pair = _answers([], chosen, rejected, row, before=asked)
    _copy_of_answer(row, pair, columns)
    return pair


def _listed(value):
    """A single message in a list."""
    return [value] if isinstance(value, dict) else value


def _prompt_columns(row: Row, columns: Columns) -> list[dict] | None:
    """The messages of the prompt in columns of its own, with the system message; None without any.

    With a prompt column, messages beside it are looked at later: they are a copy, or refused.
    """
    names = row.found("prompt", full=True)
    if not names and (messages := conversation(row, columns)) is not None:
        return with_system(row, messages)
    if not names:
        return with_system(row, []) or None
    messages, is_text = asked(row, names, columns)
    content = messages[-1]["content"]
    if is_text and (content.startswith("\n\nHuman:") or (content.startswith("Human:") and "\n\nAssistant:" in content)):
        messages = [*messages[:-1], *transcript(content.rstrip().removesuffix("\n\nAssistant:"))]
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


def _two_responses(row: Row, columns: Columns) -> Pair:
    """Read HelpSteer3's response1 and response2, of which overall_preference, from -3 to 3, says the better one."""
    preference = row.take("overall_preference")
    answers = [clean(row.take(name), name) for name in ("response1", "response2")]
    if not isinstance(preference, int | float) or preference != preference:
        raise Refused("overall_preference is not a number")
    if preference == 0:
        raise Refused("tied: overall_preference is 0")
    context = row.structure("context")
    is_text = not isinstance(context, list)
    prompt = [{"role": "user", "content": clean(context, "context")}] if is_text else messages_of(context, "context", columns)
    chosen, rejected = answers[::-1] if preference > 0 else answers
    return _checked(with_system(row, prompt), chosen, rejected, row)


def _shp(row: Row, columns: Columns) -> Pair:
    """Read SHP's human_ref_A and human_ref_B; labels is 1 where A is the better one."""
    label, answers = row.take("labels"), [clean(row.take(name), name) for name in ("human_ref_a", "human_ref_b")]
    if label not in (0, 1):
        raise Refused(f"labels is {label!r}; expected 0 or 1")
    if row.values.get("score_a") is not None and row.values.get("score_a") == row.values.get("score_b"):
        raise Refused("tied: score_A equals score_B")
    prompt = [{"role": "user", "content": clean(row.take("history"), "history")}]
    chosen, rejected = answers if label else answers[::-1]
    return _checked(prompt, chosen, rejected, row)


def _paired(row: Row, columns: Columns) -> Pair:
    """Read stack-exchange-paired's response_j, which has more votes, and response_k."""
    chosen, rejected = (clean(row.take(name), name) for name in ("response_j", "response_k"))
    return _checked(_needed(row, columns), chosen, rejected, row)


def _several(row: Row, columns: Columns) -> Pair:
    """Read several answers with a rank (1 is the best) or a score (the highest is the best): the best beside the worst."""
    name = next(name for name in ("completions", "answers", "responses") if name in row)
    answers = row.structure(name)
    if not isinstance(answers, list) or not all(isinstance(one, dict) for one in answers):
        raise Refused(f"{name} is not a list of answers with a rank or a score")
    ranked = [(_rank(one), _text(one, name)) for one in answers]
    ranked = [(rank, text) for rank, text in ranked if rank is not None]
    if len(ranked) < 2:
        raise Refused(f"{name} holds fewer than two answers with a rank or a score")
    (best, chosen), (last, rejected) = (pick(ranked, key=lambda one: one[0]) for pick in (min, max))
    if best == last:
        raise Refused(f"tied: all {name} have the same rank or score")
    row.take_all(name for name in ("models",) if name in row)
    return _checked(_needed(row, columns), chosen, rejected, row)


def _rank(answer: dict) -> float | None:
    """A number that is smaller for a better answer; None where it has neither rank nor score."""
    rank, score = answer.get("rank"), next((answer[name] for name in SCORES if answer.get(name) is not None), None)
    try:
        return float(rank) if rank is not None else -float(score) if score is not None else None
    except (TypeError, ValueError):
        return None


def _text(answer: dict, column: str) -> str:
    return clean(text_of(next((answer[name] for name in ANSWERS if answer.get(name) is not None), None)), f"an answer in {column}")


def _ranking(row: Row, columns: Columns) -> Pair:
    """Read LLaMA-Factory's older form: output is [better, worse]."""
    name = row.find("answer")
    answers = row.take(name)
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
    """Read ms-swift's messages, which end with the better answer, and the worse one in rejected_response."""
    messages = conversation(row, columns)
    rejected = clean(row.take("rejected_response"), "rejected_response")
    if messages[-1]["role"] != "assistant":
        raise Refused("the last message is not the assistant's")
    return _checked(with_system(row, messages[:-1]), whole_text(messages[-1]), rejected, row)


def _is_ranking(row: Row) -> bool:
    name = row.find("answer")
    value = row.values.get(name) if name else None
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


SHAPES: tuple[tuple[Callable[[Row], bool], Callable[[Row, Columns], Pair]], ...] = (
    (_has("input", "preferred_output", "non_preferred_output"), _azure),
    (_has("trajectory", "chosen", "rejected"), _trajectory),
    (lambda row: bool(row.find("chosen") and row.find("rejected")), _chosen),
    (_has("response1", "response2", "overall_preference", "context"), _two_responses),
    (_has("human_ref_a", "human_ref_b", "labels", "history"), _shp),
    (_has("response_j", "response_k"), _paired),
    (lambda row: "rejected_response" in row and bool(message_columns(row)), _swift),
    (lambda row: any(isinstance(structure_of(row.values.get(name)), list) for name in ("completions", "answers", "responses")), _several),
    (_is_ranking, _ranking),
)


def _number(value):
    """A rating as a number where it is one, also as text, as in CSV, or as a decimal of a table; any other as it is."""
    try:
        return float(value) if isinstance(value, str | int | float | Decimal) else value
    except (ValueError, OverflowError):
        return value


def _refuse_tie(row: Row) -> None:
    """Raise Refused where both answers are rated the same."""
    for better, worse in RATINGS:
        if better in row or worse in row:
            row.take_all([better, worse])
            high, low = (_number(row.values.get(name)) for name in (better, worse))
            if high is not None and high == low:
                raise Refused(f"tied: {better} equals {worse}")
            if isinstance(high, float) and isinstance(low, float) and high < low:
                raise Refused(f"{better} is below {worse}")
    rating = row.values.get("rating")
    if row.values.get("status") == "tie" or (isinstance(rating, list) and len(rating) == 2 and rating[0] == rating[1]):
        raise Refused("tied: both answers are rated the same")


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
    chosen, rejected = as_context(chosen), as_context(rejected)
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
        before = as_context(before)
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
    prompt = as_context(prompt)
    if not prompt or prompt[-1]["role"] not in ("user", "tool"):
        raise Refused("the prompt does not end with a user message")
    check_order(prompt)
    if chosen == rejected:
        raise Refused("chosen equals rejected")
    return Pair(prompt, chosen, rejected, tools or tools_of(row, prompt), options_of(row))
