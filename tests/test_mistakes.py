"""Bad input: one clear message that names what was seen and what to do; non-zero exit; nothing lost."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
import transformers
from conftest import launch, launch_with_deepspeed, start_run
from test_runs import sft_arguments

from posttrain.common import hub, places
from posttrain.common.places import find_ds_config
from posttrain.data.chat import ChatFormat
from posttrain.data.prepared import load_prepared
from posttrain.engine import start
from posttrain.engine.ds_config import checkpoint_function, merge_config, read_ds_config
from posttrain.engine.start import check_devices, warn_of_little_shared_memory
from posttrain.model.forms import tokenizer_beside
from posttrain.model.loading import load_model
from posttrain.model.policy import set_dropout
from posttrain.recipes.keys import SFTRecipe
from posttrain.recipes.reading import build_recipe, load_recipe_of
from posttrain.run.directory import Run
from posttrain.run.resume import resolve
from posttrain.training.command import dpo, sft
from posttrain.training.inputs import _check_template, check_positions
from posttrain.training.missing import refuse_missing

ROOT = Path(__file__).parents[1]


def fails(script, monkeypatch, *arguments: str) -> str:
    """The message with which a script's main function ends, before any process group exists."""
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    with pytest.raises((ValueError, OSError)) as error:
        script()
    return str(error.value)


@pytest.fixture
def arguments(tiny, tmp_path):
    return sft_arguments(tiny, tmp_path / "run")


def test_a_folder_for_compiled_code_that_cannot_be_written_is_named(arguments, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", f"{tmp_path}/new")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", f"{tmp_path}/file/new")
    message = fails(sft, monkeypatch, *arguments)
    assert message.startswith(f"TORCHINDUCTOR_CACHE_DIR={tmp_path}/file/new cannot be written: Not a directory. Name another folder")


