"""Faults planted in real two-rank runs: each stops the run before its first step with its cause, or is kept out of the weights."""

import json
import re
import shutil

import numpy as np
import pytest
import safetensors.torch
from conftest import last_of_each, launch, metrics, rank_environment
from test_runs import sft_arguments
from test_templates import LLAMA, byte_level
from transformers import LlamaConfig, LlamaForCausalLM

from data_prep.prepare import prepare
from posttrain.data import batches
from posttrain.data.prepared import load_prepared
from posttrain.recipes.keys import SFTRecipe
from posttrain.training.inputs import CODE, PACKAGES, hashes_of_code

pytestmark = pytest.mark.slow


def dpo_arguments(tiny, out_dir, *more: str) -> list[str]:
    paths = [f"--sft_checkpoint_path={tiny.base}", f"--dpo_data_dir={tiny.dpo}", f"--out_dir={out_dir}", "--max_iters=2"]
    numbers = ["--global_batch_size=8", "--learning_rate=1e-3", "--warmup_iters=0", "--min_lr=0", "--dtype=float32", "--eval_interval=0"]
    return [*paths, *numbers, *more]


def run(fault: str, script: str, *arguments: str, plant: str = "") -> tuple[bool, str]:
    """Whether the run ended well, and what it printed."""
    done = launch("tests/planted.py", fault, script, *arguments, env=rank_environment() | {"PLANT": plant})
    return done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """Beside the tiny world: a checkpoint and data that differ from it a little, and a model that was taught another template."""
    folder = tmp_path_factory.mktemp("planted")
    shutil.copytree(tiny.base, folder / "other_base")
    tensors = safetensors.torch.load_file(folder / "other_base" / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] += 0.01
    safetensors.torch.save_file(tensors, folder / "other_base" / "model.safetensors", metadata={"format": "pt"})
    for kind, changed in (("sft", "output"), ("dpo", "chosen")):
        rows = [json.loads(line) for line in (tiny.folder / f"{kind}.jsonl").read_text().splitlines()]
        rows[7][changed] = " ".join(reversed(rows[7][changed].split())) + " na"
        (folder / f"{kind}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        source = ["--source", f"{folder}/{kind}.jsonl", "--output_dir", f"{folder}/other_{kind}"]
        prepare(kind, [*source, "--tokenizer", tiny.base, "--val_size", "7"])
    shutil.copytree(tiny.dpo, folder / "dpo", ignore=shutil.ignore_patterns("reference"))

    tokenizer = byte_level(nfc=False)
    tokenizer.chat_template = LLAMA
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    rows = [{"prompt": f"hello {number}", "chosen": "the quick fox", "rejected": "brown"} for number in range(20)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare("dpo", ["--source", f"{folder}/rows.jsonl", "--tokenizer", f"{folder}/llama", "--output_dir", f"{folder}/chatml"])
    return folder


def llama_arguments(world, out_dir) -> list[str]:
    paths = [f"--sft_checkpoint_path={world}/llama", f"--dpo_data_dir={world}/chatml", f"--out_dir={out_dir}"]
    return [*paths, "--max_iters=1", "--global_batch_size=4", "--dtype=float32", "--warmup_iters=0", "--eval_interval=0"]


def test_a_planted_fault_ends_all_ranks_with_one_message(tiny, world, tmp_path):
    arguments = dpo_arguments(tiny, tmp_path / "run")
    ended_well, output = run("reference_of_another_checkpoint", "dpo", *arguments, plant=f"{world}/other_base")
    assert not ended_well
    assert output.count("error: the reference is another model than the policy starts from: 1 of") == 1
    assert "first model.layers.1.mlp.down_proj.weight" in output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


FAULTS = {
    "reference_of_another_checkpoint": "the reference is another model than the policy starts from: 1 of",
    "one_rank_with_other_data": "code, recipe or prepared data: 1 of {parts} parts differ, first data: manifest and lengths",
    "one_rank_with_another_token": "code, recipe or prepared data: 1 of {parts} parts differ, first data: tokens",
    "one_rank_with_another_recipe": "code, recipe or prepared data: 1 of {parts} parts differ, first recipe: learning_rate",
    "one_rank_with_other_pairs_precomputed": "ranks [1] differ from rank 0 in their code, recipe or prepared data",
    "dropout_left_on": "although the recipe says dropout 0: it is on in 1 modules, first model.layers.0.self_attn",
    "dropout_left_on_in_dpo": "although the recipe says dropout 0: it is on in 1 modules, first model.layers.0.self_attn",
    "a_loss_that_is_off": "a pair's loss differs by 0.05 from 0.693147, its value where policy and reference agree",
    "a_reference_that_computes_otherwise": "differ by 0.0001 (relative; limit 1e-06): the weights are the same, so its engine",
    "weights_that_are_nan": "the Qwen3ForCausalLM gives log-probs that are not finite: its weights are damaged",
    "data_of_another_template": "was prepared with another template than",
}


@pytest.fixture(scope="module")
def stopped(tiny, world):
    """{fault: message} of all FAULTS, in one launch."""
    sft, dpo, out = sft_arguments(tiny, world / "run"), dpo_arguments(tiny, world / "run"), world / "run"
    precomputed = dpo_arguments(tiny, out, f"--dpo_data_dir={world}/dpo", "--reference=precompute")
    jobs = {fault: [fault, "", "sft", sft] for fault in FAULTS}
    for fault in ("a_loss_that_is_off", "a_reference_that_computes_otherwise", "weights_that_are_nan"):
        jobs[fault] = [fault, "", "dpo", dpo]
    jobs["reference_of_another_checkpoint"] = ["reference_of_another_checkpoint", f"{world}/other_base", "dpo", dpo]
    jobs["one_rank_with_other_data"] = ["one_rank_with_other_data", f"{world}/other_sft", "sft", sft]
    jobs["one_rank_with_other_pairs_precomputed"] = ["one_rank_with_other_data", f"{world}/other_dpo", "dpo", precomputed]
    jobs["dropout_left_on_in_dpo"] = ["dropout_left_on", "", "dpo", dpo]
    jobs["data_of_another_template"] = ["none", "", "dpo", llama_arguments(world, out)]
    (world / "jobs.json").write_text(json.dumps(list(jobs.values())))
    done = launch("tests/planted.py", world / "jobs.json")
    assert done.returncode == 0, done.stdout
    return dict(zip(jobs, json.loads((world / "jobs.json.out").read_text()), strict=True))


def test_code_that_differs_in_any_folder_is_another(tmp_path):
    shutil.copytree(CODE, tmp_path / "posttrain", ignore=shutil.ignore_patterns("__pycache__"))
    before = hashes_of_code(tmp_path / "posttrain")
    assert before == hashes_of_code(CODE)
    folders = {path.parent for path in (tmp_path / "posttrain").rglob("*.py")}
    assert len(folders) == 15
    for folder in folders:
        changed = max(folder.glob("*.py"))
        changed.write_text(changed.read_text() + "\n")
        now = hashes_of_code(tmp_path / "posttrain")
        assert {name for name in now if now[name] != before[name]} == {str(changed.relative_to(tmp_path / "posttrain"))}
        before = now


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named_before_the_first_step(stopped, world, fault):
    parts = len(list(CODE.rglob("*.py"))) + len(PACKAGES) + len(SFTRecipe.model_fields) + 4  # plan version, ds_config, manifest, tokens
    assert FAULTS[fault].replace("{parts}", str(parts)) in stopped[fault]
    assert not (world / "run").exists()  # no step was made
    if fault == "one_rank_with_other_pairs_precomputed":
        assert not (world / "dpo" / "reference").exists()  # nor a wrong log-prob kept
    if fault == "data_of_another_template":
        assert "<|im_start|>user" in stopped[fault]
        assert "<|start_header_id|>user" in stopped[fault]


def test_weights_that_are_not_finite_take_the_place_of_no_checkpoint(tiny, tmp_path):
    out = tmp_path / "run"
    ended_well, output = run("a_weight_becomes_nan", "sft", *sft_arguments(tiny, out), "--save_interval=1", "--keep_checkpoints=1")
    assert not ended_well
    assert output.count("error: after step 2 the weights hold numbers that are not finite, so nothing is saved") == 1
    assert f"the newest checkpoint, {out}/checkpoints/step_000001, is from before" in output
    assert [path.name for path in (out / "checkpoints").glob("step_*")] == ["step_000001"]


def test_a_run_without_checks_says_so_for_good(world, tmp_path):
    ended_well, output = run("none", "dpo", *llama_arguments(world, tmp_path / "run"), "--checks=off")
    assert ended_well, output
    assert re.search("warning +checks=off", output)
    assert "checks: 'off'" in (tmp_path / "run" / "recipe.yaml").read_text()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["unchecked_from_steps"] == [1]


def test_precomputed_log_probs_are_kept_and_damaged_ones_are_refused(tiny, tmp_path):
    shutil.copytree(tiny.dpo, tmp_path / "data", ignore=shutil.ignore_patterns("reference"))
    more = [f"--dpo_data_dir={tmp_path}/data", "--reference=precompute"]
    ended_well, first = run("none", "dpo", *dpo_arguments(tiny, tmp_path / "first", *more))
    assert ended_well, first
    assert "(2 of 2 files computed now)" in first

    (file,) = (tmp_path / "data" / "reference").glob("*/train_*.npz")
    right, whole = np.load(file)["sums"], file.read_bytes()
    half = len(whole) // 2
    file.write_bytes(whole[:half] + b"damaged!" + whole[half + 8 :])  # its checksum tells: computed anew
    ended_well, second = run("none", "dpo", *dpo_arguments(tiny, tmp_path / "second", *more, "--beta=0.3"))
    assert ended_well, second
    assert "(1 of 2 files computed now)" in second  # the other serves a run with another beta, too
    assert (np.load(file)["sums"] == right).all()
    assert metrics(tmp_path / "second")[0]["loss"] == pytest.approx(0.693147, abs=1e-5)

    shutil.copytree(tiny.dpo, tmp_path / "foreign", ignore=shutil.ignore_patterns("reference"))
    (tmp_path / "foreign" / "reference").touch()  # root may write into every folder, but not into a file
    for computed in (2, 0):
        elsewhere = dpo_arguments(tiny, tmp_path / "third", f"--dpo_data_dir={tmp_path}/foreign", "--reference=precompute")
        more_steps = ["--max_iters=3", "--lr_decay_iters=3", "--extend"] if computed == 0 else []
        ended_well, third = run("none", "dpo", *last_of_each([*elsewhere, *more_steps]))
        assert ended_well, third
        note = f"; in the run, since {tmp_path}/foreign/reference cannot be written: " if computed else ""
        assert f"/third/reference/{file.parent.name} ({computed} of 2 files computed now{note}" in third
    assert (tmp_path / "third" / "final" / "model.safetensors").is_file()

    np.savez(file, sums=right - 1.0)  # whole, but another model's
    ended_well, output = run("none", "dpo", *dpo_arguments(tiny, tmp_path / "run", *more))
    assert not ended_well
    assert f"delete {file.parent}, and they are computed anew" in output
    assert not (tmp_path / "run").exists()


OFFLOADED = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}


@pytest.mark.parametrize(("ds_config", "dtype"), [("zero2_offloaded", "bfloat16"), ("zero3", "float32")])
def test_a_step_with_a_nan_is_not_applied(tiny, tmp_path, request, ds_config, dtype):
    """planted.py compares weights and optimizer before and after a refused step, bit for bit."""
    train = load_prepared(tiny.sft, "sft", "").train
    culprit = int(batches.step_examples(len(train), 8, 1337, 3)[5])
    ids = ",".join(map(str, train[culprit]["input_ids"]))
    folder = "ds_configs"
    if ds_config == "zero2_offloaded":
        request.getfixturevalue("cpu_adam")
        (tmp_path / "zero2_offloaded.json").write_text(json.dumps(OFFLOADED))
        folder = tmp_path
    layout = [f"--ds_config={folder}/{ds_config}.json", f"--dtype={dtype}", "--max_tokens_per_gpu=160"]
    arguments = sft_arguments(tiny, tmp_path / "run", *layout, "--eval_interval=1", "--max_iters=4")
    ended_well, output = run("one_example_is_nan", "sft", *arguments, plant=ids)
    assert ended_well, output
    assert "warning  step 3 was not applied: the loss is nan. Its worst example is" in output
    evals = [record["loss"] for record in metrics(tmp_path / "run", "eval")]
    assert None not in evals
    assert evals[3] == evals[2]
    assert len(set(evals)) == len(evals) - 1  # before and after, the weights moved
    assert [record["loss"] is None for record in metrics(tmp_path / "run")] == [False, False, True, False]
    (record,) = map(json.loads, (tmp_path / "run" / "bad_batches.jsonl").read_text().splitlines())
    assert (record["step"], record["reason"], record["loss"], len(record["examples"])) == (3, "the loss is nan", None, 8)
    assert [(example["index"], example["loss"]) for example in record["examples"] if example["loss"] is None] == [(culprit, None)]
    assert record["examples"][0]["source"] == train[culprit]["source"]

    if ds_config == "zero3":
        ended_well, output = run("one_example_is_nan", "sft", *arguments, "--replay_step=3", plant=ids)
        assert ended_well, output
        assert "replay of step 3 with the weights of the checkpoint of step 2: loss nan" in output
        assert f"example {culprit:>8}" in output.split("it would not be applied: the loss is nan")[1].splitlines()[1]
        assert len(metrics(tmp_path / "run")) == 4


def test_a_pair_with_a_nan_is_not_applied(tiny, tmp_path):
    """With the reference beside: looking for the culprit, too, gathers its weights on all ranks."""
    train = load_prepared(tiny.dpo, "dpo", "").train
    culprit = int(min(batches.step_examples(len(train), 8, 1337, 2), key=lambda index: train.lengths[index]))  # not in the largest batch
    ids = ",".join(map(str, train[culprit]["prompt"] + train[culprit]["chosen"]))
    settings = ["--max_iters=3", "--eval_interval=1", "--ds_config=ds_configs/zero1.json", "--max_tokens_per_gpu=120"]
    arguments = dpo_arguments(tiny, tmp_path / "run", *settings, "--learning_rate=1e-2", "--dtype=bfloat16")
    ended_well, output = run("one_example_is_nan", "dpo", *arguments, plant=ids)
    assert ended_well, output
    assert f"step 2 was not applied: the loss is nan. Its worst example is {culprit} (" in output
    evals = [record["loss"] for record in metrics(tmp_path / "run", "eval")]
    assert None not in evals
    assert evals[2] == evals[1] != evals[3]
    (record,) = map(json.loads, (tmp_path / "run" / "bad_batches.jsonl").read_text().splitlines())
    losses = {example["index"]: example["loss"] for example in record["examples"]}
    assert (record["loss"], losses.pop(culprit), len(losses)) == (None, None, 7)
    assert all(0.4 < loss < 1.0 for loss in losses.values())


def test_a_spike_is_not_applied_and_three_in_a_row_stop_the_run(tiny, tmp_path):
    common = ["--max_iters=30", "--save_interval=0", "--eval_interval=1", "--ds_config=ds_configs/zero2.json"]
    arguments = sft_arguments(tiny, tmp_path / "run", *common)
    ended_well, output = run("spikes", "sft", *arguments, plant="22:1e4,24:1e4,25:1e4,26:1e4")
    assert not ended_well
    assert "Traceback" not in output
    assert "step 22 was not applied: the gradient norm" in output
    assert "20 times" in output
    assert "3 steps in a row were not applied" in output
    assert "--replay_step=26 runs one again" in output
    evals = {record["step"]: record["loss"] for record in metrics(tmp_path / "run", "eval")}
    assert evals[22] == evals[21] != evals[23]
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "bad_batches.jsonl").read_text().splitlines()] == [22, 24, 25, 26]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")] == ["step_000026"]
    ended_well, output = run("spikes", "sft", *arguments, "--replay_step=26", plant="26:1e4")
    assert ended_well, output
    assert "replay of step 26 with the weights of the checkpoint of step 26" in output  # which no later step has changed
    assert "it would not be applied: the gradient norm" in output
    ended_well, output = run("none", "sft", *arguments)  # without the fault, the same command finishes the run
    assert ended_well, output
    assert "continuing after step 26" in output
    assert (tmp_path / "run" / "final").is_dir()


