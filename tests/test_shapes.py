"""Shapes of rows: every known one is read, a row that cannot be used is refused under its cause, and nothing of a row is lost unsaid."""

import json
import re
from decimal import Decimal

import pyarrow
import pyarrow.parquet
import pytest

from data_prep.formats.rows import file_rows
from data_prep.shapes.calls import OTHER_FORM
from data_prep.shapes.columns import USUAL, Columns, keep_of
from data_prep.shapes.conversations import KEPT, best_paths, conversations, read_row
from data_prep.shapes.messages import Chat, Document, Pair
from data_prep.shapes.structures import PYTHON
from posttrain.data.parts import Refused

SYSTEM, USER, ASSISTANT = ({"role": role, "content": text} for role, text in (("system", "s"), ("user", "q"), ("assistant", "a")))
OTHER, HH = {"role": "assistant", "content": "b"}, "\n\nHuman: q\n\nAssistant: a"
WITH_SYSTEM = Chat([SYSTEM, USER, ASSISTANT])
UNTRAINED = ASSISTANT | {"train": False}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOLS = [{"name": "f"}]


def chat(*messages, **more) -> dict:
    return {"messages": list(messages), **more}


def message(name, parent, role, rank, **more):
    return {"message_id": name, "parent_id": parent, "role": role, "text": name, "rank": rank, **more}


def said(role, content) -> dict:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "q", "input": "", "output": "a"}, Chat([USER, ASSISTANT])),
        ({"instruction": "q", "input": None, "output": "a"}, Chat([USER, ASSISTANT])),
        ({"instruction": "q", "input": "more", "output": "a"}, Chat([{"role": "user", "content": "q\n\nmore"}, ASSISTANT])),
        ({"instruction": "q", "input": "", "output": "a", "history": [["q", "a"]]}, Chat([USER, ASSISTANT, USER, ASSISTANT])),
        ({"instruction": "q", "context": "more", "response": "a"}, Chat([{"role": "user", "content": "q\n\nmore"}, ASSISTANT])),
        ({"instruction": "q", "input": "", "output": "a", "system": "s"}, Chat([SYSTEM, USER, ASSISTANT])),
        ({"prompt": "q", "response": "a"}, Chat([USER, ASSISTANT])),
        ({"prompt": "q", "completion": "a"}, Chat([USER, ASSISTANT])),
        ({"question": "q", "answer": "a"}, Chat([USER, ASSISTANT])),
        ({"messages": [SYSTEM, USER, ASSISTANT]}, Chat([SYSTEM, USER, ASSISTANT])),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ASSISTANT]}, Chat([USER, ASSISTANT])),
        (
            {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            Chat([SYSTEM, USER, ASSISTANT]),
        ),
        (
            {"conversations": [{"from": "Human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
            Chat([SYSTEM, USER, ASSISTANT]),
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                    {"from": "observation", "value": "1"},
                    {"from": "gpt", "value": "a"},
                ],
                "tools": '[{"name": "f"}]',
            },
            Chat([USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "1"}, ASSISTANT], TOOLS),
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": TOOLS},
            Chat([USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}], TOOLS),
        ),
        ({"text": "a document"}, Document("a document")),
        ({"prompt": [USER], "completion": [ASSISTANT]}, Chat([USER, ASSISTANT])),
        ({"prompt": "q", "completion": json.dumps([ASSISTANT])}, Chat([USER, ASSISTANT])),
        ({"prompt": "q", "completion": json.dumps([USER])}, Chat([USER, ASSISTANT | {"content": json.dumps([USER])}])),
        ({"prompt": '{"a": 1}', "completion": "[1,\n 2]"}, Chat([said("user", '{"a": 1}'), said("assistant", "[1,\n 2]")])),
        ({"prompt": [USER], "output": "a", "reasoning": "off"}, Chat([USER, ASSISTANT])),
        ({"question": "q", "answer": "42", "solution": "a"}, Chat([USER, ASSISTANT])),
        ({"instruction": "", "input": "q", "output": "a"}, Chat([USER, ASSISTANT])),
        ({"instruction": "q", "input": float("nan"), "output": "a"}, Chat([USER, ASSISTANT])),
        ({"messages": "", "prompt": "q", "response": "a"}, Chat([USER, ASSISTANT])),
        ({"messages": [USER], "reasoning": "t", "answer": "a"}, Chat([USER, ASSISTANT | {"reasoning_content": "t"}])),
        ({"messages": [USER, ASSISTANT], "reasoning": "t"}, Chat([USER, ASSISTANT | {"reasoning_content": "t"}])),
        (
            {"conversation": [{"system": "s", "input": "q", "output": "a", "output_with_loss": False}, {"input": "q", "output": "a"}]},
            Chat([SYSTEM, USER, UNTRAINED, USER, ASSISTANT]),
        ),
        ({"messages": [USER, ASSISTANT], "system": "s", "loss_mask": "[0, 1]"}, WITH_SYSTEM),
        ({"prompt": [SYSTEM, USER], "completion": "a"}, Chat([SYSTEM, USER, ASSISTANT])),
        ({"system_prompt": "s", "question": "q", "response": "a"}, Chat([SYSTEM, USER, ASSISTANT])),
        ({"query": "q", "response": "a", "history": [["q", "a"]]}, Chat([USER, ASSISTANT, USER, ASSISTANT])),
        ({"prompt": "q", "response": "a", "history": [USER, ASSISTANT]}, Chat([USER, ASSISTANT, USER, ASSISTANT])),
        ({"prompt": "q", "answer": "a", "history": '[{"query": "q", "response": "a"}]'}, Chat([USER, ASSISTANT, USER, ASSISTANT])),
        ({"Inputs": "q", "TARGETS": "a"}, Chat([USER, ASSISTANT])),
        ({"input": "q", "output": "a"}, Chat([USER, ASSISTANT])),
        ({"instruction": "q", "input": "", "output": "a", "text": "Asked: q\nAnswered: a"}, Chat([USER, ASSISTANT])),
        ({"conversation": [{"input": "q", "output": "a"}] * 2}, Chat([USER, ASSISTANT, USER, ASSISTANT])),
        ({"Question": "q", "Complex_CoT": "t", "Response": "a"}, Chat([USER, ASSISTANT | {"reasoning_content": "t"}])),
        ({"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'}, Chat([USER, ASSISTANT])),
        ({"messages": [said("system", " "), USER, ASSISTANT]}, Chat([USER, ASSISTANT])),
        (
            {"messages": [said("developer", "s"), USER, ASSISTANT], "prompt": "q", "input": "", "images": []},
            Chat([SYSTEM, USER, ASSISTANT]),
        ),
        ({"messages": [USER, ASSISTANT | {"thinking": "t"}]}, Chat([USER, ASSISTANT | {"reasoning_content": "t"}])),
        ({"messages": [USER, ASSISTANT], "chat_template_kwargs": {"a": 1, "b": []}}, Chat([USER, ASSISTANT], options={"a": 1})),
        ({"messages": [USER | {"weight": 0}, ASSISTANT | {"weight": 1.0}]}, Chat([USER, ASSISTANT])),
        ({"messages": [USER, ASSISTANT | {"loss": False}, USER, ASSISTANT]}, Chat([USER, UNTRAINED, USER, ASSISTANT])),
        ({"messages": [USER, ASSISTANT | {"masked": True}, USER, ASSISTANT | {"masked": False}]}, Chat([USER, UNTRAINED, USER, ASSISTANT])),
        ({"messages": [USER, ASSISTANT, USER, ASSISTANT], "loss_mask": [0, 1]}, Chat([USER, UNTRAINED, USER, ASSISTANT])),
        ({"id": "0", "data": ["q", "a", "q", "a"]}, Chat([USER, ASSISTANT, USER, ASSISTANT])),
        ({"data": ["q", "a"], "system": "s"}, WITH_SYSTEM),
        ({"data": ["q", "a"], "prompt": "q", "response": "a"}, Chat([USER, ASSISTANT])),
        ({"messages": [USER, ASSISTANT, USER, ASSISTANT], "loss_mask": [0, 0, 0, 1]}, Chat([USER, UNTRAINED, USER, ASSISTANT])),
    ],
)
def test_sft_shapes(row, expected):
    assert read_row("sft", row, USUAL)._replace(notes=()) == expected


