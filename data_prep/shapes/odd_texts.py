"""Looks at the texts of a row that was read: what tables write for null is no text, and marks of a chat in one are told.

Also a prompt that both answers of a pair repeat is taken off them.
"""

import re
from collections.abc import Iterator

from data_prep.shapes.messages import Chat, Document, Pair
from data_prep.shapes.structures import structure_of
from posttrain.data.parts import Refused

NULLS = ("nan", "NaN", "None", "null", "NULL", "<NA>", "NaT")  # what tables write for null, as text
LONGEST_NULL = max(map(len, NULLS))
NO_QUESTION = {"n/a", "na", "tbd", "todo"}
# what a chat written as one text has: a speaker's name at the start of a line for each side, or the signs of a known chat form
CHAT_MARKS = (
    re.compile(r"^\W{0,5}(human|user|instruction|question|q|prompt|input)\W{0,3}:", re.IGNORECASE | re.MULTILINE),
    re.compile(r"(^|\s)\W{0,5}(assistant|gpt|response|answer|a|bot|model|output|ai)\W{0,3}:", re.IGNORECASE | re.MULTILINE),
)
CHAT_SIGNS = re.compile(r"\[/?INST\]|<\|?/?(im_start|start_header_id|start_of_turn|user|assistant)\|?>|<｜User｜>", re.IGNORECASE)
VICUNA = re.compile(r"\b(USER|User|HUMAN|Human): .*\b(ASSISTANT|Assistant):", re.DOTALL)
SPEAKER = re.compile(r"\W{0,5}(human|user|assistant|chatgpt|gpt|bot)\W{0,3}:", re.IGNORECASE)  # at the start of a line of a file
TEMPLATE = re.compile(r"^###? ?(Instruction|Response|Human|Assistant|User|Input)\b ?:?\s*$", re.MULTILINE)  # Alpaca's and its like
SIGNS = ("INST]", "<|", "User｜>", "_of_turn>", "## ", "ssistant:", "SSISTANT:")  # without any of which no marks are looked for
SHORT = 20  # characters of a text that may be a null or no question
LOOKED_AT = 2000  # characters of a text in which they are looked for
IN_CHAT_FORM = "texts that look like a chat, trained whole, questions too: write chats as messages to train the answers alone"
MARKS = "marks of a chat in texts of messages (as <|im_start|>, [INST], ### Instruction:, Human: ... Assistant:), which stay plain text"
NULL_ANSWERS = "answers that are the text nan, None or null, as tables write null"
NO_LETTER = "questions without a letter or a digit, or n/a"
REPEATED = "the prompt taken off both answers, which begin with it"
SHORTEST_PROMPT = 10  # characters of one that is looked for in answers


def looked_at(item: Document | Chat | Pair) -> Document | Chat | Pair:
    """Return a row with notes on what is odd about its texts. Raises Refused for what tables write for null where a text should be."""
    if isinstance(item, Document):
        refuse_null(item.text, "text")
        return item._replace(notes=(*item.notes, IN_CHAT_FORM)) if is_chat(item.text) else item
    if isinstance(item, Pair):
        item = _without_prompt(item)
        for name, answer in (("chosen", item.chosen), ("rejected", item.rejected)):
            refuse_null(answer, name)
    messages = item.messages if isinstance(item, Chat) else item.prompt
    notes = [] if _are_ordinary([message["content"] for message in messages]) else [*dict.fromkeys(_notes(messages))]
    if isinstance(item, Pair) and MARKS not in notes and (has_marks(item.chosen) or has_marks(item.rejected)):
        notes.append(MARKS)
    return item._replace(notes=(*item.notes, *notes)) if notes else item


def _are_ordinary(texts: list[str]) -> bool:
    """Whether nothing is odd about the texts of messages, as of most, which is seen at once."""
    whole = "\n".join(texts)
    return min(map(len, texts)) >= SHORT and not any(sign in whole for sign in SIGNS)


def _notes(messages: list[dict]) -> Iterator[str]:
    """Yield what is told of messages. Raises Refused where the first question, or what stands before it, is a null of tables."""
    first = True
    for message in messages:
        role, text = message["role"], message["content"]
        if len(text) < SHORT and role != "tool":
            if role == "assistant":
                if text.strip() in NULLS:
                    yield NULL_ANSWERS
            elif first:
                refuse_null(text, "the system message" if role == "system" else "the question")
            if role == "user" and (text.strip().lower() in NO_QUESTION or not any(map(str.isalnum, text))):
                yield NO_LETTER
        if role != "tool" and has_marks(text):
            yield MARKS
        first = first and role == "system"


def refuse_null(text: str, what: str) -> None:
    """Raise Refused for a text that is what tables write for null."""
    if len(text) < SHORT and text.strip() in NULLS:
        raise Refused(f"{what} is the text {text.strip()!r}, which tables write for null: write null, or leave the row out")


def has_marks(text: str) -> bool:
    """Whether a text of a message has the marks of a chat."""
    if not any(sign in text for sign in SIGNS):
        return False
    start = text[:LOOKED_AT]
    return bool(CHAT_SIGNS.search(start) or VICUNA.search(start) or len({*TEMPLATE.findall(start)}) > 1 or _turns(start))


def _turns(text: str) -> bool:
    """Whether lines of a text begin with the names of both speakers."""
    names = {name.lower() for name in re.findall(r"^\W{0,5}(human|user|assistant)\W{0,3}:", text, re.IGNORECASE | re.MULTILINE)}
    return not names.isdisjoint(("human", "user")) and "assistant" in names


def is_chat(text: str) -> bool:
    """Whether a plain text looks like a chat, or like a line of one, or holds one as JSON."""
    start = text[:LOOKED_AT]
    if SPEAKER.match(start) or all(marks.search(start) for marks in CHAT_MARKS) or CHAT_SIGNS.search(start) or VICUNA.search(start):
        return True
    if start.lstrip()[:1] not in ("[", "{") or not re.search(r"""["'](role|from|messages|conversations?)["']\s*:""", start):
        return False
    found = structure_of(text)
    found = next((inner for inner in found.values() if isinstance(inner, list)), [found]) if isinstance(found, dict) else found
    messages = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
    return any(not {"role", "from"}.isdisjoint(one) and not {"content", "value"}.isdisjoint(one) for one in messages)


def _without_prompt(pair: Pair) -> Pair:
    """Take a prompt off two answers that begin with it. Raises Refused where one alone does."""
    asked, answers = pair.prompt[-1]["content"].strip(), [pair.chosen.lstrip(), pair.rejected.lstrip()]
    if len(asked) < SHORTEST_PROMPT or not any(answer.startswith(asked) for answer in answers):
        return pair
    if not all(answer.startswith(asked) for answer in answers):
        raise Refused("one answer alone begins with the prompt, which may stand before it by mistake: take it off, or write it before both")
    chosen, rejected = (answer.removeprefix(asked).lstrip() for answer in answers)
    if not chosen or not rejected:
        raise Refused("an answer is nothing but the prompt")
    return pair._replace(chosen=chosen, rejected=rejected, notes=(*pair.notes, REPEATED))
