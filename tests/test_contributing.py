"""The examples of CONTRIBUTING.md are true: applied to a copy of the tree, they keep its rules and pass the tests that they name."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import layout
import pytest
from conftest import ROOT

HOW_TO_ADD = (ROOT / "CONTRIBUTING.md").read_text().partition("## How to add")[2]
COPIED = ("posttrain", "data_prep", "ds_configs", "launch", "benchmarks", "tests")


def hunks(diff: str) -> list[tuple[str, list[str]]]:
    """(file, lines) of each hunk; a line `+++ FILE` begins a file, `@@` another hunk of it."""
    found: list[tuple[str, list[str]]] = []
    for line in diff.splitlines():
        if line.startswith("+++ "):
            found.append((line[4:], []))
        elif line == "@@":
            found.append((found[-1][0], []))
        else:
            found[-1][1].append(line)
    return found


def apply(root: Path, file: str, lines: list[str]) -> None:
    """Change a file as a hunk says; a file whose lines are all new is created. A context line may end in `...`."""
    path = root / file
    assert not any(line[:1] not in "+- " for line in lines), (file, lines)
    if all(line.startswith("+") for line in lines) and not path.exists():
        path.write_text("".join(f"{line[1:]}\n" for line in lines))
        return
    context = [re.escape(line[1:].removesuffix("...")) + (".*" if line.endswith("...") else "") for line in lines if line[0] != "+"]
    places = list(re.finditer("^" + "".join(f"({line})\n" for line in context), path.read_text(), re.M))
    assert len(places) == 1, f"{file} has {len(places)} places for this hunk of CONTRIBUTING.md: {lines}"
    (place,) = places
    kept, new = iter(place.groups()), []
    for line in lines:
        old = next(kept) if line[0] != "+" else None
        new += [] if line[0] == "-" else [line[1:] if old is None else old]
    path.write_text(place.string[: place.start()] + "".join(f"{line}\n" for line in new) + place.string[place.end() :])


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the tree with every example applied."""
    root = tmp_path_factory.mktemp("contributing")
    for name in COPIED:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, root)
    for diff in re.findall(r"^```diff\n(.*?)^```$", HOW_TO_ADD, re.M | re.S):
        for hunk in hunks(diff):
            apply(root, *hunk)
    return root


def run(tree: Path, *command: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, *command], cwd=tree, env=environment, capture_output=True, text=True, timeout=600)


CHECKS = """
import json, socket
from pathlib import Path
import torch
from transformers import AutoConfig, LlamaConfig, SmolLM3Config, SmolLM3ForCausalLM

from data_prep.shapes.conversations import conversations
from posttrain.engine.optimizer import make_optimizer
from posttrain.evaluation.tasks import load_tasks, write_tasks
from posttrain.model.policy import build_policy
from posttrain.operators import attention, saved_form
from posttrain.recipes.keys import SFTRecipe
from posttrain.recipes.reading import build_recipe
from posttrain.run.directory import Run
from posttrain.run.health import Facts

size = {"hidden_size": 32, "intermediate_size": 45, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4}
cpu, float32 = torch.device("cpu"), torch.float32
name, reason = attention.choose("auto", cpu, float32, 0.0, LlamaConfig(**size))
assert name == "posttrain_each" and float(reason.split(", ")[1].split()[0]) < 1e-5, (name, reason)
assert attention.choose("auto", cpu, float32, 0.1, LlamaConfig(**size))[0] != name

model = SmolLM3ForCausalLM(SmolLM3Config(vocab_size=99, pad_token_id=0, bos_token_id=1, eos_token_id=2, **size)).eval()
assert saved_form.widen_feed_forward(model)
build_policy(model, name, checks=True)

with socket.socket(type=socket.SOCK_DGRAM) as server:
    server.bind(("127.0.0.1", 0))
    given = {"checkpoint_path": "base", "sft_data_dir": "data", "out_dir": "run", "max_iters": 9, "global_batch_size": 8}
    changed = {"adam_epsilon": "1e-6", "statsd": f"127.0.0.1:{server.getsockname()[1]}"}
    recipe = build_recipe(SFTRecipe, given, changed)
    run = Run(recipe, 0, {})
    manifest = {"counts": {"train": 9, "validation": 0}, "tokens": {"per_epoch": 9, "trained_per_epoch": 9}}
    manifest |= {"rows": 9, "sources": ["x"], "ledger": {}, "changes": {}, "notes": []}
    run.start(1, 9, describe_model=lambda folder: None, manifest=manifest, facts=Facts(1, 9, 0, 1.0, 1.0), states={})
    run.log(3, "eval", {"loss": 0.5})
    run.close()
    assert server.recv(99) == b"eval.loss:0.5|g"
group = {"params": [torch.zeros(2, requires_grad=True)]}
assert make_optimizer([group], recipe, {}).defaults["eps"] == 1e-6
assert "adam_epsilon" not in SFTRecipe.keys_that_change("any time") and "statsd" in SFTRecipe.keys_that_change("any time")

assert [one.messages[-1]["content"] for one in conversations("sft", [{"query": "q", "reply": "a"}])] == ["a"]

Path("piqa.jsonl").write_text(json.dumps({"goal": "sit", "sol1": "on a chair", "sol2": "on a cat", "label": 0}))
for mode, task in (("logprob", "posttrain_piqa"), ("generate", "posttrain_piqa_generate")):
    write_tasks(["piqa"], mode, Path("."), Path(mode))
    (row,) = load_tasks(mode, [task], 4096)["tasks"][task].test_docs()
    assert row["label" if mode == "logprob" else "answer"] == 0
print("all checked")
"""


def test_every_section_has_an_example():
    for section in HOW_TO_ADD.split("\n### ")[1:]:
        assert len(re.findall(r"^```diff$", section, re.M)) == 1, section


@pytest.mark.slow
def test_the_examples_work_and_keep_the_rules(tree):
    assert layout.broken_rules(tree) == []
    for check in (["check"], ["format", "--check", "--diff"]):
        done = run(tree, "-m", "ruff", *check, ".")
        assert done.returncode == 0, done.stdout + done.stderr
    assert "all checked" in (done := run(tree, "-c", CHECKS)).stdout, done.stderr
    tests = ("tests/test_losses.py", "tests/test_shapes.py", "tests/test_config.py")
    done = run(tree, "-m", "pytest", "-v", "-p", "no:cacheprovider", *tests, "-m", "not slow")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "test_a_loss_equals_its_papers_equation_on_literal_numbers[squared_hinge] PASSED" in done.stdout


@pytest.mark.slow
def test_a_loss_that_was_added_is_offered_and_its_options_are_checked(tree):
    offered = run(tree, "posttrain/dpo.py", "--help")
    assert "squared_hinge" in offered.stdout, offered.stderr
    refused = run(tree, "posttrain/dpo.py", "--loss=squared_hinge", "--label_smoothing=0.1", "--out_dir=unused")
    assert "loss squared_hinge does not read label_smoothing" in refused.stderr
