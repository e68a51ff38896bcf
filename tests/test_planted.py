"""Faults planted in real two-rank runs: each stops the run before its first step with its cause, or is kept out of the weights."""

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
from conftest import launch, metrics, rank_environment
from test_runs import sft_arguments
from test_templates import LLAMA, byte_level
from transformers import LlamaConfig, LlamaForCausalLM

from data_prep.prepare import prepare
from posttrain import batches, data

pytestmark = pytest.mark.slow


def dpo_arguments(tiny, out_dir, *more: str) -> list[str]:
    paths = [f"--sft_checkpoint_path={tiny.base}", f"--dpo_data_dir={tiny.dpo}", f"--out_dir={out_dir}", "--max_iters=2"]
    numbers = ["--global_batch_size=8", "--learning_rate=1e-3", "--warmup_iters=0", "--min_lr=0", "--dtype=float32", "--eval_interval=0"]
    return [*paths, *numbers, *more]


def run(fault: str, script: str, *arguments: str, plant: str = "") -> tuple[bool, str]:
    """Whether the run ended well, and what it printed."""
    done = launch("tests/planted.py", fault, script, *arguments, env=rank_environment() | {"PLANT": plant})
    return done.returncode == 0, done.stdout


def stops_at_step_0(tmp_path, ended_well: bool, output: str) -> None:
    assert not ended_well, output
    assert output.count("error: ") == 1, output
    assert "Traceback" not in output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()  # not one step was made


@pytest.fixture
def other_checkpoint(tiny, tmp_path):
    """The base model, one weight of which is another."""
    folder = tmp_path / "other"
    shutil.copytree(tiny.base, folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] += 0.01
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_reference_from_another_checkpoint(tiny, tmp_path, other_checkpoint):
    seen = run("reference_of_another_checkpoint", "dpo", *dpo_arguments(tiny, tmp_path / "run"), plant=str(other_checkpoint))
    stops_at_step_0(tmp_path, *seen)
    assert "the reference is another model than the policy starts from: 1 of" in seen[1]
    assert "first layers.1.mlp.down_proj.weight" in seen[1].replace("model.", "")


def test_one_rank_with_a_changed_weight(tiny, tmp_path):
    seen = run("one_rank_with_a_changed_weight", "sft", *sft_arguments(tiny, tmp_path / "run"))
    stops_at_step_0(tmp_path, *seen)
    assert "ranks [1] hold another model than rank 0: 1 of" in seen[1]
    assert "first model.layers.1.mlp.up_proj.weight" in seen[1]


def test_one_rank_with_other_data(tiny, tmp_path):
    """The same rows with chosen and rejected answers of equal length, so that nothing but the tokens tells."""
    rows = [json.loads(line) for line in (tiny.folder / "sft.jsonl").read_text().splitlines()]
    rows[7]["output"] = " ".join(reversed(rows[7]["output"].split()))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = ["--tokenizer", tiny.base, "--val_size", "7"]
    prepare("sft", ["--source", f"{tmp_path}/rows.jsonl", "--output_dir", f"{tmp_path}/data", *common])
    seen = run("one_rank_with_other_data", "sft", *sft_arguments(tiny, tmp_path / "run"), plant=f"{tmp_path}/data")
    stops_at_step_0(tmp_path, *seen)
    assert "ranks [1] hold another recipe or prepared data than rank 0" in seen[1]
    assert "first data: manifest and lengths" in seen[1]


def test_one_rank_with_other_data_leaves_no_wrong_precomputed_log_probs(tiny, tmp_path):
    rows = [json.loads(line) for line in (tiny.folder / "dpo.jsonl").read_text().splitlines()]
    rows[3]["chosen"] += " na"
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare("dpo", ["--source", f"{tmp_path}/rows.jsonl", "--output_dir", f"{tmp_path}/data", "--tokenizer", tiny.base, "--val_size", "7"])
    shutil.copytree(tiny.dpo, tmp_path / "mine", ignore=shutil.ignore_patterns("reference"))
    arguments = dpo_arguments(tiny, tmp_path / "run", f"--dpo_data_dir={tmp_path}/mine", "--reference=precompute")
    seen = run("one_rank_with_other_data", "dpo", *arguments, plant=f"{tmp_path}/data")
    stops_at_step_0(tmp_path, *seen)
    assert "ranks [1] hold another recipe or prepared data than rank 0" in seen[1]
    assert not (tmp_path / "mine" / "reference").exists()


