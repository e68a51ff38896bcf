"""The benchmarks, as task files of lm-evaluation-harness: its prompts and its scoring, on its data or on files at hand.

From these files the harness's own command gives the same numbers:
    lm_eval run --model hf --model_args pretrained=DIR --include_path OUTPUT/tasks --tasks posttrain_arc_easy
"""

import json
import reprlib
import shutil
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import yaml

from posttrain.common.errors import first_line
from posttrain.common.files import parse_line, read_lines, write_whole

LETTERS = "ABCDE"
MODES = ("logprob", "generate")
HUB = (
    "the data cannot be loaded from the hub ({}); where it is not reachable, give files with --data DIR (DIR/arc_easy.jsonl ...), in a "
    "recipe with benchmark_data"
)
UNREAD = "[invalid]"  # what the harness's filters return for an answer in which they find no choice
# CHOICE finds the choice in an answer: "answer is C", "option C", "(c)", or "C." at the start. Where it finds none, the harness's filter
# looks for a choice's text, then for ": C". The pattern of the harness's own tasks knows "(C)" only.
# A bare A may be an article ("The answer is A dog"), so it counts only where no noun can follow. "(A) is wrong" is not the answer where one
# is stated after it.
_ENDS = r"[.:,;!)*$}\n\"']|\s*$|\s+(?:because|since|as)\b"
_STATED = r"(?i:(?:answer|choice|option)(?:\s+is|\s+would\s+be)?\s*:?\s*(?:(?:option|choice)\s+)?)(?:[*_(\"'$]|\\boxed\{)*"
_STATED_LATER = rf"[\s\S]*{_STATED}(?:[B-E]\b|A(?={_ENDS})|[a-e]\))"
CHOICE = (
    rf"{_STATED}(?:([B-E])\b|(A)(?={_ENDS})|([a-e])(?=\)))|\\boxed\{{([A-E])\}}"
    rf"|\(([A-Ea-e])\)(?!{_STATED_LATER})|^\s*[*_]*([A-E])(?=[.):,*\n]|\s*$)"
)


class Benchmark(NamedTuple):
    """Where a benchmark's task and data come from, and how it is scored."""

    source: str  # the harness's task file, in its folder of tasks
    files: tuple[str, ...]  # names that its file in --data may have, without .jsonl
    rows: Callable[[dict], dict]  # makes a row of that file, or of the hub's dataset, the harness's; KeyError where it cannot
    metric: dict[str, str]  # the headline metric of each mode that the benchmark has
    choices: Callable[[dict], tuple[str, list[str], int]] | None = None  # a harness's row -> question, choices, index of the right one
    more: dict | None = None  # settings that its task file adds to those of `source`
    fewshot: str = ""  # the name in --data of the file with few-shot examples


def _arc(row: dict) -> dict:
    """Return the harness's row of ARC for one of llm-foundry's {query, choices, gold}, or for the hub's."""
    if "answerKey" in row:
        return {name: row[name] for name in ("question", "choices", "answerKey")}
    labels = list(LETTERS[: len(row["choices"])])
    question = row["query"].removeprefix("Question: ")
    return {"question": question, "choices": {"text": row["choices"], "label": labels}, "answerKey": labels[row["gold"]]}


def _openbookqa(row: dict) -> dict:
    """Return the harness's row of OpenBookQA for one of llm-foundry's {query, choices, gold}, or for the hub's."""
    if "question_stem" in row:
        return {name: row[name] for name in ("question_stem", "choices", "answerKey")}
    made = _arc(row)
    return {"question_stem": made.pop("question"), **made}


def _labelled(question: str) -> Callable[[dict], tuple[str, list[str], int]]:
    """Return the `choices` of a Benchmark whose rows have labelled choices and an answerKey; `question` is the question's column."""
    return lambda row: (row[question], row["choices"]["text"], row["choices"]["label"].index(row["answerKey"].strip()))


def _only(*names: str) -> Callable[[dict], dict]:
    """Return the `rows` of a Benchmark whose files have the harness's columns."""
    return lambda row: {name: row[name] for name in names}


