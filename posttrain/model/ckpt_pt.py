"""`ckpt.pt` files: read one as a Llama model, write a Llama model as one.

A ckpt.pt is a `torch.save` dict {model, model_args, iter_num, best_val_loss, config?, optimizer?}. It is only ever unpickled as
tensors and plain values, never as code.
"""

import os
import pickle
import re
import warnings
import zipfile
from numbers import Number
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from posttrain.common import files
from posttrain.common.errors import shown, shown_name
from posttrain.model.ckpt_pt_settings import check_tensors, needed_number, refuse_inexpressible, sizes_of, tie_head, warn_of_differences
from posttrain.model.ckpt_pt_tensors import Sizes, from_llama, rope_buffers, to_llama
from posttrain.model.torch_file import refuse_damaged, why_not_plain

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # types of weights that are taken

BUFFER = re.compile(r"blocks\.\d+\.attn\.(rope\.(cos_cached|sin_cached|inv_freq)|bias)")
# best_val_loss is often a NumPy scalar; its pickle names NumPy's scalar function by the path of the NumPy that wrote it.
_SCALAR = np.float64(0).__reduce__()[0]
NUMPY_SCALARS = [
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    (np.dtype, "numpy.dtype"),
    *(type(np.dtype(name)) for name in ("bool", "int32", "int64", "float16", "float32", "float64")),
]


def load_ckpt_pt(path, dtype: torch.dtype | None = torch.float32) -> LlamaForCausalLM:
    """Return the model in a ckpt.pt, on the CPU, in `dtype` (None: as stored) and in eval mode (as from_pretrained gives it).

    Float64 becomes float32. Warns of that, and where model_args differs from the tensors. Raises FileNotFoundError, or ValueError for a
    file that is broken, holds code, lacks a needed setting or tensor, has tensors of unexpected names or shapes, or is of a kind that Llama
    cannot express.
    """
    config, state, sizes = _described(path, dtype)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    # copies, so that nothing shares storage or points into the mapped file
    tensors = {name: tensor.to(config.dtype, copy=True).contiguous() for name, tensor in to_llama(state, sizes).items()}
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, strict=True, assign=True)
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its buffers are not in the state dict, so they were still on meta
    return model.eval()


def read_config(path) -> LlamaConfig:
    """Return the config of the model in a ckpt.pt, without loading its weights. Warns and raises as load_ckpt_pt does."""
    return _described(path, None)[0]


def _described(path, dtype: torch.dtype | None) -> tuple[LlamaConfig, dict[str, torch.Tensor], Sizes]:
    """Return the config of the model in a ckpt.pt, for weights in `dtype`, its tensors, which lie in the mapped file, and their sizes."""
    checkpoint = read(path)
    state = {key.removeprefix("_orig_mod."): tensor for key, tensor in checkpoint["model"].items()}
    state = {key: tensor for key, tensor in state.items() if not BUFFER.fullmatch(key)}
    args = checkpoint["model_args"]
    refuse_inexpressible(path, args)
    if wrong := [key for key, tensor in state.items() if tensor.dtype not in FLOATS]:
        raise ValueError(
            f"{path}: the tensor {wrong[0]} is of type {state[wrong[0]].dtype}; expected floating-point numbers of "
            f"{', '.join(str(one).removeprefix('torch.') for one in FLOATS)}: convert the model to one of them where it was made"
        )
    sizes = sizes_of(path, state, args)
    dtype = dtype or state["token_embeddings.weight"].dtype
    if dtype == torch.float64:  # in which nothing here computes
        warnings.warn(f"{path}: its tensors are of type float64, and are rounded to float32", stacklevel=2)
        dtype = torch.float32
    tied = tie_head(path, state, args)
    check_tensors(path, state, sizes)
    warn_of_differences(path, args, sizes)
    config = LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.n_embd,
        intermediate_size=sizes.d_ff,
        num_hidden_layers=sizes.n_layer,
        num_attention_heads=sizes.n_head,
        num_key_value_heads=sizes.num_key_value_heads,
        max_position_embeddings=int(needed_number(path, args, "block_size", 2**31 - 1)),
        rms_norm_eps=needed_number(path, args, "norm_eps", 1.0),
        rope_parameters={"rope_type": "default", "rope_theta": needed_number(path, args, "rope_theta", 1e12)},
        tie_word_embeddings=tied,
        bos_token_id=None,  # the file does not know its tokenizer
        eos_token_id=None,
        dtype=dtype,
    )
    return config, state, sizes


