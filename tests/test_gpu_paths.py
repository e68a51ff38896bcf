"""What a GPU would run or choose, as far as that can be told without one."""

import os
import re
import subprocess
import sys
import types

import cpu_kernels
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, free_port, launch, metrics, rank_environment
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM

from posttrain.common import gpus, terminal
from posttrain.data.packing import RowBuilder
from posttrain.engine.devices import Gpu, crowded, problems_of
from posttrain.engine.start import settle_allocator, share_cores, start_distributed
from posttrain.model.policy import build_policy, fastest_policy
from posttrain.objectives.likelihood import SFT
from posttrain.objectives.preference import DPO
from posttrain.operators import attention, attention_segments, layers, logprob
from posttrain.operators.attention_segments import SEGMENTS, _attend_anywhere, attend_segments
from posttrain.operators.attention_varlen import VARLEN, attend_varlen
from posttrain.parallel.launched import take_gpu
from posttrain.planning.activations import LiveBytes
from posttrain.recipes.keys import SFTRecipe
from posttrain.recipes.reading import build_recipe
from posttrain.training.out_of_memory import smaller, too_little_memory


def pairs(share_prompt: bool):
    builder = RowBuilder()
    for prompt, chosen, rejected in (([1, 2, 3], [4, 5], [6, 7, 8, 9]), ([1], [2], [3]), ([1, 2], [3, 4, 5], [6])):
        builder.add_pair(prompt, chosen, rejected, share_prompt)
    return builder.build()


def test_the_trial_of_a_layer_takes_memory_in_proportion_to_its_rows(monkeypatch):
    """By the square of its rows, it failed on every GPU for want of memory, and liger-kernel's layers were passed over for that."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=99))
    anywhere = lambda *inputs: (_attend_anywhere(*inputs[:5], 0.0),)  # noqa: E731
    monkeypatch.setattr(attention_segments, "attend_on_cpu", anywhere)
    most = []
    for rows in (1000, 4000):
        live = LiveBytes()
        with live, sdpa_kernel(SDPBackend.MATH):  # as for float32 and grouped heads on a GPU
            layers.trial(model, model.base_model.layers[0], rows, model.device)
        most.append(live.most)
    assert most[1] < 5 * most[0]
    assert model.config._attn_implementation == "sdpa"


def test_float32_and_masks_get_expanded_heads(monkeypatch):
    """torch has no fast kernel for grouped heads but flash attention's, which takes neither."""
    attend, seen = F.scaled_dot_product_attention, []

    def noted(query, key, value, **settings):
        fast = query.dtype == torch.bfloat16 and settings["attn_mask"] is None
        seen.append((fast, settings["enable_gqa"], query.shape[1] == key.shape[1]))
        return attend(query, key, value, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    outputs = {}
    for dtype in (torch.float32, torch.bfloat16):
        for share_prompt in (False, True):
            packing, draw = pairs(share_prompt).packing, torch.Generator().manual_seed(0)
            rows = int(packing.segments[-1, 1])
            query, key, value = (torch.randn(1, heads, rows, 8, generator=draw).to(dtype) for heads in (6, 2, 2))
            grouped = _attend_anywhere(query, key, value, packing.segments, 0.3, 0.0)
            expanded = [x.repeat_interleave(3, 1) for x in (key, value)]
            outputs[dtype, share_prompt] = grouped, _attend_anywhere(query, *expanded, packing.segments, 0.3, 0.0)
    assert {(fast, gqa, same) for fast, gqa, same in seen} == {(True, True, False), (True, False, True), (False, False, True)}
    for grouped, expanded in outputs.values():
        torch.testing.assert_close(grouped, expanded)


CPU = torch.device("cpu")


@pytest.fixture
def flash_attention():
    with cpu_kernels.flash_attention():
        yield


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, attention.SAME)])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_one_call_for_all_segments_equals_grouped_calls(flash_attention, kv_heads, dtype, limit):
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=kv_heads)
    expected, seen = (attention.trial(function, config, CPU, dtype) for function in (attend_segments, attend_varlen))
    assert layers.distances(expected, seen).max() < limit