def test_python_without_docstrings_is_refused():
    command = [sys.executable, str(ROOT / "posttrain" / "report.py")]
    done = subprocess.run(command, env=os.environ | {"PYTHONOPTIMIZE": "2"}, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch("error: Python runs with -OO or PYTHONOPTIMIZE=2, .*\n", done.stderr)


def test_missing_data_names_the_command_that_makes_it(arguments, monkeypatch, tmp_path):
    message = fails(sft, monkeypatch, *arguments, f"--sft_data_dir={tmp_path}/nowhere")
    assert f"no prepared data at {tmp_path}/nowhere" in message
    base = arguments[0].removeprefix("--checkpoint_path=")
    assert f"python data_prep/prepare_sft.py --dataset alpaca --tokenizer {base} --output_dir {tmp_path}/nowhere" in message


@pytest.mark.parametrize("rows", ["my_rows.jsonl", "folder", "my_rows.csv.gz"])
def test_rows_that_are_not_prepared_get_the_command_that_prepares_them(arguments, monkeypatch, tmp_path, rows):
    (tmp_path / "folder").mkdir()
    for name in ("my_rows.jsonl", "my_rows.csv.gz", "folder/part.parquet"):
        (tmp_path / name).touch()
    message = fails(sft, monkeypatch, *arguments, f"--sft_data_dir={tmp_path}/{rows}")
    assert f"{tmp_path}/{rows} holds rows that are not prepared yet" in message
    base, name = arguments[0].removeprefix("--checkpoint_path="), rows.partition(".")[0]
    assert message.endswith(f"prepare_sft.py --dataset {tmp_path}/{rows} --tokenizer {base} --output_dir data/{name}")


def test_a_file_that_holds_no_rows_is_not_proposed_as_what_was_meant(arguments, monkeypatch, tmp_path):
    (tmp_path / "rows.txt").touch()
    message = fails(sft, monkeypatch, *arguments, f"--sft_data_dir={tmp_path}/rows.txt")
    assert f"{tmp_path}/rows.txt is a file; prepared data is a folder" in message
    assert "Did you mean" not in message


def test_a_ds_config_of_ones_own_wins_over_the_shipped_one_and_is_told(tiny, arguments, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe_of("sft", [*arguments, "--ds_config=ds_configs/zero1.json"])
    refuse_missing(recipe)
    assert (find_ds_config("ds_configs/zero1.json"), capsys.readouterr().out) == (ROOT / "ds_configs" / "zero1.json", "")
    Path("ds_configs").mkdir()
    Path("ds_configs/zero1.json").write_text('{"zero_optimization": {"stage": 2}}')
    refuse_missing(recipe)
    assert f"ds_configs/zero1.json is {tmp_path}/ds_configs/zero1.json, not the file of this name" in capsys.readouterr().out
    assert read_ds_config("ds_configs/zero1.json")["zero_optimization"]["stage"] == 2


def test_commands_in_messages_are_right_from_another_folder(monkeypatch, tmp_path):
    assert places.command("preview", "a b") == "python data_prep/preview.py 'a b'"
    assert places.command("sft", ranks=8) == "deepspeed --num_gpus 8 posttrain/sft.py"
    monkeypatch.chdir(tmp_path)
    assert places.command("preview", "x") == f"python {ROOT}/data_prep/preview.py x"
    monkeypatch.setenv(places.CONSOLE, "1")
    assert places.command("dpo", "x", ranks=2) == "posttrain dpo --num_gpus 2 x"
    text = "    python posttrain/serve.py --a\n    deepspeed --num_gpus 8 posttrain/eval_benchmarks.py ...; see data_prep/preview.py"
    assert places.in_this_form(text) == "    posttrain serve --a\n    posttrain eval --num_gpus 8 ...; see posttrain preview"


def test_a_missing_model_names_what_to_give(tiny, arguments, monkeypatch):
    message = fails(sft, monkeypatch, *arguments, "--checkpoint_path=./nowhere")
    assert "no model at ./nowhere" in message
    assert "--checkpoint_path=PATH" in message
    assert f"Did you mean {tiny.base}?" in fails(sft, monkeypatch, *arguments, f"--checkpoint_path={tiny.folder}/bas")
    message = fails(sft, monkeypatch, *arguments, "--checkpoint_path=nowhere/ckpt.pt")
    assert "no model at nowhere/ckpt.pt" in message
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.is_reachable.cache_clear()
    message = fails(sft, monkeypatch, *arguments, "--checkpoint_path=checkpoints/qwen3_1.8b")  # reads as a hub name, too
    assert "no model at checkpoints/qwen3_1.8b" in message
    assert "hf download Qwen/Qwen3-1.7B-Base --local-dir checkpoints/qwen3_1.8b" in message
    hub.is_reachable.cache_clear()


def test_a_hub_model_brings_its_own_tokenizer():
    """Else the data's own copy would be compared with itself, and any data would do for any model."""
    assert tokenizer_beside("Qwen/Qwen3-1.7B-Base") == "Qwen/Qwen3-1.7B-Base"


@pytest.mark.parametrize(
    ("damage", "message"), [("missing", "lacks 1 tensors .*random values"), ("cut", "cut or damaged"), ("shape", "other shapes")]
)
def test_a_model_that_is_not_whole_is_refused(tiny, tmp_path, damage, message):
    folder = tmp_path / "base"
    shutil.copytree(tiny.base, folder)
    file = folder / "model.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:20000])
    else:
        tensors = safetensors.torch.load_file(file)
        weight = tensors.pop("model.layers.1.mlp.up_proj.weight")
        if damage == "shape":
            tensors["model.layers.1.mlp.up_proj.weight"] = weight[:7].clone()
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{folder}.*{message}"):
        load_model(str(folder), torch.float32, "")


def test_dropout_is_the_recipes_not_the_checkpoints(tiny):
    model = load_model(tiny.base, torch.float32, "")
    for value in (0.3, 0.0):
        set_dropout(model, value)
        assert {module.attention_dropout for module in model.modules() if hasattr(module, "attention_dropout")} == {value}
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))
    set_dropout(gpt2, 0.0)
    assert {module.p for module in gpt2.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no attention dropout"):
        set_dropout(gpt2, 0.1)


def test_an_example_with_more_positions_than_the_model_has_is_named(tiny):
    prepared = load_prepared(tiny.dpo, "dpo", "")
    check_positions(prepared, types.SimpleNamespace(max_position_embeddings=int(prepared.train.positions.max())))
    with pytest.raises(ValueError, match=r"dpo.jsonl:\d+\) has \d+ positions, the model was made for at most 20; .*--max_length 20"):
        check_positions(prepared, types.SimpleNamespace(max_position_embeddings=20))


def test_a_run_goes_on_only_with_the_data_and_model_it_began_with(tmp_path):
    values = {"checkpoint_path": "b", "sft_data_dir": "d", "out_dir": str(tmp_path / "run"), "max_iters": 1, "global_batch_size": 1}
    recipe = build_recipe(SFTRecipe, values, {})
    begun = Run(recipe, 0, {"data": "1", "model": "2"})
    assert not (tmp_path / "run").exists()  # a start that a check stops leaves nothing behind
    start_run(begun, 1, 1)
    begun.close()
    Run(recipe, 0, {"data": "1", "model": "2"})
    with pytest.raises(ValueError, match="data changed since .*/run began"):
        Run(recipe, 0, {"data": "3", "model": "2"})
    with pytest.raises(ValueError, match="begun by another version of this code.*another --out_dir"):
        Run(recipe, 0, {"data": "1", "weights": "2"})
    unchecked = Run(recipe.model_copy(update={"checks": "off"}), 0, {"data": "1", "model": "2"})
    start_run(unchecked, 1, 1)
    unchecked.close()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["unchecked_from_steps"] == [1]
    (tmp_path / "run").rename(tmp_path / "moved")  # copying or renaming the directory moves the run
    assert resolve(recipe.model_copy(update={"out_dir": str(tmp_path / "moved")}), 1).out_dir.endswith("moved")


def test_a_start_from_the_beginning_leaves_no_older_records(tmp_path):
    values = {"checkpoint_path": "b", "sft_data_dir": "d", "out_dir": str(tmp_path / "run"), "max_iters": 9, "global_batch_size": 1}
    for first_step, expected in ((1, [0, 1]), (1, [0, 1]), (2, [0, 1, 2])):
        here = Run(build_recipe(SFTRecipe, values, {}), 0, {})
        start_run(here, first_step, 9)
        if first_step == 1:
            here.log(0, "eval", {"loss": 1.0})
        here.log(first_step, "train", {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1e-5})
        here.close()
        assert [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == expected


def test_dpo_without_an_sft_result_names_the_command_that_makes_it(tiny, monkeypatch, tmp_path):
    message = fails(
        dpo, monkeypatch, f"--dpo_data_dir={tiny.dpo}", f"--out_dir={tmp_path}/run", "--sft_checkpoint_path=./runs/nowhere/final"
    )
    assert "deepspeed --num_gpus 8 posttrain/sft.py" in message


def test_preference_data_must_read_as_the_model_was_taught(tiny):
    """Its folder's template decides, where it has one that can be compared."""
    recipe = types.SimpleNamespace(data_dir="data", model_path="model")
    tokenizer = type(tiny.tokenizer).from_pretrained(tiny.base)
    chat = ChatFormat(tokenizer)
    turns = "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + m['content'] }}<|im_end|>\n{% endfor %}"
    for own in (None, chat.jinja, {"default": chat.jinja}, turns + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"):
        tokenizer.chat_template = own
        _check_template(chat, recipe)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"  # of no use for training, so nothing to compare
    _check_template(chat, recipe)
    tokenizer.chat_template = "<|im_start|>system\nBe brief.<|im_end|>\n" + chat.jinja
    with pytest.raises(ValueError, match="data was prepared with another template than model was taught.*\n.*\n.*\n.*Be brief"):
        _check_template(chat, recipe)


def test_data_of_another_tokenizer_is_refused(tiny, arguments, monkeypatch, tmp_path):
    other = tmp_path / "tokenizer"
    tokenizer = type(tiny.tokenizer).from_pretrained(tiny.base)
    tokenizer.add_tokens(["lolo"])
    tokenizer.save_pretrained(other)
    message = fails(sft, monkeypatch, *arguments, f"--tokenizer={other}")
    assert f"was prepared with another tokenizer, {tiny.base}'s, than {other}'s" in message
    again = f"--source {tiny.folder}/sft.jsonl --tokenizer {other} --template chatml --output_dir {tiny.sft}_again"
    assert message.endswith(f"prepare_sft.py {again}")


def test_an_example_over_the_budget_is_named(arguments, monkeypatch):
    message = fails(sft, monkeypatch, *arguments, "--max_tokens_per_gpu=30")
    assert "sft.jsonl:" in message
    assert "more than max_tokens_per_gpu=30" in message


def test_a_directory_that_is_not_a_run_is_not_touched(arguments, monkeypatch, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    assert "is not a run" in fails(sft, monkeypatch, *arguments)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"train_batch_size": 8}', "sets train_batch_size, which belongs to the recipe"),
        ('{"bf16": {"enabled": true}}', "set dtype instead"),
        ('{"zero_optimisation": {"stage": 2}}', "Did you mean zero_optimization?"),
        ('{"zero_optimization": {"stagee": 2}}', "not accepted by DeepSpeed"),
        ('{"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}', 'holds "auto"'),
        ('{"activation_checkpointing": {"cpu_checkpoint": true}}', "Did you mean cpu_checkpointing?"),
        ('{"activation_checkpointing": true}', "activation_checkpointing should be an object"),
        ('{"aio": {"blok_size": 1}}', "Did you mean block_size?"),
        ('{"zero_optimization": 2}', "zero_optimization should be an object of its settings, saw 2"),
        ('{"zero_optimization": {"stage": "2"}}', "stage should be the number"),
        ('{"zero_optimization": {"stage": 2, "cpu_offload": true}}', "use offload_optimizer"),
        ('{"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}', "would not read its offload section"),
        ('{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}', "would not read its offload section"),
        ('{"compile": {"deepcompile": true}}', "not a sharding"),
        ('{"zero_optimization": {"stage": 2, "compute_grad_norm": false}}', "leaves no gradient norm"),
        ('{"zero_optimization": {"stage": 2, "round_robin_gradients": true}}', "checkpoints would be wrong"),
        ('{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}', "offload to nvme is not supported"),
        ('{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}', "an offload ratio other than 1"),
        ('{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": true}}}', "are not supported"),
        ('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "zenflow": {}}}', "are not supported"),
        ('{"communication_data_type": "fp16"}', "gradients would be rounded to another type than the recipe's dtype"),
        ('{"zero_optimization": {"stage": 3, "zero_quantized_weights": true}}', "weights would be rounded to 8 bits"),
        ('{"zero_optimization": {"stage": 3, "zero_quantized_gradients": true}}', "gradients would be rounded to 4 bits"),
        ('{"zero_optimization": {"stage": 1, "save_muon_momentum_buffer_in_memory": true}}', "not known to leave the numbers as they are"),
        ('{"prescale_gradients": true}', "not a sharding, offload or communication key"),
        ('{"zero_optimization": ', "is damaged: Expecting value"),
        ("[]", "is damaged: it holds a value of type list"),
        ('{"zero_optimization": {"stage": 3, "stage": 0}}', "is damaged: stage is set twice"),
        ('{"zero_optimization": {"stage": true}}', "stage should be the number 0, 1, 2 or 3, saw True"),
        ('{"zero_optimization": {"stage": 7}}', "zero_optimization.stage is not accepted by DeepSpeed: Input should be"),
        ('{"zero_optimization": {"stage": 3, "leaf_module": 5}}', "zero_optimization is not accepted by DeepSpeed: leaf_module config"),
        ('{"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 0}}', "zero_hpz_partition_size should be 1 or more, saw 0"),
        ('{"wall_clock_breakdown": "no"}', "wall_clock_breakdown should be true or false, saw 'no'"),
        ('{"aio": {"block_size": "x"}}', "aio: block_size should be a whole number, saw 'x'"),
        ('{"comms_logger": {"prof_ops": 5}}', "comms_logger: prof_ops should be a list, saw 5"),
    ],
)
def test_a_ds_config_that_says_too_much_is_refused(tmp_path, text, message):
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ValueError, match=".*") as error:
        read_ds_config(str(tmp_path / "ds.json"))
    assert message in str(error.value)


