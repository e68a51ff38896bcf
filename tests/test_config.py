"""Recipes: every shipped one loads, every mistake is named."""

import re
from pathlib import Path

import pytest
import yaml

from posttrain.recipes.keys import DPORecipe, SFTRecipe
from posttrain.recipes.other_names import OTHER_NAMES
from posttrain.recipes.reading import build_recipe, help_text, load_recipe
from posttrain.training import first_screen
from posttrain.training.schedule import learning_rate

SFT = {"checkpoint_path": "base", "sft_data_dir": "data", "out_dir": "run", "max_iters": 10, "global_batch_size": 8}
DPO = {"sft_checkpoint_path": "sft", "dpo_data_dir": "data", "out_dir": "run", "max_iters": 10, "global_batch_size": 8}
RECIPES = sorted((Path(__file__).parents[1] / "posttrain" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads(path):
    kind = SFTRecipe if path.name.startswith("sft") else DPORecipe
    assert load_recipe(kind, "unused", [str(path)]).out_dir.startswith("runs/")


def test_the_default_recipe_carries_the_documented_values():
    recipe = load_recipe(SFTRecipe, "sft_qwen3_1.8b", [])
    assert (recipe.global_batch_size, recipe.learning_rate, recipe.min_lr) == (128, 2e-5, 2e-6)
    assert (recipe.warmup_ratio, recipe.weight_decay, recipe.beta1, recipe.beta2) == (0.03, 0.01, 0.9, 0.95)
    assert (recipe.grad_clip, recipe.dropout, recipe.epochs, recipe.dtype) == (1.0, 0.0, 3.0, "bfloat16")
    recipe = load_recipe(DPORecipe, "dpo_qwen3_1.8b", [])
    assert (recipe.beta, recipe.global_batch_size, recipe.learning_rate, recipe.min_lr, recipe.epochs) == (0.1, 128, 5e-7, 1e-7, 1.0)


def test_the_keys_of_the_replaced_system_are_all_there():
    old = {"out_dir", "batch_size", "gradient_accumulation_steps", "learning_rate", "min_lr", "weight_decay", "beta1", "beta2", "grad_clip"}
    old |= {
        "max_iters",
        "warmup_iters",
        "lr_decay_iters",
        "decay_lr",
        "dropout",
        "eval_interval",
        "eval_iters",
        "log_interval",
        "eval_only",
    }
    old |= {"compile", "dtype", "wandb_log", "wandb_project", "wandb_run_name"}
    assert {*old, "checkpoint_path", "sft_data_dir"} <= set(SFTRecipe.model_fields)
    assert {*old, "sft_checkpoint_path", "dpo_data_dir", "beta", "label_smoothing", "reference_free"} <= set(DPORecipe.model_fields)


def test_overrides_are_typed_like_the_yaml():
    recipe = build_recipe(SFTRecipe, SFT, {"learning_rate": "3e-4", "compile": "True", "max_iters": "7", "tokenizer": "none"})
    assert (recipe.learning_rate, recipe.compile, recipe.max_iters, recipe.tokenizer) == (3e-4, True, 7, None)


@pytest.mark.parametrize(("kind", "passes"), [(SFTRecipe, 3.0), (DPORecipe, 1.0)])
def test_a_run_is_measured_in_passes_over_the_data_if_nothing_else_is_said(kind, passes):
    required = {name: "x" for name, field in kind.model_fields.items() if field.is_required()} | {"global_batch_size": 8}
    for values, length in (
        ({}, (passes, None)),
        ({"epochs": 2}, (2.0, None)),
        ({"max_iters": 9}, (None, 9)),
        ({"epochs": None}, (passes, None)),
    ):
        recipe = build_recipe(kind, required, values)
        assert (recipe.epochs, recipe.max_iters) == length
        assert build_recipe(kind, recipe.model_dump(), {}) == recipe


def test_the_command_line_replaces_the_files_way_to_say_how_long_the_warmup_is():
    in_file = SFT | {"warmup_ratio": 0.1}
    assert build_recipe(SFTRecipe, in_file, {"warmup_iters": "0"}).warmup_ratio is None
    assert build_recipe(SFTRecipe, in_file, {}).warmup_iters is None
    for neither in ({"warmup_ratio": "none"}, {"warmup_iters": "none", "warmup_ratio": "none"}):
        recipe = build_recipe(SFTRecipe, in_file | {"warmup_iters": None}, neither)
        assert (recipe.warmup_iters, recipe.warmup_ratio) == (0, None)


def test_none_is_a_choice_where_it_is_one():
    assert build_recipe(SFTRecipe, SFT, {"activation_checkpointing": "none"}).activation_checkpointing == "none"


def test_a_resolved_recipe_is_a_recipe():
    recipe = build_recipe(SFTRecipe, SFT, {})
    assert build_recipe(SFTRecipe, yaml.safe_load(yaml.safe_dump(recipe.model_dump())), {}) == recipe


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (SFTRecipe, {"lerning_rate": "1"}, "unknown key 'lerning_rate'. Did you mean learning_rate?"),
        (SFTRecipe, {"max_iters": "2.5"}, "max_iters='2.5': Input should be a valid integer"),
        (SFTRecipe, {"learning_rate": "fast"}, "learning_rate='fast'"),
        (SFTRecipe, {"learning_rate": "-1"}, "greater than 0"),
        (SFTRecipe, {"dtype": "float16"}, "'bfloat16' or 'float32'"),
        (SFTRecipe, {"compile": "perhaps"}, "compile='perhaps'"),
        (SFTRecipe, {"beta": "0.1"}, "unknown key 'beta'. It is a key of DPO"),
        (SFTRecipe, {"epochs": "1", "max_iters": "5"}, "sets both max_iters and epochs"),
        (SFTRecipe, {"batch_size": "4", "global_batch_size": "8"}, "sets both global_batch_size and batch_size"),
        (SFTRecipe, {"decay_lr": "False", "min_lr": "1e-6"}, "min_lr would not be read"),
        (SFTRecipe, {"warmup_iters": "9", "lr_decay_iters": "9"}, "lr_decay_iters 9 is not after warmup_iters 9"),
        (SFTRecipe, {"eval_interval": "0", "eval_iters": "2"}, "eval_iters would not be read"),
        (SFTRecipe, {"eval_interval": "0", "sample_tokens": "9"}, "sample_tokens would not be read with eval_interval=0"),
        (SFTRecipe, {"samples": "0", "sample_tokens": "9"}, "sample_tokens would not be read with samples=0"),
        (
            SFTRecipe,
            {"eval_interval": "0", "benchmarks": "arc_easy"},
            "eval_interval=0 and benchmark_interval=None; remove it",
        ),
        (SFTRecipe, {"benchmark_samples": "9"}, "benchmark_samples would not be read with benchmarks=None"),
        (SFTRecipe, {"min_lr": "1"}, "min_lr 1 is above learning_rate"),
        (SFTRecipe, {"wandb_project": "x"}, "wandb_project would not be read with wandb_log=False; remove it, or set wandb_log"),
        (SFTRecipe, {"warmup_iters": "9", "warmup_ratio": "0.1"}, "sets both warmup_iters and warmup_ratio; give one"),
        (SFTRecipe, {"warmup_ratio": "1.5"}, "warmup_ratio='1.5': Input should be less than 1"),
        (SFTRecipe, {"seed": "True"}, "seed='True'"),
        (SFTRecipe, {"skip_spikes": "0.5"}, "would refuse every other step"),
        (DPORecipe, {"label_smoothing": "0.5"}, "less than 0.5"),
        (DPORecipe, {"dropout": "0.1"}, "dropout must be 0 in DPO"),
        (DPORecipe, {"loss": "sigmiod"}, "loss='sigmiod': Input should be 'sigmoid', 'robust'"),
        (DPORecipe, {"loss": "ipo"}, "there are two: ipo_sum sums log-probs over tokens (the paper, OpenRLHF), ipo_mean averages them"),
        (DPORecipe, {"loss": "hinge", "label_smoothing": "0.1"}, "hinge does not read label_smoothing; remove it. It is read by sigmoid,"),
        (DPORecipe, {"simpo_gamma": "1"}, "loss sigmoid does not read simpo_gamma; remove it. It is read by simpo"),
        (DPORecipe, {"loss": "simpo", "reference": "precompute"}, "loss simpo does not read reference"),
        (DPORecipe, {"loss": "orpo", "reference_free": "True"}, "loss orpo does not read reference_free"),
        (DPORecipe, {"loss": "apo_zero", "reference_free": "True"}, "loss apo_zero does not read reference_free"),
        (DPORecipe, {"loss": "orpo", "chosen_nll_weight": "1"}, "loss orpo does not read chosen_nll_weight"),
        (DPORecipe, {"loss": "ipo_mean", "ld_alpha": "0.5"}, "loss ipo_mean does not read ld_alpha"),
        (DPORecipe, {"reference_free": "True", "reference": "precompute"}, "reference_free has no reference"),
        (DPORecipe, {"loss": "robust"}, "loss robust needs a label_smoothing above 0, for example 0.1"),
        (DPORecipe, {"loss": "exo_pair"}, "loss exo_pair needs a label_smoothing above 0, for example 1e-3"),
        (DPORecipe, {"ld_alpha": "1.5"}, "less than or equal to 1"),
        (DPORecipe, {"eval_only": "True", "replay_step": "3"}, "two ways not to train"),
    ],
)
def test_a_mistake_is_named(kind, values, message):
    with pytest.raises(ValueError, match=".*") as error:
        build_recipe(kind, SFT if kind is SFTRecipe else DPO, values)
    assert message in str(error.value)


