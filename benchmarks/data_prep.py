"""Time and memory of data preparation on one file: posttrain's, the bare tokenizer, TRL's, and LLaMA-Factory's method.

    python benchmarks/data_prep.py --tokenizer FOLDER [--rows 50000] [--short_rows 1000000] [--sections encode,ours,trl,llamafactory]

The files are generated: conversations of one to three exchanges of random words, about 290 tokens a row, and many rows of one short
exchange, about 45 tokens (the first four of the sections). Every section runs in a process of its own; its time excludes starting Python
and importing packages. Its memory is the largest resident size of the process and of one of its children, its CPU time that of the
process and of all its children. `serial_share` is what the times of one and of all processes leave for the part that only one does, by
Amdahl's law, of the time of one. The others are compared with `encode`: the tokenizer's own encode_batch over the same rows as ChatML
text, in chunks, without keeping anything.
"""

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this script's folder, where it would shadow the package data_prep
PROCESSES = len(os.sched_getaffinity(0))
USERS = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
OF_SHORT = ("encode", "ours", "one_worker", "trl")
SECTIONS = (*OF_SHORT, "plain", "near", "decontaminate", "llamafactory")


def write_rows(path: Path, rows: int, short: bool) -> None:
    """Write so many conversations; `short` ones have one exchange of a few words."""
    draw = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(draw.choice(letters) for _ in range(draw.randint(2, 9))) for _ in range(8000)]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            messages = []
            for _ in range(1 if short else draw.randint(1, 3)):
                for role, most in (("user", 6), ("assistant", 6)) if short else (("user", 40), ("assistant", 90)):
                    messages.append({"role": role, "content": " ".join(draw.choices(words, k=draw.randint(5, most))).capitalize() + "."})
            file.write(json.dumps({"messages": messages}) + "\n")


def encode(source: str, tokenizer: str, out: str) -> float:
    """Encode all rows with the bare tokenizer."""
    from posttrain.data.tokenization import load_tokenizer

    backend = load_tokenizer(tokenizer).backend_tokenizer
    texts = []
    with open(source, encoding="utf-8") as file:
        for line in file:
            turns = (f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in json.loads(line)["messages"])
            texts.append("".join(turns))
    started = time.perf_counter()
    for start in range(0, len(texts), 2000):
        backend.encode_batch(texts[start : start + 2000], add_special_tokens=False)
    return time.perf_counter() - started


def ours(source: str, tokenizer: str, out: str, name: str = "ours", *more: str) -> float:
    from data_prep.prepare import prepare

    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    started = time.perf_counter()
    prepare("sft", ["--source", source, "--tokenizer", tokenizer, "--output_dir", f"{out}/{name}", *more])
    return time.perf_counter() - started


def one_worker(source: str, tokenizer: str, out: str) -> float:
    """Prepare with posttrain, in one process."""
    return ours(source, tokenizer, out, "one_worker", "--workers", "1")


def plain(source: str, tokenizer: str, out: str) -> float:
    """Prepare with posttrain where fastokens is not installed."""
    from posttrain.data import faster

    faster.fastokens = None
    return ours(source, tokenizer, out, "plain")


def near(source: str, tokenizer: str, out: str) -> float:
    """Prepare with posttrain, and search for near copies."""
    return ours(source, tokenizer, out, "near", "--duplicates", "near")


def decontaminate(source: str, tokenizer: str, out: str) -> float:
    """Prepare with posttrain, and compare with a generated benchmark of 1000 rows."""
    write_rows(Path(out) / "benchmark.jsonl", 1000, short=False)
    return ours(source, tokenizer, out, "decontaminate", "--decontaminate", f"{out}/benchmark.jsonl", "--max_dropped", "1")


def trl(source: str, tokenizer: str, out: str) -> float:
    """Let SFTTrainer prepare conversations, with the loss on answers only, until the trainer is constructed."""
    import datasets
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from trl import SFTConfig, SFTTrainer

    from posttrain.data.chat import ChatFormat
    from posttrain.data.tokenization import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    # TRL finds answers by {% generation %} marks in the template
    loaded.chat_template = ChatFormat(loaded).jinja.replace(
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}",
        "{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}",
    )
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(loaded), head_dim=8, **shape))
    config = SFTConfig(f"{out}/trl", max_length=2048, assistant_only_loss=True, dataset_num_proc=PROCESSES, report_to=[], use_cpu=True)
    started = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=source, split="train", cache_dir=f"{out}/trl_cache")
    SFTTrainer(model, args=config, train_dataset=rows, processing_class=loaded)
    return time.perf_counter() - started