BOTH = {"logprob": "acc_norm", "generate": "exact_match"}
BENCHMARKS = {
    "openbookqa": Benchmark("openbookqa/openbookqa.yaml", ("openbookqa", "openbook_qa"), _openbookqa, BOTH, _labelled("question_stem")),
    "arc_easy": Benchmark("arc/arc_easy.yaml", ("arc_easy",), _arc, BOTH, _labelled("question")),
    "arc_challenge": Benchmark("arc/arc_challenge.yaml", ("arc_challenge",), _arc, BOTH, _labelled("question")),
    "mmlu": Benchmark(
        "mmlu/default/_default_template_yaml",
        ("mmlu",),
        _only("question", "choices", "answer", "subject"),
        {"logprob": "acc", "generate": "exact_match"},
        lambda row: (row["question"].strip(), row["choices"], row["answer"]),
        {
            "dataset_name": "all",
            "num_fewshot": 0,
            "description": "The following are multiple choice questions (with answers) about {{subject.replace('_', ' ')}}.\n\n",
        },
    ),
    "hellaswag": Benchmark(
        "hellaswag/hellaswag.yaml",
        ("hellaswag",),
        _only("ctx_a", "ctx_b", "activity_label", "endings", "label"),
        BOTH,
        lambda row: (f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()} ...", row["endings"], int(row["label"])),
    ),
    "truthfulqa": Benchmark(
        "truthfulqa/truthfulqa_mc2.yaml", ("truthfulqa",), _only("question", "mc1_targets", "mc2_targets"), {"logprob": "acc"}
    ),
    "gsm8k": Benchmark(
        "gsm8k/gsm8k.yaml", ("gsm8k", "gsm8k_test"), _only("question", "answer"), {"generate": "exact_match"}, fewshot="gsm8k_train"
    ),
    "ifeval": Benchmark(
        "ifeval/ifeval.yaml",
        ("ifeval", "ifeval_input_data"),
        _only("key", "prompt", "instruction_id_list", "kwargs"),
        {"generate": "prompt_level_strict_acc"},
    ),
}
# the types of columns that are more than choices, in whichever benchmark has them
COLUMNS = {"question": str, "answerKey": str, "question_stem": str, "subject": str, "prompt": str, "ctx_a": str, "ctx_b": str}
COLUMNS |= {"activity_label": str, "endings": list, "mc1_targets": dict, "mc2_targets": dict, "instruction_id_list": list, "kwargs": list}
# The harness checks these instructions with nltk's sentence models, which no package holds, so they may be absent.
NEED_NLTK = {"change_case:capital_word_frequency", "length_constraints:number_sentences"}


def task_name(benchmark: str, mode: str) -> str:
    """Return the name of a benchmark's task: one that has both modes has a task for each."""
    return f"posttrain_{benchmark}" + ("_generate" if mode == "generate" and BENCHMARKS[benchmark].choices else "")


def write_tasks(names: list[str], mode: str, data: Path | None, folder: Path) -> list[str]:
    """Write a task file for each benchmark, and its rows where they come from `data` (--data). Return notes for the user.

    Raises FileNotFoundError and ValueError for data that is missing or of another shape, naming what was seen and expected.
    """
    for name in names:
        if name not in BENCHMARKS or mode not in BENCHMARKS[name].metric:
            able = ", ".join(one for one, benchmark in BENCHMARKS.items() if mode in benchmark.metric)
            raise ValueError(f"there is no benchmark {name!r} by {mode}; there are {able}")
    folder.mkdir(parents=True, exist_ok=True)
    return [note for name in names for note in _write_task(name, mode, data, folder)]


