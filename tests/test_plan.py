"""The planner: what it says beside what was measured, and what it refuses."""

import json
import re
import subprocess

import pytest
import torch
from conftest import ROOT, launch, python
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3Config, Qwen3Config

from benchmarks import fake_world
from benchmarks.plan import CONFIGURATIONS, name
from benchmarks.sft import QWEN3_1_7B
from benchmarks.tiny_models import tiny_config
from posttrain.data.packing import RowBuilder
from posttrain.data.parts import IGNORE
from posttrain.operators.heads import heads_of
from posttrain.operators.logprob import Way
from posttrain.planning.activations import count_working
from posttrain.planning.machines import GPUS, find_gpu
from posttrain.planning.memory import Layout, Parts, Working, Zero, peak
from posttrain.planning.shapes import SHAPES, assumed_shape
from posttrain.planning.work import read_model_shape
from posttrain.recipes.keys import SFTRecipe
from posttrain.recipes.reading import build_recipe

RESULTS = ROOT / "benchmarks" / "results"
BF16 = torch.bfloat16


def rows(count: int, length: int, trained: int):
    builder = RowBuilder()
    for _ in range(count):
        builder.add_sequence([1] * length, [IGNORE] * (length - trained) + [1] * trained)
    return builder.build()


@pytest.mark.slow
def test_memory_is_what_an_h200_was_seen_to_take():
    """SFT of 1.7B parameters, 16 rows of 1,950 tokens in a micro-batch, measured by benchmarks/sft.py --race gpu."""
    measured = json.loads((RESULTS / "sft_gpu.json").read_text())["summary"]["ours_compile"]["peak_mb"]
    config = Qwen3Config(**QWEN3_1_7B, tie_word_embeddings=True)
    with torch.device("meta"):
        count = AutoModelForCausalLM.from_config(config).num_parameters()
    working = count_working(config, rows(16, 1950, 1910), BF16, "none", fused=True, head=Way(compiled=True))
    planned = peak(count, count, Layout(Zero(1), 1, BF16, on_gpu=True), working, working, has_reference=False).total
    kept_then = 2 * count  # all gradients in bfloat16, which ZeRO-1 then kept beside those in float32
    assert (planned + kept_then) / 2**20 == pytest.approx(measured, rel=0.035)


@pytest.mark.slow
def test_the_peak_of_a_large_vocabulary_is_not_taken_for_that_of_the_layers():
    """With few layers the embedding's gradients take the most, with many the layers': memory must grow with them all the same."""
    wide = Qwen3Config(**{**QWEN3_1_7B, "num_hidden_layers": 4}, tie_word_embeddings=True)
    deep = Qwen3Config(**QWEN3_1_7B, tie_word_embeddings=True)
    few, many = (count_working(config, rows(1, 2000, 1000), BF16, "none", fused=True).most for config in (wide, deep))
    per_layer = 2 * 2000 * (4 * 2048 + 2 * 6144)  # what a layer at least keeps: its inputs, and those of its products
    assert many - few > 20 * per_layer


def test_six_runs_came_within_the_bounds():
    """Memory within 10 %, time within 20 %."""
    results = json.loads((RESULTS / "plan_cpu.json").read_text())["configurations"]
    assert set(results) == {name(*one) for one in CONFIGURATIONS}
    for one, result in results.items():
        assert abs(result["predicted"]["peak_mb"] / result["measured"]["peak_mb"] - 1) < 0.10, one
        assert abs(result["predicted"]["step_seconds"] / result["measured"]["step_seconds"] - 1) < 0.20, one


@pytest.mark.slow
def test_rank_0_of_many_gpus_holds_and_sends_what_is_predicted():
    """As benchmarks/fake_world.py has measured; after a change to the planner `python benchmarks/fake_world.py --predict` is due."""
    cases = json.loads((RESULTS / "fake_world.json").read_text())["cases"]
    assert list(cases) == [fake_world.name(*case) for case in fake_world.CASES]
    for case in fake_world.CASES:
        assert cases[fake_world.name(*case)] == fake_world.row(case, cases[fake_world.name(*case)]["measured"], fake_world.predict(*case))
    for one, result in cases.items():
        assert -0.001 < result["memory_gb_off_by"] < 0.04, one
        assert -0.001 < result["sent_gb_off_by"] < 0.11, one


