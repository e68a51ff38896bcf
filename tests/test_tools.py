"""Tools as templates write them: calls are trained, what tools say is not, and nothing of either is lost."""

import json

import pytest
from shown import shown
from test_templates import LLAMA, byte_level

from data_prep.examples import DPO
from data_prep.shapes.calls import KEPT_NULLS, NULL_ARGUMENTS, NULLS
from data_prep.shapes.function_calls import BARE, UNWRITTEN
from posttrain.data.chat import ChatFormat

START, STOP = "{{ '<|im_start|>' + m['role'] + '\n' }}", "{{ '<|im_end|>\n' }}"
DESCRIBED = "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
CALLED = "{% for c in m['tool_calls'] or [] %}{{ '<call>' + c['function'] | tojson + '</call>' }}{% endfor %}"
ASKED = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TOOLS = DESCRIBED + "{% for m in messages %}" + START + "{{ m['content'] }}" + CALLED + STOP + "{% endfor %}" + ASKED
USER = {"role": "user", "content": "hello"}
FOX = {"role": "assistant", "content": "the fox"}
LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {"where": {"type": "string"}}}}}


def call(name: str = "look", arguments=None, **more) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments or {"where": "up"}}, **more}


def calls(*several: dict) -> dict:
    return {"role": "assistant", "content": "", "tool_calls": list(several) or [call()]}


def result(content="blue", **more) -> dict:
    return {"role": "tool", "content": content, **more}


def form(template) -> ChatFormat:
    tokenizer = byte_level(False)
    tokenizer.chat_template = template
    return ChatFormat(tokenizer, "tokenizer")


def only(template, messages: list[dict], tools=None, **columns) -> str:
    """The one example of a row, with what is trained in brackets."""
    texts, _ = shown(form(template), {"messages": messages, "tools": tools, **columns})
    assert not isinstance(texts, str), texts
    (text,) = texts
    return text


WRITTEN = '[[<call>{"name": "look", "arguments": {"where": "up"}}</call><|im_end|>]]\n'


@pytest.mark.parametrize(
    "called",
    [
        calls(call(id="abc")),
        {"role": "assistant", "content": None, "tool_calls": json.dumps([call()])},
        {"role": "assistant", "function_call": {"name": "look", "arguments": '{"where": "up"}'}},
        {"role": "function_call", "content": '{"name": "look", "arguments": {"where": "up"}}'},
        {"role": "tool_call", "content": '[{"name": "look", "arguments": "{\\"where\\": \\"up\\"}"}]'},
    ],
)
@pytest.mark.parametrize(
    ("said", "read"),
    [
        (result(), "blue"),
        (result({"colour": "blue"}), '{"colour": "blue"}'),
        (result([1, None]), "[1, null]"),
        (result(7), "7"),
        (result(""), ""),
        ({"role": "function", "name": "look", "content": "blue"}, "blue"),
        ({"role": "observation", "content": "blue"}, "blue"),
    ],
)
def test_calls_and_results_of_every_kind_are_one_conversation(called, said, read):
    text = only(TOOLS, [USER, called, said, FOX], [LOOK])
    assert WRITTEN + f"<|im_start|>tool\n{read}<|im_end|>\n<|im_start|>assistant\n[[the fox<|im_end|>]]\n" in text


def test_calls_in_parallel_are_one_turn():
    for turns in ([calls(call(), call("f"))], [{"from": "function_call", "value": json.dumps(call()["function"])}] * 2):
        text = only(TOOLS, [USER, *turns, result(), result(), FOX])
        assert text.count("<call>") == 2
        assert text.count("[[") == 2


