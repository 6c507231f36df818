"""Makes a small configuration of the same architecture, so that a model can be tried in a second without its weights.

Every size is recognised by its field name and reduced. Layers of one kind are reduced to one or two, so that every kind
of layer remains. Windows, chunks and the top-k of sparse indexers are made shorter than the sequences of a test, so
that they take effect.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCAB, EOS, PAD = 64, 1, 0
"""Size of the vocabulary of a small model, and its ids of BOS and EOS, and of padding."""

_NAMES = {
    1: "n_group topk_group num_expert_group n_groups mamba_n_groups ngroups mamba_ngroups n_expert_groups "
    "first_k_dense_replace num_dense_layers num_nextn_predict_layers",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers depth "
    "num_key_value_heads n_head_kv num_kv_heads num_experts_per_tok moe_top_k top_k_experts num_experts_per_token "
    "moe_topk linear_num_key_heads swa_num_key_value_heads num_encoder_layers num_global_key_value_heads "
    "temporal_patch_size spatial_merge_size",
    4: "num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads num_heads num_experts "
    "n_routed_experts num_local_experts sliding_window attention_chunk_size index_topk attention_window_size "
    "window_size keep_window_size swa_num_attention_heads moe_num_experts linear_num_value_heads mamba_chunk_size "
    "ssm_num_heads mamba_n_heads chunk_size patch_size mamba_d_conv linear_conv_kernel_dim conv_L_cache attn_window "
    "sliding_window_size decoder_sparse_step",
    8: "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim kv_lora_rank index_head_dim linear_key_head_dim "
    "linear_value_head_dim mamba_d_state ssm_state_size state_size mamba_d_head mamba_head_dim attention_head_dim "
    "mamba_dt_rank time_step_rank index_n_heads swa_head_dim global_head_dim d_kv d_head rotary_dim swa_v_head_dim",
    16: "q_lora_rank moe_intermediate_size expert_ffn_hidden_size dim_model_base hidden_size_per_layer_input "
    "embedding_size",
    32: "hidden_size d_model n_embd dim embed_dim word_embed_proj_dim lru_width hidden_dim embedding_dim "
    "projection_dim mamba_d_ssm hidden_size_global cross_attention_hidden_size encoder_hidden_size",
    48: "intermediate_size ffn_dim n_inner d_ff decoder_ffn_dim encoder_ffn_dim ffn_hidden_size ff_dim d_inner "
    "shared_expert_intermediate_size moe_shared_expert_intermediate_size shared_intermediate_size "
    "intermediate_size_mlp block_ff_dim dense_intermediate_size feed_forward_size",
    64: "max_position_embeddings n_positions n_ctx max_sequence_length image_size max_seq_len "
    "encoder_hash_byte_group_vocab original_max_position_embeddings max_source_positions max_target_positions",
}
SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}
"""Name of a field -> its largest value in a small configuration. Sparse indexers keep 8 heads: with fewer heads more
keys have score 0, and the choice among equal scores is arbitrary."""


_DERIVED = (
    *("model_type", "transformers_version", "architectures", "_name_or_path", "auto_map"),
    *("per_layer_config", "hybrid_layer_ids"),
)
"""Fields that the class of the configuration sets itself."""


def small_config(config: PretrainedConfig, overrides: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """Returns a configuration for a model with a few thousand parameters that has every kind of layer of `config`.

    `overrides`: fields that the rules by name would set wrongly; they apply to the language model too. A mapping under
    the name of a sub-configuration holds fields of it. Raises whatever the class of the configuration raises if the
    small sizes do not fit together.
    """
    return type(config)(**_small(config, overrides or {}))


def small_model(config: PretrainedConfig) -> PreTrainedModel:
    """Builds a random causal language model. Its weights are large, so that log-probs of different tokens differ
    by tenths of a nat."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.mul_(2)
                else:
                    parameter.add_(torch.randn(parameter.shape), alpha=0.02)
            # Padding has the embedding 0. An indexer then scores all keys equally, and its choice is arbitrary.
            table = model.get_input_embeddings().weight
            table[0] = torch.randn(table.shape[1:]) * table.std()
    return model


