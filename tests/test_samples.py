"""Answers to fixed prompts in a run: right, in any layout, kept and shown."""

import json

import pytest
import torch
from conftest import launch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_runs import sft_arguments
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow
PROMPTS = [[3, 40, 41, 42], [77, 5], [9, 8, 7, 6, 5, 4, 3, 2, 10], [100], [200, 201, 202]]
MOST = 12


@pytest.fixture(scope="module")
def expected(tiny) -> tuple[int, list]:
    """A stop token, which the first answer reaches, and the answers up to it by transformers' own generation, one prompt at a time."""
    model, answers = AutoModelForCausalLM.from_pretrained(tiny.base, dtype=torch.float32), []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        length = {"max_new_tokens": MOST, "min_new_tokens": MOST}
        made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, eos_token_id=None, **length)
        answers.append(made[0, len(prompt) :].tolist())
    stop = answers[0][3]
    return stop, [answer[: answer.index(stop) + 1] if stop in answer else answer for answer in answers]


def test_answers_are_those_of_transformers_in_every_layout(tiny, tmp_path, expected):
    stop, expected = expected
    (tmp_path / "asked.json").write_text(json.dumps([PROMPTS, MOST, [stop]]))
    done = launch("tests/sampled.py", tiny.folder, tmp_path / "answers.json", tmp_path / "asked.json")
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "answers.json").read_text())
    assert len({answer[-1] == stop for answer in expected}) == 2  # both are tried
    losses = [value for name, value in found.items() if name.endswith("loss")]
    assert max(losses) - min(losses) < 1e-5
    for name, answers in found.items():
        if not name.endswith("loss"):
            assert answers == expected[: len(answers)], name


def test_a_run_keeps_and_shows_them(tiny, tmp_path):
    asked = ["repeat\u20285\x85ka", "say 7 to lu"]  # what str.splitlines calls ends of lines are none
    (tmp_path / "prompts.txt").write_text("\n\n".join([*asked, "say 8"]))
    more = ["--samples=2", f"--sample_prompts={tmp_path}/prompts.txt", "--sample_tokens=5"]
    done = launch("posttrain/sft.py", *sft_arguments(tiny, tmp_path / "run", *more))
    assert done.returncode == 0, done.stdout
    records = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").open()]
    assert [record["step"] for record in records] == [0, 3, 6]
    for record in records:
        assert [sample["prompt"] for sample in record["samples"]] == asked
        assert all(0 <= sample["tokens"] <= 5 for sample in record["samples"])
    events = EventAccumulator(str(tmp_path / "run"), {"tensors": 0}).Reload()
    shown = events.Tensors("samples/2/text_summary")
    assert [event.step for event in shown] == [0, 3, 6]
    assert b"| prompt | before | now |" in shown[-1].tensor_proto.string_val[0]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    means = [json.loads(line)["sample_tokens"] for line in lines if '"eval"' in line]
    assert means == [sum(sample["tokens"] for sample in record["samples"]) / 2 for record in records]


@pytest.mark.parametrize(
    ("content", "expected"), [(None, "there is no file"), ("\n \n", "holds no prompt; expected one per line")], ids=["missing", "empty"]
)
def test_a_file_of_prompts_that_is_none_gets_one_message(tiny, tmp_path, content, expected):
    if content is not None:
        (tmp_path / "prompts.txt").write_text(content)
    arguments = sft_arguments(tiny, tmp_path / "run", f"--sample_prompts={tmp_path}/prompts.txt")
    done = launch("posttrain/sft.py", *arguments, ranks=1)
    assert done.returncode != 0
    assert expected in done.stdout
    assert "Traceback" not in done.stdout
