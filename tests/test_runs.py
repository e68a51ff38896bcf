"""The user's commands on two ranks: what a run leaves behind, that it goes on where it stopped, and that mistakes end it at once."""

import json
import re
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, last_of_each, launch, launch_with_deepspeed, metrics, python, start
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.data import chat
from posttrain.data.chatml import IM_END

pytestmark = pytest.mark.slow
STEPS = 6
CURVE = ("loss", "learning_rate", "grad_norm", "epoch", "num_tokens")


def sft_arguments(tiny, out_dir, *more: str) -> list[str]:
    paths = [f"--checkpoint_path={tiny.base}", f"--sft_data_dir={tiny.sft}", f"--out_dir={out_dir}"]
    numbers = [f"--max_iters={STEPS}", "--global_batch_size=8", "--learning_rate=1e-2", "--warmup_iters=2", "--max_tokens_per_gpu=400"]
    return [*paths, *numbers, "--dtype=float32", "--ds_config=ds_configs/zero2.json", "--eval_interval=3", "--save_interval=2", *more]


@pytest.fixture(scope="module")
def sft_run(tiny, tmp_path_factory) -> tuple[Path, str]:
    """Under the real launcher, so that the runs which others are compared with have interpreters of their own."""
    out_dir = tmp_path_factory.mktemp("runs") / "sft"
    done = launch_with_deepspeed("posttrain/sft.py", *sft_arguments(tiny, out_dir))
    assert done.returncode == 0, done.stdout
    port = done.args[done.args.index("--master_port") + 1]
    assert not list(Path("/dev/shm").glob(f"deepspeed*_{port}_*"))  # DeepSpeed's own buffers would stay there for good
    return out_dir, done.stdout


@pytest.fixture(scope="module")
def dpo_run(tiny, sft_run) -> tuple[Path, str]:
    out_dir = sft_run[0].with_name("dpo")
    recipe = {"sft_checkpoint_path": f"{sft_run[0]}/final", "dpo_data_dir": tiny.dpo, "out_dir": str(out_dir)}
    recipe |= {"max_iters": STEPS, "batch_size": 2, "gradient_accumulation_steps": 2, "beta": 0.3, "learning_rate": 3e-3}
    recipe |= {"dtype": "float32", "ds_config": "ds_configs/zero3.json", "max_tokens_per_gpu": 400}
    path = out_dir.with_name("dpo.yaml")
    path.write_text(yaml.safe_dump(recipe))
    done = launch("posttrain/dpo.py", path, "--eval_interval=6")
    assert done.returncode == 0, done.stdout
    return out_dir, done.stdout


def test_an_sft_run_leaves_everything_behind(sft_run, tiny):
    out_dir, output = sft_run
    assert {"recipe.yaml", "run.json", "metrics.jsonl", "checkpoints", "final"} <= {path.name for path in out_dir.iterdir()}
    assert list(out_dir.glob("events.out.tfevents*"))
    train = metrics(out_dir)
    assert [record["step"] for record in train] == list(range(1, STEPS + 1))
    assert train[-1]["loss"] < train[0]["loss"]
    assert [record["step"] for record in metrics(out_dir, "eval")] == [0, 3, 6]
    assert [path.name for path in sorted((out_dir / "checkpoints").glob("step_*"))] == ["step_000004", "step_000006"]
    for text in ("step       8 examples", "eval at step 0", "step 6/6 | loss", "tokens/s", "left", f"saved {out_dir}/final"):
        assert text in output
    assert output.count("step 6/6") == 1  # rank 0 alone speaks
    assert yaml.safe_load((out_dir / "recipe.yaml").read_text())["global_batch_size"] == 8


def test_what_libraries_print_is_in_the_logs(sft_run):
    out_dir, output = sft_run
    # the launcher's own lines, and what is said while modules load, before there is a run
    said = [line for line in output.splitlines() if not re.search(r"\[(real_accelerator|runner|launch)\.py", line)]
    assert said[0].startswith("model    ")
    assert not [line for line in said if "WARNING" in line or "INFO" in line]
    assert "\x1b" not in output
    for rank in range(2):
        assert (out_dir / "logs" / f"rank_{rank}.log").read_text().startswith("--- ")