def test_data_prepared_with_another_template(tmp_path):
    """ChatML pairs for a model that was taught another form; and pairs of the model's own template for one taught ChatML."""
    tokenizer = byte_level(nfc=False)
    tokenizer.chat_template = LLAMA
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"hello {number}", "chosen": "the quick fox", "rejected": "brown"} for number in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare("dpo", ["--source", f"{tmp_path}/rows.jsonl", "--tokenizer", f"{tmp_path}/model", "--output_dir", f"{tmp_path}/data"])
    paths = [f"--sft_checkpoint_path={tmp_path}/model", f"--dpo_data_dir={tmp_path}/data", f"--out_dir={tmp_path}/run"]
    arguments = [*paths, "--max_iters=1", "--global_batch_size=4", "--dtype=float32", "--warmup_iters=0", "--eval_interval=0"]
    seen = run("none", "dpo", *arguments)
    stops_at_step_0(tmp_path, *seen)
    assert "was prepared with another template" in seen[1]
    assert "<|im_start|>user" in seen[1]
    assert "<|start_header_id|>user" in seen[1]
    ended_well, output = run("none", "dpo", *arguments, "--checks=off")
    assert ended_well, output
    assert "warning  checks=off" in output
    assert "checks: 'off'" in (tmp_path / "run" / "recipe.yaml").read_text()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["unchecked_from_steps"] == [1]


@pytest.mark.parametrize("script", ["sft", "dpo"])
def test_dropout_left_on(tiny, tmp_path, script):
    arguments = {"sft": sft_arguments, "dpo": dpo_arguments}[script](tiny, tmp_path / "run")
    seen = run("dropout_left_on", script, *arguments)
    stops_at_step_0(tmp_path, *seen)
    assert "although the recipe says dropout 0: it is on in 1 modules, first model.layers.0.self_attn" in seen[1]


def test_precomputed_log_probs_are_kept_and_damaged_ones_are_refused(tiny, tmp_path):
    shutil.copytree(tiny.dpo, tmp_path / "data")
    more = [f"--dpo_data_dir={tmp_path}/data", "--reference=precompute"]
    ended_well, first = run("none", "dpo", *dpo_arguments(tiny, tmp_path / "first", *more))
    assert ended_well, first
    assert "(2 of 2 files computed now)" in first
    ended_well, second = run("none", "dpo", *dpo_arguments(tiny, tmp_path / "second", *more, "--beta=0.3"))
    assert ended_well, second
    assert "(0 of 2 files computed now)" in second  # another beta, the same log-probs
    assert metrics(tmp_path / "second")[0]["loss"] == pytest.approx(0.693147, abs=1e-5)

    (file,) = (tmp_path / "data" / "reference").glob("*/train_*.npz")
    whole = file.read_bytes()
    file.write_bytes(whole[:-40] + b"damaged!" + whole[-32:])  # its checksum tells: computed anew
    ended_well, third = run("none", "dpo", *dpo_arguments(tiny, tmp_path / "third", *more))
    assert ended_well, third
    assert "(1 of 2 files computed now)" in third
    assert metrics(tmp_path / "third")[1]["loss"] == metrics(tmp_path / "first")[1]["loss"]

    np.savez(file, sums=np.load(file)["sums"] - 1.0)  # whole, but another model's
    seen = run("none", "dpo", *dpo_arguments(tiny, tmp_path / "run", *more))
    stops_at_step_0(tmp_path, *seen)
    assert f"delete {tmp_path}/data/reference, whose log-probs are another model's" in seen[1]


