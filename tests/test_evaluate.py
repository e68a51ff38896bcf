"""Benchmarks: how answers are read, what scores show, and that the numbers are lm-evaluation-harness's own."""

import asyncio
import http.server
import itertools
import json
import math
import random
import shutil
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import bases
import numpy as np
import pytest
import torch
from conftest import ROOT, launch, metrics, python, rank_environment
from scipy import stats

from posttrain.evaluation.compare import holm, majority_baseline, p_value, random_baseline, rate
from posttrain.evaluation.judge import judge
from posttrain.evaluation.measure import measure
from posttrain.evaluation.tasks import BENCHMARKS, CHOICE, chosen_benchmarks, task_name, write_tasks
from posttrain.model import assistant
from posttrain.run import report

SCRIPT = ROOT / "posttrain" / "eval_benchmarks.py"

# ---- reading answers ----

CHOICES = ["a red apple", "seven", "lead apron", "the third planet"]


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("THE ANSWER IS C", "C"),  # the system that this replaces read A
        ("(c)", "(c)"),
        ("C.", "C"),
        ("C", "C"),
        (" B) seven", "B"),
        ("The answer is (D).", "D"),
        ("Answer: B", "B"),
        ("The best answer is B because of A", "B"),
        ("I would say lead apron", "(C)"),  # by the text of the choice
        ("Lead Apron!", "(C)"),
        ("My choice: D", "(D)"),  # the filter's own last resort
        ("the third", "[invalid]"),  # as the harness reads it: neither letter nor text
        ("A dog barks", "[invalid]"),
        ("The answer is A dog", "[invalid]"),
        ("The answer is a farmer", "[invalid]"),
        ("Because", "[invalid]"),
        ("The answer is A) because", "A"),
        ("The answer is A\n(B) is wrong because it is hot", "A"),
        ("The answer is A because", "A"),
        ("The answer is **B**", "B"),
        ("B\nbecause", "B"),
        ("**B**", "B"),
        ("The answer is c) seven", "c"),
        ("The correct answer is option B.", "B"),
        ("The correct choice is B.", "B"),
        ("Option B", "B"),
        ("The answer is $B$", "B"),
        ("The answer is \\boxed{A}", "A"),
        ("So \\boxed{B}", "B"),
        ("The answer would be C", "C"),
        ("It is not (A). The answer is (B)", "B"),
        ("(A) is wrong, so the answer is (C)", "C"),
        ("(A) is right, and the answer of others is wrong", "A"),
        ("It is the option a dog takes", "[invalid]"),
        ("The answer is not A", "[invalid]"),
        ("", "[invalid]"),
    ],
)
def test_what_an_answer_is_read_as(said, read):
    from lm_eval.filters.extraction import MultiChoiceRegexFilter

    found = MultiChoiceRegexFilter(CHOICE, ignore_case=True, ignore_punctuation=True).apply([[said]], [{"choices": CHOICES}])
    assert found[0][0].strip("()").upper() == read.strip("()").upper() if read != "[invalid]" else found[0][0] == read


# ---- what scores show ----


@pytest.mark.parametrize(("hits", "n"), [(0, 20), (20, 20), (1, 500), (130, 500), (600, 2376)])
def test_intervals_of_rates(hits, n):
    found, expected = rate([1.0] * hits + [0.0] * (n - hits)), stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert (found.value, found.n) == (hits / n, n)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_intervals_of_shares():
    draw = random.Random(0)
    scores = [draw.random() for _ in range(400)]
    found, expected = rate(scores), stats.bootstrap((scores,), np.mean, method="basic", rng=0).confidence_interval
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=2e-3)


@pytest.mark.parametrize("scores", [[0.5] * 3, [0.5] * 30, [0.2, 0.2], [0.3] * 12, [1.0, 0.5, 0.5, 0.0, 1.0]])
def test_few_scores_are_never_sure(scores):
    """Scores that are all alike are not, either: three judgements that the order decided say little."""
    found = rate(scores)
    assert found.low < found.value - 0.15 and found.high > found.value + 0.15