def test_eval_preferences_says_what_the_run_measured(dpo_run, sft_run, tiny, tmp_path):
    """Reward accuracy and margin of the held-out pairs, by another way: transformers' own forward pass over each answer alone."""
    models = ["--checkpoint", dpo_run[0], "--reference", sft_run[0]]
    done = python("posttrain/eval_preferences.py", *models, "--pairs", tiny.dpo, "--output", tmp_path)
    assert done.returncode == 0, done.stdout
    found, last = json.loads((tmp_path / "reward_accuracy.json").read_text()), metrics(dpo_run[0], "eval")[-1]
    assert found["reward_accuracy"]["value"] == pytest.approx(last["rewards/accuracies"])
    assert 0.3 * found["mean_margin_nats"] == pytest.approx(last["rewards/margins"], abs=1e-4)


def test_tensorboard_holds_the_same_numbers(sft_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(sft_run[0]))
    events.Reload()
    for split, name in (("train", "loss"), ("train", "grad_norm"), ("eval", "loss")):
        seen = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(f"{split}/{name}")]
        assert [(record["step"], record[name]) for record in metrics(sft_run[0], split)] == seen


def test_the_result_loads_in_plain_transformers_with_its_last_validation_loss(sft_run, tiny):
    """The exported weights give, by transformers' own forward pass, the loss that the run measured last."""
    from posttrain.data.prepared import load_prepared

    model = AutoModelForCausalLM.from_pretrained(sft_run[0] / "final", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(sft_run[0] / "final")
    rows = load_prepared(tiny.sft, "sft", "").validation
    nll = tokens = 0
    for row in rows:
        loss = model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
        nll, tokens = nll + loss.item() * row["num_trained"], tokens + row["num_trained"]
    assert nll / tokens == pytest.approx(metrics(sft_run[0], "eval")[-1]["loss"], abs=1e-5)
    end = tokenizer.convert_tokens_to_ids(IM_END)
    assert end in model.generation_config.eos_token_id
    assert model.config.use_cache
    chats = [{"role": "user", "content": "ta ke"}]
    assert tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False) == chat.render_prompt(tiny.chat, chats)


def test_a_finished_run_says_so(sft_run, tiny):
    done = launch("posttrain/sft.py", *sft_arguments(tiny, sft_run[0]))
    assert done.returncode == 0
    assert "is finished" in done.stdout
    assert len(metrics(sft_run[0])) == STEPS


