"""`ckpt.pt` files: read one as a Llama model, write a Llama model as one.

A ckpt.pt is a `torch.save` dict {model, model_args, iter_num, best_val_loss, config?, optimizer?}. It is only ever unpickled as
tensors and plain values, never as code. Where `model_args` and the tensors disagree the tensors are right, and a warning says so.
"""

import os
import pickle
import re
import warnings
import zipfile

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

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
BUFFER = re.compile(r"blocks\.\d+\.attn\.(rope\.(cos_cached|sin_cached|inv_freq)|bias)")
# best_val_loss is often a NumPy scalar; its pickle names NumPy's scalar function by the path of the NumPy that wrote it.
_SCALAR = np.float64(0).__reduce__()[0]
NUMPY_SCALARS = [
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    (np.dtype, "numpy.dtype"),
    *(type(np.dtype(name)) for name in ("bool", "int32", "int64", "float16", "float32", "float64")),
]


def is_ckpt_pt(path) -> bool:
    """True for the name of a ckpt.pt file (.pt or .pth), whether or not it exists."""
    return str(path).endswith((".pt", ".pth"))


def load_ckpt_pt(path, dtype: torch.dtype | None = torch.float32) -> LlamaForCausalLM:
    """The model in a ckpt.pt, on the CPU, in `dtype` (None: as stored) and in eval mode (as from_pretrained gives it).

    Warns where model_args differs from the tensors. Raises FileNotFoundError, or ValueError for a file that is broken, holds
    code, lacks a needed setting or tensor, has tensors of unexpected names or shapes, or is of a kind that Llama cannot express.
    """
    checkpoint = read(path)
    state = {key.removeprefix("_orig_mod."): tensor for key, tensor in checkpoint["model"].items()}
    state = {key: tensor for key, tensor in state.items() if not BUFFER.fullmatch(key)}
    args = checkpoint["model_args"]
    _refuse_inexpressible(path, args)
    sizes = _sizes(path, state, args)
    dtype = dtype or state["token_embeddings.weight"].dtype
    tied = _tied(path, state, args)
    _check_tensors(path, state, sizes)
    _warn_of_differences(path, args, sizes)
    config = LlamaConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["n_embd"],
        intermediate_size=sizes["d_ff"],
        num_hidden_layers=sizes["n_layer"],
        num_attention_heads=sizes["n_head"],
        num_key_value_heads=sizes["num_key_value_heads"],
        max_position_embeddings=int(_needed(path, args, "block_size")),
        rms_norm_eps=float(_needed(path, args, "norm_eps")),
        rope_parameters={"rope_type": "default", "rope_theta": float(_needed(path, args, "rope_theta"))},
        tie_word_embeddings=tied,
        bos_token_id=None,  # the file does not know its tokenizer
        eos_token_id=None,
        dtype=dtype,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    # copies, so that nothing shares storage or points into the mapped file
    tensors = {name: tensor.to(dtype, copy=True).contiguous() for name, tensor in _to_llama(state, sizes).items()}
    if tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, strict=True, assign=True)
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its buffers are not in the state dict, so they were still on meta
    return model.eval()