def llamafactory(source: str, tokenizer: str, out: str) -> float:
    """Prepare as LLaMA-Factory 0.9 does: Dataset.map over batches of 1000 rows, each turn encoded by itself, labels joined."""
    import datasets

    from posttrain.data.tokenization import load_tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    loaded = load_tokenizer(tokenizer)

    def supervised(batch: dict) -> dict:
        columns = {"input_ids": [], "attention_mask": [], "labels": []}
        for messages in batch["messages"]:
            ids, labels = [], []
            for asked, answered in zip(messages[::2], messages[1::2], strict=True):
                prompt = loaded.encode(f"<|im_start|>user\n{asked['content']}<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
                answer = loaded.encode(f"{answered['content']}<|im_end|>\n", add_special_tokens=False)
                ids += prompt + answer
                labels += [-100] * len(prompt) + answer
            columns["input_ids"].append(ids)
            columns["attention_mask"].append([1] * len(ids))
            columns["labels"].append(labels)
        return columns

    started = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=source, split="train", cache_dir=f"{out}/llamafactory_cache")
    rows = rows.map(supervised, batched=True, batch_size=1000, num_proc=PROCESSES, remove_columns=rows.column_names)
    rows.save_to_disk(f"{out}/llamafactory")
    return time.perf_counter() - started


def measure(section: str, source: str, tokenizer: str, out: str) -> dict:
    """Run one section in a process of its own, and return its result."""
    command = [sys.executable, __file__, "--section", section, "--source", source, "--tokenizer", tokenizer, "--scratch", out]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        return {"failed": finished.stderr.strip().splitlines()[-1]}
    return json.loads(finished.stdout.splitlines()[-1])


def measure_all(rows: int, short: bool, sections: list[str], tokenizer: str) -> dict:
    """Run some sections on a generated file, and return their results."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "rows.jsonl"
        write_rows(source, rows, short)
        found = {name: measure(name, str(source), tokenizer, scratch) for name in sections}
        manifest = json.loads((Path(scratch) / "ours" / "manifest.json").read_text(encoding="utf-8"))
    yardstick = found.get("encode", {}).get("seconds")
    for section in found.values():
        if yardstick and "seconds" in section:
            section["times_encode_batch"] = round(section["seconds"] / yardstick, 2)
    both = [found.get(name, {}).get("seconds") for name in ("ours", "one_worker")]
    if all(both) and PROCESSES > 1:
        found["ours"]["serial_share"] = round((PROCESSES * both[0] / both[1] - 1) / (PROCESSES - 1), 3)
    return {"rows": rows, "tokens": manifest["tokens"]["per_epoch"], "encoder": manifest["encoder"], "sections": found}


def installed(name: str) -> str | None:
    """The version of a package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--short_rows", type=int, default=1_000_000)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "data_prep.json"))
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--source", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.section:
        before = [used.ru_utime + used.ru_stime for used in map(resource.getrusage, USERS)]
        seconds = globals()[options.section](options.source, options.tokenizer, options.scratch)
        after = list(map(resource.getrusage, USERS))
        cpu = [used.ru_utime + used.ru_stime - begun for used, begun in zip(after, before, strict=True)]
        sizes = [round(used.ru_maxrss / 2**20, 2) for used in after]
        print(json.dumps({"seconds": round(seconds, 2), "cpu_seconds": [round(one, 2) for one in cpu], "peak_gib": sizes}))
        return
    sections = options.sections.split(",")
    result = {
        "tokenizer": Path(options.tokenizer).name,
        "machine": f"{PROCESSES} cores, {platform.machine()}",
        "versions": {name: installed(name) for name in ("tokenizers", "fastokens", "transformers", "datasets", "trl")},
        "conversations": measure_all(options.rows, False, sections, options.tokenizer),
        "short rows": measure_all(options.short_rows, True, [name for name in sections if name in OF_SHORT], options.tokenizer),
    }
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