def test_a_dpo_run_starts_at_ln_2_and_learns(dpo_run):
    train, evals = metrics(dpo_run[0]), metrics(dpo_run[0], "eval")
    assert evals[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert evals[0]["rewards/accuracies"] == 0.0  # ties count as wrong
    assert train[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert evals[-1]["rewards/margins"] > 0.01
    assert train[-1]["loss"] < train[0]["loss"]
    names = {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "grad_norm"}
    assert names <= set(train[0])
    assert json.loads((dpo_run[0] / "run.json").read_text())["batch_form"] == {"batch_size": 2, "gradient_accumulation_steps": 2}
    assert yaml.safe_load((dpo_run[0] / "recipe.yaml").read_text())["global_batch_size"] == 8  # 2 x 2 x 2 ranks
    assert (dpo_run[0] / "final" / "model.safetensors").is_file()


def test_a_killed_run_goes_on_bit_for_bit(sft_run, tiny, tmp_path):
    """SIGKILL after the first checkpoint; the same command again ends with the undisturbed run's numbers and weights."""
    process = start("posttrain/sft.py", *sft_arguments(tiny, tmp_path / "run"))
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000002"
    deadline = time.monotonic() + 120
    while not checkpoint.is_dir() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert checkpoint.is_dir()
    assert not (tmp_path / "run" / "final").exists()
    done = launch("posttrain/sft.py", *sft_arguments(tiny, tmp_path / "run"))
    assert done.returncode == 0, done.stdout
    assert "continuing after step" in done.stdout
    for split in ("train", "eval"):
        expected, actual = metrics(sft_run[0], split), metrics(tmp_path / "run", split)
        assert [[record.get(name) for name in CURVE] for record in actual] == [[record.get(name) for name in CURVE] for record in expected]
    files = [run / "final" / "model.safetensors" for run in (sft_run[0], tmp_path / "run")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_another_recipe_in_the_same_directory_is_refused(sft_run, tiny):
    done = launch("posttrain/sft.py", *sft_arguments(tiny, sft_run[0], "--learning_rate=0.5", "--seed=1"))
    assert done.returncode != 0
    assert "learning_rate: 0.01 -> 0.5" in done.stdout
    assert "seed: 1337 -> 1" in done.stdout
    assert "Traceback" not in done.stdout


def test_validation_alone_does_not_start_a_run(sft_run, tiny, tmp_path):
    done = launch("posttrain/sft.py", *sft_arguments(tiny, tmp_path / "none", "--eval_only=True"))
    assert done.returncode == 0, done.stdout
    assert f"loss {metrics(sft_run[0], 'eval')[0]['loss']:.4f}" in done.stdout
    assert not (tmp_path / "none").exists()


def test_a_tokenizers_own_template_goes_through_training_into_the_result(tmp_path):
    """Prepared with it, trained with it, exported with it: the result stops at that template's end token."""
    from test_templates import LLAMA, byte_level
    from transformers import LlamaConfig, LlamaForCausalLM

    from data_prep.prepare import prepare

    tokenizer = byte_level(nfc=False)
    tokenizer.chat_template = LLAMA
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"hello {number}", "response": "the quick brown fox"} for number in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--source", f"{tmp_path}/rows.jsonl", "--tokenizer", f"{tmp_path}/base", "--output_dir", f"{tmp_path}/data"]
    prepare("sft", [*arguments, "--template", "tokenizer"])
    paths = [f"--checkpoint_path={tmp_path}/base", f"--sft_data_dir={tmp_path}/data", f"--out_dir={tmp_path}/run"]
    numbers = ["--max_iters=2", "--global_batch_size=4", "--dtype=float32", "--warmup_iters=0", "--lr_decay_iters=none"]
    done = launch("posttrain/sft.py", *paths, *numbers, ranks=1)
    assert done.returncode == 0, done.stdout
    result = AutoTokenizer.from_pretrained(tmp_path / "run" / "final")
    assert result.chat_template == LLAMA
    assert len(result) == len(tokenizer)  # no ChatML tokens were added
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert result.convert_tokens_to_ids("<|eot_id|>") in model.generation_config.eos_token_id


def test_deepspeeds_own_activation_checkpointing_survives_forward_passes_alone(tiny, tmp_path):
    """Its contiguous buffers count on a backward pass after each forward one; the checks before step 1 and validation make none."""
    section = {"partition_activations": True, "contiguous_memory_optimization": True, "number_checkpoints": 2}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "activation_checkpointing": section}))
    settings = [f"--ds_config={tmp_path}/ds.json", "--activation_checkpointing=full", "--eval_interval=1", "--max_iters=2"]
    done = launch("posttrain/sft.py", *sft_arguments(tiny, tmp_path / "run", *settings))
    assert done.returncode == 0, done.stdout


def test_zeropp_on_two_nodes_of_two_draws_the_same_curve(sft_run, tiny, tmp_path):
    """Here all four ranks share a host; they gather from the two of their own node all the same. Stopped once, and continued."""
    section = json.loads((ROOT / "ds_configs" / "zeropp.json").read_text())
    assert section["zero_optimization"]["zero_hpz_partition_size"] == 8
    section["zero_optimization"]["zero_hpz_partition_size"] = 2
    (tmp_path / "zeropp.json").write_text(json.dumps(section))
    more = [f"--ds_config={tmp_path}/zeropp.json", "--activation_checkpointing=full"]
    for last, extends in ((4, []), (STEPS, ["--extend"])):
        arguments = sft_arguments(tiny, tmp_path / "run", *more, f"--max_iters={last}", f"--lr_decay_iters={STEPS}", *extends)
        done = launch("posttrain/sft.py", *last_of_each(arguments), ranks=4)
        assert done.returncode == 0, done.stdout
    for seen, expected in zip(metrics(tmp_path / "run"), metrics(sft_run[0]), strict=True):
        for name in CURVE:
            assert seen[name] == pytest.approx(expected[name], rel=1e-5), (seen["step"], name)
