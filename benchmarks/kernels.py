# ruff: noqa: E402
"""Each kernel beside its alternatives, and beside the limit of the device's matrix units or memory: python benchmarks/kernels.py

One process on one device (a GPU if there is one); forward and backward together; medians of REPEATS after a warm-up. Each result has its
distance from the table's first one, in value and gradients. In bfloat16, or in float32 on a CPU without instructions for bfloat16.
Written to results/NAME.json.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a rank's share of two cores
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.side_by_side import RESULTS, dtype_of_cpu, machine, suffix, versions
from posttrain.data.packing import Segment, pack, to_device
from posttrain.engine.cpu_adam import load_cpu_adam
from posttrain.operators import attention, layers
from posttrain.operators.attention_segments import _attend_anywhere, attend_segments
from posttrain.operators.attention_varlen import attend_varlen
from posttrain.operators.logprob import Way, token_logps

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else getattr(torch, dtype_of_cpu())
REPEATS = 20 if ON_GPU else 7
PATIENCE = 20  # seconds to measure one way for; slow ones are repeated less often


def seconds(action: Callable) -> float:
    """The median time of an action."""
    times, begun = [], time.perf_counter()
    while len(times) < REPEATS + 2 and time.perf_counter() - begun < PATIENCE:
        _wait()
        started = time.perf_counter()
        action()
        _wait()
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:] or times)


def _wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def peak_bytes(action: Callable) -> int | None:
    """The most that an action allocates beyond what was allocated before; None on CPUs."""
    if not ON_GPU:
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    action()
    return torch.cuda.max_memory_allocated() - before


def compare(ways: dict[str, Callable], inputs: list[torch.Tensor], flops: float, limit: float, before: dict | None = None) -> dict:
    """Time, memory and share of the matrix limit of each way to compute a (loss-like) output from inputs; the first is the reference.

    `before`: what has to be done before some of the ways.
    """
    rows, expected = {}, None
    for name, way in ways.items():

        def both(way=way):
            output = way(*inputs)
            grad = torch.ones_like(output)
            return output.detach(), torch.autograd.grad(output, [x for x in inputs if x.requires_grad], grad)

        try:
            (before or {}).get(name, lambda: None)()
            output, gradients = both()
        except Exception as error:  # not installed, not for this device, or whatever a kernel that is compiled here may raise
            rows[name] = {"did_not_run": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            continue
        expected = expected or (output, gradients)
        differs = layers.distances([expected[0], *expected[1]], [output, *gradients]).max().item()
        taken = seconds(both)
        rows[name] = {"ms": round(1000 * taken, 3), "of_matrix_limit": round(flops / taken / limit, 3), "differs_by": f"{differs:.1e}"}
        if (most := peak_bytes(both)) is not None:
            rows[name]["peak_mb"] = round(most / 2**20, 1)
        print(f"  {name:40} {rows[name]}", flush=True)
    return rows


def matrix_limit() -> float:
    """FLOP/s of a large matrix product on this device."""
    size = 8192 if ON_GPU else 1024
    a, b = (torch.randn(size, size, device=DEVICE, dtype=DTYPE) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b)


def heads(limit: float) -> dict:
    """Compare heads: the summed negative log-probs of N tokens from N hidden states, as SFT, DPO and the reference need them."""
    results = {}
    for rows, hidden, vocabulary in [(4096, 2048, 151936), (32768, 2048, 151936)] if ON_GPU else [(1024, 256, 6400), (256, 512, 151936)]:
        states = torch.randn(rows, hidden, device=DEVICE, dtype=DTYPE, requires_grad=True)
        weight = (torch.randn(vocabulary, hidden, device=DEVICE) / hidden**0.5).to(DTYPE).requires_grad_()
        targets = torch.randint(vocabulary, (rows,), device=DEVICE)

        def ours(states, weight, targets=targets):
            return -token_logps(states, weight, targets).sum()

        def compiled(states, weight, targets=targets):
            return -token_logps(states, weight, targets, Way(compiled=True)).sum()

        def whole(states, weight, targets=targets):
            return F.cross_entropy((states @ weight.t()).float(), targets, reduction="sum")

        def of_torch(states, weight, targets=targets):
            return F.linear_cross_entropy(states, weight, targets, reduction="sum", options=nn.LinearCrossEntropyOptions())

        def of_liger(states, weight, targets=targets):
            from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Fused

            return Fused.apply(states, weight, targets, None, None, -100, 0.0, 0.0, "sum", None, False, torch.float32)[0]

        def of_cce(states, weight, targets=targets):
            from cut_cross_entropy import linear_cross_entropy

            return linear_cross_entropy(states, weight, targets, reduction="sum", filter_eps=None)

        ways = {"all logits in float32": whole, "posttrain": ours, "posttrain, compiled": compiled, "torch linear_cross_entropy": of_torch}
        ways |= {"liger": of_liger, "cut-cross-entropy": of_cce}
        if rows > 20000:  # the logits and their gradient would not fit
            del ways["all logits in float32"]
        if not ON_GPU and vocabulary > 100_000:  # does not come back within minutes on a CPU (torch 2.13)
            del ways["torch linear_cross_entropy"]
        name = f"head, {rows} x {hidden} x {vocabulary}"
        print(name)
        results[name] = compare(ways, [states, weight], 6 * rows * hidden * vocabulary, limit)
    return results


def attentions(limit: float) -> dict:
    """Compare causal attention over a packed row: examples of mixed lengths, and pairs that share their prompt."""
    heads, kv_heads, width = (16, 8, 128) if ON_GPU else (8, 4, 32)
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(128 if ON_GPU else 24, generator=generator).mul(0.8).exp() * 90).int().clamp(8, 1500).tolist()
    plain, shared, start = [], [], 0
    for length in lengths:
        plain.append(Segment(start, start + length))
        shared.append(Segment(start, start + length))
        start += length
        prefix = length * 2 // 3  # its last third is the chosen answer; a rejected one as long follows
        shared_end = start
        plain.append(Segment(start, start + length - prefix))
        shared.append(Segment(start, start + length - prefix, shared_end - length, shared_end - length + prefix))
        start += length - prefix
    results = {}
    for what, segments in (("examples", plain), ("pairs that share a prompt", shared)):
        packing = to_device(pack(segments), DEVICE)
        shapes = [(1, heads, start, width), (1, kv_heads, start, width), (1, kv_heads, start, width)]
        inputs = [torch.randn(shape, device=DEVICE, dtype=DTYPE, requires_grad=True) for shape in shapes]

        def by(function, packing=packing):
            return lambda q, k, v: function(None, q, k, v, None, width**-0.5, packing)[0]

        alone = [(s, *_rows_and_mask(s)) for s in segments]

        def one_by_one(q, k, v, alone=alone):
            outputs = []
            for s, rows, mask in alone:
                how = {"attn_mask": mask, "is_causal": mask is None, "scale": width**-0.5, "enable_gqa": True}
                outputs.append(F.scaled_dot_product_attention(q[:, :, s.start : s.end], k[:, :, rows], v[:, :, rows], **how))
            return torch.cat(outputs, dim=2).transpose(1, 2)

        def through_autograd(q, k, v, packing=packing):
            return _attend_anywhere(q, k, v, packing.segments, width**-0.5, 0.0)

        ways = {"one call an example": one_by_one, "groups, autograd": through_autograd, "groups": by(attend_segments)}
        activate = {f"varlen, {version}": partial(attention._activate, version) for version in ("FA2", "FA3", "FA4")} if ON_GPU else {}
        ways |= dict.fromkeys(activate, by(attend_varlen))
        flops = 6 * 2 * heads * width * sum((s.end - s.start) * (s.prefix_end - s.prefix_start + (s.end - s.start) / 2) for s in segments)
        name = f"attention, {what}, {len(segments)} segments, {start} tokens"
        print(name)
        results[name] = compare(ways, inputs, flops, limit, activate)
        attention._activate("FA2")
    return results


def _rows_and_mask(s: Segment) -> tuple[slice | torch.Tensor, torch.Tensor | None]:
    """The rows of a segment's keys, and their mask."""
    if not s.prefix_end:
        return slice(s.start, s.end), None
    rows = torch.cat([torch.arange(s.prefix_start, s.prefix_end), torch.arange(s.start, s.end)]).to(DEVICE)
    return rows, torch.ones(s.end - s.start, len(rows), device=DEVICE).tril(s.prefix_end - s.prefix_start).bool()


