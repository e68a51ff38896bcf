"""Reads rows with two answers as preference pairs."""

from collections.abc import Callable

from data_prep.messages import Pair, as_list, check_order, messages_of, system_message, text_of, tools_of, transcript
from posttrain.common.places import in_this_form
from posttrain.data.parts import Refused

RATINGS = (("chosen-rating", "rejected-rating"), ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"))


def dpo_reader(columns: set[str]) -> Callable[[dict], Pair]:
    """Return the reader for preference rows with these columns. Raises ValueError with what was seen and what is expected."""
    if {"input", "preferred_output", "non_preferred_output"} <= columns:
        return _azure_pair
    if {"chosen", "rejected"} <= columns:
        for name in ("conversations", "messages"):
            if name in columns:
                return lambda row, n=name: _answers(
                    system_message(row) + messages_of(row[n], n), as_list(row["chosen"]), as_list(row["rejected"]), row
                )
        for question, context in (("question", None), ("prompt", None), ("instruction", "input")):
            if question in columns:
                return lambda row, q=question, c=context: _pair(row, q, c)
        return lambda row: _pair(row, None, None)
    raise ValueError(
        f"rows have the columns {', '.join(sorted(columns))}; expected chosen and rejected (text or messages) with prompt, question, "
        "instruction or conversations; chosen and rejected alone as messages or as Human/Assistant transcripts; or input, "
        + in_this_form("preferred_output and non_preferred_output. For rows with one answer use data_prep/prepare_sft.py")
    )


def _azure_pair(row: dict) -> Pair:
    """Read a row in the form of Azure's preference data: input.messages, preferred_output and non_preferred_output."""
    if not isinstance(row["input"], dict) or "messages" not in row["input"]:
        raise Refused("input has no messages")
    prompt = messages_of(row["input"]["messages"], "input.messages")
    return _answers(prompt, row["preferred_output"], row["non_preferred_output"], {**row, "tools": row["input"].get("tools")})


def _pair(row: dict, question: str | None, context: str | None) -> Pair:
    """Read a row with chosen and rejected; `question` and `context` are the columns of its prompt, if it has any."""
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        if question is None:
            return _answers([], transcript(chosen), transcript(rejected), row)
        return _checked(_prompt(row, question, context), text_of(row, "chosen"), text_of(row, "rejected"), row)
    if question is None:
        return _answers(system_message(row), chosen, rejected, row)
    prompt = _prompt(row, question, context)
    if isinstance(chosen, list) and len(chosen) == 1:  # without turns before the answer the prompt is in its own column
        return _answers(prompt, chosen, rejected, row)
    pair = _answers(system_message(row), chosen, rejected, row)
    asked = [message for message in pair.prompt if message["role"] != "system"]
    if isinstance(row[question], list):
        if asked != [message for message in prompt if message["role"] != "system"]:
            raise Refused(f"{question} disagrees with the messages before the answer")
        return pair if pair.prompt[0]["role"] == "system" else pair._replace(prompt=prompt)
    if all(message["content"].strip() != prompt[-1]["content"].strip() for message in asked):
        raise Refused(f"{question} disagrees with the messages before the answer")
    return pair


def _prompt(row: dict, question: str, context: str | None) -> list[dict]:
    """The messages of the prompt in the column `question`: messages, a transcript or a text, which the context's text ends."""
    if isinstance(row[question], list):
        return system_message(row) + messages_of(row[question], question)
    content = text_of(row, question)
    if content.startswith("\n\nHuman:"):
        turns = transcript(content.removesuffix("\n\nAssistant:"))
        return system_message(row) + turns
    if context and row.get(context):
        content += "\n\n" + text_of(row, context)
    return [*system_message(row), {"role": "user", "content": content}]


def _answers(prompt: list[dict], chosen, rejected, row: dict) -> Pair:
    """The Pair of two message lists that agree up to their last message, the answer; what they share goes after `prompt`."""
    chosen, rejected = messages_of(chosen, "chosen"), messages_of(rejected, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise Refused("chosen and rejected differ before their last message")
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise Refused("the last message of chosen or rejected is not the assistant's")
    if "tool_calls" in chosen[-1] or "tool_calls" in rejected[-1]:
        raise Refused("chosen or rejected is a tool call")
    return _checked(prompt + chosen[:-1], chosen[-1]["content"], rejected[-1]["content"], row)


def _checked(prompt: list[dict], chosen: str, rejected: str, row: dict) -> Pair:
    """The Pair, unless roles are out of order, the answers equal, or rated the same."""
    if not prompt or prompt[-1]["role"] not in ("user", "tool"):
        raise Refused("the prompt does not end with a user message")
    check_order(prompt)
    if chosen == rejected:
        raise Refused("chosen equals rejected")
    for better, worse in RATINGS:
        if row.get(better) is not None and row.get(better) == row.get(worse):
            raise Refused(f"tied: {better} equals {worse}")
    return Pair(prompt, chosen, rejected, tools_of(row))