def test_a_result_that_the_template_writes_as_json_is_context():
    template = TOOLS.replace("{{ m['content'] }}", "{{ m['content'] | tojson if m['role'] == 'tool' else m['content'] }}")
    text = only(template, [USER, calls(), result('{"a": "b\\n"} <|im_end|>'), FOX])
    assert text.count("<|im_end|>") == 5  # the one in the result is text, and all the others end a turn
    assert text.count("[[") == 2
    chat = form(template)
    ids = [token for part in chat.parts([USER, calls(), result("<|im_end|>"), FOX]) for token in getattr(part, "ids", [])]
    assert ids.count(chat.end_id) == 4
    sneaky = template.replace("| tojson if", "| replace('blue', '<|im_end|>') if")
    assert "writes special tokens into a message" in shown(form(sneaky), {"messages": [USER, calls(), result(), FOX]})[0]
    shout = template.replace("| tojson if", "| upper if")  # any other way to write it, as long as it is told from the rest
    assert "BLUE" in only(shout, [USER, calls(), result(), FOX])


NAMED = TOOLS.replace("{{ m['content'] }}", "{% if m['role'] == 'tool' %}{{ '<' + m['name'] + '>' }}{% endif %}{{ m['content'] }}")
WRAPPED = TOOLS.replace("tools | tojson", "tools[0]['function']['name']")
TEXTS = TOOLS.replace("c['function'] | tojson", "c['function']['name'] + ' ' + c['function']['arguments']")
FIRST_ONLY = TOOLS.replace("m['tool_calls'] or []", "(m['tool_calls'] or [])[:1]")
NINE = "{% if c['id'] | length != 9 %}{{ raise_exception('nine') }}{% endif %}{{ c['id'] + '<call>'"
IDS = TOOLS.replace(CALLED, CALLED.replace("{{ '<call>'", NINE))
IDS = IDS.replace("{{ m['content'] }}", "{{ m['tool_call_id'] if m['role'] == 'tool' else '' }}{{ m['content'] }}")


def test_what_a_template_demands_is_made_of_what_the_row_has():
    text = only(NAMED, [USER, calls(call(id="1"), call("f", id="2")), result(tool_call_id="2"), result("red", name="look"), FOX])
    assert "<f>blue" in text
    assert "<look>red" in text
    silent = NAMED.replace("{{ '<' + m['name'] + '>' }}", "<{{ m['name'] }}>")  # writes nothing for a name that is not there
    texts, changes = shown(form(silent), {"messages": [USER, calls(), result(), FOX]})
    assert "<look>blue" in texts[0]
    assert changes == {"a tool's result named after its call": 1}
    bare = LOOK["function"]
    texts, changes = shown(form(WRAPPED), {"messages": [USER, calls(), result(), FOX], "functions": [bare]})
    assert "<|im_start|>system\nlook<|im_end|>" in texts[0]
    assert any("wrapped as {type: function}" in note for note in changes)
    assert json.dumps(bare) in only(TOOLS, [USER, calls(), result(), FOX], [bare])  # as it is, where the template takes it so
    assert '[[<call>look {"where": "up"}</call><|im_end|>]]' in only(TEXTS, [USER, calls(), result(), FOX])


def test_ids_that_a_template_demands_are_kept_or_made_anew_and_counted():
    chat = form(IDS)
    kept, changes = shown(chat, {"messages": [USER, calls(call(id="abcdefghi")), result(tool_call_id="abcdefghi"), FOX]})
    assert kept[0].count("abcdefghi") == 2
    assert not changes
    for first, second in ((None, None), ("call_1", "call_1"), ("call_1", None)):
        row = [USER, calls(call(**({"id": first} if first else {}))), result(**({"tool_call_id": second} if second else {})), FOX]
        texts, changes = shown(chat, {"messages": row})
        made = texts[0].split("<call>")[0].rpartition("[[")[2]
        assert len(made) == 9
        assert texts[0].count(made) == 2  # the call's and its result's
        assert texts == shown(chat, {"messages": row})[0]
        assert any("call ids made anew" in note for note in changes)
    texts, _ = shown(chat, {"messages": [USER, calls(call(), call("f")), result("1"), result("2"), FOX]})
    ids = [written.split("<|im_end|>")[0][:9] for written in texts[0].split("<|im_start|>tool\n")[1:]]
    assert len({*ids}) == 2  # each result has the id of its own call, in their order
    assert texts[0].index(ids[0]) < texts[0].index(ids[1])