def save_ckpt_pt(model: LlamaForCausalLM, path, iter_num: int = 0, best_val_loss: float | None = None) -> None:
    """Write a Llama model as a ckpt.pt; load_ckpt_pt gives back the same weights, bit for bit. No optimizer state is written.

    A best_val_loss of None is written as infinity. Raises ValueError for a model that the format cannot express, or whose
    parameters are not whole on this rank.
    """
    model = getattr(model, "_orig_mod", model)
    config = model.config
    _refuse_unwritable(model)
    sizes = {
        "vocab_size": model.get_input_embeddings().weight.shape[0],
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_embd": config.hidden_size,
        "num_key_value_heads": config.num_key_value_heads,
        "d_ff": config.intermediate_size,
        "fused": config.num_key_value_heads == config.num_attention_heads,
    }
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    theta = config.rope_parameters["rope_theta"]
    model_args = {
        **{key: sizes[key] for key in ("vocab_size", "n_layer", "n_head", "n_embd", "num_key_value_heads", "d_ff")},
        **{"block_size": config.max_position_embeddings, "norm_eps": config.rms_norm_eps, "rope_theta": float(theta)},
        **{"normalization": "rmsnorm", "activation": "silu", "ffn_type": "swiglu", "norm_position": "pre"},
        **{"position_encoding": "rope", "attention_backend": "sdpa", "bias": False, "ffn_expansion_ratio": None},
        **{"dropout": 0.0, "attention_dropout": 0.0, "residual_dropout": 0.0, "weight_tying": config.tie_word_embeddings},
    }
    checkpoint = {
        "model": _from_llama(weights, sizes) | _rope_buffers(sizes, config.max_position_embeddings, theta),
        "model_args": model_args,
        "iter_num": iter_num,
        "best_val_loss": float("inf") if best_val_loss is None else float(best_val_loss),
        "config": {},
    }
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        torch.save(checkpoint, temporary)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def read(path) -> dict:
    """The content of a ckpt.pt, of which nothing runs as code. Raises as load_ckpt_pt does."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} does not exist or is not a file; expected a ckpt.pt written by torch.save")
    try:
        with torch.serialization.safe_globals(NUMPY_SCALARS):
            # mapped, so that the optimizer state is never read; only the zip form of torch.save can be
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path} holds {found[1]}, which loading would run as code; only tensors, plain values and NumPy scalars are "
                "accepted. Where you trust the file, load it where it was written and save it again without that object"
            ) from None
        raise ValueError(f"{path} is not a readable torch.save file (damaged, or another format): copy it again") from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, IndexError) as error:
        raise ValueError(f"{path} is cut short or damaged ({str(error).splitlines()[:1]}): copy it again") from error
    needed = ("model", "model_args")
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(key), dict) for key in needed):
        seen = ", ".join(map(str, list(checkpoint)[:8])) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(f"{path} is not a ckpt.pt: expected a dict whose keys model and model_args are dicts, found {seen}")
    if wrong := [key for key, value in checkpoint["model"].items() if not isinstance(value, torch.Tensor)]:
        raise ValueError(f"{path}: expected only tensors in its state dict, found other values at {', '.join(map(str, wrong[:8]))}")
    return checkpoint


def _refuse_inexpressible(path, args: dict) -> None:
    said = {key: str(args[key]).lower().replace("-", "_") for key in EXPRESSIBLE if args.get(key) is not None}
    if wrong := [f"{key}={args[key]!r}" for key, value in said.items() if value not in EXPRESSIBLE[key]]:
        raise ValueError(
            f"{path} has {', '.join(wrong)}, which a Llama model cannot express; expected normalization=rmsnorm, activation=silu, "
            "ffn_type=swiglu, position_encoding=rope, norm_position=pre, bias=False"
        )
    if unknown := [f"{key}={value!r}" for key, value in args.items() if value and key not in {*EXPRESSIBLE, *OTHER_ARGS}]:
        warnings.warn(f"{path}: model_args has settings that are unknown here and have no effect: {_first(unknown)}", stacklevel=3)


def _needed(path, args: dict, key: str):
    if args.get(key) is None:
        raise ValueError(f"{path}: model_args lacks {key}, which the tensors cannot tell; it has {', '.join(map(str, args))}")
    return args[key]


def _sizes(path, state: dict, args: dict) -> dict:
    """The model's sizes as its tensors say; n_head alone is taken from model_args, as no tensor shows it."""
    fused = "blocks.0.attn.c_attn.weight" in state
    show = ["token_embeddings.weight", "blocks.0.ffn.w_gate.weight", f"blocks.0.attn.{'c_attn' if fused else 'c_kv'}.weight"]
    if missing := [key for key in show if key not in state or state[key].dim() != 2]:
        raise ValueError(f"{path}: expected matrices named {', '.join(show)}; missing {', '.join(missing)}, found {_first(state)}")
    vocab_size, n_embd = state[show[0]].shape
    n_head = int(_needed(path, args, "n_head"))
    if n_head < 1 or n_embd % n_head or (n_embd // n_head) % 2:
        raise ValueError(f"{path}: n_head={n_head} does not split n_embd={n_embd} into heads of an even size")
    kv_rows, head = state[show[2]].shape[0] // 2, n_embd // n_head
    if not fused and (kv_rows == 0 or kv_rows % head or n_head % (kv_rows // head) or state[show[2]].shape[0] % 2):
        rows = state[show[2]].shape[0]
        raise ValueError(f"{path}: {show[2]} has {rows} rows; expected 2 x a divisor of n_head={n_head} x head size {head}")
    return {
        "vocab_size": vocab_size,
        "n_layer": 1 + max(int(key.split(".")[1]) for key in state if re.match(r"blocks\.\d+\.", key)),
        "n_head": n_head,
        "n_embd": n_embd,
        "num_key_value_heads": n_head if fused else kv_rows // head,
        "d_ff": state[show[1]].shape[0],
        "fused": fused,
    }


def _tied(path, state: dict, args: dict) -> bool:
    """Whether the head is the embedding. A file cannot claim a tie its tensors break, nor deny one they are stored with."""
    claimed, embedding = args.get("weight_tying"), state["token_embeddings.weight"]
    head = state.setdefault("lm_head.weight", embedding) if claimed else state.get("lm_head.weight")
    if head is None:
        raise ValueError(f"{path}: lm_head.weight is missing, and model_args has weight_tying={claimed!r}")
    equal = head.shape == embedding.shape and torch.equal(head, embedding)
    tied = equal and (claimed is not False or head.data_ptr() == embedding.data_ptr())
    if claimed is not None and tied != bool(claimed):
        found = "one tensor" if tied else "two different tensors"
        warnings.warn(f"{path}: model_args has weight_tying={claimed}, but head and embedding are {found}", stacklevel=3)
    return tied


def _expected_shapes(sizes: dict) -> dict[str, tuple]:
    dim, ff, vocab = sizes["n_embd"], sizes["d_ff"], sizes["vocab_size"]
    kv = 2 * sizes["num_key_value_heads"] * dim // sizes["n_head"]
    shapes = {"token_embeddings": (vocab, dim), "lm_head": (vocab, dim), "final_norm": (dim,)}
    for i in range(sizes["n_layer"]):
        shapes |= {f"blocks.{i}.norm1": (dim,), f"blocks.{i}.norm2": (dim,), f"blocks.{i}.attn.c_proj": (dim, dim)}
        attention = {"c_attn": (3 * dim, dim)} if sizes["fused"] else {"c_q": (dim, dim), "c_kv": (kv, dim)}
        shapes |= {f"blocks.{i}.attn.{name}": shape for name, shape in attention.items()}
        shapes |= {f"blocks.{i}.ffn.w_gate": (ff, dim), f"blocks.{i}.ffn.w_value": (ff, dim), f"blocks.{i}.ffn.w_out": (dim, ff)}
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def _check_tensors(path, state: dict, sizes: dict) -> None:
    expected, seen = _expected_shapes(sizes), {key: tuple(tensor.shape) for key, tensor in state.items()}
    differing = [f"{key} is {seen[key]}, expected {shape}" for key, shape in expected.items() if seen.get(key, shape) != shape]
    problems = [
        *([f"missing: {_first(missing)}"] if (missing := [key for key in expected if key not in seen]) else []),
        *([f"unknown: {_first(unknown)}"] if (unknown := [key for key in seen if key not in expected]) else []),
        *([f"of another shape: {_first(differing)}"] if differing else []),
    ]
    if problems:
        raise ValueError(f"{path}: its tensors are not those of a {sizes['n_layer']}-layer model; {'; '.join(problems)}")


def _first(names, limit: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _warn_of_differences(path, args: dict, sizes: dict) -> None:
    claims = {key: args[key] for key in sizes if args.get(key) is not None}
    if lies := [f"{key}={claim} but the tensors have {sizes[key]}" for key, claim in claims.items() if claim != sizes[key]]:
        warnings.warn(f"{path}: the tensors win over model_args, which claims {', '.join(lies)}", stacklevel=3)


LAYER_NAMES = {
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "ffn.w_gate": "mlp.gate_proj",
    "ffn.w_value": "mlp.up_proj",
    "ffn.w_out": "mlp.down_proj",
}
TOP_NAMES = {"token_embeddings": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head"}


def _same_tensors(n_layer: int) -> dict[str, str]:
    """ckpt.pt name → Llama name of every tensor that is the same in both."""
    layers = {f"blocks.{i}.{a}": f"model.layers.{i}.{b}" for i in range(n_layer) for a, b in LAYER_NAMES.items()}
    return {f"{a}.weight": f"{b}.weight" for a, b in (TOP_NAMES | layers).items()}


def _to_llama(state: dict, sizes: dict) -> dict:
    heads, kv_heads, dim = sizes["n_head"], sizes["num_key_value_heads"], sizes["n_embd"]
    out = {theirs: state[ours] for ours, theirs in _same_tensors(sizes["n_layer"]).items()}
    for i in range(sizes["n_layer"]):
        names = ["c_attn"] if sizes["fused"] else ["c_q", "c_kv"]
        kv_rows = kv_heads * dim // heads
        q, k, v = torch.cat([state[f"blocks.{i}.attn.{n}.weight"] for n in names]).split([dim, kv_rows, kv_rows])
        attention = {"q_proj": _pairs_to_halves(q, heads), "k_proj": _pairs_to_halves(k, kv_heads), "v_proj": v}
        out |= {f"model.layers.{i}.self_attn.{name}.weight": tensor for name, tensor in attention.items()}
    return out


def _from_llama(weights: dict, sizes: dict) -> dict:
    out = {ours: weights[theirs] for ours, theirs in _same_tensors(sizes["n_layer"]).items()}
    for i in range(sizes["n_layer"]):
        q, k, v = (weights[f"model.layers.{i}.self_attn.{name}_proj.weight"] for name in "qkv")
        q, k = _halves_to_pairs(q, sizes["n_head"]), _halves_to_pairs(k, sizes["num_key_value_heads"])
        fused = {"c_attn": torch.cat([q, k, v])} if sizes["fused"] else {"c_q": q, "c_kv": torch.cat([k, v])}
        out |= {f"blocks.{i}.attn.{name}.weight": tensor for name, tensor in fused.items()}
    return out


def _pairs_to_halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of [heads × hd, D]: rotary pairs (0,1), (2,3) … of each head become (0, hd/2), (1, hd/2 + 1) …"""
    return rows.view(heads, -1, 2, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)


def _halves_to_pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    return rows.view(heads, 2, -1, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)


def _rope_buffers(sizes: dict, length: int, theta: float) -> dict:
    """The cached tables that a strict load by the format's own code asks for; one storage, named once a layer."""
    head = sizes["n_embd"] // sizes["n_head"]
    angles = torch.outer(torch.arange(length).float(), theta ** (-torch.arange(0, head, 2).float() / head))
    tables = {"cos_cached": angles.cos(), "sin_cached": angles.sin()}
    return {f"blocks.{i}.attn.rope.{name}": table for i in range(sizes["n_layer"]) for name, table in tables.items()}


def _refuse_unwritable(model) -> None:
    config = model.config
    if config.model_type != "llama":
        raise ValueError(f"a ckpt.pt can hold a Llama model only, not {config.model_type}; save it as a Hugging Face folder")
    problems = [f"{key}=True" for key in ("attention_bias", "mlp_bias") if getattr(config, key)]
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        problems.append(f"head_dim={config.head_dim} (expected {config.hidden_size} / {config.num_attention_heads} heads)")
    if config.rope_parameters.get("rope_type", "default") != "default":
        problems.append(f"rope_type={config.rope_parameters['rope_type']}")
    if config.hidden_act not in ("silu", "swish"):
        problems.append(f"hidden_act={config.hidden_act}")
    if problems:
        raise ValueError(f"a ckpt.pt cannot express {', '.join(problems)}; save the model as a Hugging Face folder")
    if parts := [name for name, tensor in model.named_parameters() if tensor.numel() == 0 or tensor.is_meta]:
        raise ValueError(f"{parts[0]} is not whole here (sharded by ZeRO-3, or on the meta device); gather the weights first")