CALLED = {"role": "assistant", "content": "a", "tool_calls": [CALL | {"id": "t"}], "reasoning_content": "t"}
WITH_RESULT = [SYSTEM, USER, CALLED, {"role": "tool", "content": "b", "tool_call_id": "t"}, ASSISTANT]
GEMINI = [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "a"}]}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (  # Anthropic's messages, of which a table has filled nulls into the parts
            {
                "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
                "messages": [
                    said("user", "q"),
                    said(
                        "assistant",
                        [
                            {"type": "thinking", "thinking": "t", "signature": "xyz", "text": None},
                            {"type": "text", "text": "a", "thinking": None, "input": None},
                            {"type": "tool_use", "id": "t", "name": "f", "input": {"x": 1}, "text": None},
                        ],
                    ),
                    said("user", [{"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "b"}]}]),
                    said("assistant", [{"type": "text", "text": "a"}]),
                ],
            },
            Chat(WITH_RESULT),
        ),
        (
            {
                "schemaVersion": "bedrock-conversation-2024",
                "system": [{"text": "s"}],
                "messages": [
                    said("user", [{"text": "q"}]),
                    said(
                        "assistant",
                        [
                            {"reasoningContent": {"reasoningText": {"text": "t", "signature": "xyz"}}},
                            {"text": "a"},
                            {"toolUse": {"toolUseId": "t", "name": "f", "input": {"x": 1}}},
                        ],
                    ),
                    said("user", [{"toolResult": {"toolUseId": "t", "content": [{"text": "b"}], "status": "success"}}]),
                    said("assistant", [{"text": "a"}]),
                ],
            },
            Chat(WITH_RESULT),
        ),
        (
            {
                "systemInstruction": {"role": "system", "parts": [{"text": "s"}]},
                "contents": [
                    {"role": "user", "parts": [{"text": "q"}]},
                    {
                        "role": "model",
                        "parts": [
                            {"text": "t", "thought": True},
                            {"text": "a"},
                            {"functionCall": {"id": "t", "name": "f", "args": {"x": 1}}},
                        ],
                    },
                    {"role": "function", "parts": [{"functionResponse": {"id": "t", "name": "f", "response": {"y": 2}}}]},
                    {"role": "model", "parts": [{"text": ""}, {"text": "a"}]},
                ],
                "tools": [
                    {"functionDeclarations": [{"name": "f", "parameters": {"type": "OBJECT", "properties": {"x": {"type": "INTEGER"}}}}]}
                ],
            },
            Chat(
                [*WITH_RESULT[:3], {"role": "tool", "content": '{"y": 2}', "tool_call_id": "t", "name": "f"}, ASSISTANT],
                [
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}},
                    }
                ],
            ),
        ),
        ({"contents": json.dumps(GEMINI), "system_instruction": "s"}, WITH_SYSTEM),
        ({"contents": "a table of", "prompt": "q", "response": "a"}, Chat([USER, ASSISTANT])),
        # two results and a text are three messages
        (
            chat(
                USER,
                CALLED | {"content": [{"type": "text", "text": "a"}]},
                said(
                    "user",
                    [
                        {"type": "tool_result", "tool_use_id": "t", "content": "b"},
                        {"type": "tool_result", "tool_use_id": "u"},
                    ],
                ),
                ASSISTANT,
            ),
            Chat([*WITH_RESULT[1:4], {"role": "tool", "content": "", "tool_call_id": "u"}, ASSISTANT]),
        ),
        (
            chat(USER, ASSISTANT, tools=[{"name": "f", "description": "d", "input_schema": {"type": "object"}}, {"name": "g"}]),
            Chat(
                [USER, ASSISTANT],
                [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}, {"name": "g"}],
            ),
        ),
        (
            chat(USER, ASSISTANT, toolConfig={"tools": [{"toolSpec": {"name": "f", "inputSchema": {"json": {"type": "object"}}}}]}),
            Chat([USER, ASSISTANT], [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]),
        ),
    ],
)
def test_messages_of_parts_say_what_those_of_texts_do(row, expected):
    item = read_row("sft", row, USUAL)
    assert item._replace(notes=()) == expected
    assert (OTHER_FORM in item.notes) is (item.tools is not None)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, Pair([USER], "a", "b")),
        ({"system": "s", "question": "q", "chosen": "a", "rejected": "b"}, Pair([SYSTEM, USER], "a", "b")),
        ({"instruction": "q", "input": "", "output": "x", "chosen": "a", "rejected": "b"}, Pair([USER], "a", "b")),
        ({"prompt": [SYSTEM, USER], "chosen": "a", "rejected": "b"}, Pair([SYSTEM, USER], "a", "b")),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]}, Pair([USER], "a", "b")),
        ({"prompt": "q", "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]}, Pair([USER], "a", "b")),
        ({"prompt": "q", "chosen": [ASSISTANT], "rejected": [OTHER]}, Pair([USER], "a", "b")),
        ({"prompt": [SYSTEM, USER], "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]}, Pair([SYSTEM, USER], "a", "b")),
        ({"prompt": HH.removesuffix(" a"), "chosen": "a", "rejected": "b"}, Pair([USER], "a", "b")),
        (
            {"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: q\n\nAssistant: a", "rejected": HH + "\n\nHuman: q\n\nAssistant: b"},
            Pair([USER, ASSISTANT, USER], "a", "b"),
        ),
        (
            {"input": {"messages": [SYSTEM, USER]}, "preferred_output": [ASSISTANT], "non_preferred_output": [OTHER]},
            Pair([SYSTEM, USER], "a", "b"),
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": OTHER, "system": "s"},
            Pair([SYSTEM, USER], "a", "b"),
        ),
        ({"prompt": "q", "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER], "messages": [USER, ASSISTANT]}, Pair([USER], "a", "b")),
        ({"prompt": "q", "chosen": [SYSTEM, USER, ASSISTANT], "rejected": [SYSTEM, USER, OTHER]}, Pair([SYSTEM, USER], "a", "b")),
        ({"question": None, "prompt": "q", "chosen": "a", "rejected": "b"}, Pair([USER], "a", "b")),
        ({"chosen": json.dumps([USER, ASSISTANT]), "rejected": json.dumps([USER, OTHER])}, Pair([USER], "a", "b")),
        ({"query": "q", "history": [["q", "a"]], "chosen": "a", "rejected": "b"}, Pair([USER, ASSISTANT, USER], "a", "b")),
        ({"context": [USER], "response1": "a", "response2": "b", "overall_preference": -1}, Pair([USER], "a", "b")),
        ({"context": [USER], "response1": "b", "response2": "a", "overall_preference": 3}, Pair([USER], "a", "b")),
        ({"history": "q", "human_ref_A": "b", "human_ref_B": "a", "labels": 0, "score_A": 1, "score_B": 7}, Pair([USER], "a", "b")),
        ({"question": "q", "response_j": "a", "response_k": "b"}, Pair([USER], "a", "b")),
        ({"instruction": "q", "input": "", "output": ["a", "b"]}, Pair([USER], "a", "b")),
        ({"prompt": "q", "answers": [{"answer": c, "rank": n} for n, c in enumerate("acb")]}, Pair([USER], "a", "b")),
        ({"instruction": "q", "completions": [{"response": c, "overall_score": n} for n, c in enumerate("bca")]}, Pair([USER], "a", "b")),
        (  # stack-exchange-preferences
            {"qid": 1, "question": "q", "answers": [{"answer_id": n, "pm_score": n, "text": c} for n, c in enumerate("bca")], "date": "d"},
            Pair([USER], "a", "b"),
        ),
        ({"question": "q", "answers": [{"pm_score": str(n), "answer_text": c} for n, c in enumerate("bca")]}, Pair([USER], "a", "b")),
        ({"input": "q", "system": "s", "chosen": "a", "rejected": "b"}, Pair([SYSTEM, USER], "a", "b")),
        ({"prompt": "q", "chosen": '{"a": 1}', "rejected": "b"}, Pair([USER], '{"a": 1}', "b")),
        ({"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": HH, "rejected": HH[:-1] + "b"}, Pair([USER], "a", "b")),
        ({"prompt": "Human: q\n\nAssistant:", "chosen": "a", "rejected": "b"}, Pair([USER], "a", "b")),
        ({"prompt": [USER, ASSISTANT | {"weight": 0}, USER], "chosen": "a", "rejected": "b"}, Pair([USER, ASSISTANT, USER], "a", "b")),
        ({"messages": [USER, ASSISTANT], "rejected_response": "b"}, Pair([USER], "a", "b")),
        (
            {
                "contents": GEMINI[:1],
                "completions": [{"score": n, "completion": {"role": "model", "parts": [{"text": c}]}} for n, c in enumerate("ba")],
            },
            Pair([USER], "a", "b"),
        ),
        ({"trajectory": [{"from": "user", "value": "q"}], "chosen": "a", "rejected": "b"}, Pair([USER], "a", "b")),
    ],
)
def test_dpo_shapes(row, expected):
    assert read_row("dpo", row, USUAL)._replace(notes=()) == expected


MALFORMED_SFT = [
    *(
        (chat(USER, ASSISTANT | {key: value}), f"a message has {key}, which may say that it is trained")
        for key, value in {
            "train_on_turn": False,
            "loss_weight": 0.5,
            "is_masked": True,
            "compute_loss": False,
            "deleted": True,
            "skip": 1,
        }.items()
    ),
    (chat(USER, ASSISTANT | {"recipient": "functions.look"}), "a message has recipient, which would be lost"),
    (chat(USER, ASSISTANT | {"value": "b"}), "a message has content and value, which differ: name the one to take with --content_key"),
    *(
        (chat(USER, ASSISTANT, **{name: value}), f"column {name} would be lost")
        for name, value in {
            "weights": [0, 1],
            "train_mask": [0],
            "train": False,
            "image_path": "a.png",
            "pixel_values": [1],
            "passage": "p",
        }.items()
    ),
    (
        chat(USER, ASSISTANT, is_correct=False),
        "is_correct rates the answer (unpaired preferences): take the good ones with --keep is_correct=true",
    ),
    ({"prompt": "q", "response": ""}, "response is empty"),
    ({"prompt": "q", "response": " \n\t"}, "response is empty"),
    ({"prompt": "", "response": "a"}, "prompt is empty"),
    ({"prompt": None, "response": "a"}, "prompt is null"),
    ({"prompt": "q", "response": None}, "response is null"),
    ({"prompt": 3, "response": "a"}, "prompt is a int, not text"),
    ({"prompt": "q", "response": ["a", "b"]}, "response holds 2 answers, of which one can be trained"),
    ({"prompt": "q\x00", "response": "a"}, "prompt holds control characters"),
    ({"prompt": "q", "response": "a\x1b[31m"}, "response holds control characters"),
    ({"prompt": "q", "response": "\ud83d"}, "response holds half a surrogate pair"),
    ({"prompt": "q", "response": "a", "system": 7}, "system is a int, not text"),
    ({"instruction": "q", "input": 5, "output": "a"}, "input is a int, not text"),
    ({"instruction": "q", "input": "", "output": "a", "history": [["q"]]}, "history is not a list"),
    ({"instruction": "q", "input": "", "output": "a", "history": [["q", ""]]}, "history is empty"),
    (chat(), "messages is not a list of messages"),
    ({"messages": None}, "messages is null"),
    ({"messages": "hello"}, "messages is not a list of messages"),
    ({"messages": ["hello", 1]}, "messages is not a list of messages"),
    ({"conversations": ["q", "a"]}, "but of texts: --columns messages=conversations reads the user's and the assistant's in turn"),
    ({"data": ["q", " "]}, "a message is empty"),
    ({"data": ["q", " "]}, "a message is empty"),
    (chat(USER), "last message is not the assistant's"),
    (chat(USER, {**ASSISTANT, "tool_calls": [CALL]}, said("tool", "b")), "last message is not the assistant's"),
    (chat(ASSISTANT), "wrong order of roles: assistant first"),
    (chat(ASSISTANT, USER, ASSISTANT), "wrong order of roles: assistant first"),
    (chat(USER, USER, ASSISTANT), "wrong order of roles: user after user"),
    (chat(USER, ASSISTANT, ASSISTANT), "wrong order of roles: assistant after assistant"),
    (chat(USER, SYSTEM, ASSISTANT), "wrong order of roles: system after user"),
    (chat(SYSTEM, SYSTEM, USER, ASSISTANT), "wrong order of roles: system after system"),
    (chat(USER, said("tool", "x"), ASSISTANT), "wrong order of roles: tool after user"),
    (chat(USER, said("robot", "a")), "unknown role 'robot'"),
    (chat(USER, said(None, "a")), "the role of a message is null"),
    (chat(USER, said(["assistant"], "a")), "unknown role"),
    (chat(USER, {"content": "a"}), "does not say who speaks; it has content"),
    (chat(USER, {"role": "assistant"}), "a message is null"),
    (chat(USER, said("assistant", "")), "a message is empty"),
    (chat(USER, said("assistant", {"text": "a"})), "a message is a dict, not text"),
    (chat(said("user", [{"type": "image_url"}]), ASSISTANT), "a message holds image_url, which is something other than text"),
    (chat(said("user", [{"text": "q"}, {"image": {"format": "png"}}]), ASSISTANT), "a message holds image, which"),
    ({"contents": [{"role": "user", "parts": [{"inlineData": {"data": "x"}}]}, *GEMINI[1:]]}, "a message holds inlineData, which"),
    (chat(said("user", [{"type": "text", "text": "q", "file": "x"}]), ASSISTANT), "a message holds file, which"),
    (chat(said("user", ["q"]), ASSISTANT), "a message holds something other than text"),
    (chat(said("user", []), ASSISTANT), "a message is empty"),
    (chat(USER, said("assistant", [{"type": "redacted_thinking", "data": "x"}])), "a message holds redacted_thinking, which"),
    (chat(USER, said("assistant", [{"text": "a"}, {"type": "thinking", "thinking": "t"}])), "a message has thinking after its text"),
    (chat(USER, said("assistant", [{"toolUse": {"name": "f", "input": {}}}, {"text": "a"}])), "a message has text after its tool calls"),
    (chat(USER, said("user", [{"toolResult": {"content": [{"text": "b"}, {"video": 1}]}}])), "a message holds video, which"),
    (chat(USER | {"tool_calls": [CALL]}, ASSISTANT), "a message of the role user has tool_calls, which would be lost"),
    (chat(USER, ASSISTANT | {"thinking": "t", "reasoning": "u"}), "thinking in two keys that differ (reasoning, thinking)"),
    ({"contents": [GEMINI[0], GEMINI[1] | {"content": "b"}]}, "a message has parts, which would be lost"),
    (
        chat(USER, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "argv": "x"}}]}),
        "no arguments, and argv, which",
    ),
    (chat(USER, {"role": "assistant", "content": "", "tool_calls": ["f()"]}), "a tool call has no name"),
    (chat(USER, {"from": "function_call", "value": "{f"}), "a tool call: not valid JSON"),
    (chat(USER, ASSISTANT, tools="[{"), "tools: not valid JSON"),
    (chat(USER, ASSISTANT, tools={"f": "f"}), "tools is not a list of objects"),
    (chat(USER, {**ASSISTANT, "weight": 0}), "no answer of it is to be trained"),
    (chat(USER, {**ASSISTANT, "weight": 0.5}), "the weight 0.5; expected 0 or 1"),
    (chat(USER, {**ASSISTANT, "weight": 1, "train": False}), "says that it is trained, and that it is not (weight, train)"),
    (chat({**USER, "train": True}, ASSISTANT), "asks to be trained; only answers are"),
    (chat(USER, {**ASSISTANT, "images": ["a.png"]}), "a message has images, which would be lost"),
    (chat(USER, ASSISTANT, label=False), "label rates the answer (unpaired preferences): take the good ones with --keep label=true"),
    (chat(USER, ASSISTANT, images=["a.png"]), "column images would be lost"),
    (chat(USER, ASSISTANT, history=[["q", "a"]]), "column history would be lost"),
    (chat(USER, ASSISTANT, text="another story"), "column text would be lost"),
    (chat(USER, ASSISTANT, prompt="another"), "column prompt would be lost"),
    (chat(USER, {**ASSISTANT, "mask": 1}), "a message has mask, which may say that it is trained, or that it is not"),
    (chat(USER, {**ASSISTANT, "loss_scale": 0.0}), "no answer of it is to be trained"),
    ({"question": "q", "options": {"A": "x"}, "answer": "A"}, "column options would be lost"),
    ({"text": "a document", "summary": "x"}, "column summary would be lost"),
    ({"messages": "[{'role': 'user'}]"}, "a message is null"),
    ({"messages": "[{'role': 'user'"}, "but a text that is neither JSON nor Python's: write it as JSON"),
    ({"messages": "[f(x)]"}, "but a text that is neither JSON nor Python's"),
    ({"messages": "[" * 100_000}, "but a text that is neither JSON nor Python's"),
    (
        {"messages": "[{'from': 'human', 'value': 'q'}\n {'from': 'gpt', 'value': 'a'}]"},
        "but a text as numpy prints objects, without commas",
    ),
    (chat(USER, ASSISTANT, loss_mask=[0, 1, 1]), "loss_mask is not a list of 0 or 1"),
    ({"instruction": "q", "query": "other", "output": "a"}, "instruction and query hold two questions"),
    ({"instruction": "q", "input": "", "output": "a", "history": 5}, "history is not a list"),
    ({"text": "\n"}, "text is empty"),
]
MALFORMED_DPO = [
    ({"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": "2", "score_rejected": "10"}, "score_chosen is below score_rejected"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": "5", "score_rejected": "5.0"}, "tied: score_chosen equals"),
    (
        {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": Decimal("1.5"), "score_rejected": Decimal("2.5")},
        "score_chosen is below score_rejected",
    ),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "images": ["a.png"]}, "column images would be lost"),
    ({"prompt": "q", "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER], "messages": [OTHER]}, "column messages would be lost"),
    ({"context": [USER], "response1": "a", "response2": "b", "overall_preference": "x"}, "overall_preference is not a number"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "chosen_score": 1, "rejected_score": 9}, "chosen_score is below rejected_score"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "rating": [9.0, 9.0], "status": "tie"}, "tied: both answers are rated the same"),
    ({"context": [USER], "response1": "a", "response2": "b", "overall_preference": 0}, "tied: overall_preference prefers none"),
    ({"prompt": "q", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 1}]}, "tied: all answers have the same rank or score"),
    ({"question": "q", "answers": [{"text": c, "pm_score": 2} for c in "ab"]}, "tied: all answers have the same rank or score"),
    ({"prompt": "q", "answers": [{"answer": "a", "rank": 1}, {"answer": "b"}]}, "fewer than two answers with a rank or a score"),
    (
        {"prompt": "q", "chosen": "a", "rejected": "b", "chosen_rating": 4, "rejected_rating": 4},
        "tied: chosen_rating equals rejected_rating",
    ),
    ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen equals rejected"),
    ({"prompt": "q", "chosen": "", "rejected": "a"}, "chosen is empty"),
    ({"prompt": "q", "chosen": None, "rejected": "a"}, "chosen is null"),
    ({"prompt": "", "chosen": "a", "rejected": "b"}, "prompt is empty"),
    ({"prompt": [], "chosen": "a", "rejected": "b"}, "prompt is empty"),
    ({"prompt": [USER, ASSISTANT], "chosen": "a", "rejected": "b"}, "does not end with a user message"),
    ({"prompt": [ASSISTANT, USER], "chosen": "a", "rejected": "b"}, "wrong order of roles: assistant first"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "chosen-rating": 4, "rejected-rating": 4}, "tied"),
    ({"chosen": [USER, ASSISTANT], "rejected": [SYSTEM, ASSISTANT]}, "differ before their last message"),
    ({"chosen": [USER, USER], "rejected": [USER, ASSISTANT]}, "not the assistant's"),
    ({"chosen": "a", "rejected": "b"}, "without a prompt"),
    ({"chosen": HH + "\n\nHuman: q\n\nAssistant: a", "rejected": HH}, "differ before their last message"),
    ({"chosen": "\n\nHuman: q\n\nAssistant:", "rejected": HH}, "a message is empty"),
    ({"prompt": "other", "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]}, "prompt disagrees with the messages before the answer"),
    (
        {"prompt": [SYSTEM, OTHER], "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
        "prompt disagrees with the messages before the answer",
    ),
    ({"input": "q", "preferred_output": [ASSISTANT], "non_preferred_output": [OTHER]}, "input has no messages"),
    (
        {"input": {"messages": [USER]}, "preferred_output": [], "non_preferred_output": [OTHER]},
        "preferred_output is not a list of messages",
    ),
]


@pytest.mark.parametrize(("row", "cause"), MALFORMED_SFT)
def test_sft_rows_that_cannot_be_used(row, cause):
    assert cause in str(next(conversations("sft", [row])))


@pytest.mark.parametrize(("row", "cause"), MALFORMED_DPO)
def test_pairs_that_cannot_be_used(row, cause):
    assert cause in str(next(conversations("dpo", [row])))


def test_a_row_of_no_known_shape_is_refused_alone():
    odd = {"prompt": "q"}
    found = list(conversations("sft", [odd, {"prompt": "q", "response": "a"}, odd, {"text": "a document"}]))
    assert [isinstance(item, Refused) for item in found] == [True, False, True, False]
    assert str(found[0]) == str(found[2]) == "its columns are of no known shape: prompt"


def test_trees_among_rows_of_other_shapes_are_not_taken_for_documents():
    found = list(conversations("sft", [{"prompt": "q", "response": "a"}, message("root", None, "prompter", None)]))
    assert str(found[1]) == "a message of a tree among rows of other shapes: give the trees as a file of their own"


def test_a_tree_of_messages_is_its_best_ranked_path():
    rows = [
        message("root", None, "prompter", None),
        message("second", "root", "assistant", 1),
        message("best", "root", "assistant", 0),
        message("gone", "best", "prompter", 0, deleted=True),
        message("unranked", "best", "prompter", None),
        message("asked", "best", "prompter", 1),
        message("alone", None, "prompter", None),
        message("reply", "asked", "assistant", None),
        message("left open", "reply", "prompter", 0),
    ]
    assert [[sent["text"] for sent in path] for path in best_paths(rows)] == [["root", "best", "asked", "reply"], []]
    whole, open_tree = conversations("sft", rows)
    assert whole.messages[1] == {"role": "assistant", "content": "best"}
    assert str(open_tree) == "a tree without an answer"


def test_every_row_of_a_tree_is_accounted_for():
    rows = [
        message("root", None, "prompter", None),
        message("answer", "root", "assistant", 0),
        message("orphan", "nowhere", "assistant", 0),
    ]
    rows += [message("odd", "root", "assistant", "0"), {"parent_id": None, "role": "prompter", "text": "x"}, Refused("not UTF-8")]
    causes = [str(item) for item in conversations("sft", rows) if isinstance(item, Refused)]
    assert len(causes) == 4
    assert sum("whose parent is not there" in cause for cause in causes) == 1
    assert sum("rank is not a number" in cause for cause in causes) == 2
    without_parent = [{"message_id": "a", "role": "assistant", "text": "x"}]
    assert "wrong order of roles" in str(list(conversations("sft", [rows[0], *without_parent]))[1])


def test_nulls_that_arrow_adds_are_not_the_rows(tmp_path):
    calls = [[{"function": {"name": "f", "arguments": arguments}}] for arguments in ({"a": 1}, {"b": 1})]
    rows = [{"messages": [USER, {"role": "assistant", "content": "", "tool_calls": call}]} for call in calls]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = [item.messages[1]["tool_calls"][0]["function"]["arguments"] for item in conversations("sft", file_rows(tmp_path / "a.parquet"))]
    assert read == [{"a": 1}, {"b": 1}]


def rows_of(kind: str, row: dict, **columns):
    return list(conversations(kind, [row], Columns(**columns)))


def test_columns_and_messages_of_other_names_are_read_as_the_user_says():
    named = {"prompt": "ask", "answer": "said", "system": "rules"}
    assert rows_of("sft", {"ask": "q", "said": "a", "rules": "s", "n": 1}, names=named) == [
        Chat([SYSTEM, USER, ASSISTANT], notes=("column not used: n",))
    ]
    assert rows_of("dpo", {"ask": "q", "good": "a", "bad": "b"}, names={"prompt": "ask", "chosen": "good", "rejected": "bad"}) == [
        Pair([USER], "a", "b")
    ]
    # a column that has the usual name, and is not what the user means
    (read,) = rows_of("sft", {"prompt": "a title", "ask": "q", "said": "a"}, names=named, ignore=("prompt",))
    assert read.messages == [USER, ASSISTANT]
    turns = [{"who": "Narrator", "text": "q"}, {"who": "hero", "text": "a"}]
    keys = {"role_key": "who", "content_key": "text", "roles": {"narrator": "user", "hero": "assistant"}}
    assert rows_of("sft", {"talk": turns}, names={"messages": "talk"}, **keys) == [Chat([USER, ASSISTANT])]


def test_two_columns_with_one_conversation_are_read_once_and_two_conversations_refused():
    shared = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    (item,) = rows_of("sft", {"conversations": shared, "Messages": [USER, ASSISTANT], "contents": GEMINI})
    note = "two columns with conversations: Messages taken, {} says the same"
    assert item == Chat([USER, ASSISTANT], notes=(note.format("conversations"), note.format("contents")))
    assert rows_of("sft", {"messages": [USER, ASSISTANT], "conversations": []}) == [Chat([USER, ASSISTANT])]
    differs = "messages and conversations hold two conversations that differ: say with --columns messages=NAME which is meant"
    for other in ([*shared, *shared], [shared[0], {"from": "gpt", "value": "b"}], [shared[0], shared[1] | {"weight": 0}]):
        row = {"messages": [USER, ASSISTANT], "conversations": other}
        assert str(rows_of("sft", row)[0]) == differs
        assert rows_of("sft", row, names={"messages": "messages"})[0].messages == [USER, ASSISTANT]
    pair = {"messages": [USER], "conversations": shared[:1], "chosen": "a", "rejected": "b"}
    assert rows_of("dpo", pair)[0]._replace(notes=()) == Pair([USER], "a", "b")
    assert str(rows_of("dpo", pair | {"conversations": shared})[0]) == differs


def test_texts_without_a_comma_are_no_list():
    for text in ("['q' 'a']", "['q'\n 'a']"):  # as numpy prints arrays; Python reads one text
        (item,) = rows_of("sft", {"messages": text}, names={"messages": "messages"})
        assert str(item) == "messages is not a list of messages, but a text that is neither JSON nor Python's: write it as JSON"


def test_columns_as_python_writes_them_are_read_and_told():
    messages = [USER | {"content": 'it\'s \u00e9\\d\n"q"'}, ASSISTANT]
    expected = Chat(messages, notes=(PYTHON,))
    assert rows_of("sft", {"messages": str(messages)}) == [expected]
    assert rows_of("sft", {"messages": json.dumps(messages)}) == [expected._replace(notes=())]
    assert rows_of("sft", {"prompt": str(messages[:1]), "completion": str([ASSISTANT]), "tools": str(TOOLS)}) == [
        expected._replace(tools=TOOLS)
    ]
    assert rows_of("sft", {"prompt": "q", "response": "a", "history": "[['q', 'a']]"}) == [Chat([USER, ASSISTANT] * 2, notes=(PYTHON,))]
    assert rows_of("sft", {"data": "['q', 'a']"}) == [Chat([USER, ASSISTANT], notes=(PYTHON,))]
    code = {"prompt": "[{'x': 1}]", "response": "['a']"}  # texts that only look so
    assert rows_of("sft", code) == [Chat([USER | {"content": code["prompt"]}, ASSISTANT | {"content": code["response"]}])]
    pair = {"chosen": str([USER, ASSISTANT]), "rejected": str([USER, OTHER])}
    assert rows_of("dpo", pair) == [Pair([USER], "a", "b", notes=(PYTHON,))]
    several = {"prompt": "q", "answers": str([{"answer": c, "rank": n} for n, c in enumerate("ab")])}
    assert rows_of("dpo", several) == [Pair([USER], "a", "b", notes=(PYTHON,))]


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_question_is_found_alike_beside_one_answer_and_two(kind):
    answers = {"sft": {"output": "a"}, "dpo": {"chosen": "a", "rejected": "b"}}[kind]

    def asked(**row):
        (item,) = rows_of(kind, row | answers)
        return item if isinstance(item, Refused) else (item.messages[:-1] if kind == "sft" else item.prompt, item.notes)

    same = "two columns with prompts: instruction taken, query says the same"
    assert asked(query="q", instruction="q", input="") == ([USER], (same,))
    assert asked(question="q", input="x", context="y") == ([USER | {"content": "q\n\nx\n\ny"}], ())
    assert asked(input="q", context="y") == ([USER | {"content": "q\n\ny"}], ())
    assert asked(prompt=[USER], history=[["q", "a"]]) == ([USER, ASSISTANT, USER], ())
    assert str(asked(query="q", problem="p")).startswith("query and problem hold two questions: say with --columns prompt=NAME")


def test_texts_in_turn_are_read_where_the_user_says_so():
    row = {"id": "1", "dialogue": ["q", "a", "q", "a"], "topic": ["fruit"]}
    with pytest.raises(ValueError, match="This would probably read them: --columns messages=dialogue$"):
        rows_of("sft", row)
    expected = [USER, ASSISTANT] * 2
    assert rows_of("sft", row, names={"messages": "dialogue"})[0].messages == expected
    assert rows_of("sft", {"dialogue": json.dumps(row["dialogue"])}, names={"messages": "dialogue"})[0].messages == expected
    (odd,) = rows_of("sft", {"messages": ["q", "a", "q"]}, names={"messages": "messages"})
    assert odd.messages == expected[:2]


def test_only_the_answers_that_the_user_names_are_trained():
    two = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}] * 2}
    assert rows_of("sft", two, train_on="last") == [Chat([USER, UNTRAINED, USER, ASSISTANT])]
    other = {"conversations": [*two["conversations"][:3], {"from": "model", "value": "a"}]}
    assert rows_of("sft", other, train_on="model") == [Chat([USER, UNTRAINED, USER, ASSISTANT])]
    assert str(rows_of("sft", two, train_on="model")[0]) == "no answer of it is to be trained"
    speakers = {"messages": [USER, ASSISTANT | {"name": "Ann"}, USER, ASSISTANT | {"name": "bob"}]}
    expected = [USER, ASSISTANT | {"name": "Ann"}, USER, UNTRAINED | {"name": "bob"}]
    assert rows_of("sft", speakers, train_on="ann") == [Chat(expected)]
    assert rows_of("sft", two, train_on="assistant") == [Chat([USER, ASSISTANT, USER, ASSISTANT])]