OFFLOADED = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}


@pytest.mark.parametrize(
    ("ds_config", "dtype"), [("zero0", "float32"), ("zero1", "bfloat16"), ("zero2_offloaded", "bfloat16"), ("zero3", "float32")]
)
def test_a_step_with_a_nan_is_not_applied(tiny, tmp_path, ds_config, dtype):
    train = data.load(tiny.sft, "sft", "").train
    culprit = int(batches.step_examples(len(train), 8, 1337, 3)[5])
    ids = ",".join(map(str, train.table[culprit]["input_ids"]))
    (tmp_path / "zero2_offloaded.json").write_text(json.dumps(OFFLOADED))
    folder = tmp_path if "offloaded" in ds_config else "ds_configs"
    layout = [
        f"--ds_config={folder}/{ds_config}.json",
        f"--dtype={dtype}",
        "--eval_interval=1",
        "--max_tokens_per_gpu=160",
        "--max_iters=4",
    ]
    ended_well, output = run("one_example_is_nan", "sft", *sft_arguments(tiny, tmp_path / "run", *layout), plant=ids)
    assert ended_well, output
    assert "warning  step 3 was not applied: the loss is nan. Its worst example is" in output
    evals = [record["loss"] for record in metrics(tmp_path / "run", "eval")]
    assert evals[3] == evals[2]  # neither weights nor optimizer moved
    assert len(set(evals)) == len(evals) - 1  # before and after, they did
    assert [record["loss"] is None for record in metrics(tmp_path / "run")] == [False, False, True, False]
    (record,) = map(json.loads, (tmp_path / "run" / "bad_batches.jsonl").read_text().splitlines())
    assert (record["step"], record["reason"], len(record["examples"])) == (3, "the loss is nan", 8)
    assert [(example["index"], example["loss"]) for example in record["examples"] if example["loss"] is None] == [(culprit, None)]
    assert record["examples"][0]["source"] == train.table[culprit]["source"]
    if ds_config != "zero3":
        return
    ended_well, output = run("one_example_is_nan", "sft", *sft_arguments(tiny, tmp_path / "run", *layout, "--replay_step=3"), plant=ids)
    assert ended_well, output
    assert "replay of step 3 with the weights of the checkpoint of step 2: loss nan" in output
    assert f"example {culprit:>8}" in output.split("it would not be applied: the loss is nan")[1].splitlines()[1]
    assert len(metrics(tmp_path / "run")) == 4


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
    replayed = sft_arguments(tiny, tmp_path / "run", *common, "--replay_step=26")
    ended_well, output = run("spikes", "sft", *replayed, plant="26:1e4")
    assert ended_well, output
    assert "replay of step 26 with the weights of the checkpoint of step 26" in output  # which no later step has changed
    assert "it would not be applied: the gradient norm" in output
    ended_well, output = run("none", "sft", *arguments)  # without the fault, the same command finishes the run
    assert ended_well, output
    assert "continuing after step 26" in output
    assert (tmp_path / "run" / "final").is_dir()

    ended_well, output = run("spikes", "sft", *sft_arguments(tiny, tmp_path / "off", *common, "--skip_spikes=0"), plant="22:1e4")
    assert ended_well, output
    assert "not applied" not in output


def test_an_infinite_gradient_norm_is_not_applied(tiny, tmp_path):
    """At ZeRO-0 in float32, where DeepSpeed itself would not notice; the loss is finite, and spikes are not looked for."""
    arguments = ["--ds_config=ds_configs/zero0.json", "--skip_spikes=0", "--eval_interval=1", "--max_iters=4"]
    ended_well, output = run("spikes", "sft", *sft_arguments(tiny, tmp_path / "run", *arguments), plant="3:1e30")
    assert ended_well, output
    assert "step 3 was not applied: the gradient norm is inf" in output
    evals = [record["loss"] for record in metrics(tmp_path / "run", "eval")]
    assert evals[3] == evals[2] != evals[4]