@pytest.mark.parametrize("draw", [lambda r: float(r.random() < 0.7), lambda r: r.choice([0.0, 0.5, 1.0, 1.0]), lambda r: r.random() ** 0.5])
@pytest.mark.parametrize("n", [5, 29, 30, 200])
def test_intervals_hold_the_truth_as_often_as_they_say(draw, n):
    chance = random.Random(n)
    truth = np.mean([draw(chance) for _ in range(100_000)])
    held = sum(found.low <= truth <= found.high for found in (rate([draw(chance) for _ in range(n)]) for _ in range(1000)))
    assert held > 930


@pytest.mark.parametrize(("better", "worse", "same"), [(0, 0, 9), (1, 0, 3), (9, 1, 500), (30, 12, 1000), (5, 5, 0)])
def test_paired_tests_of_right_and_wrong(better, worse, same):
    first, second = [0.0] * better + [1.0] * worse + [1.0] * same, [1.0] * better + [0.0] * worse + [1.0] * same
    expected = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert p_value(first, second) == pytest.approx(expected) == p_value(second, first)


def test_paired_tests_of_shares():
    draw = random.Random(1)
    first = [draw.random() for _ in range(300)]
    second = [min(1.0, max(0.0, one + draw.gauss(0.03, 0.2))) for one in first]
    by_swaps = stats.permutation_test((first, second), lambda a, b: np.mean(b - a), permutation_type="samples", n_resamples=2000, rng=0)
    assert p_value(first, second) == pytest.approx(by_swaps.pvalue, abs=0.01)
    assert p_value(first, first) == 1.0
    for n in (1, 2, 3, 13):  # each item for the same one: exactly what as many coins would say
        assert p_value([0.1] * n, [0.2] * n) == pytest.approx(2 / 2**n)
    assert p_value([0.1, 0.2, 0.3], [0.15, 0.26, 0.36]) == 0.25


def test_paired_tests_are_right_as_often_as_they_say():
    """At most one in twenty comparisons of two equally good models may call them different."""
    draw, wrong = random.Random(2), 0
    for _ in range(400):
        pairs = [(float(draw.random() < 0.6), float(draw.random() < 0.6)) for _ in range(120)]
        wrong += p_value(*zip(*pairs, strict=True)) < 0.05
    assert wrong <= 0.07 * 400
    for count, n in ((100, 8), (400, 30)):
        wrong = sum(p_value([draw.random() for _ in range(n)], [draw.random() for _ in range(n)]) < 0.05 for _ in range(count))
        assert wrong <= 0.09 * count


def test_many_comparisons_need_stronger_evidence():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.04}) == {"a": 0.04} and holm({}) == {}
    draw, tables = random.Random(3), 0
    for _ in range(400):  # ten comparisons of what is equal: at most one table in twenty may claim a difference
        tables += min(holm({i: draw.random() for i in range(10)}).values()) < 0.05
    assert tables <= 0.07 * 400


def test_baselines():
    assert random_baseline([0.25, 0.25, 0.2, 1 / 3]) == pytest.approx((0.25 + 0.25 + 0.2 + 1 / 3) / 4)
    assert random_baseline([0.25, None]) is None
    assert majority_baseline([0, 1, 1, "B", 1]) == 0.6


# ---- tasks ----


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of small files in the forms of llm-foundry's gauntlet and of the hub's datasets, with invented rows."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    words = ["pa", "ke", "ti", "mo", "lu", "na", "re", "so"]

    def text(count: int) -> str:
        return " ".join(draw.choices(words, k=count))

    def write(name: str, rows: list[dict]) -> None:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows))

    def asked(count: int) -> dict:
        query = f"Question: {text(3)}\u2028{text(2)}?"
        return {"query": query, "choices": [text(2) + f" {i}" for i in range(count)], "gold": draw.randrange(count)}

    write("arc_easy", [asked(draw.choice([3, 4, 4, 5])) for _ in range(21)])
    labels = ["A", "B", "C", "D"]
    hub = [{"id": str(i), "question_stem": text(4), "choices": {"text": [text(2) for _ in labels], "label": labels}} for i in range(11)]
    write("openbook_qa", [row | {"answerKey": draw.choice(labels)} for row in hub])
    physics = {"subject": "high_school_physics", "answer": 2}
    write("mmlu", [{"question": text(6), "choices": [text(2) for _ in labels]} | physics for _ in range(9)])
    for name, count in (("gsm8k_test", 4), ("gsm8k_train", 6)):
        write(name, [{"question": text(6), "answer": f"{text(4)}\n#### {i}"} for i in range(count)])
    walking = {"activity_label": "Walking", "label": "1"}
    write("hellaswag", [{"ctx_a": text(3), "ctx_b": text(2), "endings": [text(3) for _ in labels]} | walking for _ in range(5)])
    first, second = {"choices": ["pa", "ke"], "labels": [1, 0]}, {"choices": ["pa", "ke", "ti"], "labels": [1, 1, 0]}
    write("truthfulqa", [{"question": text(3), "mc1_targets": first, "mc2_targets": second} for _ in range(4)])
    checks = [["punctuation:no_comma"], ["length_constraints:number_sentences"], ["punctuation:no_comma", "detectable_format:title"]]
    values = [[{}], [{"relation": "at least", "num_sentences": 2}], [{}, {}]]
    instructed = [{"key": i, "instruction_id_list": checks[i], "kwargs": values[i]} for i in range(3)]
    write("ifeval", [row | {"prompt": text(5)} for row in instructed])
    return folder


