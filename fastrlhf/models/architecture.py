"""Checks by the configuration of a model whether its architecture can be trained."""

from __future__ import annotations

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING_NAMES


def check_decoder(config: PretrainedConfig, what: str) -> None:
    """Raises ValueError, whose message starts with `what`, for an encoder, an encoder-decoder and every other model
    that transformers cannot load as a causal language model."""
    kind = config.model_type
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return  # its code comes with the model
    if config.is_encoder_decoder:
        found = f"an encoder-decoder model ({kind})"
    elif kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        found = f"an encoder ({kind}), which does not write text"
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        found = f"a {kind} model, for which transformers has no causal language model"
    else:
        return
    raise ValueError(f"{what} is {found}; give a causal language model (decoder only)")
