"""Makes a tiny configuration for every causal language model of the installed transformers.

Each is made by `small_config` from the default configuration of the class. For some types a few fields are then
changed.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fastrlhf.models.small import small_config

_INDEXER = {
    "num_key_value_heads": 2,
    "num_attention_heads": 4,
    "indexer_n_heads": 8,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}
_GEMMA3N = {
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    "vocab_size_per_layer_input": 64,
}
_MAMBA2 = {"mamba_expand": 1, "mamba_n_heads": 4, "mamba_d_head": 8}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA2, "num_hidden_layers": 2, "attn_layer_indices": [1]},
    "granitemoehybrid": {**_MAMBA2, "num_hidden_layers": 2, "layer_types": ["mamba", "attention"]},
    "dory": {
        "num_hidden_layers": 3,
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
        "layer_types": None,
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"],
        "num_hidden_layers": 2,
        "rope_parameters": {
            "full_attention": None,
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8}, "ffn_config": {"hidden_size": 32}},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "longcat_flash": {"head_dim": 8, "qk_head_dim": 16},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": _INDEXER,
    "qwen4_exp_text": _INDEXER,
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2},
    "reformer": {
        "hidden_size": 32,
        "axial_pos_embds_dim": [8, 24],
        "axial_pos_shape": [8, 8],
        "attention_head_size": 8,
    },
    "inkling2_text": {"unpadded_vocab_size": 64},
    "inkling2_loop_text": {"unpadded_vocab_size": 64},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"]},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"]},
    "xlm": {"n_langs": 1},
    "prophetnet": {"num_decoder_layers": 2},
    "ernie4_5_moe": {"moe_k": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": 2, "num_experts": 4},
    "gemma3n": {**_GEMMA3N, "vision_config": {"architecture": "resnet10t"}},
    "gemma3n_text": _GEMMA3N,
    "gemma4_assistant": {"num_kv_shared_layers": 2},
    "gemma4_unified_assistant": {"num_kv_shared_layers": 2},
}
"""Model type -> values of the fields for which the general rules of `small_config` give an invalid model. The values
also apply to the text configuration. A dict under the name of a sub-configuration holds values for its fields."""

_SHARED_LAYERS = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
STARTS: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", **_SHARED_LAYERS}},
}
"""Model type -> values of fields without which the default configuration of the type is invalid."""


def causal_types() -> list[str]:
    """Returns the model types of all causal language models, in the order of transformers."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str) -> PretrainedConfig:
    """Returns a configuration of a model that has a few thousand parameters and every kind of layer of its family."""
    default = AutoConfig.for_model(model_type, **STARTS.get(model_type, {}))
    return small_config(default, OVERRIDES.get(model_type, {}))
