"""Reads rows of any known shape as conversations: each row by the columns that it has, so a file may mix shapes.

A reader returns a Document, a Chat or a Pair, or raises Refused with the cause when the row cannot be used; the caller counts causes.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator

from data_prep.formats.rows import Row as FileRow
from data_prep.shapes.advice import describe, is_texts, readings, remedy
from data_prep.shapes.beside import asked, one_of, options_of, with_system
from data_prep.shapes.call_data import glaive, is_glaive, is_xlam, xlam
from data_prep.shapes.calls import tools_of
from data_prep.shapes.columns import IGNORED, USUAL, Columns, Keep, Row, UnknownShape
from data_prep.shapes.content_parts import in_messages, text_of
from data_prep.shapes.forms import TURNS
from data_prep.shapes.messages import (
    Chat,
    Document,
    Pair,
    answer_in,
    check_order,
    clean,
    conversation,
    finished,
    message_columns,
    messages_in,
    messages_of,
)
from data_prep.shapes.names import LABELS, MISSED, MISSED_OF_PAIRS, is_switch, words_of
from data_prep.shapes.odd_texts import looked_at
from data_prep.shapes.pairs import pair_of
from data_prep.shapes.plain import plain_chat
from data_prep.shapes.ratings import number_of
from data_prep.shapes.structures import structure_of
from data_prep.shapes.verdicts import OF_ANSWERS, WEIGHTS, refuse_bad, refuse_rating
from posttrain.common.places import in_this_form
from posttrain.data.parts import Refused

TREE_COLUMNS = {"message_id", "parent_id", "role", "text"}
UNKNOWN = 1000  # rows of no known shape after which, without one of a known shape, a source is refused
LONGEST_CAUSE = 600  # characters
KEPT = "left out by --keep "  # the start of the cause of a row that the user did not want


def conversations(kind: str, rows: Iterable[FileRow], columns: Columns = USUAL) -> Iterator[Document | Chat | Pair | Refused]:
    """Yield what each row says, or why it cannot be used, in the order of the rows.

    Raises ValueError, with what was seen, where no row is of a known shape. Rows that are single messages of conversation trees (oasst1)
    give one conversation for each tree, its best-ranked path.
    """
    rows, known, unknown = iter(rows), False, []
    for given in rows:
        if isinstance(given, Refused):
            yield given
            continue
        if kind == "sft" and not known and TREE_COLUMNS.issubset(given):
            yield from _trees([*unknown, given, *rows], columns)
            return
        item = read_row(kind, given, columns)
        if known or not isinstance(item, UnknownShape):
            known = True
            yield from (Refused(str(read_row(kind, one, columns))) for one in unknown)
            unknown = []
            yield Refused(str(item)) if isinstance(item, UnknownShape) else item
            continue
        unknown.append(given)
        if len(unknown) >= UNKNOWN:
            break
    if unknown:
        raise ValueError(_no_shape(kind, unknown, columns))


def read_row(kind: str, given: dict, columns: Columns) -> Document | Chat | Pair | Refused:
    """Read one row; a Refused says why it cannot be used."""
    try:
        if kind == "sft" and columns.are_usual and (plain := plain_chat(given)) is not None:
            return looked_at(plain)
        row = Row(given, columns)
        for keep in columns.keep:
            _refuse_unwanted(row, given, keep)
        _refuse_unusable(kind, row, columns)
        if kind == "sft" and TREE_COLUMNS.issubset(given):
            raise Refused("a message of a tree among rows of other shapes: give the trees as a file of their own")
        item = sft_of(row, columns) if kind == "sft" else pair_of(row, columns)
        return looked_at(item._replace(notes=row.finish(MISSED if kind == "sft" else MISSED_OF_PAIRS)))
    except Refused as cause:
        return type(cause)(_short(str(cause)))  # without the traceback, which holds the row
    except RecursionError:
        return Refused("its values are nested too deeply")


def _refuse_unusable(kind: str, row: Row, columns: Columns) -> None:
    """Raise Refused for a row that says itself that it is not to be trained, is held out, or is to count for more or less than others."""
    for name in [name for name in row.left() if name not in row.named]:
        if kind == "dpo" and not OF_ANSWERS.isdisjoint(words_of(row.shown[name])):
            continue
        refuse_bad(row.shown[name], row.values[name], held_out=columns.held_out)
    for name in WEIGHTS:
        if name in row and number_of(row.take(name)) != 1:
            how = f"--keep {row.shown[name]}=1 takes those, --ignore {row.shown[name]} all"
            raise Refused(f"{row.shown[name]} is {row.values[name]!r}, and rows are trained by 1: {how}")


def _short(cause: str) -> str:
    """A cause in one line of bounded length, also where it shows a value or a name of any length."""
    line = " ".join(cause.splitlines())
    return line if len(line) <= LONGEST_CAUSE else f"{line[: LONGEST_CAUSE // 2]} ... {line[-LONGEST_CAUSE // 2 :]}"


def _no_shape(kind: str, rows: list[dict], columns: Columns) -> str:
    """The error for rows of no known shape: their columns, what is expected, and the option that would probably read them."""
    expected = {
        "sft": "messages, conversations, instruction + output (and input), prompt + response, question + answer, or text",
        "dpo": "chosen and rejected (texts or messages), with prompt, question, instruction or conversations where they do not hold it",
    }[kind]
    other = ""
    others = Refused if kind == "sft" else UnknownShape  # a pair that is refused may as well be no pair
    if any(not isinstance(read_row("dpo" if kind == "sft" else "sft", row, columns), others) for row in rows[:20]):
        other = in_this_form(
            "\nThese look like preference pairs: use data_prep/prepare_dpo.py"
            if kind == "sft"
            else "\nThese look like rows with one answer: use data_prep/prepare_sft.py"
        )
    how = f"\nThis would probably read them: {line}" if not other and (line := _advice(kind, rows[:100])) else ""
    other = other or ("" if how else remedy(rows[:100], kind))
    return f"rows have these columns, with an example of each:\n{describe(rows[:100])}\nexpected {expected}{other}{how}"


def _advice(kind: str, rows: list[dict]) -> str:
    """The options that read some of the rows, as on a command line; empty where none is known."""
    for reading in readings(rows, kind):
        if any(not isinstance(item := read_row(kind, row, reading.columns), Refused) or "unknown role" in str(item) for row in rows):
            return reading.line
    return ""


def _refuse_unwanted(row: Row, given: dict, keep: Keep) -> None:
    """Raise Refused unless a row has what the user wants."""
    if given.get(keep.column) is None:
        raise Refused(f"column {keep.column} of --keep is null or missing")
    row.take_all([keep.column.lower()])
    if not keep.holds(given[keep.column]):
        raise Refused(f"{KEPT}{keep}")


def sft_of(row: Row, columns: Columns) -> Chat | Document:
    """Read a row with one answer, or a plain text. Raises Refused."""
    if row.find("chosen") and row.find("rejected"):
        raise UnknownShape("the row has two answers, chosen and rejected")
    if is_xlam(row):
        return _chat(with_system(row, xlam(row)), row, columns)
    if is_glaive(row):
        messages, tools = glaive(row)
        return _chat(messages, row, columns)._replace(tools=tools)
    if (messages := conversation(row, columns, full=True)) is not None:
        return _chat(with_system(row, _with_answer(row, messages)), row, columns)
    answers = row.found("answer")
    prompts = [name for name in row.found("prompt", full=True) or row.found("prompt") if name not in answers]
    if prompts and answers:
        return _exchange(row, prompts, answers, columns)
    if names := message_columns(row):
        raise Refused(f"{names[0]} is not a list of messages")
    if is_texts(structure_of(row.values.get(TURNS))):
        return _chat(with_system(row, messages_of(row.structure(TURNS), TURNS, columns)), row, columns)
    if (name := row.find("text")) is not None:
        text = clean(row.take(name), name)
        for other in [other for other in row.left() if other not in LABELS]:
            refuse_rating(other, row.shown[other], row.values[other])
        return Document(text)
    if (name := _null(row)) is not None:
        raise Refused(f"{name} is null")
    raise UnknownShape(f"its columns are of no known shape: {', '.join(sorted(row.shown.values()))}")


def _null(row: Row) -> str | None:
    """The name of a null column without which a row that has the columns of a known shape is of none."""
    return next((row.shown[name] for name in ("output", "response", "completion", "answer", "messages", "text", "conversations",
                 "instruction", "prompt", "question", "query") if name in row.empty), None)  # fmt: skip


def _exchange(row: Row, prompts: list[str], answers: list[str], columns: Columns) -> Chat:
    """Read a question and an answer that stand in columns of their own, with context, system message and earlier exchanges."""
    answer = one_of(row, "answer", answers)
    messages, is_text = asked(row, prompts, columns)
    answered = row.take(answer) if is_text else messages_in(row, answer)  # after a question that is a text, JSON is the answer
    if is_text and (message := answer_in(answered)) is not None:  # but for a message of the assistant
        if isinstance(answered, str):
            row.notes.append(f"{row.shown[answer]} read as the JSON text of a message")
        answered = message
    if isinstance(answered, list) and answered and all(isinstance(text, str) for text in answered):
        answered = _only_answer(row, answer, answered)
    if isinstance(answered, list) and all(isinstance(message, dict) for message in answered):
        messages = messages + messages_of(answered, answer, columns)
    else:
        messages = [*messages, {"role": "assistant", "content": clean(answered, answer)} | _thinking(row)]
    return _chat(with_system(row, messages), row, columns)


def _only_answer(row: Row, name: str, answers: list[str]) -> str:
    """The answer of a list that holds one. Raises Refused for several, and UnknownShape where they are LLaMA-Factory's pairs."""
    shown = row.shown[name]
    if len(set(answers)) > 1:
        cause = f"{shown} holds {len(answers)} answers, of which one can be trained: write that one as a text, in a column of its own"
        raise UnknownShape(cause) if name == "output" and len(answers) == 2 else Refused(cause)
    row.notes.append(f"{shown} is a list of one text, which is taken")
    return answers[0]