def run(*arguments) -> subprocess.CompletedProcess:
    return python(SCRIPT, *arguments, separate=True)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('{"query": "x"}', "arc_easy.jsonl:1 is not a row of arc_easy: it lacks the column 'choices'"),
        ("{", "arc_easy.jsonl:1 is not a row"),
        ("", "is empty"),
    ],
)
def test_a_file_of_another_shape_is_refused(tmp_path, row, says):
    (tmp_path / "arc_easy.jsonl").write_text(row)
    with pytest.raises(ValueError, match=says):
        write_tasks(["arc_easy"], "logprob", tmp_path, tmp_path / "tasks")
    with pytest.raises(FileNotFoundError, match="openbook_qa.jsonl"):
        write_tasks(["openbookqa"], "logprob", tmp_path, tmp_path / "tasks")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--checkpoint", "nowhere"], "there is no model at nowhere"),
        (["--benchmark", "arc_easy,gsm8k"], "gsm8k has no --mode logprob; measure it in a command of its own with --mode generate"),
        (["--benchmark", "arc_easy,chess"], "there is no benchmark 'chess'; there are all, openbookqa"),
        (["--max_samples", "0"], "--max_samples must be at least 1"),
        (["--batch_size", "-1"], "--batch_size must be at least 1"),
        (["--benchmark", "ifeval", "--mode", "generate"], "ifeval lets a model say 1,280 tokens; this one reads 256 in all: leave it out"),
    ],
)
def test_mistakes_end_with_one_line(tiny, data, tmp_path, arguments, says):
    given = {"--checkpoint": tiny.base, "--benchmark": "arc_easy"} | dict(zip(arguments[::2], arguments[1::2], strict=True))
    done = run(*(part for pair in given.items() for part in pair), "--data", data, "--output", tmp_path / "out")
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_every_benchmark_in_both_modes(tiny, data, tmp_path):
    """Each item is there once, with its prompt, and its score is the harness's."""
    loaded = assistant.load(tiny.base, dtype=torch.float32)
    loaded.model.config.max_position_embeddings = 4096
    loaded = loaded._replace(context=4096)
    loaded.model.generation_config.max_new_tokens = 512  # as finished runs have it; the task's limit counts
    counts = {"openbookqa": 11, "arc_easy": 21, "mmlu": 9, "hellaswag": 5, "truthfulqa": 4, "gsm8k": 4, "ifeval": 3}
    for mode in ("logprob", "generate"):
        names = [name for name in counts if mode in BENCHMARKS[name].metric]
        notes = write_tasks(names, mode, data, tmp_path / mode)
        settings = {"mode": mode, "tasks": tmp_path / mode, "max_samples": None, "batch_size": 8, "chat": False}
        found = measure(loaded, names, **settings, rank=0, ranks=1)
        left = sum("left out" in note for note in notes)
        for name in names:
            assert [item.number for item in found[name]] == list(range(counts[name] - (left if name == "ifeval" else 0)))
            assert all(math.isfinite(item.score) and item.prompt for item in found[name])
        if mode == "logprob":
            assert {item.chance for item in found["arc_easy"]} == {1 / 3, 1 / 4, 1 / 5}
            assert {item.chance for item in found["truthfulqa"]} == {2 / 3}
            assert "questions (with answers) about high school physics.\n\n" in found["mmlu"][0].prompt
            for item in found["openbookqa"]:
                best = max(range(4), key=lambda i, item=item: item.answer[i][0])
                assert item.scores["acc"] == float(best == item.target)
        else:
            assert found["gsm8k"][0].prompt.count("Question:") == 6  # five examples, the same however items are dealt
            shares = [measure(loaded, ["gsm8k"], **settings, rank=rank, ranks=3)["gsm8k"] for rank in range(3)]
            assert sorted(itertools.chain.from_iterable(shares)) == found["gsm8k"]
            assert found["gsm8k"][0].prompt.split("Question:")[1] != found["gsm8k"][1].prompt.split("Question:")[1]
            said = [len(loaded.tokenizer(item.answer[0], add_special_tokens=False)["input_ids"]) for item in found["arc_easy"]]
            assert 40 < max(said) < 100
            assert found["arc_easy"][0].prompt.endswith("Answer with the letter of the right choice.\nAnswer:")