def test_a_key_that_is_read_without_validations_may_be_given():
    for values in ({"eval_only": "True", "eval_iters": "2"}, {"benchmarks": "arc_easy", "benchmark_interval": "5"}):
        build_recipe(SFTRecipe, SFT, {"eval_interval": "0", **values})


def test_a_run_may_change_what_the_curve_does_not_depend_on_and_nothing_else():
    free = DPORecipe.keys_that_change("any time")
    assert {"out_dir", "max_tokens_per_gpu", "ds_config", "compile", "share_prompt", "reference", "eval_interval"} <= free
    assert not free & {"learning_rate", "seed", "global_batch_size", "dtype", "beta", "loss", "dpo_data_dir", "tokenizer", "max_iters"}
    assert SFTRecipe.keys_that_change("by extend") == {"max_iters", "epochs", "lr_decay_iters"}


def test_every_mistake_is_named_at_once():
    with pytest.raises(ValueError, match="max_iters.*\n.*learning_rate"):
        build_recipe(SFTRecipe, SFT, {"learning_rate": "fast", "max_iters": "x"})


def test_a_true_false_value_is_not_a_number():
    with pytest.raises(ValueError, match="not a true/false value"):
        build_recipe(SFTRecipe, {**SFT, "learning_rate": True}, {})