def widths(limit: float) -> dict:
    """Compare products and head of odd widths (5461, 151669: the 1.8B ckpt.pt) with those of the next multiples of 128."""
    rows, hidden = (8192, 2048) if ON_GPU else (256, 2048)
    states = torch.randn(rows, hidden, device=DEVICE, dtype=DTYPE, requires_grad=True)
    results = {f"feed-forward, {rows} rows": {}, f"head, {rows // 8} rows": {}}
    for what, odd, even in (("feed-forward", 5461, 5504), ("head", 151669, 151680)):
        weight = (torch.randn(even, hidden, device=DEVICE) / hidden**0.5).to(DTYPE)
        back = (torch.randn(hidden, even, device=DEVICE) / even**0.5).to(DTYPE)
        for width in (odd, even):
            used = rows // 8 if what == "head" else rows
            w, b = weight[:width].clone().requires_grad_(), back[:, :width].clone().requires_grad_()
            if what == "head":
                inputs, way = [states, w], lambda x, w: token_logps(x[:used], w, torch.arange(used, device=DEVICE)).sum()  # noqa: B023
            else:
                inputs, way = [states, w, b], lambda x, w, b: F.linear(F.silu(F.linear(x, w)), b)
            flops = 6 * used * hidden * odd * (1 if what == "head" else 2)
            results[f"{what}, {used} rows"] |= compare({f"{width} wide": way}, inputs, flops, limit)
    return results