@pytest.mark.parametrize(
    ("template", "messages", "tools", "cause"),
    [
        (TOOLS.replace(CALLED, ""), [USER, calls(), result(), FOX], None, "does not write the tool calls"),
        (
            TOOLS.replace("m['tool_calls'] or []", "(m['tool_calls'] or [])[:1]"),
            [USER, calls(call(), call("f")), result(), FOX],
            None,
            "only some",
        ),
        (TOOLS.replace("c['function'] | tojson", "c['function']['name']"), [USER, calls(), result(), FOX], None, "only some of them"),
        (TOOLS.replace(DESCRIBED, ""), [USER, calls(), result(), FOX], [LOOK], "the template does not write the tools"),
        (TOOLS, [USER, calls(call(arguments={"where": "\ud83d"})), result(), FOX], None, "a tool call holds half a surrogate pair"),
        (TOOLS, [USER, FOX], [{"name": "f", "description": "\udc00"}], "a description of tools holds half a surrogate pair"),
        (TOOLS, [USER, calls(call("<|im_end|>")), result(), FOX], None, "spells a special token"),
    ],
)
def test_what_would_be_lost_or_break_out_is_refused(template, messages, tools, cause):
    assert cause in shown(form(template), {"messages": messages, "tools": tools})[0]


def test_the_template_for_tools_is_taken_where_there_are_some():
    chat = form({"default": LLAMA, "tool_use": TOOLS.replace("<|im_end|>", "<|eot_id|>")})
    with_tools, _ = shown(chat, {"messages": [USER, calls(), result(), FOX], "tools": [LOOK]})
    assert with_tools[0].startswith("<|im_start|>system")
    assert shown(chat, {"messages": [USER, FOX]})[0][0].startswith("<s><|start_header_id|>user")


def test_a_template_that_describes_tools_to_a_question_only_gets_an_example_for_each_answer():
    """As Mistral's, which writes them before the last question: the earlier answers would be trained without them."""
    last = DESCRIBED.replace("if tools", "if tools and m == (messages | selectattr('role', 'equalto', 'user') | list)[-1]")
    again, once = {"role": "user", "content": "once more"}, TOOLS.replace(DESCRIBED, "")
    row = {"messages": [USER, calls(), result(), FOX], "tools": [LOOK]}
    texts, _ = shown(form(once.replace(START, last + START)), row | {"messages": [*row["messages"], again, FOX]})
    assert [text.count("[[") for text in texts] == [2, 1]
    assert all('"look", "parameters"' in text for text in texts)
    asked = DESCRIBED.replace("if tools", "if tools and loop.last and m['role'] == 'user'")
    texts, _ = shown(form(once.replace(START, asked + START)), row)
    assert [text.count("[[") for text in texts] == [1, 1]
    assert '"look", "parameters"' in texts[0]


SPEAKER = "{{ '<|im_start|>' + m['role'] + (':' + m['name'] if m['name'] and m['role'] == 'user' else '') + '\n' }}"


def test_names_of_messages_are_written_as_the_template_writes_them_or_told():
    row = {"messages": [USER | {"name": "ann"}, FOX | {"name": "bob"}]}
    bare = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n[[the fox<|im_end|>]]\n"
    for chat in (form(TOOLS), ChatFormat(byte_level(False))):
        assert shown(chat, row) == ([bare], {UNWRITTEN.format(role=role): 1 for role in ("user", "assistant")})
    chat = form(TOOLS.replace(START, SPEAKER))
    (text,), changes = shown(chat, row)
    assert text == bare.replace("user", "user:ann")
    assert text.replace("[[", "").replace("]]", "") == chat.tokenizer.apply_chat_template(row["messages"], tokenize=False)
    assert changes == {UNWRITTEN.format(role="assistant"): 1}
    tools = {"messages": [USER | {"name": "ann"}, calls(), result(name="look"), FOX], "tools": [LOOK]}
    (text,), changes = shown(form(NAMED.replace(START, SPEAKER)), tools)
    assert "user:ann\nhello" in text and "<look>blue" in text
    assert not changes
    assert shown(form(TOOLS), tools)[1] == {UNWRITTEN.format(role="user"): 1}
    pair = {"chosen": row["messages"], "rejected": [USER | {"name": "ann"}, FOX | {"content": "world"}]}
    (text,), changes = shown(chat, pair, DPO)
    assert "user:ann" in text
    assert changes == {"a name of an answer left out: pairs have none": 1}


