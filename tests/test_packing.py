"""Packing changes nothing: values and gradients equal the untouched transformers model's, example by example."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from posttrain.data.packing import MicroBatch, RowBuilder, Segment, pack
from posttrain.data.parts import IGNORE
from posttrain.data.prepared import load_prepared
from posttrain.model.policy import fastest_policy
from posttrain.objectives.answers import answer_sums
from posttrain.operators.attention_segments import SEGMENTS, _attend_anywhere, attend_on_cpu, attend_segments, groups_of


def plain_logps(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()


def gradients(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def token_by_token(examples: list[tuple], share_prompt: bool) -> dict[str, torch.Tensor]:
    """The tensors of the micro-batch of sequences (ids, labels) and pairs (prompt, chosen, rejected), in plain Python."""
    input_ids, positions, segments, key_rows = [], [], [], []
    trained = []  # (row, target, answer, beyond)
    answers = 0

    def append(ids: list[int], first_position: int, prefix: tuple[int, int] = (0, 0)) -> int:
        start = len(input_ids)
        for place, token in enumerate(ids):
            input_ids.append(token)
            positions.append(first_position + place)
        segments.append((start, len(input_ids), *prefix))
        key_rows.extend([*range(*prefix), *range(start, len(input_ids))])
        return start

    for example in examples:
        if len(example) == 2:
            ids, labels = example
            start = append(ids, 0)
            for place in range(1, len(ids)):
                if labels[place] != IGNORE:
                    trained.append((start + place - 1, labels[place], answers, 0))
            answers += 1
            continue
        prompt, *both = example
        first = None  # row of the prompt that both answers share
        for answer in both:
            if first is None or not share_prompt:
                first = append(prompt + answer, 0)
                rows = [first + len(prompt) + place for place in range(len(answer))]
            else:
                own = append(answer, len(prompt), (first, first + len(prompt)))
                rows = [own + place for place in range(len(answer))]
            for place, token in enumerate(answer):
                predicted_by = rows[place - 1] if place else first + len(prompt) - 1
                trained.append((predicted_by, token, answers, int(place >= min(map(len, both)))))
            answers += 1
    sizes = [(end - start, end - start + prefix_end - prefix_start) for start, end, prefix_start, prefix_end in segments]
    found = {
        "input_ids": [input_ids],
        "position_ids": [positions],
        "answer_lengths": [sum(one[2] == number for one in trained) for number in range(answers)],
        "segments": segments,
    }
    found |= {name: [entry[i] for entry in trained] for i, name in enumerate(("rows", "targets", "answers", "beyond"))}
    found |= {"key_rows": key_rows if len(key_rows) > len(input_ids) else None, "lengths": [size[1] for size in sizes]}
    for i, which in enumerate("qk"):
        found[f"max_{which}"] = max(size[i] for size in sizes)
        ends = [sum(size[i] for size in sizes[:n]) for n in range(len(sizes) + 1)]
        found[f"cu_seqlens_{which}"] = torch.tensor(ends, dtype=torch.int32)
    return {name: torch.tensor(value, dtype=torch.int64) if isinstance(value, list) else value for name, value in found.items()}


SEQUENCES = [([5, 6, 7, 8], [IGNORE, IGNORE, 7, 8]), ([3, 4], [3, 4]), ([9], [9]), ([1, 2, 3], [IGNORE] * 3), ([4, 5, 6], [4, IGNORE, 6])]
PAIRS = [([1, 2, 3], [4, 5], [6, 7, 8, 9]), ([1], [2], [3]), ([1, 2], [3, 4, 5], [6])]


def assert_is(batch: MicroBatch, expected: dict) -> None:
    """Every field, with its type."""
    seen = {**batch._asdict(), **vars(batch.packing)}
    assert seen.keys() - expected.keys() == {"packing", "reference_sums"}
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert seen[name].dtype == value.dtype, name
            assert torch.equal(seen[name], value), name
        else:
            assert seen[name] == value, name


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("examples", [SEQUENCES, PAIRS, SEQUENCES + PAIRS + SEQUENCES], ids=["sequences", "pairs", "both"])
@pytest.mark.parametrize("given", [list, lambda ids: np.array(ids, np.int32)], ids=["lists", "arrays"])
def test_a_micro_batch_equals_one_made_token_by_token(examples, share_prompt, given):
    builder = RowBuilder()
    for example in examples:
        ids = map(given, example)
        builder.add_sequence(*ids) if len(example) == 2 else builder.add_pair(*ids, share_prompt)
    assert_is(builder.build(), token_by_token(examples, share_prompt))


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize(("kind", "columns"), [("sft", ("input_ids", "labels")), ("dpo", ("prompt", "chosen", "rejected"))])
def test_stored_rows_become_a_micro_batch(tiny, kind, columns, share_prompt):
    split = load_prepared(getattr(tiny, kind), kind, "", share_prompt).train
    indices = [3, 0, 11, 7, 3]
    examples = [tuple(split[index][name] for name in columns) for index in indices]
    assert_is(split.micro_batch(indices), token_by_token(examples, share_prompt))


def load(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny.base, dtype=torch.float32)


def test_a_packed_sft_batch_equals_transformers(tiny):
    split = load_prepared(tiny.sft, "sft", "").train
    indices = [3, 0, 11, 7]
    plain, packed = load(tiny), fastest_policy(load(tiny), SEGMENTS)
    expected = []
    for index in indices:
        row = split[index]
        labels = torch.tensor([row["labels"]])
        count = int((labels[:, 1:] != -100).sum())
        assert count == row["num_trained"]
        expected.append(-plain(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss * count)
    sum(expected).backward()
    batch = split.micro_batch(indices)
    logps = packed(batch)
    sums = torch.zeros(batch.num_answers).index_add(0, batch.answers, logps)
    torch.testing.assert_close(sums, torch.stack(expected).detach(), rtol=1e-5, atol=1e-5)
    logps.sum().backward()
    torch.testing.assert_close(gradients(packed), gradients(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share_prompt", [True, False])
def test_a_packed_dpo_batch_equals_transformers(tiny, share_prompt):
    split = load_prepared(tiny.dpo, "dpo", "", share_prompt).train
    indices = [5, 2, 9]
    plain, packed = load(tiny), fastest_policy(load(tiny), SEGMENTS)
    rows = [split[index] for index in indices]
    chosen = torch.stack([plain_logps(plain, row["prompt"], row["chosen"]) for row in rows])
    rejected = torch.stack([plain_logps(plain, row["prompt"], row["rejected"]) for row in rows])
    weights = torch.tensor([1.0, -2.0, 0.5])
    ((chosen - 0.3 * rejected) * weights).sum().backward()
    batch = split.micro_batch(indices)
    actual = answer_sums(packed(batch), batch).sum(1)
    torch.testing.assert_close(actual[0::2].float(), chosen.detach(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(actual[1::2].float(), rejected.detach(), rtol=1e-5, atol=1e-4)
    ((actual[0::2] - 0.3 * actual[1::2]) * weights).sum().backward()
    torch.testing.assert_close(gradients(packed), gradients(plain), rtol=1e-4, atol=1e-5)
    assert batch.input_ids.shape[1] == split.lengths[indices].sum()


def test_grouped_attention_equals_one_call_per_segment():
    """Lengths of several size classes, with and without shared prefixes, grouped query heads: values and gradients."""
    S = Segment
    segments = [S(0, 40), S(40, 45, 0, 33), S(45, 47, 0, 33), S(47, 118), S(118, 158, 47, 100), S(158, 159), S(159, 202, 158, 159)]
    torch.manual_seed(0)
    shapes = ((1, 4, 202, 8), (1, 2, 202, 8), (1, 2, 202, 8))
    query, key, value = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    query.data[0, :, 0] *= 1e5  # padding repeats the first row: its scores against others' keys must not overflow into their gradients
    expected = []
    for s in segments:
        rows = [*range(s.prefix_start, s.prefix_end), *range(s.start, s.end)]
        keys, values = (x[0, :, rows].repeat_interleave(2, dim=0) for x in (key, value))
        scores = 0.3 * query[0, :, s.start : s.end] @ keys.transpose(1, 2)
        unseen = torch.ones(s.end - s.start, len(rows)).triu(s.prefix_end - s.prefix_start + 1).bool()
        expected.append(scores.masked_fill(unseen, -torch.inf).softmax(-1) @ values)
    expected = torch.cat(expected, dim=1).transpose(0, 1)[None]
    packing = pack(segments)
    assert len(groups_of(packing.segments, query.dtype, query.device)[0]) < len(segments)
    weights = torch.randn_like(expected)
    right = torch.autograd.grad((expected * weights).sum(), (query, key, value))
    for actual in (
        attend_segments(None, query, key, value, None, 0.3, packing)[0],
        _attend_anywhere(query, key, value, packing.segments, 0.3, 0.0),
    ):
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(torch.autograd.grad((actual * weights).sum(), (query, key, value)), right)
    torch.library.opcheck(attend_on_cpu, (query, key, value, packing.segments, 0.3))


def test_one_token_answers_and_a_long_prompt():
    builder = RowBuilder()
    builder.add_pair(list(range(20)), [1], [2], share_prompt=True)
    batch = builder.build()
    assert batch.rows.tolist() == [19, 19]  # both are predicted by the prompt's last token
    assert batch.targets.tolist() == [1, 2]
    assert batch.position_ids[0].tolist() == [*range(20), 20, 20]


ODD_PAIRS = {
    "one-token answers": [(23, 1, 1)],
    "prompt longer than both": [(61, 7, 5)],
    "one token against many": [(1, 1, 37)],
    "all together": [(13, 1, 9), (61, 7, 5), (1, 37, 1), (2, 3, 3)],
}


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("sizes", ODD_PAIRS.values(), ids=ODD_PAIRS.keys())
def test_odd_pairs_equal_transformers(tiny, sizes, share_prompt):
    torch.manual_seed(0)
    plain, packed = load(tiny), fastest_policy(load(tiny), SEGMENTS)
    pairs = [[torch.randint(plain.config.vocab_size, (size,)).tolist() for size in pair] for pair in sizes]
    builder = RowBuilder()
    for pair in pairs:
        builder.add_pair(*pair, share_prompt)
    batch = builder.build()
    actual = answer_sums(packed(batch), batch).sum(1)
    expected = torch.stack([plain_logps(plain, prompt, answer) for prompt, *answers in pairs for answer in answers])
    torch.testing.assert_close(actual.float(), expected.detach(), rtol=1e-5, atol=1e-4)
    weights = torch.randn(len(expected))
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(gradients(packed), gradients(plain), rtol=1e-4, atol=1e-5)


def test_an_empty_micro_batch_has_a_gradient_of_zeros(tiny):
    policy = fastest_policy(load(tiny), SEGMENTS)
    batch = load_prepared(tiny.sft, "sft", "").train.micro_batch(np.zeros(0, np.int64))
    assert batch.num_answers == 0
    policy(batch).sum().backward()
    assert gradients(policy).abs().max() == 0