def _thinking(row: Row) -> dict:
    """The reasoning before an answer, in a column of its own; one that only says whether there is any is not used."""
    name = row.find("thinking", full=True)
    if name is None:
        return {}
    value = text_of(row.take(name))
    if is_switch(value):
        row.notes.append(f"{IGNORED}{row.shown[name]}")
        return {}
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        (read, *more) = in_messages({}, value, "role", "content")
        value = read.get("thinking") if not more and not read["content"] else value
    return {"reasoning_content": clean(value, name)}


def _with_answer(row: Row, messages: list[dict]) -> list[dict]:
    """The messages with an answer that stands in a column of its own, where they end without one, and the thinking before the last."""
    *before, last = messages
    if last["role"] in ("user", "tool") and (names := row.found("answer", full=True)):
        name = one_of(row, "answer", names)
        return [*messages, {"role": "assistant", "content": clean(row.take(name), name)} | _thinking(row)]
    if last["role"] != "assistant" or "reasoning_content" in last:
        return messages
    return [*before, last | _thinking(row)]


def _take_copies(row: Row, messages: list[dict]) -> None:
    """Count columns as used that repeat a message's text, or all texts, as Alpaca's `text` does, in a form of their own."""
    if row.taken.issuperset(row.values):
        return
    texts = {message["content"].strip() for message in messages}
    for name in [*row.found("prompt"), *row.found("answer"), *row.found("text")]:
        value = row.values[name]
        if name in row.taken or not isinstance(value, str):
            continue
        if value.strip() in texts or (name == "text" and all(text in value for text in texts)):
            row.take_all([name])