def test_windows_and_shared_prompts_are_those_of_every_score_in_memory(flash_attention):
    """Also chunks, which cut the segments; and what the kernel lacks is refused, so that another is taken."""
    packing, draw = pairs(share_prompt=True).packing, torch.Generator().manual_seed(0)
    rows = int(packing.segments[-1, 1])
    inputs = [torch.randn(1, heads, rows, 8, generator=draw) for heads in (4, 2, 2)]
    chunked = types.SimpleNamespace(config=types.SimpleNamespace(layer_types=["chunked_attention"], attention_chunk_size=4), layer_idx=0)
    for module, asked in ((None, {"sliding_window": 1}), (None, {"sliding_window": 3}), (None, {"sliding_window": 99}), (chunked, {})):
        expected, seen = (one(module, *inputs, None, 0.3, packing, **asked)[0] for one in (attend_segments, attend_varlen))
        torch.testing.assert_close(seen, expected)
    for asked in ({"softcap": 2.0}, {"s_aux": torch.zeros(4)}):
        with pytest.raises(ValueError, match="its attention has sinks or bounds its scores"):
            attend_varlen(None, *inputs, None, 0.3, packing, **asked)
    config = GptOssConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8
    )
    policy = build_policy(GptOssForCausalLM(config).eval(), VARLEN, checks=True)
    assert policy.way.attention == SEGMENTS
    assert policy.why_slower.startswith(f"not {VARLEN}: its attention has sinks")


def test_one_call_for_all_segments_is_traced_whole(flash_attention):
    """A break in the graph there would be one in every decoder layer that is compiled."""
    torch.compiler.reset()
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    compiled = torch.compile(attend_varlen, fullgraph=True, backend="aot_eager")
    expected, seen = (attention.trial(function, config, CPU, torch.float32) for function in (attend_varlen, compiled))
    assert layers.distances(expected, seen).max() < 1e-5


def test_pairs_with_shared_prompts_are_those_with_a_prompt_each(flash_attention):
    """With the attention of GPUs, through a model: log-probs and all gradients."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    outcomes = []
    for share_prompt in (False, True):
        torch.manual_seed(0)
        policy = fastest_policy(LlamaForCausalLM(LlamaConfig(**shape, vocab_size=99)).eval(), VARLEN)
        logps = policy(pairs(share_prompt))
        (logps * torch.arange(len(logps))).sum().backward()
        outcomes.append([logps.detach(), *(parameter.grad for parameter in policy.parameters())])
    torch.testing.assert_close(*outcomes)


def test_a_loss_asks_for_no_values():
    """Each value that is asked for lets a GPU stand idle until all that was queued is done."""
    asked = {"loss": "sigmoid", "beta": 0.1, "chosen_nll_weight": 0.5}
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        batch = pairs(share_prompt=True)
        batch = batch._replace(
            **{name: fake.from_tensor(value) for name, value in batch._asdict().items() if isinstance(value, torch.Tensor)},
            reference_sums=torch.zeros(6, 2, dtype=torch.float64),
        )
        for objective, totals in ((SFT(logps), {"tokens": 9}), (DPO(logps, logps, **asked), {"tokens": 9, "pairs": 3})):
            share, sums = objective.loss(batch, totals)
            share.backward()
            assert not sums["nll"].requires_grad


def logps(batch) -> torch.Tensor:
    return torch.zeros(len(batch.targets), requires_grad=True)


@pytest.mark.slow
def test_the_gpus_that_were_given_to_a_run_are_those_that_it_takes(tmp_path):
    """DeepSpeed's launcher takes the first ones of the machine instead, which may be another's."""
    script = tmp_path / "see.py"
    script.write_text(
        "import os\nfrom posttrain.parallel.script import run_script\n"
        # in one piece: that of print, which -u leaves unbuffered, others' lines come between
        "run_script(lambda: os.write(1, f\"rank {os.environ['RANK']} of {os.environ['CUDA_VISIBLE_DEVICES']}\\n\".encode()))\n"
    )
    command = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), str(script)]
    environment = rank_environment() | {"CUDA_VISIBLE_DEVICES": "5,4", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200)
    assert done.returncode == 0, done.stdout
    assert "rank 0 of 5,4" in done.stdout and "rank 1 of 5,4" in done.stdout, done.stdout
    assert done.stdout.count("note: CUDA_VISIBLE_DEVICES=5,4 is kept, which deepspeed --num_gpus would ignore") == 1


DRIVERS = {
    "a container without GPUs": ("version", None, "13.0", "sees no GPU: start the container with --gpus all"),
    "a build without CUDA": ("version", "control", None, "is a build without CUDA: rm -r .venv"),
    "an old driver": ("version", "control", "13.0", "cannot use its GPUs (too old a driver). Take a newer driver"),
    "no version": (None, "control", "13.0", "an NVIDIA driver, but torch"),
}


@pytest.mark.parametrize("machine", DRIVERS)
def test_gpus_that_cannot_be_used_are_not_passed_over_in_silence(tmp_path, monkeypatch, machine):
    version, control, cuda, expected = DRIVERS[machine]
    monkeypatch.setattr(gpus, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(gpus, "CONTROL", tmp_path / "control")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "init", too_old)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert gpus.why_unusable() is None
    for name in filter(None, (version, control)):
        (tmp_path / name).write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n")
    with pytest.raises(ValueError, match=re.escape(expected)) as error:
        start_distributed()
    assert ("driver (535.104.05), but" in str(error.value)) == bool(version)
    assert str(error.value).endswith("To train on the CPU all the same: export DS_ACCELERATOR=cpu")
    said = []
    monkeypatch.setattr(terminal, "say", said.append)
    assert gpus.usual_device() == "cpu"
    assert said[0].startswith("warning: the CPU computes, since this machine has an NVIDIA driver")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus.why_unusable() is None


def too_old() -> None:
    raise RuntimeError("too old a driver")


@pytest.mark.parametrize(
    ("visible", "device", "expected"),
    [("", "cuda:1", ("cuda", "1")), ("6,GPU-1a", "cuda:1", ("cuda", "GPU-1a")), ("6", "cuda", ("cuda", "6")), ("6", "cpu", ("cpu", "6"))],
)
def test_a_server_sees_only_the_gpu_that_it_is_given(monkeypatch, visible, device, expected):
    """Its cache was sized by the free memory of GPU 0."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert (take_gpu(device), os.environ["CUDA_VISIBLE_DEVICES"]) == expected