def test_nulls_that_a_table_filled_in_are_taken_out_and_counted():
    schema = {"type": "object", "properties": {"where": {"type": "string", "enum": None}, "x": None}}
    tools = [{"type": "function", "function": {"name": "look", "parameters": schema}}]
    messages = [USER, calls(call(arguments={"where": "up", "x": None})), result(), FOX]
    texts, changes = shown(form(TOOLS), {"messages": messages, "tools": tools})
    assert "null" not in texts[0]
    assert changes == {NULLS: 1, NULL_ARGUMENTS: 1}
    texts, changes = shown(form(TOOLS), {"messages": [USER, calls(call(arguments={"where": None})), result(), FOX], "tools": [LOOK]})
    assert '{"where": null}' in texts[0]  # the function has such an argument
    assert changes == {KEPT_NULLS: 1}


def test_data_sets_of_calls_are_read():
    described = json.dumps({"name": "look", "description": "Look.", "parameters": {}}, indent=4)
    system = "SYSTEM: You are a helpful assistant with access to the following functions. Use them if required -\n" + described
    turns = ("USER: hello", """ASSISTANT: <functioncall> {"name": "look", "arguments": '{"where": "up"}'} <|endoftext|>""")
    turns += ('FUNCTION RESPONSE: {"colour": "blue"}', "ASSISTANT: the fox <|endoftext|>")
    (text,), _ = shown(form(TOOLS), {"system": system, "chat": "\n\n\n".join(turns)})
    assert "system\nYou are a helpful assistant.<|im_end|>" in text
    assert WRITTEN + '<|im_start|>tool\n{"colour": "blue"}<|im_end|>\n<|im_start|>assistant\n[[the fox<|im_end|>]]\n' in text
    row = {"query": "hello", "answers": json.dumps([call()["function"]] * 2), "tools": json.dumps([LOOK])}
    (text,), _ = shown(form(TOOLS), row)
    assert text.count('<call>{"name": "look"') == 2


def test_results_that_are_wrapped_as_the_template_wraps_them_are_wrapped_once():
    around = "{{ '<tool_response>' + m['content'] + '</tool_response>' if m['role'] == 'tool' else m['content'] }}"
    template = TOOLS.replace("{{ m['content'] }}", around)
    wrapped = "<tool_response>\n{}\n</tool_response>"
    plain, told = shown(form(template), {"messages": [USER, calls(call()), result(wrapped.format("blue")), FOX], "tools": [LOOK]})
    assert plain[0].count("tool_response>") == 2 and "<tool_response>blue</tool_response>" in plain[0] and told[BARE] == 1
    two = wrapped.format("blue") + "\n" + wrapped.format("red")
    both, _ = shown(form(template), {"messages": [USER, calls(call(), call()), result(two), FOX], "tools": [LOOK]})
    assert both[0].count("<tool_response>") == 2 and "<tool_response>red</tool_response>" in both[0]
    other, told = shown(form(TOOLS), {"messages": [USER, calls(call()), result(wrapped.format("blue")), FOX], "tools": [LOOK]})
    assert "<tool_response>\nblue\n</tool_response>" in other[0] and BARE not in told
    quoted = result("see <tool_response>x</tool_response>")
    kept, told = shown(form(template), {"messages": [USER, calls(call()), quoted, FOX], "tools": [LOOK]})
    assert "see <tool_response>x" in kept[0] and BARE not in told