def _chat(messages: list[dict], row: Row, columns: Columns) -> Chat:
    """The Chat of some messages with the row's tools and its arguments for the template. Raises Refused unless it ends with an answer."""
    _mask(row, messages)
    messages = finished(messages, columns.train_on, row)
    check_order(messages)
    if len(messages) > 1 and messages[-1]["role"] == "user":
        messages = messages[:-1]
        row.notes.append("a last message of the user left out, which has no answer")
    if messages[-1]["role"] != "assistant":
        raise Refused("the last message is not the assistant's")
    for name in row.left():
        refuse_rating(name, row.shown[name], row.values[name])
    _take_copies(row, messages)
    tools = tools_of(row, messages)
    if tools and messages[0]["role"] == "system" and "<tools>" in messages[0]["content"]:
        name = row.shown[row.find("tools")]
        raise Refused(f"the system message describes tools, and so does {name}: leave one out, as with --ignore {name}")
    return Chat(messages, tools, options_of(row))


def _mask(row: Row, messages: list[dict]) -> None:
    """Take a row's loss_mask, a 0 or 1 for each message or for each answer."""
    if "loss_mask" not in row:
        return
    mask, answers = row.structure("loss_mask"), [message for message in messages if message["role"] == "assistant"]
    if isinstance(mask, list) and len(mask) == len(messages) - 1 and messages[0]["role"] == "system":
        messages = messages[1:]  # the system message stood in a column of its own
    if not isinstance(mask, list) or any(value not in (0, 1) for value in mask) or len(mask) not in (len(messages), len(answers)):
        raise Refused("loss_mask is not a list of 0 or 1 for each message or each answer")
    for message, trained in zip(messages if len(mask) == len(messages) else answers, mask, strict=True):
        if message["role"] == "assistant" and not trained:
            message["train"] = False
        elif message["role"] != "assistant" and trained:
            raise Refused("loss_mask asks to train a message that is no answer")