@pytest.mark.slow
@pytest.mark.parametrize(("ds_config", "most_sent"), [("zero1", 0.001), ("zero3", 0.15)])
def test_rank_0_of_eight_gpus_holds_and_sends_what_is_predicted_today(ds_config, most_sent, tmp_path):
    """With six of a 7B model's layers, of which ZeRO-3 keeps a larger part gathered than of all."""
    SHAPES["7b"]._replace(depth=6).config().save_pretrained(tmp_path)
    case = 8, ds_config, str(tmp_path)
    result = fake_world.row(case, fake_world.measure_apart(*case), fake_world.predict(*case))
    assert -0.001 < result["memory_gb_off_by"] < 0.01, result
    assert -0.001 < result["sent_gb_off_by"] < most_sent, result


SHAPE = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


@pytest.fixture(scope="module")
def small():
    return Qwen3Config(**SHAPE, num_hidden_layers=6, max_position_embeddings=2048)


def test_what_a_gpu_takes_does_not_depend_on_this_machines_cpu(small, cpu_has_bfloat16):
    here = count_working(small, rows(4, 250, 200), BF16, "none", fused=True)
    for has in (True, False):
        cpu_has_bfloat16(has)
        assert count_working(small, rows(4, 250, 200), BF16, "none", fused=True) == here


@pytest.mark.parametrize("fused", [False, True])
def test_recomputing_more_takes_less(small, fused):
    none, selective, full = (count_working(small, rows(4, 250, 20), BF16, mode, fused)[0] for mode in ("none", "selective", "full"))
    assert none > 1.2 * selective > 1.4 * full


def test_activations_grow_with_layers_and_tokens(small):
    deeper = Qwen3Config(**{**small.to_dict(), "num_hidden_layers": 12, "layer_types": None})
    one, two, longer = (
        count_working(config, rows(count, 250, 20), BF16, "none", fused=False)[0] for config, count in ((small, 4), (deeper, 4), (small, 8))
    )
    assert 1.7 < two / one < 2
    assert 1.9 < longer / one < 2.1


def test_a_model_with_a_frozen_parameter_is_counted():
    """The bias of Ernie 4.5's router is one."""
    experts = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 0}
    config = AutoConfig.for_model("ernie4_5_moe", **SHAPE, num_hidden_layers=2, moe_layer_end_index=1, **experts)
    with torch.device("meta"):
        assert not all(one.requires_grad for one in AutoModelForCausalLM.from_config(config).parameters())
    assert count_working(config, rows(4, 250, 20), BF16, "none", fused=False)[0] > 0


def test_heads_of_two_widths_are_counted_by_what_they_attend_to():
    """Their segments were read where tensors have no values: whatever lay in memory was taken for lengths."""
    config = DeepseekV3Config(
        **{"vocab_size": 500, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
        },
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 2, "n_group": 1},
        topk_group=1,
    )
    few, many = (count_working(config, rows(count, 250, 20), BF16, "none", fused=False).most for count in (2, 4))
    assert 1.5 * few < many < 2.5 * few < 1e9


def test_each_kind_of_layer_is_counted_as_often_as_there_are_such():
    """Qwen3-Next's linear attention keeps more than its full attention does; by any one kind the model would be misjudged."""
    shape = {
        "vocab_size": 500,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    shape |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
    shape |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    linear, full = ["linear_attention"], ["full_attention"]
    most = {}
    for kinds in (linear * 4, full * 4, (linear + full) * 2):
        config = AutoConfig.for_model("qwen3_next", **shape, num_hidden_layers=4, layer_types=kinds)
        most[tuple(kinds)] = count_working(config, rows(4, 250, 20), BF16, "none", fused=False).most
    first, second, mixed = most.values()
    assert first > 1.2 * second
    assert mixed == pytest.approx((first + second) / 2, rel=0.1)


@pytest.mark.parametrize(
    ("kind", "heads"),
    [
        ("gemma4_text", {(4, 2, 8), (4, 2, 16)}),  # wider in some layers
        ("mamba2", set()),
        ("qwen2_5_vl", {(4, 2, 8)}),  # whose text part has no class of its own
        ("mixtral", {(4, 2, 8)}),  # experts, of which torch's own operator has shapes for bfloat16 only
    ],
)
def test_models_of_every_kind_are_counted(kind, heads):
    config = tiny_config(kind, 100)
    assert {*heads_of(config.get_text_config())} == heads
    little, much = (count_working(config, rows(count, 50, 20), torch.float32, "none", fused=False).most for count in (2, 8))
    assert 0 < little < much / 2


def on_8_gpus(zero: Zero, count: int, has_reference: bool = False) -> Parts:
    """Memory without activations."""
    none = Working(0, 0)
    return peak(count, count // 20, Layout(zero, 8, BF16, on_gpu=True), none, none, has_reference)


def test_what_is_sharded_shrinks_with_ranks():
    count = 8_000_000_000
    totals = {stage: on_8_gpus(Zero(stage), count) for stage in range(4)}
    assert totals[0].total > totals[1].total > totals[2].total > totals[3].total
    assert totals[0].weights + totals[0].optimizer == 14 * count
    assert totals[1].optimizer == 12 * count / 8
    assert totals[2].gradients == 4 * count / 8
    assert totals[3].weights == 2 * count / 8
    # ZeRO-1 in bfloat16 sends the sums of all gradients at once, whatever the bucket
    assert totals[1].activations == 2 * count
    assert on_8_gpus(Zero(1, offload_optimizer=True), count).gradients == 4 * count  # by another optimizer, which keeps none in bfloat16
    assert on_8_gpus(Zero(3), count, has_reference=True).reference > 2 * count / 8


@pytest.mark.slow
def test_bytes_sent_are_those_of_the_collectives_of_a_step(tiny, tmp_path):
    done = launch("tests/sent.py", tiny.folder, tmp_path / "sent.json")
    assert done.returncode == 0, done.stdout
    for way, result in json.loads((tmp_path / "sent.json").read_text()).items():
        assert result["planned"] == pytest.approx(sum(result["counted"].values()), rel=0.02), (way, result)


def plan(*arguments: str) -> subprocess.CompletedProcess:
    return python("posttrain/plan.py", *arguments, cwd="/")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "least"), [("sft", 20), ("dpo", 60)])