def test_yaml_reads_a_bare_on_as_true_and_the_recipe_takes_it_back():
    assert [build_recipe(SFTRecipe, {**SFT, "checks": value}, {}).checks for value in (True, False, "on")] == ["on", "off", "on"]


def test_the_command_line_replaces_the_other_way_to_say_the_same():
    recipe = build_recipe(SFTRecipe, SFT, {"epochs": "2", "batch_size": "4"})
    assert (recipe.epochs, recipe.max_iters, recipe.batch_size, recipe.global_batch_size) == (2.0, None, 4, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_iters: 3\nmax_iters: 4", "max_iters is set twice"),
        ("- a list", "should hold `key: value` lines"),
        ("max_iters: [", "not valid YAML"),
        ("max_itres: 3", "Did you mean max_iters?"),
    ],
)
def test_a_broken_recipe_file_is_named(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=".*") as error:
        load_recipe(SFTRecipe, "unused", [str(tmp_path / "recipe.yaml")])
    assert message in str(error.value)
    assert "recipe.yaml" in str(error.value)


def test_command_lines_that_are_not_key_value():
    for words in (["--max_iters"], ["--max_iters", "--seed=3"]):
        with pytest.raises(ValueError, match="--max_iters has no value; write --max_iters=VALUE"):
            load_recipe(SFTRecipe, "sft_qwen3_1.8b", words)
    words = ["--max_iters", "3", "--wandb_log", str(RECIPES[-1]), "--out_dir", "runs/x y"]
    recipe = load_recipe(SFTRecipe, "unused", words)
    assert (recipe.max_iters, recipe.wandb_log, recipe.out_dir) == (3, True, "runs/x y")
    with pytest.raises(FileNotFoundError, match=r"no recipe at nowhere\.yaml. Shipped"):
        load_recipe(SFTRecipe, "sft_qwen3_1.8b", ["nowhere.yaml"])
    assert load_recipe(SFTRecipe, "sft_qwen3_1.8b", ["--local_rank=3"]).epochs == 3