def save_ckpt_pt(model: LlamaForCausalLM, path, iter_num: int = 0, best_val_loss: float | None = None) -> None:
    """Write a Llama model as a ckpt.pt; load_ckpt_pt gives back the same weights, bit for bit. No optimizer state is written.

    A best_val_loss of None is written as infinity. Raises ValueError for a model that the format cannot express, or whose parameters
    are not whole on this rank.
    """
    model = getattr(model, "_orig_mod", model)
    config = model.config
    _refuse_unwritable(model)
    sizes = Sizes(
        vocab_size=model.get_input_embeddings().weight.shape[0],
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        n_embd=config.hidden_size,
        num_key_value_heads=config.num_key_value_heads,
        d_ff=config.intermediate_size,
        fused=config.num_key_value_heads == config.num_attention_heads,
    )
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    theta = config.rope_parameters["rope_theta"]
    model_args = {
        **{key: size for key, size in sizes._asdict().items() if key != "fused"},
        **{"block_size": config.max_position_embeddings, "norm_eps": config.rms_norm_eps, "rope_theta": float(theta)},
        **{"normalization": "rmsnorm", "activation": "silu", "ffn_type": "swiglu", "norm_position": "pre"},
        **{"position_encoding": "rope", "attention_backend": "sdpa", "bias": False, "ffn_expansion_ratio": None},
        **{"dropout": 0.0, "attention_dropout": 0.0, "residual_dropout": 0.0, "weight_tying": config.tie_word_embeddings},
    }
    checkpoint = {
        "model": from_llama(weights, sizes) | rope_buffers(sizes, config.max_position_embeddings, theta),
        "model_args": model_args,
        "iter_num": iter_num,
        "best_val_loss": float("inf") if best_val_loss is None else float(best_val_loss),
        "config": {},
    }
    with files.written_whole(Path(path)) as file:
        torch.save(checkpoint, file)


def read(path) -> dict:
    """Return the content of a ckpt.pt, of which nothing runs as code. Raises as load_ckpt_pt does."""
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
    required = ("model", "model_args")
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(key), dict) for key in required):
        seen = ", ".join(map(str, list(checkpoint)[:8])) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(f"{path} is not a ckpt.pt: expected a dict whose keys model and model_args are dicts, found {seen}")
    if wrong := [key for key, value in checkpoint["model"].items() if not (isinstance(key, str) and isinstance(value, torch.Tensor))]:
        raise ValueError(f"{path}: expected only tensors in its state dict, found other values at {', '.join(map(str, wrong[:8]))}")
    args = checkpoint["model_args"]
    if not all(isinstance(key, str) for key in args):
        raise ValueError(f"{path}: model_args has keys that are no texts: {', '.join(map(shown, list(args)[:8]))}")
    if wrong := [key for key, value in args.items() if not (value is None or isinstance(value, str | Number | np.bool_ | torch.Tensor))]:
        raise ValueError(f"{path}: model_args has {shown_name(wrong[0])}={shown(args[wrong[0]])}; expected one text or number, or None")
    if wrong := [key for key, value in args.items() if isinstance(value, torch.Tensor) and (_without_values(value) or value.numel() != 1)]:
        raise ValueError(f"{path}: model_args has {shown_name(wrong[0])}=a tensor of {args[wrong[0]].numel()} numbers; expected one")
    for key, tensor in checkpoint["model"].items():
        if why_not := _without_values(tensor):
            raise ValueError(f"{path}: the tensor {shown_name(key)} {why_not}; save the model again, whole and on the CPU")
    with torch.serialization.safe_globals(NUMPY_SCALARS):
        refuse_damaged(Path(path), required)
    return checkpoint


def _without_values(tensor: torch.Tensor) -> str | None:
    """Return why a file's tensor has not a value for each of its elements there; None for a plain one."""
    if why_not := why_not_plain(tensor):
        return why_not
    if tensor.device.type != "cpu":
        return f"is on the device {tensor.device}, so the file may hold no values of it"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"claims {tensor.numel():,} elements, of which the file holds fewer"
    return None


def _refuse_unwritable(model: PreTrainedModel) -> None:
    """Raise ValueError for a model that a ckpt.pt cannot express, or whose parameters are not whole on this rank."""
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
