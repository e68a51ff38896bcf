"""Small bases of other kinds than the tiny world's, with folders as people have them: for tests of what goes in and comes out."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain.data.parts import IGNORE
from posttrain.data.prepared import Split
from posttrain.model.classes import class_in

MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 2, "topk_group": 1}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
TWO_BASES = {
    "full_attention": {"rope_type": "default", "rope_theta": 5e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.3] * 4, "long_factor": [4.0] * 4}
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05}


def make(tiny, folder: Path, kind: str = "llama", drop: tuple[str, ...] = (), **more) -> Path:
    """Write a random model of a transformers model_type with the tiny world's tokenizer into `folder`; returns it."""
    sizes = {"vocab_size": len(tiny.tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3}
    tokens = {"bos_token_id": None, "eos_token_id": tiny.tokenizer.eos_token_id, "pad_token_id": None}
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **{name: value for name, value in (sizes | tokens | more).items() if name not in drop})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    return folder


def parquet(**columns) -> bytes:
    """Return a Parquet file's content."""
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue()


def edit(folder: Path, change: dict, name: str = "config.json") -> None:
    """Change keys of a JSON file of a folder; None removes one."""
    path = folder / name
    values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    values = {key: value for key, value in (values | change).items() if value is not None}
    path.write_text(json.dumps(values), encoding="utf-8")


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Change the tensors of a folder of one file."""
    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path, metadata={"format": "pt"})


def with_activation_buffers(tiny, folder: Path) -> Path:
    """Apertus: its activation has parameters and, as persistent buffers, two constants that its file sets."""
    rope = {"rope_theta": 1e4, "rope_type": "default"}
    make(tiny, folder, "apertus", rope_parameters=rope)
    edit_tensors(folder, lambda state: {n: t + 0.7 if n.endswith((".beta", ".eps")) else t for n, t in state.items()})
    return folder


def with_router_bias(tiny, folder: Path) -> Path:
    """DeepSeek V3: the router's correction bias, a float32 buffer, decides which experts answer."""
    make(tiny, folder, "deepseek_v3", **MOE, **LATENT, first_k_dense_replace=1)
    edit_tensors(folder, lambda state: {n: torch.randn_like(t.float()) if "correction_bias" in n else t for n, t in state.items()})
    return folder


def tied_by_flag_only(tiny, folder: Path) -> Path:
    """config.json says that the head is the embedding, and the file holds two matrices."""
    make(tiny, folder, tie_word_embeddings=False)
    edit(folder, {"tie_word_embeddings": True})
    return folder


def as_released(tiny, folder: Path) -> Path:
    """An instruct model as its makers release it: scaled positions, sampling defaults, stop tokens, several templates, code beside it."""
    rope = LLAMA3 | {"original_max_position_embeddings": 64}
    make(tiny, folder, rope_parameters=rope)
    code = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    edit(folder, {"auto_map": code, "pad_token_id": tiny.chat.end_id})
    edit(folder, SAMPLING | {"eos_token_id": [tiny.tokenizer.eos_token_id, 5], "pad_token_id": 0}, "generation_config.json")
    templates = [{"name": "default", "template": tiny.chat.jinja}, {"name": "tool_use", "template": tiny.chat.jinja + "{# tools #}"}]
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    edit(folder, {"chat_template": templates}, "tokenizer_config.json")
    return folder


def first_step(base: str, split: Split) -> tuple[float, float]:
    """Return the loss of all examples together by plain transformers, one at a time, and the norm of its gradient."""
    model = class_in(base).from_pretrained(base, dtype=torch.float32)  # computes as in use, without dropout or noise
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # torch computes no gradient for the row of a padding token, which data may hold
    total, count = 0.0, sum(int(split[index]["num_trained"]) for index in range(len(split)))
    for index in range(len(split)):
        ids, labels = (torch.tensor(split[index][name]) for name in ("input_ids", "labels"))
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=IGNORE, reduction="sum") / count
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()