def test_good_answers_alone_are_kept_of_rated_ones():
    rows = [{"prompt": "q", "completion": answer, "label": label} for answer, label in (("a", True), ("b", False), ("c", 1))]
    found = list(conversations("sft", rows, Columns(keep=(keep_of("label=true"),))))
    assert [item.messages[-1]["content"] for item in found if isinstance(item, Chat)] == ["a", "c"]
    assert str(found[1]) == f"{KEPT}label=true"
    scored = [rows[0] | {"label": None, "score": score} for score in (5.0, "4", 1)]
    for condition, kept in (("score>=4", 2), ("score=5", 1), ("score!=5", 2), ("score<4", 1)):
        found = list(conversations("sft", scored, Columns(keep=(keep_of(condition),))))
        assert sum(isinstance(item, Chat) for item in found) == kept, condition
    assert "column score of --keep score>4 is 'good', which is no number" in str(
        read_row("sft", rows[0] | {"score": "good"}, Columns(keep=(keep_of("score>4"),)))
    )
    for wrong in ("score", "=5", "score>high"):
        with pytest.raises(ValueError, match="--keep"):
            keep_of(wrong)


def test_what_is_not_used_is_told_and_which_of_two_columns_was_taken():
    (item,) = rows_of("sft", {"instruction": "q", "input": "more", "response": "b", "output": "a", "id": 7, "tag": None})
    assert item.messages == [{"role": "user", "content": "q\n\nmore"}, ASSISTANT]
    assert item.notes == ("two columns with answers: output taken, response left out", "column not used: id")


