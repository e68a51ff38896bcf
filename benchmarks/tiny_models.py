"""Builds a small random model of every family of causal language models that the installed transformers has.

A family is a model type of AutoModelForCausalLM. Sizes are set by the names of a config's attributes, which are much the same everywhere;
what a family needs besides is in OWN.
"""

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from posttrain.model.classes import class_of

VOCABULARY = ("vocab_size", "vocab_size_per_layer_input")  # attributes
# models that are not asked for text alone: decoders of encoder-decoder models, encoders with a head, models of sound, of bytes (blt)
OTHERS = """
bart bert bert-generation big_bird bigbird_pegasus blenderbot blt blenderbot-small camembert cpmant ctrl data2vec-text electra ernie
git marian mbart megatron-bert mllama moshi moss_transcribe_diarize musicgen musicgen_melody mvp pegasus plbart prophetnet rembert
roberta roberta-prelayernorm roc_bert roformer trocr whisper xlm xlm-roberta xlm-roberta-xl xlnet xmod reformer emu3 fuyu got_ocr2
aria_text gemma4_assistant gemma4_unified_assistant phi4_multimodal
"""
# those that are asked for pictures, too, and whose text part has no class of its own
WRAPPED = "mistral3 llava internvl qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe glm4v paddleocr_vl"
LAYERS = 4
# by the names of attributes (transformers 5.23); those that a config lacks are left out
SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "model_dim"), 32),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "shared_intermediate_size", "dense_intermediate_size"), 48
    ),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size", "intermediate_size_mlp"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "attention_num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "attention_head_dim", "d_kv"), 8),
    **dict.fromkeys(("kv_lora_rank",), 16),
    **dict.fromkeys(("q_lora_rank",), 24),
    **dict.fromkeys(("qk_rope_head_dim",), 4),
    **dict.fromkeys(("qk_nope_head_dim",), 4),
    **dict.fromkeys(("v_head_dim",), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token", "experts_top_k", "moe_top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "seq_length", "max_seq_len", "n_ctx"), 256),
    **dict.fromkeys(("sliding_window", "attention_window_size"), 8),
    **dict.fromkeys(("attention_chunk_size",), 8),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("mamba_num_heads", "mamba_n_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank"), 2),
    **dict.fromkeys(("initializer_range",), 0.2),
}
WINDOWS = ["sliding_attention", "full_attention"] * 2
THREE_AXES = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}  # of positions: time, height and width
OWN: dict[str, dict] = {
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in WINDOWS[:2]}},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {
        "per_layer_config": {},
        "index_head_dim": 8,
        "index_n_heads": 4,
        "shared_experts_intermediate_size": 16,
        "head_dim": 8,
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "layer_types": WINDOWS,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "intermediate_size": [48] * LAYERS,
        "activation_sparsity_pattern": [0.0] * LAYERS,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]], "window_size": 8},
    "gptj": {"rotary_dim": 4},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4, "layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 4},
    "mamba2": {"head_dim": 16},
    "qwen2_vl_text": {"rope_parameters": THREE_AXES},
    "qwen2_5_vl_text": {"rope_parameters": THREE_AXES},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "glm4v_text": {"rope_parameters": THREE_AXES},
    "paddleocr_vl_text": {"rope_parameters": THREE_AXES},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 100,
        "output_gate_type": "sigmoid",
    },
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "hybrid_layer_ids": [1, 3],
    },
    "zaya": {"num_experts_per_tok": 1},
}


def families() -> list[str]:
    """Return the model types whose models read and write text."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *WRAPPED.split()} - {*OTHERS.split()})


def tiny_config(kind: str, vocabulary: int) -> PreTrainedConfig:
    """Return the config of a small model of a family that knows so many tokens."""
    config = CONFIG_MAPPING[kind]()
    text = config.get_text_config()
    made = type(text)(**sized(text) | {name: vocabulary for name in VOCABULARY if name in text.to_dict()} | OWN.get(text.model_type, {}))
    if text is config:
        return made
    parts = {name: value for name, value in vars(config).items() if isinstance(value, PreTrainedConfig) and value is not text}
    name = next(name for name, value in vars(config).items() if value is text)
    return type(config)(**{name: made}, **{name: type(part)(**sized(part)) for name, part in parts.items()})


def sized(config: PreTrainedConfig) -> dict:
    """Return small sizes for those attributes that a config has."""
    values = config.to_dict()
    there = set(values) | set(config.attribute_map)
    given = {name: size for name, size in SIZES.items() if name in there and (name != "sliding_window" or values.get(name))}
    if "kv_lora_rank" in there:  # each head has keys of its own, of a width that follows from others
        given["num_key_value_heads"] = given["num_attention_heads"]
        given.pop("head_dim", None)
    return given | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tiny_model(kind: str, vocabulary: int = 128) -> PreTrainedModel:
    """Return a small random model of a family, in float32."""
    torch.manual_seed(0)
    config = tiny_config(kind, vocabulary)
    model = class_of(config)._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # many start at ones and zeros, with which a wrong one would not show
                parameter += 0.1 * torch.randn(parameter.shape)
    return model.eval()
