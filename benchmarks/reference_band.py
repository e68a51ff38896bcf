"""How far do the log-probs of the same weights differ between two ways to pack the same pairs?

    python benchmarks/reference_band.py        minutes; writes benchmarks/results/reference_band.json

SAME_PRECOMPUTED of posttrain/training/start_checks.py follows from it. A precomputed reference was computed in other micro-batches than
the policy's, so in bfloat16 its sums are rounded elsewhere. Rounding of single tokens is independent, so an answer's difference grows
with the square root of its tokens. That quotient is measured between pairs packed together with shared prompts, and each pair alone with
its prompt computed twice; and for comparison between the model and itself after a change as large as one optimizer step at 1e-5.
"""

import argparse
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # instead of benchmarks/, whose data_prep.py would be taken for the package

from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from posttrain.data.packing import RowBuilder  # noqa: E402
from posttrain.model.policy import Policy, fastest_policy  # noqa: E402
from posttrain.objectives.answers import answer_sums  # noqa: E402
from posttrain.operators.attention_segments import SEGMENTS  # noqa: E402
from posttrain.training.start_checks import SAME_PRECOMPUTED  # noqa: E402

PAIRS = 24


def quickstart_base() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(ROOT / "launch" / "quickstart" / "base", dtype=torch.float32)


def deep_random() -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=6400, num_hidden_layers=24, **shape)).float()


def pairs(vocabulary: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Random pairs of prompt, chosen and rejected token ids."""
    draw = torch.Generator().manual_seed(0)

    def ids(least: int, most: int) -> list[int]:
        length = int(torch.randint(least, most, (1,), generator=draw))
        return torch.randint(5, vocabulary, (length,), generator=draw).tolist()

    return [(ids(4, 60), ids(2, 250), ids(2, 250)) for _ in range(PAIRS)]


@torch.no_grad()
def sums(policy: Policy, rows: list[tuple], together: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed log-probs of the answers, and their token counts, each (2 * PAIRS,)."""
    found = []
    for group in [rows[i : i + 6] for i in range(0, len(rows), 6)] if together else [[row] for row in rows]:
        builder = RowBuilder()
        for row in group:
            builder.add_pair(*row, share_prompt=together)
        batch = builder.build()
        found.append((answer_sums(policy(batch), batch).sum(1), batch.answer_lengths))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def measure(make, dtype: torch.dtype) -> dict[str, float]:
    """The largest quotients for one model in one dtype."""
    policy = fastest_policy(make().to(dtype), SEGMENTS)
    rows = pairs(policy.model.config.vocab_size)
    alone, lengths = sums(policy, rows, together=False)
    packed, _ = sums(policy, rows, together=True)
    torch.manual_seed(1)
    moved = make()
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter += 1e-5 * torch.randn_like(parameter).sign()
    other, _ = sums(fastest_policy(moved.to(dtype), SEGMENTS), rows, together=False)
    return {
        "packed_differently": ((packed - alone).abs() / lengths.sqrt()).max().item(),
        "one_step_away": ((other - alone).abs() / lengths.sqrt()).max().item(),
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    results = {
        make.__name__: {str(dtype).removeprefix("torch."): measure(make, dtype) for dtype in (torch.float32, torch.bfloat16)}
        for make in (quickstart_base, deep_random)
    }
    facts = {"machine": f"{platform.machine()} CPU", "torch": version("torch"), "transformers": version("transformers"), "pairs": PAIRS}
    limits = {str(dtype).removeprefix("torch."): limit for dtype, limit in SAME_PRECOMPUTED.items()}
    path = ROOT / "benchmarks" / "results" / "reference_band.json"
    path.write_text(json.dumps({**facts, "limits": limits, "nats_by_root_of_tokens": results}, indent=1) + "\n", encoding="utf-8")
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
