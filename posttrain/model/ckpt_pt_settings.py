"""What model a ckpt.pt describes, by its model_args and its tensors, and whether that is a Llama.

Where they disagree the tensors are right, and a warning says so. Warnings point at the line that called load_ckpt_pt.
"""

import re
import warnings
from numbers import Real

import torch

from posttrain.common.errors import shown, shown_name
from posttrain.model.ckpt_pt_tensors import Sizes, expected_shapes

# What Llama can express, by the spellings met for it. A key that is absent or None says nothing, and the tensor names decide.
EXPRESSIBLE = {
    "normalization": {"rmsnorm", "rms_norm", "rms"},
    "activation": {"silu", "swish", "swiglu"},
    "ffn_type": {"swiglu"},
    "position_encoding": {"rope", "rotary"},
    "norm_position": {"pre", "pre_norm", "prenorm"},
    "bias": {"false", "0"},
}
# Read from the tensors instead, or without effect on what the model computes (dropout is a matter of training).
OTHER_ARGS = {
    *("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "norm_eps", "attention_backend", "num_key_value_heads"),
    *("rope_theta", "dropout", "weight_tying", "d_ff", "ffn_expansion_ratio", "attention_dropout", "residual_dropout"),
}


def refuse_inexpressible(path, args: dict) -> None:
    """Raise ValueError for model_args that Llama cannot express; warn of settings that are unknown here."""
    said = {key: shown_name(args[key]).lower().replace("-", "_") for key in EXPRESSIBLE if args.get(key) is not None}
    if wrong := [f"{key}={shown(args[key])}" for key, value in said.items() if value not in EXPRESSIBLE[key]]:
        raise ValueError(
            f"{path} has {', '.join(wrong)}, which a Llama model cannot express; expected normalization=rmsnorm, activation=silu, "
            "ffn_type=swiglu, position_encoding=rope, norm_position=pre, bias=False"
        )
    if unknown := [f"{shown_name(key)}={shown(value)}" for key, value in args.items() if value and key not in {*EXPRESSIBLE, *OTHER_ARGS}]:
        warnings.warn(f"{path}: model_args has settings that are unknown here and have no effect: {_first(unknown)}", stacklevel=3)


def needed(path, args: dict, key: str):
    """Return a setting that only model_args can tell. Raises ValueError where it does not."""
    if args.get(key) is None:
        raise ValueError(f"{path}: model_args lacks {key}, which the tensors cannot tell; it has {', '.join(map(shown_name, args))}")
    return args[key]


def needed_number(path, args: dict, key: str, most: float) -> float:
    """Return a number that only model_args can tell. Raises ValueError unless it is there, above 0 and at most `most`."""
    value = needed(path, args, key)
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value <= most:
        raise ValueError(f"{path}: model_args has {key}={shown(value)}; expected a number above 0, at most {most:g}")
    return float(value)


def sizes_of(path, state: dict[str, torch.Tensor], args: dict) -> Sizes:
    """Return the model's sizes as its tensors say; n_head alone is taken from model_args, as no tensor shows it.

    Raises ValueError where a tensor that shows a size is missing, or is of no whole number of heads.
    """
    fused = "blocks.0.attn.c_attn.weight" in state
    show = ["token_embeddings.weight", "blocks.0.ffn.w_gate.weight", f"blocks.0.attn.{'c_attn' if fused else 'c_kv'}.weight"]
    if missing := [key for key in show if key not in state or state[key].dim() != 2]:
        raise ValueError(f"{path}: expected matrices named {', '.join(show)}; missing {', '.join(missing)}, found {_first(state)}")
    vocab_size, n_embd = state[show[0]].shape
    n_head = int(needed_number(path, args, "n_head", n_embd))
    if n_embd % n_head or (n_embd // n_head) % 2:
        raise ValueError(f"{path}: n_head={n_head} does not split n_embd={n_embd} into heads of an even size")
    rows, head = state[show[2]].shape[0], n_embd // n_head
    kv_rows = rows // 2
    if not fused and (kv_rows == 0 or kv_rows % head or n_head % (kv_rows // head) or rows % 2):
        raise ValueError(f"{path}: {show[2]} has {rows} rows; expected 2 x a divisor of n_head={n_head} x head size {head}")
    layers = {found[1] for key in state if (found := re.match(r"blocks\.(\d+)\.", key))}
    if layers != {str(number) for number in range(len(layers))}:
        raise ValueError(f"{path}: its {len(layers)} layers are not numbered from 0 on: there is {max(layers, key=len)[:20]}")
    return Sizes(
        vocab_size=vocab_size,
        n_layer=len(layers),
        n_head=n_head,
        n_embd=n_embd,
        num_key_value_heads=n_head if fused else kv_rows // head,
        d_ff=state[show[1]].shape[0],
        fused=fused,
    )


def tie_head(path, state: dict[str, torch.Tensor], args: dict) -> bool:
    """Return whether the head is the embedding; where the file claims so and holds no head, put it into `state`.

    A file cannot claim a tie that its tensors break, nor deny one that they are stored with: a warning says so. Raises ValueError where
    there is no head, and no claim that it is the embedding.
    """
    claimed, embedding = args.get("weight_tying"), state["token_embeddings.weight"]
    head = state.setdefault("lm_head.weight", embedding) if claimed else state.get("lm_head.weight")
    if head is None:
        raise ValueError(f"{path}: lm_head.weight is missing, and model_args has weight_tying={shown(claimed)}")
    equal = head.shape == embedding.shape and torch.equal(head, embedding)
    tied = equal and (claimed is not False or head.data_ptr() == embedding.data_ptr())
    if claimed is not None and tied != bool(claimed):
        found = "one tensor" if tied else "two different tensors"
        warnings.warn(f"{path}: model_args has weight_tying={shown(claimed)}, but head and embedding are {found}", stacklevel=3)
    return tied


def check_tensors(path, state: dict[str, torch.Tensor], sizes: Sizes) -> None:
    """Raise ValueError, naming tensors that are missing, unknown or of another shape than a model of these sizes has."""
    expected, seen = expected_shapes(sizes), {key: tuple(tensor.shape) for key, tensor in state.items()}
    differing = [f"{key} is {seen[key]}, expected {shape}" for key, shape in expected.items() if seen.get(key, shape) != shape]
    problems = [
        *([f"missing: {_first(missing)}"] if (missing := [key for key in expected if key not in seen]) else []),
        *([f"unknown: {_first(unknown)}"] if (unknown := [key for key in seen if key not in expected]) else []),
        *([f"of another shape: {_first(differing)}"] if differing else []),
    ]
    if problems:
        raise ValueError(f"{path}: its tensors are not those of a {sizes.n_layer}-layer model; {'; '.join(problems)}")


def warn_of_differences(path, args: dict, sizes: Sizes) -> None:
    """Warn of every size that model_args claims otherwise than the tensors show."""
    lies = [
        f"{key}={shown(args[key])} but the tensors have {size}"
        for key, size in sizes._asdict().items()
        if args.get(key) is not None and args[key] != size
    ]
    if lies:
        warnings.warn(f"{path}: the tensors win over model_args, which claims {', '.join(lies)}", stacklevel=3)


def _first(names, limit: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