@pytest.mark.slow
def test_two_ranks_one_rank_and_lm_eval_say_the_same(tiny, data, tmp_path):
    options = ("--benchmark", "arc_easy,mmlu", "--data", data, "--max_samples", "17")
    checkpoints = ("--checkpoint", f"one={tiny.base}", "--checkpoint", f"two={tiny.base}")
    done = launch("posttrain/eval_benchmarks.py", *checkpoints, *options, "--output", tmp_path / "two")
    assert done.returncode == 0, done.stdout
    assert "not distinguishable (p = 1)" in done.stdout and "| arc_easy (acc_norm) | 17 |" in done.stdout
    command = [sys.executable, SCRIPT, *checkpoints, *options, "--output", tmp_path / "one"]  # anew: bars are chosen as tqdm is imported
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=rank_environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    assert "%|" not in done.stderr  # no bars in a file
    again = run("--checkpoint", tiny.base, *options, "--output", tmp_path / "one")
    assert again.returncode == 2 and "one holds an earlier command's results (results.json)" in again.stderr
    assert (tmp_path / "one" / "results.json").read_text() == (tmp_path / "two" / "results.json").read_text()
    written = {"results.json", "results.md", "results.png", "details.json", "items", "tasks"}
    assert {path.name for path in (tmp_path / "one").iterdir()} == written

    def items(folder) -> list[dict]:
        return [json.loads(line) for line in (folder / "items" / "one_posttrain_arc_easy.jsonl").open()]

    ours = items(tmp_path / "one")
    assert [item["number"] for item in items(tmp_path / "two")] == [item["number"] for item in ours] == list(range(17))
    hand = [Path(find_spec("lm_eval").origin).with_name("__main__.py"), "run", "--model", "hf", "--device", "cpu"]
    hand += ["--output_path", tmp_path / "hand", "--log_samples"]
    hand += ["--model_args", f"pretrained={tiny.base},dtype=float32", "--limit", "17"]
    hand += ["--tasks", task_name("arc_easy", "logprob"), "--include_path", tmp_path / "one" / "tasks"]
    done = python(*hand, separate=True)
    assert done.returncode == 0, done.stderr
    theirs = sorted(map(json.loads, next((tmp_path / "hand").rglob("samples*.jsonl")).open()), key=lambda row: row["doc_id"])
    for item, row in zip(ours, theirs, strict=True):
        assert [one[0] for one in item["answer"]] == pytest.approx([float(one[0]) for one in row["filtered_resps"]], rel=1e-6)
        assert item["scores"] == {"acc": row["acc"], "acc_norm": row["acc_norm"]}
        assert item["prompt"] == row["arguments"]["gen_args_0"]["arg_0"]


def test_all_says_what_it_leaves_out(tmp_path):
    (tmp_path / "gsm8k_test.jsonl").touch()
    (tmp_path / "arc_easy.jsonl").touch()
    names, notes = chosen_benchmarks(["all"], "generate", tmp_path)
    assert names == ["arc_easy", "gsm8k"]
    assert notes == [
        f"all leaves out openbookqa, arc_challenge, mmlu, hellaswag, ifeval: --data {tmp_path} has no file of them",
        "all leaves out truthfulqa: they have no --mode generate",
    ]
    assert chosen_benchmarks(["gsm8k,arc_easy"], "generate", None) == (["arc_easy", "gsm8k"], [])