def test_the_default_recipes_on_eight_b200(kind, least):
    done = plan(f"{ROOT}/posttrain/recipes/{kind}_qwen3_1.8b.yaml")
    assert done.returncode == 0, done.stdout
    assert "assumed Qwen3-1.7B's shape, 1,720,574,976 parameters" in done.stdout
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("zero")]
    assert [line[0] for line in lines] == [f"zero{stage}" for stage in range(4) for _ in range(3)] + ["zero3_offload"]
    for line in lines:  # parts add up to the total
        assert sum(map(float, line[2:9])) == pytest.approx(float(line[9]), abs=0.4)
    assert "--ds_config=ds_configs/zero1.json --activation_checkpointing=none" in done.stdout
    if kind == "sft":  # the first column of a table in ds_configs/README.md
        table = dict(re.findall(r"^\| (\w+)\.json \| (\d+ / \d+) \|", (ROOT / "ds_configs" / "README.md").read_text(), re.M))
        totals = {(line[0], line[1]): f"{float(line[9]):.0f}" for line in lines}
        for stage in ("zero0", "zero1", "zero2", "zero3"):
            assert table[stage] == f"{totals[stage, 'none']} / {totals[stage, 'full']}"


@pytest.mark.slow
def test_a_model_that_does_not_fit_is_told_so():
    done = plan(f"{ROOT}/posttrain/recipes/sft_qwen3_1.8b.yaml", "--model=70b", "--gpu_memory=24", "--gpus=2")
    assert done.returncode == 0, done.stdout
    assert "on 2 x GPU with 24 GB (assumed as fast as" in done.stdout
    assert "does not fit" in done.stdout
    assert "nothing fits into" in done.stdout


@pytest.mark.slow
def test_this_machine_and_the_data_that_is_there(tiny, tmp_path):
    recipe = tmp_path / "dpo.yaml"
    keys = {"sft_checkpoint_path": tiny.base, "dpo_data_dir": tiny.dpo, "out_dir": "run", "epochs": 2, "global_batch_size": 8}
    recipe.write_text("".join(f"{key}: {value}\n" for key, value in keys.items()))
    done = plan(str(recipe), "--gpus=2", "--gpu=here")
    assert done.returncode == 0, done.stdout
    assert f"{tiny.dpo}: 33 examples" in done.stdout
    assert "run       10 steps of 8 examples on 2 x" in done.stdout
    assert "layers and engines were timed here" in done.stdout
    assert "zero3_offload" not in done.stdout  # there is no GPU to offload from


