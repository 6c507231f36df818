"""Makes a tiny configuration for every causal language model of the installed transformers.

Each tiny configuration is the default configuration of its class with every size reduced; sizes are recognised by field
name. Windows, chunks and the top-k of sparse indexers are smaller than the test sequences, so that they take effect.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB, EOS, PAD = 64, 1, 0

SMALL: dict[int, Iterable[str]] = {
    1: "n_group topk_group num_expert_group n_groups mamba_n_groups ngroups mamba_ngroups n_expert_groups "
    "first_k_dense_replace num_dense_layers num_nextn_predict_layers",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers depth "
    "num_key_value_heads n_head_kv num_kv_heads num_experts_per_tok moe_top_k top_k_experts num_experts_per_token "
    "moe_topk linear_num_key_heads swa_num_key_value_heads num_encoder_layers num_global_key_value_heads "
    "temporal_patch_size spatial_merge_size",
    4: "num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads num_heads num_experts "
    "n_routed_experts num_local_experts sliding_window attention_chunk_size index_topk attention_window_size "
    "window_size keep_window_size swa_num_attention_heads moe_num_experts linear_num_value_heads mamba_chunk_size "
    "ssm_num_heads chunk_size patch_size mamba_d_conv linear_conv_kernel_dim conv_L_cache attn_window "
    "sliding_window_size decoder_sparse_step",
    8: "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim kv_lora_rank index_head_dim linear_key_head_dim "
    "linear_value_head_dim mamba_d_state ssm_state_size state_size mamba_d_head mamba_head_dim attention_head_dim "
    "mamba_dt_rank time_step_rank index_n_heads swa_head_dim global_head_dim d_kv d_head rotary_dim swa_v_head_dim",
    16: "q_lora_rank moe_intermediate_size expert_ffn_hidden_size dim_model_base hidden_size_per_layer_input "
    "embedding_size",
    32: "hidden_size d_model n_embd dim embed_dim word_embed_proj_dim lru_width hidden_dim embedding_dim "
    "projection_dim cross_attention_hidden_size encoder_hidden_size",
    48: "intermediate_size ffn_dim n_inner d_ff decoder_ffn_dim encoder_ffn_dim ffn_hidden_size ff_dim d_inner "
    "shared_expert_intermediate_size moe_shared_expert_intermediate_size shared_intermediate_size "
    "intermediate_size_mlp block_ff_dim dense_intermediate_size feed_forward_size",
    64: "max_position_embeddings n_positions n_ctx max_sequence_length image_size max_seq_len "
    "original_max_position_embeddings max_source_positions max_target_positions",
}  # pyright: ignore[reportAssignmentType] (split below)
SMALL_BY_NAME = {name: size for size, names in SMALL.items() for name in str(names).split()}

# Sparse indexers keep 8 heads: with fewer heads more keys have score 0, and the choice among equal scores is arbitrary.

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
    "dots3_note": {"adapter_in_dim": 32},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"],
        "num_hidden_layers": 2,
        "rope_parameters": None,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "longcat_flash": {"head_dim": 8, "qk_head_dim": 16},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"num_key_value_heads": 2, "num_attention_heads": 4},
    "qwen4_exp_text": {"num_key_value_heads": 2, "num_attention_heads": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2},
    "reformer": {
        "hidden_size": 32,
        "axial_pos_embds_dim": [8, 24],
        "axial_pos_shape": [8, 8],
        "attention_head_size": 8,
    },
    "rwkv": {"attention_hidden_size": 32},
    "inkling2_text": {"unpadded_vocab_size": 64},
    "inkling2_loop_text": {"unpadded_vocab_size": 64},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "mamba", "hybrid"]},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "mamba", "hybrid"]},
    "xlm": {"n_langs": 1},
    "prophetnet": {"num_decoder_layers": 2},
    "ernie4_5_moe": {"moe_k": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": 2, "num_experts": 4},
    "gemma3n_text": {
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "vocab_size_per_layer_input": 64,
    },
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
}
"""Model type -> values of fields that the rules by field name would set wrongly (also in the text configuration)."""


def causal_types() -> list[str]:
    """The model types of all causal language models, in the order of transformers."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str) -> PretrainedConfig:
    """A configuration for a model with a few thousand parameters that has every kind of layer of its family."""
    default = AutoConfig.for_model(model_type)
    fields = _small(default, OVERRIDES.get(model_type, {}))
    return type(default)(**fields)


def _small(config: PretrainedConfig, overrides: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        part = vars(config).get(name)
        if name in ("model_type", "transformers_version", "architectures", "_name_or_path", "per_layer_config"):
            continue
        if isinstance(part, PretrainedConfig):
            fields[name] = _small(part, overrides if name in ("text_config", "decoder") else {})
            fields[name]["model_type"] = part.model_type
        elif name == "vocab_size_per_layer_input":
            fields[name] = VOCAB
        elif name in SMALL_BY_NAME and isinstance(value, int) and not isinstance(value, bool):
            fields[name] = min(SMALL_BY_NAME[name], value) if value > 0 else value
        elif name == "vocab_size" or name.startswith("vocab_size_"):
            fields[name] = VOCAB
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int):
            fields[name] = value % (VOCAB - 8) if value >= 0 else value
        else:
            fields[name] = copy.deepcopy(value)
    if "pad_token_id" in fields:
        fields["pad_token_id"] = PAD
    for name in ("eos_token_id", "bos_token_id"):
        if name in fields:
            fields[name] = EOS
    if isinstance(kinds := fields.get("layer_types"), list):
        fields["layer_types"] = _each_kind(kinds)
        for name in ("num_hidden_layers", "n_layer", "num_layers"):
            if name in fields:
                fields[name] = len(fields["layer_types"])
        for name, value in fields.items():
            if isinstance(value, list) and name != "layer_types" and len(value) == len(kinds):
                fields[name] = _each_kind(value)[: len(fields["layer_types"])]
    if fields.get("kv_lora_rank"):  # multi-head latent attention has no grouped keys and values
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    if "is_decoder" in fields:
        fields["is_decoder"] = True
    if fields.get("is_encoder_decoder"):
        fields["is_encoder_decoder"] = False
    for name, value in overrides.items():
        if name in fields or not name.startswith("?"):
            fields[name.lstrip("?")] = copy.deepcopy(value)
    return fields


def _each_kind(kinds: list[Any]) -> list[Any]:
    """Shortens a list of layer types: every kind once, in order; if there is only one kind, two layers of it."""
    found = [kind for i, kind in enumerate(kinds) if kind not in kinds[:i]]
    return found if len(found) > 1 else found * 2