@pytest.mark.slow
def test_a_hub_that_is_out_of_reach_is_said_before_a_model_is_read(tiny, tmp_path):
    shutil.copytree(tiny.base, tmp_path / "model")
    bases.edit(tmp_path / "model", {"model_type": "unheard_of"})  # it could not be read
    command = [sys.executable, SCRIPT, "--checkpoint", tmp_path / "model", "--benchmark", "arc_easy", "--output", tmp_path / "out"]
    environment = rank_environment() | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 2 and "arc_easy: the data cannot be loaded from the hub" in done.stderr and "--data DIR" in done.stderr


RULES = {
    "longer": lambda a, b: "A" if len(a) > len(b) else "B" if len(b) > len(a) else "C",
    "first": lambda a, b: "A",
    "silent": lambda a, b: None,
    "strange": lambda a, b: "no JSON",
    "strict": lambda a, b: "C",
}


@pytest.fixture
def judging():
    """An OpenAI-compatible endpoint whose models judge by RULES; every third request is refused once, as a busy server would."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            busy = len(asked) % 3 == 0
            refused = body["model"] == "strict" and "forbidden" in body["messages"][0]["content"]
            text = body["messages"][0]["content"]
            first, second = text.split("[Answer A]\n")[1].split("\n\n[Answer B]\n")
            said = RULES[body["model"]](first, second.split("\n\nGive a short reason.")[0])
            answer = f"Not [[B]] at once. [[{said}]]" if said else "I cannot say."
            whole = json.dumps({"choices": [{"message": {"role": "assistant", "content": answer}}]})
            content = (said if body["model"] == "strange" else whole).encode()
            self.send_response(429 if busy else 400 if refused else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


@pytest.mark.slow
def test_a_judge_is_asked_in_both_orders(judging):
    rows = [("p", "long answer", "short"), ("p", "short", "long answer"), ("p", "same", "same")]
    found, refusals = asyncio.run(judge(judging, "longer", None, rows))
    assert [one.score for one in found] == [1.0, 0.0, 0.5] and not any(one.depends_on_order for one in found)
    assert refusals == []
    found, _ = asyncio.run(judge(judging, "first", None, rows))
    assert [one.score for one in found] == [0.5] * 3 and all(one.depends_on_order for one in found)
    found, _ = asyncio.run(judge(judging, "silent", None, rows[:1]))
    assert found[0].score is None
    with pytest.raises(ValueError, match="cannot be used: it answered with no chat completion but 'no JSON'"):
        asyncio.run(judge(judging, "strange", None, rows[:1]))


@pytest.mark.slow
def test_a_question_that_the_judge_refuses_costs_no_other(judging):
    found, refusals = asyncio.run(judge(judging, "strict", None, [("p", "a", "b"), ("forbidden", "a", "b"), ("p", "b", "a")]))
    assert [one.score for one in found] == [0.5, None, 0.5] and len(refusals) == 2 and refusals[0].startswith("status 400")
    with pytest.raises(ValueError, match="cannot be used: status 400"):
        asyncio.run(judge(judging, "strict", None, [("forbidden", "a", "b")]))


def test_a_judge_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr("posttrain.evaluation.judge.TRIES", 1)
    with pytest.raises(ValueError, match="the judge at http://127.0.0.1:9/v1/ cannot be used: ConnectError"):
        asyncio.run(judge("http://127.0.0.1:9/v1", "m", None, [("p", "a", "b")]))


@pytest.mark.slow
def test_win_rate(tiny, judging, tmp_path):
    (tmp_path / "prompts").write_text("say 1 pa\n\nrepeat 2 ke\nsay 3\n")
    script = ROOT / "posttrain" / "eval_preferences.py"
    options = ["--checkpoint", f"a={tiny.base}", "--checkpoint", f"b={tiny.base}", "--prompts", tmp_path / "prompts", "--max_tokens", "12"]
    command = [script, *options, "--judge", judging, "--output", tmp_path / "out", "--judge_model"]

    def win_rate(rule: str) -> subprocess.CompletedProcess:
        return python(*command, rule, separate=True)

    done = win_rate("longer")
    assert done.returncode == 0, done.stderr
    assert "a wins against b: 50.0 %" in done.stdout and "not distinguishable from even" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "out" / "win_rate.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["say 1 pa", "repeat 2 ke", "say 3"] and all(row["a"] == row["b"] for row in rows)
    done = win_rate("longer")
    assert done.returncode == 2 and "holds an earlier command's results (win_rate.json)" in done.stderr
    (tmp_path / "out" / "win_rate.json").unlink()
    done = win_rate("silent")
    assert done.returncode == 2 and "silent gave no verdict that could be read" in done.stderr
    done = win_rate("strange")  # before anything is generated
    assert done.returncode == 2 and "cannot be used: it answered with no chat completion" in done.stderr and not done.stdout


@pytest.mark.slow
def test_benchmarks_during_training_are_those_of_its_result(tiny, data, tmp_path):
    """What two ranks measured last, at ZeRO-3 and in packed rows, is what eval_benchmarks.py measures of final/."""
    long = shutil.copytree(tiny.base, tmp_path / "long")  # it has room for five examples and an answer
    config = json.loads((long / "config.json").read_text())
    (long / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    paths = [f"--checkpoint_path={long}", f"--sft_data_dir={tiny.sft}", f"--out_dir={tmp_path}/run", "--dtype=float32"]
    numbers = ["--max_iters=4", "--global_batch_size=8", "--learning_rate=1e-2", "--warmup_iters=1", "--max_tokens_per_gpu=400"]
    asked = ["--eval_interval=3", "--benchmarks=arc_easy, mmlu, gsm8k", "--benchmark_interval=2", "--benchmark_samples=9"]
    asked += [f"--benchmark_data={data}"]
    done = launch("posttrain/sft.py", *paths, *numbers, *asked, "--ds_config=ds_configs/zero3.json")
    assert done.returncode == 0, done.stdout
    seen = metrics(tmp_path / "run", "eval")
    assert [record["step"] for record in seen] == [0, 2, 3, 4]
    both = [("loss" in record, "benchmark/mmlu" in record) for record in seen]
    assert both == [(True, True), (False, True), (True, False), (True, True)]
    for mode, names in (("logprob", ("arc_easy", "mmlu")), ("generate", ("gsm8k",))):
        options = [word for name in names for word in ("--benchmark", name)]
        options += ["--mode", mode, "--data", data, "--max_samples", "9", "--chat", "on", "--output", tmp_path / mode]
        done = run("--checkpoint", tmp_path / "run", *options)
        assert done.returncode == 0, done.stderr
        found = json.loads((tmp_path / mode / "results.json").read_text())["run"]
        assert {name: one["value"] for name, one in found.items()} == pytest.approx({name: seen[-1][f"benchmark/{name}"] for name in names})
        for name in names:
            files = (
                tmp_path / "run" / "benchmarks" / f"latest_{name}.jsonl",
                tmp_path / mode / "items" / f"run_{task_name(name, mode)}.jsonl",
            )
            ours, theirs = ([json.loads(line) for line in file.open()] for file in files)
            for one, other in zip(ours, theirs, strict=True):
                if mode == "logprob":
                    logps = [[logp for logp, _ in item.pop("answer")] for item in (one, other)]
                    assert logps[0] == pytest.approx(logps[1], rel=1e-4)
                assert one == other
    names = [name for name, _ in report.figures(report.read_runs([tmp_path / "run"]))]
    assert [name for name in names if name.startswith("benchmark")] == ["benchmark_arc_easy", "benchmark_gsm8k", "benchmark_mmlu"]
    done = launch("posttrain/sft.py", *paths[:2], f"--out_dir={tmp_path}/other", *numbers, "--eval_interval=2", "--benchmarks=chess")
    assert done.returncode != 0 and "benchmarks: there is no 'chess'; there are openbookqa" in done.stdout


@pytest.mark.slow
def test_a_model_that_knows_nothing_scores_what_guessing_does(shared_data, tmp_path):
    seed = shared_data / "seed_checkpoint"
    options = ("--tokenizer", seed / "tok512.model", "--data", shared_data / "eval_gauntlet", "--max_samples", "400", "--output", tmp_path)
    done = run("--checkpoint", seed / "gqa_tied.pt", "--benchmark", "all", *options)
    assert done.returncode == 0, done.stderr
    assert "note: all leaves out mmlu, hellaswag, truthfulqa: --data " in done.stdout
    found = json.loads((tmp_path / "results.json").read_text())["gqa_tied"]
    assert set(found) == {"openbookqa", "arc_easy", "arc_challenge"}
    for one in found.values():
        assert one["n"] == 400 and 0.15 < one["value"] < 0.35