def layer(limit: float) -> dict:
    """Compare a decoder layer as it is, compiled, and with what is chosen for this device: Qwen3-1.7B's shape, smaller on a CPU.

    In bfloat16 also if the rest is measured in float32.
    """
    return {name: rows for dtype in dict.fromkeys((DTYPE, torch.bfloat16)) for name, rows in _layer(limit, dtype).items()}


def _layer(limit: float, dtype: torch.dtype) -> dict:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    hidden, rows = (2048, 8192) if ON_GPU else (512, 512)
    shape = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_attention_heads": hidden // 128, "head_dim": 128}
    shape |= {"num_key_value_heads": max(1, hidden // 256), "num_hidden_layers": 1, "vocab_size": 128}
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**shape)).to(DEVICE, dtype).eval()
    states = torch.randn(1, rows, hidden, device=DEVICE, dtype=dtype, requires_grad=True)
    positions = torch.arange(rows, device=DEVICE)[None]
    embeddings = model.model.rotary_emb(states, positions)
    inputs = [states, *model.model.layers[0].parameters()]
    weights = sum(p.numel() for p in model.model.layers[0].parameters() if p.ndim == 2)

    def of(function):
        return lambda *_: function(states, attention_mask=None, position_ids=positions, position_embeddings=embeddings)

    plain, chosen = model.model.layers[0], []
    ways = {"transformers": of(plain), "transformers, compiled": of(torch.compile(plain, dynamic=True)), "chosen": of(plain)}
    before = {"chosen": lambda: chosen.append(layers.choose(model, "auto", False, model.device)[0])}
    results = compare(ways, inputs, 6 * rows * weights, limit, before)
    results["chosen"] = {"what": chosen[0], **results["chosen"]}
    return {f"decoder layer, {rows} x {hidden}, {str(dtype).removeprefix('torch.')}": results}


def optimizers(limit: float) -> dict:
    """Compare AdamW on 20 million float32 weights; the limit is memory: it reads weight, gradient and two moments, and writes three."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    if not ON_GPU:
        load_cpu_adam()
    count, settings = 20_000_000, {"lr": 1e-5, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01}
    source, target = (torch.randn(count, device=DEVICE) for _ in range(2))
    bandwidth = 12 * count / seconds(lambda: target.add_(source))
    ways = {
        "torch, fused": lambda p: torch.optim.AdamW(p, **settings, fused=True),
        "torch, foreach": lambda p: torch.optim.AdamW(p, **settings, foreach=True),
        "DeepSpeed": lambda p: FusedAdam(p, **settings) if ON_GPU else DeepSpeedCPUAdam(p, **settings),
    }
    rows = {}
    for name, make in ways.items():
        weights = nn.Parameter(torch.randn(count, device=DEVICE))
        weights.grad = torch.randn(count, device=DEVICE)
        try:
            taken = seconds(make([weights]).step)
        except (RuntimeError, ImportError, OSError) as error:  # DeepSpeed compiles its own, which needs nvcc
            rows[name] = {"did_not_run": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            continue
        rows[name] = {"ms": round(1000 * taken, 3), "of_memory_limit": round(28 * count / taken / bandwidth, 3)}
        print(f"  {name:40} {rows[name]}", flush=True)
    return {f"AdamW, {count:,} weights": {"memory_limit_gb_s": round(bandwidth / 1e9, 1), **rows}}


SECTIONS = {"heads": heads, "attentions": attentions, "layer": layer, "optimizers": optimizers, "widths": widths}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default=f"kernels_cpu{suffix(dtype_of_cpu())}", help="of the result file")
    parser.add_argument("--sections", nargs="*", default=list(SECTIONS), choices=SECTIONS)
    options = parser.parse_args()
    limit = matrix_limit()
    print(f"a large product: {limit / 1e12:.3f} TFLOP/s")
    file = RESULTS / f"{options.name}.json"
    results = {"machine": machine(), "versions": versions(), "dtype": str(DTYPE), "matrix_limit_tflops": round(limit / 1e12, 3)}
    if file.exists() and options.sections != list(SECTIONS):  # the other sections stay
        before = json.loads(file.read_text(encoding="utf-8"))
        if any(before[name] != results[name] for name in ("machine", "versions", "dtype")):
            sys.exit(f"{file} was measured on another machine or with other versions; measure all sections")
        results = before
    for section in options.sections:
        results |= SECTIONS[section](limit)
        file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