def test_an_infinite_gradient_norm_is_not_applied(tiny, tmp_path):
    """At ZeRO-0 in float32, where DeepSpeed itself would not notice; the loss is finite, and spikes are not looked for."""
    arguments = ["--ds_config=ds_configs/zero0.json", "--skip_spikes=0", "--eval_interval=1", "--max_iters=4"]
    ended_well, output = run("spikes", "sft", *sft_arguments(tiny, tmp_path / "run", *arguments), plant="3:1e30")
    assert ended_well, output
    assert "step 3 was not applied: the gradient norm is inf" in output
    evals = [record["loss"] for record in metrics(tmp_path / "run", "eval")]
    assert None not in evals
    assert evals[3] == evals[2] != evals[4]


def test_a_rank_that_hangs_is_named_and_ends_the_run(tiny, tmp_path):
    """It is alive and answers the watchdog, so the one that has come least far is named; both show where they are."""
    well, output = run(
        "one_rank_hangs", "sft", *sft_arguments(tiny, tmp_path / "run", "--watchdog_seconds=4", "--eval_interval=0"), plant="6"
    )
    assert not well
    assert re.search(
        r"error: rank 1 \(.*pid \d+\) has made no progress for [45] s, last seen in phase forward of step \d+, its log is .*/rank_1.log",
        output,
    ), output
    assert "others: rank 0 in " in output
    assert output.count("has made no progress") == 1
    for rank, place in ((1, "planted.py"), (0, "all_reduce")):  # the stacks
        assert re.search(rf"rank {rank} was in phase \w+ of step \d+ for \d+ s:", output), output
        assert place in output