def _trees(rows: list[FileRow], columns: Columns) -> Iterator[Document | Chat | Pair | Refused]:
    """Yield a conversation for each tree of messages, and a Refused for each row that belongs to none."""
    sound, known = [], {row["message_id"] for row in rows if isinstance(row, dict) and isinstance(row.get("message_id"), str)}
    for row in rows:
        if isinstance(row, Refused):
            yield row
        elif not isinstance(row.get("message_id"), str) or not isinstance(row.get("rank"), int | float | None):
            yield Refused("a message of a tree without message_id, or whose rank is not a number")
        elif row.get("parent_id") is not None and row["parent_id"] not in known:
            yield Refused("a message of a tree whose parent is not there")
        else:
            sound.append(row)
    for path in best_paths(sound):
        if not path:
            yield Refused("a tree without an answer")
            continue
        messages = [{"role": row.get("role"), "content": row.get("text")} for row in path]
        kept = {keep.column: path[0].get(keep.column) for keep in columns.keep}  # of the first message
        yield read_row("sft", {"messages": messages, **kept}, columns)


def best_paths(rows: Iterable[dict]) -> Iterator[list[dict]]:
    """Yield a path for each tree of oasst1's messages: from the root always on to the best-ranked reply, up to the last assistant's."""
    children, roots = defaultdict(list), []
    for row in rows:
        (roots if row.get("parent_id") is None else children[row["parent_id"]]).append(row)
    for root in roots:
        path = [root]
        while replies := [reply for reply in children.pop(path[-1]["message_id"], []) if not reply.get("deleted")]:
            path.append(min(replies, key=lambda reply: math.inf if reply.get("rank") is None else reply["rank"]))
        while path and path[-1].get("role") not in ("assistant", "gpt"):
            path.pop()
        yield path