def _write_task(name: str, mode: str, data: Path | None, folder: Path) -> list[str]:
    """Write the task file of one benchmark, and its rows where the harness does not load them itself. Return notes for the user."""
    benchmark, task, notes = BENCHMARKS[name], task_name(name, mode), []
    by_letter = mode == "generate" and benchmark.choices is not None
    rows = _read(name, benchmark, _find(name, benchmark.files, data)) if data else _from_hub(name, benchmark) if by_letter else None
    if rows is not None and name == "ifeval" and not _has_nltk_data():
        kept = [row for row in rows if NEED_NLTK.isdisjoint(row["instruction_id_list"])]
        notes.append(
            f"ifeval: {len(rows) - len(kept)} of {len(rows)} prompts are left out, since nltk's punkt_tab is not on this machine "
            "(python -m nltk.downloader punkt_tab)"
        )
        rows = kept
    if by_letter:
        rows, settings = [_asked(benchmark, row) for row in rows], dict(GENERATE)
    else:
        settings = {"include": str(harness() / benchmark.source), **(benchmark.more or {})}
    if rows is not None:
        path = folder / f"{task}.jsonl"
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
        files, examples = {"test": str(path.resolve())}, None
        if benchmark.fewshot:
            _read(name, benchmark, found := _find(name, (benchmark.fewshot,), data))
            files["train"], examples = str(found.resolve()), "train"
        settings |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}, "test_split": "test"}
        settings |= {"validation_split": None, "training_split": examples, "fewshot_split": examples}
    write_whole(folder / f"{task}.yaml", yaml.safe_dump(settings | {"task": task}, sort_keys=False))
    return notes


def load_tasks(folder: str, names: list[str], context: int) -> dict:
    """Load tasks of write_tasks for the harness's evaluate(), with the few-shot examples that the harness's own command draws.

    Raises ValueError for one whose answers may be longer than the `context` tokens that the model reads, or whose data is out of reach.
    """
    from datasets.exceptions import DatasetsError
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager

    try:
        with tempfile.TemporaryDirectory() as alone:  # the harness would read, and run the code that is named in, every file of `folder`
            for name in names:
                shutil.copyfile(Path(folder) / f"{name}.yaml", Path(alone) / f"{name}.yaml")
            loaded = TaskManager(include_path=alone, include_defaults=False).load(names)
    except (OSError, ValueError, DatasetsError) as error:
        if files := [str(path) for name in names if (path := Path(folder) / f"{name}.jsonl").is_file()]:
            raise ValueError(f"the harness cannot read the rows, as they stand in {', '.join(files)}: {first_line(error)}") from error
        raise ValueError(f"{_named(names)}: {HUB.format(first_line(error))}") from error
    for name in names:
        task = loaded["tasks"][name]
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(1234)  # lm_eval's default
        longest = normalize_gen_kwargs(task.get_config("generation_kwargs"))["max_gen_toks"] if task.OUTPUT_TYPE == "generate_until" else 0
        if longest >= context:
            raise ValueError(f"{_named([name])} lets a model say {longest:,} tokens; this one reads {context:,} in all: leave it out")
    return loaded


def _named(tasks: list[str]) -> str:
    """Return the benchmarks of these tasks, for a message."""
    return ", ".join(name.removeprefix("posttrain_") for name in tasks)


# The task file of every benchmark with choices in mode `generate`
GENERATE = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}\n{% for choice in choices %}({{'" + LETTERS + "'[loop.index0]}}) {{choice}}\n{% endfor %}"
    "Answer with the letter of the right choice.\nAnswer:",
    "doc_to_target": "{{'" + LETTERS + "'[answer]}}",
    "generation_kwargs": {"until": ["</s>", "<|im_end|>", "\n\n"], "do_sample": False, "temperature": 0.0, "max_gen_toks": 64},
    "filter_list": [
        {
            "name": "answer",
            "filter": [
                {"function": "multi_choice_regex", "regex_pattern": CHOICE, "ignore_case": True, "ignore_punctuation": True},
                {"function": "take_first"},
            ],
        }
    ],
    "metric_list": [
        {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True, "ignore_punctuation": True}
    ],
    "num_fewshot": 0,
    "metadata": {"version": 1.0},
}


def _asked(benchmark: Benchmark, row: dict) -> dict:
    """Return a row of GENERATE, the task that asks for a letter."""
    question, choices, right = benchmark.choices(row)
    return {"question": question, "choices": choices, "answer": right}


def _find(name: str, files: tuple[str, ...], data: Path) -> Path:
    """Return the file of --data that has one of these names: DIR/NAME.jsonl, or DIR/NAME/REST.jsonl for NAME_REST."""
    places = [data / f"{file}.jsonl" for file in files]
    places += [data / first / f"{rest}.jsonl" for first, _, rest in (file.partition("_") for file in files) if rest]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        there = "no such folder" if not data.exists() else "it is a file, and not a folder of files" if data.is_file() else ""
        there = there or ", ".join(sorted(path.name for path in data.glob("*.jsonl"))[:12])
        raise FileNotFoundError(
            f"{name}: --data {data} has none of {', '.join(place.name for place in places)} (there: {there or 'no .jsonl'})"
        )
    return found