def test_every_shipped_ds_config_is_accepted():
    shipped = sorted((ROOT / "ds_configs").glob("*.json"))
    assert len(shipped) >= 6
    for path in shipped:
        read_ds_config(str(path))


def test_a_ds_config_may_say_what_deepspeed_does_anyway(tmp_path):
    """Files made for other trainers name many settings; those that keep the numbers, or have their default, are no reason to refuse one."""
    pieces = {"overlap_comm": True, "stage3_prefetch_bucket_size": 0, "param_persistence_threshold": 10, "reduce_bucket_size": 1e6}
    section = {"stage": 3, "zero_quantized_weights": False, "round_robin_gradients": False, **pieces}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": section}))
    assert read_ds_config(str(tmp_path / "ds.json"))["zero_optimization"] == section


def test_a_node_of_zeropp_divides_the_ranks(monkeypatch):
    values = {"checkpoint_path": "b", "sft_data_dir": "d", "out_dir": "r", "max_iters": 1, "global_batch_size": 1}
    recipe = build_recipe(SFTRecipe, values, {"ds_config": "ds_configs/zeropp.json"})
    section = read_ds_config(recipe.ds_config)
    for name, value in {"RANK": "0", "WORLD_SIZE": "16", "MASTER_ADDR": "node-1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    merge_config(recipe, section)
    monkeypatch.setenv("WORLD_SIZE", "12")
    with pytest.raises(ValueError, match="zeropp.json: zero_hpz_partition_size 8, the GPUs of a node, does not divide the 12 of this run"):
        merge_config(recipe, section)


def test_activation_checkpointing_has_one_owner():
    values = {"checkpoint_path": "b", "sft_data_dir": "d", "out_dir": "r", "max_iters": 1, "global_batch_size": 1}
    section = {"activation_checkpointing": {"partition_activations": True}}
    for mode in ("none", "selective", "offload"):
        with pytest.raises(ValueError, match=f"activation_checkpointing: {mode}. Set it to full, the only one"):
            merge_config(build_recipe(SFTRecipe, values, {"activation_checkpointing": mode}), section)
    with pytest.raises(ValueError, match="compile does nothing within DeepSpeed's activation checkpointing"):
        checkpoint_function(build_recipe(SFTRecipe, values, {"activation_checkpointing": "full", "compile": True}), section)
    for mode, config in (("offload", {}), ("full", {"activation_checkpointing": {"cpu_checkpointing": True}})):
        with pytest.raises(ValueError, match="moves activations from a GPU to the CPU; here the model is on the CPU. Use full"):
            checkpoint_function(build_recipe(SFTRecipe, values, {"activation_checkpointing": mode}), config)


def test_little_shared_memory_is_said(tmp_path, monkeypatch):
    """The 64 MB of a container, as a real file system of that size (it needs root), with what to do."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(tmp_path)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    said: list[str] = []
    monkeypatch.setattr(start, "say", said.append)
    try:
        warn_of_little_shared_memory(str(tmp_path))
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
    warn_of_little_shared_memory("/")
    (line,) = said
    assert re.fullmatch(f"warning +{tmp_path} has 67 MB, of which NCCL may need 537.*--shm-size=16g or --ipc=host.*", line)


def test_more_gpus_than_there_are():
    check_devices(2, 2, None)
    with pytest.raises(ValueError, match="asks for 9 GPUs on this machine, 8 are visible; use --num_gpus 8"):
        check_devices(9, 8, "deepspeed")
    with pytest.raises(ValueError, match="--nproc_per_node asks for 9 GPUs on this machine, 8 are visible; use --nproc_per_node 8"):
        check_devices(9, 8, "torchrun")


@pytest.mark.slow
def test_a_mistake_under_the_launcher_is_one_message_and_ends_all_ranks(tiny, tmp_path):
    started = time.monotonic()
    done = launch_with_deepspeed("posttrain/sft.py", *sft_arguments(tiny, tmp_path / "run", "--lerning_rate=1"))
    assert done.returncode != 0
    assert done.stdout.count("Did you mean learning_rate?") == 1
    assert "Traceback" not in done.stdout
    assert time.monotonic() - started < 60


@pytest.mark.slow
def test_a_checkpoint_that_holds_code_is_refused_and_the_code_does_not_run(tiny, tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"model": Attack(), "model_args": {}}, tmp_path / "ckpt.pt")
    arguments = sft_arguments(tiny, tmp_path / "run", f"--checkpoint_path={tmp_path}/ckpt.pt", f"--tokenizer={tiny.base}")
    done = launch("posttrain/sft.py", *arguments)
    assert done.returncode != 0
    assert done.stdout.count("error: ") == 1
    assert "ckpt.pt" in done.stdout
    assert not (tmp_path / "owned").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("size", "save_interval", "kept"), [("1600k", 2, "step_000004"), ("720k", 0, "step_000006")])
def test_a_full_disk_loses_nothing(tiny, tmp_path, size, save_interval, kept):
    """A real full file system (a small tmpfs, so it needs root): at the third checkpoint, then at the final save."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        arguments = sft_arguments(tiny, disk / "run", f"--save_interval={save_interval}")
        done = launch("posttrain/sft.py", *arguments)
        assert done.returncode != 0
        assert len(re.findall("^error: ", done.stdout, re.MULTILINE)) == 1, done.stdout
        assert "are free" in done.stdout or "No space left" in done.stdout
        assert "Traceback" not in done.stdout
        assert max(path.name for path in (disk / "run" / "checkpoints").glob("step_*[0-9]")) == kept
        assert not (disk / "run" / "final").exists()
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        done = launch("posttrain/sft.py", *arguments)  # with space again, the same command finishes the run
        assert done.returncode == 0, done.stdout
        assert f"continuing after step {int(kept.removeprefix('step_'))}" in done.stdout
        assert (disk / "run" / "final" / "model.safetensors").is_file()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
