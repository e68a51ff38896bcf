"""Whether a template writes the tools and the tool calls of a conversation: those that know none leave them out without a word."""

from collections.abc import Callable, Iterator

from posttrain.data.parts import Refused


def writes_tools(render: Callable[[list[dict]], str], tools: list[dict]) -> bool:
    """Whether the template writes every tool; `render` makes its output with some."""
    marks = [f"qztool{i}zq" for i in range(len(tools))]  # a call may name a tool, too
    output = _tried(render, [_renamed(tool, mark) for tool, mark in zip(tools, marks, strict=True)])
    return output is None or all(mark in output for mark in marks)


def refuse_lost_calls(render: Callable[[list[dict]], str], messages: list[dict]) -> None:
    """Raise Refused where the template does not write every call with its name and its arguments."""
    if any(message.get("tool_calls") for message in messages):
        marks: list[str] = []
        output = _tried(render, [_marked(message, marks) for message in messages])
        if output is not None and not all(mark in output for mark in marks):
            raise Refused("the template does not write the tool calls, or only some of them")


def _tried(render: Callable, given) -> str | None:
    """The template's output, None where it refuses: it has then read what was changed."""
    try:
        return render(given)
    except Refused:
        return None


def _renamed(tool: dict, name: str) -> dict:
    """The tool under another name."""
    function = tool.get("function")
    return {**tool, "function": {**function, "name": name}} if isinstance(function, dict) else {**tool, "name": name}


def _marked(message: dict, marks: list[str]) -> dict:
    """The message with names and arguments of its calls that occur nowhere else; they are added to `marks`."""
    calls = []
    for call in message.get("tool_calls") or []:
        name, mark = f"qzname{len(marks)}zq", f"qzargument{len(marks)}zq"
        marks.append(name)
        function = {**call["function"], "name": name}
        if function.get("arguments"):
            marks.append(mark)
            is_text = isinstance(function["arguments"], str)
            function["arguments"] = f'{{"{mark}": 1}}' if is_text else {mark: 1} if isinstance(function["arguments"], dict) else [mark]
        calls.append({**call, "function": function})
    return {**message, "tool_calls": calls} if calls else message


def strings(value) -> Iterator[str]:
    """Yield every text inside nested lists and dicts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield name
            yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)