def available(data: Path, name: str) -> bool:
    """Return whether --data has a file of the benchmark."""
    try:
        _find(name, BENCHMARKS[name].files, data)
    except FileNotFoundError:
        return False
    return True


def _read(name: str, benchmark: Benchmark, path: Path) -> list[dict]:
    """Return the benchmark's rows from a file, in the harness's form. Raises ValueError naming the file, and a line that is none."""
    rows = []
    for number, line in enumerate(read_lines(path, 2**30), 1):
        if not line.strip():
            continue
        try:
            row = benchmark.rows(parse_line(line))
            _check(benchmark, row)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            why = f"it lacks the column {error}" if isinstance(error, KeyError) else first_line(error)
            raise ValueError(
                f"{path}:{number} is not a row of {name}: {why}. Expected the columns of the dataset that {benchmark.source} of "
                "lm-evaluation-harness names, or for questions with choices {query, choices, gold}"
            ) from error
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} is empty")
    return rows


def _check(benchmark: Benchmark, row: dict) -> None:
    """Raise ValueError unless a row in the harness's form can be asked: texts where texts should be, and one of the choices is right."""
    for column, kind in (COLUMNS if benchmark.choices else COLUMNS | {"answer": str}).items():
        if column in row and not isinstance(row[column], kind):
            raise ValueError(f"{column} is {reprlib.repr(row[column])}, which should be {kind.__name__}")
    for one in (row[column] for column in ("mc1_targets", "mc2_targets") if column in row):
        if not one["choices"] or len(one["choices"]) != len(one["labels"]):
            raise ValueError(f"it has {len(one['choices'])} choices and {len(one['labels'])} labels")
    if benchmark.choices:
        question, choices, right = benchmark.choices(row)
        if not isinstance(question, str) or not all(isinstance(one, str) for one in choices):
            raise ValueError("the question or a choice is no text")
        if not isinstance(right, int) or not 0 <= right < len(choices):
            raise ValueError(f"the right choice is number {right} of {len(choices)}, counted from 0")


def _from_hub(name: str, benchmark: Benchmark) -> list[dict]:
    """Return the rows that the harness's task is measured on, from the hub."""
    import datasets
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(harness() / benchmark.source, recursive=True, resolve_func=False) | (benchmark.more or {})
    split = config.get("test_split") or config["validation_split"]
    try:
        return [benchmark.rows(row) for row in datasets.load_dataset(config["dataset_path"], config.get("dataset_name"), split=split)]
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: {HUB.format(first_line(error))}") from error


def _has_nltk_data() -> bool:
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True


def chosen_benchmarks(given: list[str], mode: str, data: Path | None) -> tuple[list[str], list[str]]:
    """Return the benchmarks asked for, in BENCHMARKS' order, and notes on what `all` leaves out.

    Raises ValueError for a benchmark that is not there, or not in this mode.
    """
    asked = [name for one in given for name in one.split(",")]
    able = [name for name, one in BENCHMARKS.items() if mode in one.metric]
    if unknown := [name for name in asked if name not in ("all", *BENCHMARKS)]:
        raise ValueError(f"there is no benchmark {unknown[0]!r}; there are all, {', '.join(BENCHMARKS)}")
    if "all" in asked:
        names = [name for name in able if data is None or available(data, name)]
        if not names:
            raise ValueError(f"--data {data} holds no benchmark for --mode {mode}: {', '.join(able)}")
        others = {f"--data {data} has no file of them": [name for name in able if name not in names]}
        others[f"they have no --mode {mode}"] = [name for name in BENCHMARKS if name not in able]
        return names, [f"all leaves out {', '.join(left)}: {why}" for why, left in others.items() if left]
    for name in asked:
        if name not in able:
            other = " or ".join(BENCHMARKS[name].metric)
            raise ValueError(f"{name} has no --mode {mode}; measure it in a command of its own with --mode {other}")
    return [name for name in able if name in asked], []


def harness() -> Path:
    """Return lm-evaluation-harness's folder of tasks, without importing it, which takes seconds."""
    return Path(find_spec("lm_eval").origin).parent / "tasks"