def test_rows_of_no_known_shape_are_shown_with_the_option_that_would_read_them():
    rows = [{"title": "How do plums ripen?", "body": "In the sun, " * 9, "n": 3}]
    with pytest.raises(ValueError, match="rows have these columns, with an example of each") as error:
        list(conversations("sft", rows))
    text = str(error.value)
    assert '    title  "How do plums ripen?"' in text
    assert "    n      3" in text
    assert "This would probably read them: --columns prompt=title,answer=body" in text
    names = dict(pair.split("=") for pair in text.rsplit("--columns ", 1)[1].split(","))
    assert isinstance(next(conversations("sft", rows, Columns(names=names))), Chat)
    # which of two answers is the better one is not guessed
    with pytest.raises(ValueError, match="rows have these columns") as error:
        list(conversations("dpo", [{"prompt": "How do plums ripen?", "response_0": "Not at all.", "response_1": "In the sun.", "n": 1}]))
    assert "--columns" not in str(error.value)
    with pytest.raises(ValueError, match="preference pairs: use data_prep/prepare_dpo.py"):
        list(conversations("sft", [{"prompt": "q", "chosen": "a", "rejected": "b"}]))
    with pytest.raises(ValueError, match="preference pairs: use data_prep/prepare_dpo.py"):
        list(conversations("sft", [{"question": "q", "answers": [{"text": c, "pm_score": n} for n, c in enumerate("ab")]}]))
    with pytest.raises(ValueError, match="one answer: use data_prep/prepare_sft.py"):
        list(conversations("dpo", [{"prompt": "q", "response": "a"}]))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("columns: {prompt: ask, answer: said}\nroles: {Hero: assistant}\nignore: [n]\n", None),
        ("columns: {promt: ask}\n", "'promt' is not what a column holds. Did you mean prompt?"),
        ("columns: [ask]\n", "columns should map names to names"),
        ("prompt: ask\n", "should hold keys among columns, roles, role_key, content_key, ignore; saw prompt"),
        ("roles: {hero: knight}\n", "expected THEIRS=OURS with system, user, assistant or tool"),
        ("{", "is not valid YAML"),
    ],
)
def test_a_file_beside_the_rows_says_what_columns_hold(tmp_path, text, expected):
    path = tmp_path / "rows.jsonl.columns.yaml"
    path.write_text(text)
    if expected is None:
        read = Columns.read(path, Columns(names={"answer": "spoken"}, train_on="last"))
        names = {"prompt": "ask", "answer": "spoken"}
        assert read == Columns(names=names, roles={"hero": "assistant"}, ignore=("n",), train_on="last")
        return
    with pytest.raises(ValueError, match=re.escape(expected)) as error:
        Columns.read(path, USUAL)
    assert str(path) in str(error.value)