@pytest.mark.parametrize("device", ["cuda:2", "cuda:-1", "cuda:x"])
def test_a_gpu_that_is_not_among_the_visible_ones_is_refused(monkeypatch, device):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    with pytest.raises(ValueError, match=f"--device {device} names no GPU; expected cuda or cuda:N, with N from 0 to 1, of"):
        take_gpu(device)


def test_cores_are_shared_by_the_ranks_of_a_machine(monkeypatch):
    """With GPUs, too: eight ranks whose optimizer is offloaded took every core each."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)))
    try:
        share_cores(8)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


GIB = 2**30


@pytest.mark.parametrize(
    ("gpus", "problem", "warning"),
    [
        ([Gpu("a", "H100", 80 * GIB, 79 * GIB)] * 8, None, None),
        (
            [Gpu("a", "H100", 80 * GIB, 79 * GIB)] * 8 + [Gpu("b", "A100", 40 * GIB, 39 * GIB)] * 8,
            "of 2 kinds: H100 (ranks 0, 1, 2, 3, 4, 5, 6, 7 on a); A100 (ranks 8, 9, 10, 11, 12, 13, 14, 15 on b)",
            None,
        ),
        (
            [Gpu("a", "H100", 80 * GIB, 79 * GIB), Gpu("a", "H100", 80 * GIB, 3 * GIB), Gpu("b", "H100", 80 * GIB, GIB)],
            "of the GPU of rank 1 on a 3.0 of 80.0 GiB are free (and so of 1 others): another process uses it",
            None,
        ),
        ([Gpu("a", "4090", 24 * GIB, 18 * GIB)], None, "of the GPU of rank 0 on a 18.0 of 24.0 GiB are free; another process"),
    ],
)
def test_gpus_of_several_kinds_and_full_ones_are_named(gpus, problem, warning):
    assert [problem in said for said in problems_of(gpus)] == [True] * bool(problem)
    assert [warning in said for said in crowded(gpus)] == [True] * bool(warning)


@pytest.mark.slow
def test_a_rank_without_memory_says_what_takes_less(tiny, tmp_path):
    paths = [f"--checkpoint_path={tiny.base}", f"--sft_data_dir={tiny.sft}", f"--out_dir={tmp_path}/run"]
    numbers = ["--max_iters=4", "--global_batch_size=8", "--dtype=float32", "--eval_interval=0", "--max_tokens_per_gpu=120"]
    done = launch("tests/starved.py", *paths, *numbers)
    assert done.returncode == 1, done.stdout  # after which --max_restarts starts it again
    assert "Traceback" not in done.stdout
    assert "rank 1 on " in done.stdout and "has not enough memory for this run (tried to allocate " in done.stdout
    assert "--ds_config=ds_configs/zero1.json --activation_checkpointing=full --max_tokens_per_gpu=60" in done.stdout


def test_what_takes_less_takes_less():
    values = {"out_dir": "run", "checkpoint_path": "model", "sft_data_dir": "data", "global_batch_size": 8}
    recipe = build_recipe(SFTRecipe, values | {"ds_config": "ds_configs/zero1.json", "activation_checkpointing": "full"}, {})
    assert smaller(recipe, 100) == "--ds_config=ds_configs/zero2.json --activation_checkpointing=full --max_tokens_per_gpu=8192"
    assert smaller(recipe, 9000).endswith("=9000")  # no row is longer than what is named
    least = recipe.model_copy(update={"ds_config": "ds_configs/zero3.json", "max_tokens_per_gpu": "auto"})
    assert smaller(least, 100) == ""  # nothing can be offloaded from a CPU
    assert "No option takes less" in too_little_memory(MemoryError(), least, 100)
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.02 GiB is free. Including "
        "non-PyTorch memory, this process has 22.60 GiB memory in use."
    )
    assert "(Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.02 GiB is free)" in too_little_memory(
        error, recipe, 100
    )


def test_memory_grows_in_segments_unless_the_environment_says_otherwise(monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    settle_allocator()
    said = os.environ["PYTORCH_ALLOC_CONF"]
    assert "expandable_segments:True" in said
    torch._C._accelerator_setAllocatorSettings(said)  # raises for a setting that this torch does not know
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    settle_allocator()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:64"


@pytest.mark.slow
def test_a_deterministic_run_is_the_same_run_on_a_cpu(tiny, tmp_path):
    """Where all algorithms are deterministic anyway; what has none that is, is refused in one sentence."""
    paths = [f"--checkpoint_path={tiny.base}", f"--sft_data_dir={tiny.sft}", "--max_iters=3", "--global_batch_size=8", "--eval_interval=0"]
    curves = []
    for name, more in (("plain", []), ("deterministic", ["--deterministic"])):
        done = launch("posttrain/sft.py", *paths, f"--out_dir={tmp_path}/{name}", *more)
        assert done.returncode == 0, done.stdout
        assert ("algorithms that add up in the same order" in done.stdout) == bool(more)  # as torch says, not the recipe
        curves.append([(one["loss"], one["grad_norm"]) for one in metrics(tmp_path / name)])
    assert curves[0] == curves[1]
    flags = "import torch, sys; sys.path.insert(0, '.'); from posttrain.engine.start import compute_deterministically as now; now(); "
    flags += "print(torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory)"
    done = subprocess.run([sys.executable, "-c", flags], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split()[-2:] == ["True", "False"], done.stderr


def test_products_that_add_themselves_are_more_exact(cpu_has_bfloat16):
    """As cuBLAS does it: what is added is not rounded to bfloat16 before."""
    cpu_has_bfloat16(True)
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 16).bfloat16().requires_grad_(), torch.randn(512, 16).bfloat16().requires_grad_()
    targets, exact = torch.randint(512, (300,)), [x.detach().double().requires_grad_() for x in (hidden, weight)]
    right = torch.autograd.grad(-F.cross_entropy(exact[0] @ exact[1].t(), targets, reduction="sum"), exact)
    errors = []
    for adds in (False, True):
        way = logprob.Way(adds_products=adds, piece=300 * 16)
        with cpu_kernels.adding_products():
            mine = torch.autograd.grad(logprob.token_logps(hidden, weight, targets, way).sum(), (hidden, weight))
        errors.append([((one - other).norm() / other.norm()).item() for one, other in zip(mine, right, strict=True)])
    assert errors[1][0] < errors[0][0] and errors[1][1] == errors[0][1]
    with pytest.raises(NotImplementedError):  # without the kernel, so that it was the one that was called
        torch.autograd.grad(logprob.token_logps(hidden, weight, targets, way).sum(), (hidden, weight))


def test_much_memory_takes_large_pieces_beside_a_small_model():
    """1.7 billion parameters on an H100; 8 billion leave too little of it."""
    assert logprob.way_on_gpu(85e9, 3.4e9).piece == 4 * logprob.way_on_gpu(85e9, 16.4e9).piece == 4 * logprob.way_on_gpu(48e9, 1e9).piece