@pytest.mark.parametrize(
    ("name", "known", "gib", "tflops"),
    [
        ("rtx4090", "RTX 4090", 24, 165),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", 24, 165),
        ("4070tisuper", "RTX 4070 Ti SUPER", 16, 88),
        ("NVIDIA H100 80GB HBM3", "H100", 80, 989),
        ("NVIDIA H100 PCIe", "H100 PCIe", 80, 756),
        ("a100-40gb", "A100 with 40 GB", 40, 312),
        ("NVIDIA A100-SXM4-80GB", "A100", 80, 312),
        ("NVIDIA GH200 480GB", "GH200", 96, 989),
        ("NVIDIA GH200 120GB", "GH200", 96, 989),
        ("rtx 3080 12gb", "RTX 3080 with 12 GB", 12, 60),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada", 48, 364),
        ("NVIDIA RTX A6000", "RTX A6000", 48, 155),
    ],
)
def test_a_gpu_is_known_by_the_names_that_people_and_drivers_give_it(name, known, gib, tflops):
    device = find_gpu(name)
    assert (device.name, round(device.peak / 1e12)) == (known, tflops)
    assert device.memory / 2**30 == pytest.approx(gib, rel=0.02)


def test_every_known_gpu_is_found_by_its_own_name():
    for device in GPUS.values():
        assert find_gpu(device.name) is device


@pytest.mark.parametrize("name", ["RTX 4090 Laptop GPU", "V100", "100", ""])
def test_another_gpu_is_not_taken_for_a_known_one(name):
    with pytest.raises(ValueError, match="--gpu_memory=24"):
        find_gpu(name)


@pytest.mark.parametrize(
    ("path", "size"),
    [("Qwen/Qwen3-8B-Base", "8b"), ("runs/sft_qwen3_1.8b/final", "1.8b"), ("checkpoints/llama-7b/run_2b", "error"), ("my/base", "error")],
)
def test_the_shape_that_is_assumed_is_of_the_size_in_the_models_name(path, size):
    recipe = build_recipe(SFTRecipe, {"out_dir": "run", "checkpoint_path": path, "sft_data_dir": "data", "global_batch_size": 8}, {})
    if size == "error":
        with pytest.raises(ValueError, match=r"say which shape to assume with --model=0\.6b"):
            read_model_shape(recipe, None)
    else:
        assert read_model_shape(recipe, None)[0].to_dict() == SHAPES[size].config().to_dict()


def test_no_shape_is_assumed_for_something_else_that_is_there(tmp_path):
    run = tmp_path / "llama-8b"
    run.mkdir()
    (run / "run.json").touch()
    recipe = build_recipe(SFTRecipe, {"out_dir": "run", "checkpoint_path": str(run), "sft_data_dir": "x", "global_batch_size": 8}, {})
    with pytest.raises(FileNotFoundError, match="found a run without a result yet"):
        assumed_shape(recipe, None)


def test_the_size_of_a_mixture_of_experts_is_not_taken_for_a_dense_models():
    recipe = build_recipe(
        SFTRecipe, {"out_dir": "run", "checkpoint_path": "Qwen3-30B-A3B", "sft_data_dir": "x", "global_batch_size": 8}, {}
    )
    with pytest.raises(ValueError, match="mixture of experts"):
        read_model_shape(recipe, None)


MISTAKES = {
    "--gpus=0": "should be at least 1, saw 0 and 1",
    "--gpu=here --nodes=2": "times this machine alone, saw --nodes=2",
    "--gpu=z9": "give its memory instead: --gpu_memory=24 (GB). Known: B300",
    "--gpu=here --gpu_memory=24": "times this machine alone, saw --gpu_memory=24",
    "--gpu_memory=24000": "should be the GB of one GPU, saw 24000",
    "--checkpoint_path=my/base": "and its name does not say its size. Download it first, or say which shape to assume with --model=0.6b",
    "--max_tokens_per_gpu=100": "the longest example has 2,048 tokens, more than max_tokens_per_gpu=100",
    "--learning_rat=1": "Did you mean learning_rate?",
}


@pytest.mark.slow
@pytest.mark.parametrize("argument", MISTAKES)
def test_a_mistake_gets_one_message(argument):
    done = plan(f"{ROOT}/posttrain/recipes/sft_qwen3_1.8b.yaml", *argument.split())
    assert done.returncode != 0
    assert MISTAKES[argument] in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.slow
def test_a_recipe_that_is_no_yaml_gets_one_message(tmp_path):
    (tmp_path / "cut.yaml").write_text("out_dir: [runs,\n")
    done = plan(f"{tmp_path}/cut.yaml")
    assert done.returncode != 0
    assert "cut.yaml is not valid YAML" in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.slow
def test_a_shape_is_not_assumed_for_a_model_that_is_there(tiny):
    done = plan(f"{ROOT}/posttrain/recipes/sft_qwen3_1.8b.yaml", "--model=8b", f"--checkpoint_path={tiny.base}")
    assert done.returncode == 2
    assert "--model=8b would not be read" in done.stdout
