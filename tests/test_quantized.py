"""Weights saved as FP8 or MXFP4 are multiplied out once, on loading, exactly; what transformers would get wrong is refused."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from conftest import launch, metrics
from test_model_folders import config_with, configure, put, state, with_tensors

from posttrain.model.forms import find_model
from posttrain.model.loading import load_model

SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"head_dim": 8, "max_position_embeddings": 256}
BLOCK = [16, 8]  # rows and columns that share a scale
Q_PROJ = "model__layers__0__self_attn__q_proj__weight"


@pytest.fixture(scope="module")
def fp8(tiny, tmp_path_factory) -> Path:
    """A folder as Qwen3's FP8 ones: linear layers in blocks, the rest in the dtype that it was saved in."""
    folder = tmp_path_factory.mktemp("fp8")
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL, vocab_size=len(tiny.tokenizer), initializer_range=0.2))
    model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    shutil.copytree(folder, folder / "multiplied_out")
    saved, plain = state(folder), state(folder)
    for name in [name for name in saved if name.endswith("proj.weight")]:
        rows, columns = (size // one for size, one in zip(saved[name].shape, BLOCK, strict=True))
        scale = 2.0 ** torch.randint(-9, -5, (rows, columns))
        spread = scale.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)
        saved[name] = (saved[name] / spread).to(torch.float8_e4m3fn)
        saved[f"{name}_scale_inv"], plain[name] = scale, saved[name].float() * spread
    put(folder, saved)
    put(folder / "multiplied_out", plain)
    configure(folder, quantization_config={"quant_method": "fp8", "weight_block_size": BLOCK, "activation_scheme": "dynamic"})
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_is_multiplied_out_exactly_and_never_written_again(fp8, dtype, tmp_path):
    told: list[str] = []
    model = load_model(str(fp8), dtype, "", told.append)
    assert told == [f"its weights are FP8: they are multiplied out to {str(dtype)[6:]}, and never rounded to FP8 again"]
    expected = state(fp8 / "multiplied_out")
    model.save_pretrained(tmp_path)
    for tensors in (model.state_dict(), state(tmp_path)):
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            assert tensor.dtype == dtype and torch.equal(tensor, expected[name].to(dtype)), name
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_fp8_with_one_scale_for_a_weight_and_one_for_what_enters(fp8, tmp_path):
    """As Mistral's own FP8 models are saved."""
    folder = tmp_path / "base"
    shutil.copytree(fp8, folder)
    saved = state(fp8)
    for name in [name for name in saved if name.endswith("_scale_inv")]:
        saved[name], saved[name.replace("weight_scale_inv", "activation_scale")] = torch.tensor(0.125), torch.tensor(3.0)
    put(folder, saved)
    configure(folder, quantization_config={"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"})
    model = load_model(str(folder), torch.float32, "")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved[name].float() * (0.125 if f"{name}_scale_inv" in saved else 1)), name


def test_mxfp4_is_multiplied_out_exactly(tiny, tmp_path):
    """As gpt-oss is saved: two numbers of 4 bits in a byte, 32 of them with one exponent."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(**SMALL, vocab_size=len(tiny.tokenizer), num_local_experts=2, num_experts_per_tok=1)
    transformers.GptOssForCausalLM(config).save_pretrained(tmp_path)
    saved, expected = state(tmp_path), {}
    for name in [name for name in saved if name.endswith("_proj") and ".experts." in name]:
        experts, wide, outputs = saved.pop(name).shape
        blocks = torch.randint(0, 256, (experts, outputs, wide // 32, 16), dtype=torch.uint8)
        exponents = torch.randint(120, 128, (experts, outputs, wide // 32), dtype=torch.uint8)
        bits = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).int()
        exponent, half = bits >> 1 & 3, (bits & 1) / 2
        sizes = torch.where(exponent == 0, half, (1 + half) * 2.0 ** (exponent - 1)) * (1 - 2 * (bits >> 3))
        expected[name] = (sizes * 2.0 ** (exponents.int() - 127)[..., None]).flatten(-2).transpose(1, 2)
        saved[f"{name}_blocks"], saved[f"{name}_scales"] = blocks, exponents
    put(tmp_path, saved)
    configure(tmp_path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]})
    model = load_model(str(tmp_path), torch.bfloat16, "").state_dict()
    assert len(expected) == 4 and all(torch.equal(model[name].float(), tensor) for name, tensor in expected.items())
    assert {tensor.dtype for tensor in model.values()} == {torch.bfloat16}
    put(tmp_path, {name: tensor for name, tensor in saved.items() if not name.endswith("1.mlp.experts.down_proj_scales")})
    with pytest.raises(ValueError, match="not whole: .*down_proj_blocks is MXFP4, and .*down_proj_scales, .* is missing"):
        find_model(str(tmp_path), "")


def without_scale(folder: Path) -> None:
    put(folder, {name: tensor for name, tensor in state(folder).items() if not name.endswith("1.mlp.up_proj.weight_scale_inv")})


REFUSED = {
    # 32 rows in 4 blocks are 8 for transformers, whatever config.json says
    "smaller blocks": (with_tensors(**{f"{Q_PROJ}_scale_inv": torch.ones(4, 4)}), "q_proj.weight, of .32, 32. with .4, 4. scales"),
    "a last block that is smaller": (
        config_with(quantization_config={"quant_method": "fp8", "weight_block_size": [20, 8]}),
        "whole blocks",
    ),
    "a lacking scale": (without_scale, "not whole: .*1.mlp.up_proj.weight is FP8, and .*weight_scale_inv.* is missing"),
    "no size of a block": (config_with(quantization_config={"quant_method": "fp8"}), "weight_block_size None, .* is .2, 4."),
    "another form": (
        with_tensors(**{"model__layers__0__self_attn__q_proj__qweight": torch.ones(4)}),
        "quantized .its weights hold .*qweight",
    ),
    "bytes": (with_tensors(**{Q_PROJ: torch.ones(32, 32, dtype=torch.int8)}), "quantized .its weights hold .*q_proj.weight, I8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_multiplied_out_wrongly_is_refused(case, fp8, tmp_path):
    change, refused = REFUSED[case]
    folder = tmp_path / "base"
    shutil.copytree(fp8, folder)
    change(folder)
    with pytest.raises(ValueError, match=refused):
        find_model(str(folder), "")


def test_a_run_from_fp8_is_the_run_from_its_values(fp8, tiny, tmp_path):
    """On two ranks at ZeRO-3, and final/ is a model like any other."""
    curves = []
    for base in (fp8, fp8 / "multiplied_out"):
        paths = [f"--checkpoint_path={base}", f"--sft_data_dir={tiny.sft}", f"--out_dir={tmp_path}/{base.name}"]
        numbers = ["--max_iters=3", "--global_batch_size=16", "--warmup_iters=0", "--dtype=float32", "--max_tokens_per_gpu=300"]
        done = launch("posttrain/sft.py", *paths, *numbers, "--ds_config=ds_configs/zero3.json", "--eval_interval=0")
        assert done.returncode == 0, done.stdout
        assert ("multiplied out to float32" in done.stdout) == (base == fp8)
        curves.append([[row["loss"], row["grad_norm"]] for row in metrics(tmp_path / base.name)])
    assert curves[0] == curves[1]
    final = tmp_path / fp8.name / "final"
    assert {tensor.dtype for tensor in safetensors.torch.load_file(final / "model.safetensors").values()} == {torch.float32}
    assert "quantization_config" not in json.loads((final / "config.json").read_text())
