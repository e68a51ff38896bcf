"""Reads what stands in columns of their own: a question, a system message, earlier exchanges, arguments for the template."""

from data_prep.shapes.columns import Columns, Row
from data_prep.shapes.content_parts import text_of
from data_prep.shapes.messages import clean, messages_in, messages_of, transcript
from data_prep.shapes.odd_texts import refuse_null
from posttrain.data.parts import Refused

EXCHANGES = (("question", "answer"), ("query", "response"), ("prompt", "response"), ("instruction", "output"))  # keys of an object


def with_system(row: Row, messages: list[dict]) -> list[dict]:
    """Return the messages after the system message of the row's own column, unless they begin with one, which then holds."""
    name = row.find("system", full=True)
    if name is None:
        return messages
    content = clean(text_of(row.take(name)), name)
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"] != content:
            if name in row.named:
                raise Refused(row.unused(name, "the messages begin with another system message"))
            row.notes.append(f"a system message in the messages taken, not the one in the column {row.shown[name]}")
        return messages
    return [{"role": "system", "content": content}, *messages]


def history(row: Row, columns: Columns) -> list[dict]:
    """Read earlier exchanges, [[question, answer], ...] as LLaMA-Factory, ms-swift and ChatGLM have them, or messages."""
    name = row.find("history", full=True)
    if name is None:
        return []
    exchanges = row.structure(name)
    if not isinstance(exchanges, list):
        raise Refused(f"{name} is not a list of [question, answer]")
    if all(isinstance(one, dict) for one in exchanges):
        keys = next((keys for keys in EXCHANGES if all(set(keys) <= one.keys() for one in exchanges)), None)
        if keys is None:
            return messages_of(exchanges, name, columns)
        exchanges = [[one[key] for key in keys] for one in exchanges]
    if not all(isinstance(one, list) and len(one) == 2 for one in exchanges):
        raise Refused(f"{name} is not a list of [question, answer]")
    roles = ("user", "assistant")
    return [{"role": role, "content": clean(text, name)} for one in exchanges for role, text in zip(roles, one, strict=True)]


def asked(row: Row, names: list[str], columns: Columns) -> tuple[list[dict], bool]:
    """Read the question that one of the columns `names` holds, after earlier exchanges, and whether it is a text, which a context ends.

    The first of the names may not hold a context, as `input` does beside an instruction. Raises Refused for two questions.
    """
    contexts = [name for name in row.found("context", full=True) if name != names[0]]
    prompt = one_of(row, "prompt", [name for name in names if name not in contexts])
    earlier, question = history(row, columns), messages_in(row, prompt)
    if isinstance(question, dict) and isinstance(question.get("full_text"), str):  # WebGPT's
        question = question["full_text"]
    if isinstance(question, list):
        return earlier + messages_of(question, prompt, columns), False
    texts = [clean(question, prompt), *(clean(row.take(name), name) for name in contexts)]
    for name, text in zip(contexts, texts[1:], strict=True):
        refuse_null(text, row.shown[name])
    if texts[0].startswith("\n\nHuman:") or (texts[0].startswith("Human:") and "\n\nAssistant:" in texts[0]):  # Anthropic's HH
        return [*earlier, *transcript("\n\n".join(texts).rstrip().removesuffix("\n\nAssistant:"))], True
    return [*earlier, {"role": "user", "content": "\n\n".join(texts)}], True


def one_of(row: Row, what: str, names: list[str]) -> str:
    """Choose the column that holds `what`: the first that is not empty. Others that say the same are used; an answer that differs is told.

    Raises Refused for two prompts that differ.
    """
    full = [name for name in names if name in row.found(what, full=True)] or names[:1]
    first, *others = full
    for name in others:
        same = row.values[name] == row.values[first]
        if not same and what == "prompt":
            raise Refused(f"{row.shown[first]} and {row.shown[name]} hold two questions: say with --columns prompt=NAME which is asked")
        row.take_all([name])
        row.notes.append(f"two columns with {what}s: {row.shown[first]} taken, {row.shown[name]} {'says the same' if same else 'left out'}")
    return first


def options_of(row: Row) -> dict | None:
    """Return the row's arguments for the template, None without any."""
    if "chat_template_kwargs" not in row:
        return None
    options = row.structure("chat_template_kwargs")
    if not isinstance(options, dict):
        raise Refused("chat_template_kwargs is not an object")
    return {name: value for name, value in options.items() if value not in (None, [], {}, "")} or None
