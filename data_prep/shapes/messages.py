"""Brings a row's messages into the one form that the chat format takes: {role, content}, and what else a message may say.

Besides role and content these are tool_calls, reasoning_content, name, a tool's tool_call_id, and train: False for an answer that is
context only. Whatever cannot be trained on raises Refused with the cause.
"""

import re
from typing import NamedTuple

from data_prep.shapes.calls import SURROGATE, calls_of, json_text, text_of_id
from data_prep.shapes.columns import USUAL, Columns, Row
from data_prep.shapes.content_parts import in_messages, text_of
from data_prep.shapes.forms import ROLES, listed, message_in, parts_of, role_of
from data_prep.shapes.names import MEDIA, SPEAKER_KEYS, TEXT_KEYS, is_switch, near, quoted
from data_prep.shapes.structures import json_of, says_nothing, structure_of
from data_prep.shapes.verdicts import refuse_rated_message
from posttrain.common.errors import shown_name
from posttrain.data.parts import Refused

CALLS = {"function_call", "tool_call"}  # roles whose content is a call
# which role may follow which; None is the start
MAY_FOLLOW = {
    "system": {None},
    "user": {None, "system", "assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}
THINKING = ("reasoning_content", "reasoning", "thinking")
# what says whether a message is trained, and what of it means that it is
TRAINED = {
    **dict.fromkeys(
        ("weight", "train", "trainable", "trained", "training", "loss", "loss_mask", "loss_scale", "train_on", "should_train"), True
    ),
    **dict.fromkeys(("masked", "ignore", "no_loss"), False),
}
MASKING = re.compile("loss|mask|train|weight|learn|skip|ignore|delete", re.IGNORECASE)  # in a key with a number or a truth value
UNCLEAR = ("mask", "label")  # which mean one thing to some and the opposite to others
# keys of a message that say nothing about its text; anything else that is not null would be lost
SAID = {"role", "from", "content", "value", "tool_calls", "function_call", "tool_call_id", "name", *THINKING, *TRAINED}
METADATA = {"id", "timestamp", "created", "language", "lang", "model", "turn_identifier", "toxic", "redacted", "state", "country", "header"}
METADATA |= {"hashed_ip", "user-agent", "type", "end_turn", "refusal", "annotations", "openai_id", "system_fingerprint"}
METADATA |= {"usage", "finish_reason", "source", "provider"}
PARTS = "contents of messages read as JSON text of their parts"
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class Document(NamedTuple):
    """A plain text, of which every token is trained: continued pre-training."""

    text: str
    notes: tuple[str, ...] = ()  # what the ledger tells about the row, such as columns that are not used


class Chat(NamedTuple):
    """A conversation that ends with an answer."""

    messages: list[dict]
    tools: list[dict] | None = None
    options: dict | None = None  # arguments for the template (chat_template_kwargs)
    notes: tuple[str, ...] = ()


class Pair(NamedTuple):
    """Two answers to one conversation."""

    prompt: list[dict]  # messages, the last one from the user or a tool
    chosen: str
    rejected: str
    tools: list[dict] | None = None
    options: dict | None = None
    notes: tuple[str, ...] = ()


class Lost(Refused):
    """A message of which keys would be lost, its `args`."""


def messages_of(value, column: str, columns: Columns) -> list[dict]:
    """Read [{role, content}, ...] or ShareGPT's [{from, value}, ...], also as JSON text; empty system messages are left out.

    Tool calls may be in OpenAI's form or turns of their own; calls that follow each other are one turn. The key `as` holds a message's role
    as the row calls it, until `finished` has taken it out.
    """
    value = listed(value, column, columns)
    if columns.ignore:
        kept = {"role", "from", "content", "value", columns.role_key, columns.content_key}
        value = [{key: inner for key, inner in one.items() if key in kept or key not in columns.ignore} for one in value]
    key = columns.content_key or "content"
    as_text = [
        one for one in value if isinstance(one.get(key), str) and _role(one, columns) != "tool" and parts_of(one[key]) is not one[key]
    ]
    if as_text:
        value = [one | {key: parts_of(one[key])} if one in as_text else one for one in value]
    if any(isinstance(given.get(key), list) or "parts" in given for given in value):
        value = [message for given in value for message in _of_parts(given, columns)]
    messages: list[dict] = []
    lost: dict[str, None] = {}
    for given in value:
        try:
            message = _message(given, columns)
        except Lost as cause:  # all are named at once
            lost |= dict.fromkeys(cause.args)
            continue
        if message is None:
            continue
        before = messages[-1] if messages else {}
        if "tool_calls" in before and _is_call(given, columns) and before.get("train") == message.get("train"):
            before["tool_calls"] += message["tool_calls"]
        else:
            messages.append(message)
    if lost:
        them = "it" if len(lost) == 1 else "them"
        how = f"leave {them} out with {quoted('--ignore', ','.join(lost))}"
        raise Refused(f"a message has {', '.join(map(shown_name, lost))}, which would be lost: {how}")
    if not messages:
        raise Refused(f"{column} is empty")
    if as_text:
        messages[0]["told"] = (*messages[0].get("told", ()), PARTS)
    return messages


def conversation(row: Row, columns: Columns, full: bool = False) -> list[dict] | None:
    """The messages of a row's conversation, None without one; with `full`, of a column that is not empty.

    Other columns with conversations count as used where they say the same. Raises Refused where they do not.
    """
    names = message_columns(row, full)
    if not names:
        return None
    messages = messages_of(row.structure(names[0]), names[0], columns)
    for name in names[1:]:
        if not row.values[name]:
            continue
        if [_unnamed(one) for one in messages_of(row.structure(name), name, columns)] != [_unnamed(one) for one in messages]:
            both = f"{row.shown[names[0]]} and {row.shown[name]}"
            raise Refused(f"{both} hold two conversations that differ: say with --columns messages=NAME which is meant")
        row.notes.append(f"two columns with conversations: {row.shown[names[0]]} taken, {row.shown[name]} says the same")
    return messages


def message_columns(row: Row, full: bool = False) -> list[str]:
    """The names of the columns that hold conversations, also of Gemini's contents, whose messages have parts."""
    names = row.found("messages", full)
    if "contents" in row and "messages" not in row.named:
        contents = structure_of(row.values["contents"])
        if isinstance(contents, list) and contents and all(isinstance(one, dict) and "parts" in one for one in contents):
            names.append("contents")
    return names


def _unnamed(message: dict) -> dict:
    """A message without its role as the row calls it, and without the keys that are only told."""
    return {key: value for key, value in message.items() if key not in ("as", "told")}


def messages_in(row: Row, name: str):
    """Take a column; return the messages that it holds as text, or its value: also a text that is only like a list of messages."""
    value, notes = row.take(name), list(row.notes)
    if isinstance(value, dict) and isinstance(value.get("role", value.get("from")), list):
        return listed(value, name, USUAL)
    if (message := message_in(value)) is not None:
        return message
    if isinstance(value, str) and not value.lstrip().startswith("["):
        return value
    found = row.structure(name)
    if isinstance(found, list) and found and all(isinstance(one, dict) and {"role", "from"} & one.keys() for one in found):
        return found
    row.notes = notes
    return value


def answer_in(value) -> list[dict] | None:
    """The messages of the assistant that an answer is, or holds as JSON text; None for any other answer."""
    is_text = isinstance(value, str) and re.match(r'\s*\[\s*\{\s*"(role|from|content|value)"', value)
    found = json_of(value) if is_text else message_in(value) or []
    is_answer = isinstance(found, list) and found and all((message_in(one) or [{}])[0] is one for one in found)
    return found if is_answer and role_of(found[0].get("role", found[0].get("from")), USUAL) == "assistant" else None


def _of_parts(message: dict, columns: Columns) -> list[dict]:
    """The messages that one whose content is a list of parts says; any other message as it is, and the result of a tool, as JSON."""
    content_key = columns.content_key or "content"
    key = content_key if message.get(content_key) else "parts"
    is_result = key != "parts" and _role(message, columns) == "tool"
    if is_result or not isinstance(message.get(key), list):
        return [message]
    rest = {name: value for name, value in message.items() if name != key}
    return in_messages(rest, message[key], columns.role_key or "role", content_key)


def _role(message: dict, columns: Columns) -> str | None:
    """The role that a message has; None where it has none, or an unknown one."""
    return role_of(_first(message, columns.role_key, "role", "from"), columns)


def _is_call(message: dict, columns: Columns) -> bool:
    role = _first(message, columns.role_key, "role", "from")
    return isinstance(role, str) and role.strip().lower() in CALLS


def _first(message: dict, named: str | None, *usual: str):
    """The value of the first key that is there and not null; the key that the user has named comes alone."""
    return next((message[key] for key in ((named,) if named else usual) if message.get(key) is not None), None)


PLAIN = ({"role", "content"}, {"from", "value"})  # keys of a message that says nothing else, as most do
SPEAKERS = {name: role for name, role in ROLES.items() if role in ("user", "assistant") and name not in CALLS}


def _message(message: dict, columns: Columns) -> dict | None:
    """Read one message; None for an empty system message, which says nothing."""
    if message.keys() in PLAIN and not columns.roles and not columns.role_key and not columns.content_key:
        name, content = message.values() if next(iter(message)) in ("role", "from") else reversed(message.values())
        if isinstance(name, str) and name in SPEAKERS and isinstance(content, str):
            return {"role": SPEAKERS[name], "as": name, "content": clean(content, "a message")}
    name, content = _first(message, columns.role_key, "role", "from"), _first(message, columns.content_key, "content", "value")
    role = role_of(name, columns)
    if name is None and not {"role", "from", columns.role_key}.isdisjoint(message):
        raise Refused("the role of a message is null")
    if name is None:
        keys, speaker, said = ", ".join(map(shown_name, message)) or "nothing", one_key(SPEAKER_KEYS, message), one_key(TEXT_KEYS, message)
        how = f"--role_key {speaker} and --content_key {said}" if speaker and said else "--role_key and --content_key"
        raise Refused(f"a message does not say who speaks; it has {keys}: name the keys with {how}")
    if role is None:
        raise Refused(f"unknown role {name!r}: name it with {quoted('--roles', str(name) + '=user')}, assistant, system or tool")
    _refuse_without_content(message, columns)
    told = _left(message, columns)
    content = text_of(content)
    if role == "system" and (content is None or (isinstance(content, str) and not content.strip())):
        return None
    read = {"role": role, "as": name} | ({"told": told} if told else {})
    calls = [message[key] for key in ("tool_calls", "function_call") if not says_nothing(message.get(key))]
    lost = [key for key in ("tool_calls", "function_call", *THINKING) if not says_nothing(message.get(key)) and not is_switch(message[key])]
    if lost and role != "assistant":
        raise Refused(f"a message of the role {name} has {lost[0]}, which would be lost")
    if role == "tool":
        return read | _tool_result(message, content)
    if message.get("name") not in (None, ""):
        read["name"] = clean(message["name"], "a message's name")
    if role == "assistant":
        read |= _train_flag(message)
        if thinking := {key: message[key] for key in THINKING if message.get(key) and not is_switch(message[key])}:
            if any(one != next(iter(thinking.values())) for one in thinking.values()):
                raise Refused(f"a message has thinking in two keys that differ ({', '.join(thinking)})")
            read["reasoning_content"] = clean(next(iter(thinking.values())), "a message's reasoning")
        calls, content = ([content, *calls], "") if name.strip().lower() in CALLS else (calls, content)
        if calls:
            content = "" if content is None else content
            return read | {"content": clean(content, "a message", empty=True), "tool_calls": _only(calls, columns)}
    elif _train_flag(message, asks=True):
        raise Refused(f"a message of the role {name} asks to be trained; only answers are")
    if isinstance(content, list):
        raise Refused("a message holds something other than text")
    return read | {"content": clean(content, "a message")}


def _refuse_without_content(message: dict, columns: Columns) -> None:
    """Raise Refused for a message whose text stands under another key."""
    usual = {columns.content_key} if columns.content_key else {"content", "value", "parts", "tool_calls", "function_call"}
    if usual.isdisjoint(message) and (said := one_key(TEXT_KEYS, message)):
        raise Refused(f"a message has no content, but {said}: name it with --content_key {said}")


def one_key(known: tuple[str, ...], message: dict) -> str | None:
    """The first of the known keys under which a message has a text."""
    return next((key for key in known if isinstance(message.get(key), str)), None)


def _only(given: list, columns: Columns) -> list[dict]:
    """The calls that a message has in one or more of its keys. Raises Refused where they differ."""
    first, *others = [calls_of(calls, columns.ignore) for calls in given]
    if any([call["function"] for call in other] != [call["function"] for call in first] for other in others):
        raise Refused("a message has tool calls in two keys that differ: leave one out with --ignore function_call, or --ignore tool_calls")
    return first


def _left(message: dict, columns: Columns) -> tuple[str, ...]:
    """The keys of a message that are only told as not used. Raises Refused for what would be lost."""
    left, lost, unclear = [], [], []
    if not columns.content_key and None not in (both := (message.get("content"), message.get("value"))) and both[0] != both[1]:
        raise Refused("a message has content and value, which differ: name the one to take with --content_key")
    for key, value in message.items():
        if key in THINKING and value not in (None, "") and is_switch(value):
            left.append(key)
        if key in SAID or value in (None, [], {}, ""):
            continue
        if key in UNCLEAR or (MASKING.search(key) and isinstance(value, bool | int | float)):
            unclear.append(key)
            continue
        refuse_rated_message(key, value)
        if key in METADATA or key in (columns.role_key, columns.content_key):
            continue
        if key == "recipient" and value == "all":
            continue
        if near(key) == "thinking" and is_switch(value):
            left.append(key)
            continue
        (lost if key.lower() in MEDIA or isinstance(value, str | list | dict) else left).append(key)
    if lost:
        raise Lost(*lost)
    if unclear:
        how = "which may say that it is trained, or that it is not: write weight, 0 or 1, or leave it out with --ignore"
        raise Refused(f"a message has {unclear[0]}, {how} {unclear[0]}")
    return tuple(f"key of messages not used: {shown_name(key)}" for key in left)


def _tool_result(message: dict, content) -> dict:
    """What a tool answered: a text, also an empty one, or anything else as JSON; with the tool's name and the call's id."""
    if not isinstance(content, str):
        content = "" if content is None else json_text(content, "a tool's result")
    about = {} if message.get("name") is None else {"name": clean(message["name"], "a message's name", empty=True)}
    if identity := text_of_id(message.get("tool_call_id")):
        about["tool_call_id"] = identity
    return {"content": clean(content, "a tool's result", empty=True)} | about


def _train_flag(message: dict, asks: bool = False) -> dict:
    """{train: False} for a message that says it is not trained, in any of the ways of TRAINED, else {}.

    With `asks`, for a message that is never trained: {train: True} where it says more than a weight of 1 that it is.
    """
    said = set()
    for key, means in TRAINED.items():
        value = message.get(key)
        if value is None:
            continue
        if value not in (0, 1):
            raise Refused(f"a message has the {key} {value!r}; expected 0 or 1")
        said.add(bool(value) is means)
        if asks and key not in ("weight", "loss") and bool(value) is means:
            return {"train": True}
    if asks:
        return {}
    if len(said) > 1:
        raise Refused(f"a message says that it is trained, and that it is not ({', '.join(key for key in TRAINED if key in message)})")
    return {"train": False} if said == {False} else {}


def as_context(messages: list[dict], row: Row) -> list[dict]:
    """Return the messages of a pair as the chat format takes them: which of their answers SFT would train says nothing there."""
    _tell(messages, row)
    return [{key: value for key, value in _unnamed(message).items() if key != "train"} for message in messages]


def _tell(messages: list[dict], row: Row) -> None:
    """Note the keys of messages that are not used."""
    told = sorted({note for message in messages for note in message.get("told", ())})
    row.notes += [note for note in told if note not in row.notes]


def finished(messages: list[dict], train_on: str, row: Row) -> list[dict]:
    """Return the messages as the chat format takes them, with train: False at the answers that --train_on leaves out.

    What their keys say besides is noted in the row. Raises Refused where no answer is left to train.
    """
    _tell(messages, row)
    answers = [message for message in messages if message["role"] == "assistant"]
    if train_on == "last":
        for message in answers[:-1]:
            message["train"] = False
    elif train_on != "all":
        names = {name.lower() for name in train_on.split(",")}
        for message in answers:
            if names.isdisjoint((str(message.get("as", "")).lower(), message["role"], str(message.get("name", "")).lower())):
                message["train"] = False
    if answers and not any(message.get("train", True) for message in answers):
        raise Refused("no answer of it is to be trained")
    return [_unnamed(message) for message in messages]


def transcript(text: str) -> list[dict]:
    """Read the messages of a transcript in the form of Anthropic's HH data ("\\n\\nHuman: ...\\n\\nAssistant: ..."); all turns are kept."""
    before, *turns = re.split(r"\n\n(Human|Assistant):", "\n\n" + text if text.startswith("Human:") else text)
    if before.strip() or not turns:
        raise Refused("chosen and rejected are texts without a prompt")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[turns[i]], "content": clean(turns[i + 1].strip(), "a message")} for i in range(0, len(turns), 2)]


def check_order(messages: list[dict]) -> None:
    """Raise Refused unless each message's role may follow the one before."""
    before = None
    for message in messages:
        role = message["role"]
        if before not in MAY_FOLLOW[role]:
            raise Refused(f"wrong order of roles: {role} {'after ' + before if before else 'first'}")
        before = role


def clean(value, what: str, empty: bool = False) -> str:
    """The text, if it is one that can be trained on."""
    if not isinstance(value, str):
        raise Refused(f"{what} is null" if value is None else f"{what} is a {type(value).__name__}, not text")
    if not empty and not value.strip():
        raise Refused(f"{what} is empty")
    if CONTROL.search(value):
        raise Refused(f"{what} holds control characters")
    if not value.isascii() and SURROGATE.search(value):
        raise Refused(f"{what} holds half a surrogate pair")
    return value