def test_what_the_command_line_switches_off_leaves_the_files_options_idle(tmp_path, capsys, monkeypatch):
    """Switching something off for once needs no edit of the file; what is idle within one place, or given beside it, stays a mistake."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**DPO, "sample_tokens": 9, "label_smoothing": 0.1, "wandb_log": True, "wandb_project": "mine"}))
    recipe = load_recipe(DPORecipe, "unused", [str(path), "--samples=0", "--loss=hinge", "--wandb_log=False"])
    assert (recipe.sample_tokens, recipe.label_smoothing, recipe.wandb_project) == (64, 0.0, "posttrain")  # as it will be recorded
    notes = capsys.readouterr().out.splitlines()
    expected = [("wandb_project", "wandb_log=False"), ("label_smoothing", "loss=hinge"), ("sample_tokens", "samples=0")]
    assert sorted(notes) == sorted(f"note: {name} of {path} is not read with {off}" for name, off in expected)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node-1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    load_recipe(DPORecipe, "unused", [str(path), "--samples=0", "--loss=hinge", "--wandb_log=False"])
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="sample_tokens would not be read with samples=0; remove it, or set samples"):
        load_recipe(DPORecipe, "unused", [str(path), "--samples=0", "--sample_tokens=9"])
    path.write_text(yaml.safe_dump({**DPO, "sample_tokens": 9, "samples": 0}))
    with pytest.raises(ValueError, match="sample_tokens would not be read with samples=0; remove it, or set samples"):
        load_recipe(DPORecipe, "unused", [str(path)])


def test_a_run_whose_last_steps_change_nothing_says_so():
    """As nanoGPT's configs are often copied: a cosine to 0 that ends before the run."""
    for values, expected in (
        (
            {"lr_decay_iters": 6},
            ["lr_decay_iters 6 is before the last step, 10, and min_lr is 0: the last 4 steps are made at"],
        ),
        ({"lr_decay_iters": 6, "min_lr": 1e-6}, []),
        ({"lr_decay_iters": 10}, []),
        ({}, []),
        ({"decay_lr": False}, []),
    ):
        recipe = build_recipe(SFTRecipe, {**SFT, "max_iters": 10, **values}, {})
        said = list(first_screen._warnings(recipe, 10, 1.0))
        assert len(said) == len(expected), said
        assert [text[: len(start)] for text, start in zip(said, expected, strict=True)] == expected
        assert (learning_rate(recipe, 7, 10) == 0) == bool(expected)


def test_a_cosine_that_does_not_come_to_its_end_is_said():
    recipe = build_recipe(SFTRecipe, {**SFT, "max_iters": 10, "lr_decay_iters": 12}, {})
    (said,) = first_screen._warnings(recipe, 10, 1.0)
    assert said == "lr_decay_iters 12 is after the last step, 10: the learning rate does not come down to min_lr"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in ("learning_rate", "weight_decay", "grad_clip", "epochs", "skip_spikes") for value in ("inf", "nan")),
        *(("learning_rate", "1e300"), ("epochs", "1e308"), ("max_iters", f"1{'0' * 30}"), ("watchdog_seconds", f"1{'0' * 30}")),
        *(("time_limit", "inf"), ("tokenizer", ""), ("checkpoint_path", "")),
    ],
)
def test_a_value_without_bounds_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=f"^{key}='?{value}"):
        build_recipe(SFTRecipe, SFT | {"max_iters": 10} if key != "epochs" else SFT, {key: value})


def test_a_recipe_of_the_other_kind_is_told_from_a_misspelt_one(tmp_path):
    for mine, values, other in ((SFTRecipe, DPO, "dpo"), (DPORecipe, SFT, "sft")):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        with pytest.raises(ValueError, match=f"recipe.yaml is a recipe of {other.upper()}, not of .*posttrain/{other}.py {path}"):
            load_recipe(mine, "unused", [str(path)])


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_a_key_of_another_trainer_is_translated(name):
    with pytest.raises(ValueError, match=f"unknown key '{name}'. (Here it|That) is ") as error:
        build_recipe(SFTRecipe, SFT, {name: "1"})
    told = str(error.value)
    known = {*SFTRecipe.model_fields, *DPORecipe.model_fields, "--max_length", "--template", "--val_size"}
    assert name not in known
    if "That is" in told:
        assert re.search("That is (missing|not needed|not a key): ", told)
    else:
        assert told.partition("Here it is ")[2].split()[0].strip(".,;").partition("=")[0] in known


def test_help_lists_every_key_with_its_meaning():
    for kind in (SFTRecipe, DPORecipe):
        text = help_text(kind, f"{kind.kind}_qwen3_1.8b")
        for name, field in kind.model_fields.items():
            assert f"--{name}=" in text
            assert field.description in text