def _small(config: PretrainedConfig, overrides: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        part = vars(config).get(name)
        if name in _DERIVED:
            continue
        if isinstance(part, PretrainedConfig):
            inherited = overrides if name in ("text_config", "decoder") else {}
            fields[name] = _small(part, {**inherited, **overrides.get(name, {})})
            fields[name]["model_type"] = part.model_type
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool):
            fields[name] = min(SIZES[name], value) if value > 0 else value
        elif name == "vocab_size" or name.startswith("vocab_size_"):
            fields[name] = VOCAB if value != 0 else 0
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int):
            fields[name] = value % (VOCAB - 8) if value >= 0 else value
        else:
            fields[name] = copy.deepcopy(value)
    if "pad_token_id" in fields:
        fields["pad_token_id"] = PAD
    for name in ("eos_token_id", "bos_token_id"):
        if name in fields:
            fields[name] = EOS
    listed = next((name for name in ("layer_types", "layers_block_type") if isinstance(fields.get(name), list)), "")
    if listed:
        kinds = fields[listed]
        fields[listed] = _each_kind(kinds)
        for name in ("num_hidden_layers", "n_layer", "num_layers"):
            if name in fields:
                fields[name] = len(fields[listed])
        for name, value in fields.items():
            if isinstance(value, list) and name != listed and len(value) == len(kinds):
                fields[name] = _each_kind(value)[: len(fields[listed])]
    for expand, heads, size in (
        ("mamba_expand", "mamba_n_heads", "mamba_d_head"),
        ("mamba_expand", "n_mamba_heads", "mamba_headdim"),
        ("expand", "num_heads", "head_dim"),
    ):
        if expand in fields and heads in fields:
            inner = fields.get("mamba_d_ssm") or int(fields[expand] * fields["hidden_size"])
            fields[size] = inner // fields[heads]
    if fields.get("attention_hidden_size"):  # a multiple of the hidden size, in Zamba and RWKV
        wide = fields["attention_hidden_size"] // config.hidden_size * fields["hidden_size"]
        fields["attention_hidden_size"] = wide
        fields["attention_head_dim"] = wide // fields.get("num_attention_heads", wide)
    width = fields.get("head_dim") or fields.get("hidden_size", 0) // (fields.get("num_attention_heads") or 1)
    for name in ("rope_parameters", "rope_scaling"):
        fields[name] = _small_rope(fields[name], width) if isinstance(fields.get(name), dict) else fields.get(name)
        if fields[name] is None:
            del fields[name]
    if fields.get("kv_lora_rank"):  # multi-head latent attention has no grouped keys and values
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    if "is_decoder" in fields:
        fields["is_decoder"] = True
    if fields.get("is_encoder_decoder"):
        fields["is_encoder_decoder"] = False
    parts = {name for name, part in vars(config).items() if isinstance(part, PretrainedConfig)}
    fields |= {name: copy.deepcopy(value) for name, value in overrides.items() if name not in parts}
    return fields


def _small_rope(rope: dict[str, Any], width: int) -> dict[str, Any]:
    """Makes the lists of rotary parameters fit heads of `width`: factors per frequency, and sections of frequencies."""
    num = max(1, int(width * (rope.get("partial_rotary_factor") or 1)) // 2)
    fitted = {k: _small_rope(value, width) if isinstance(value, dict) else value for k, value in rope.items()}
    for name, value in fitted.items():
        if name.endswith("_factor") and isinstance(value, list):
            fitted[name] = value[:num]
        if name == "mrope_section" and isinstance(value, list):
            parts = [size * num // sum(value) for size in value]
            fitted[name] = [*parts[:-1], num - sum(parts[:-1])]
    return fitted


def _each_kind(kinds: list[Any]) -> list[Any]:
    """Shortens a list of layer types: every kind once, in order; if there is only one kind, two layers of it."""
    found = [kind for i, kind in enumerate(kinds) if kind not in kinds[:i]]
    return found if len(found) > 1 else found * 2
