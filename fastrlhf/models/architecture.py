"""Checks by the configuration of a model whether its architecture can be trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from safetensors import safe_open
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING_NAMES


def check_decoder(config: PretrainedConfig, what: str) -> None:
    """Raises ValueError, whose message starts with `what`, for an encoder, an encoder-decoder and every other model
    that transformers cannot load as a causal language model."""
    kind = config.model_type
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return  # the model brings its own code
    if config.is_encoder_decoder:
        found = f"an encoder-decoder model ({kind})"
    elif kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        found = f"an encoder ({kind}), which does not write text"
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        found = f"a model of type {kind}, for which transformers has no causal language model"
    elif (
        saved := cast(Any, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]).config_class
    ) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        found = f"a model of type {kind}, and transformers cannot load its language model ({saved.model_type})"
    else:
        return
    raise ValueError(f"{what} is {found}; give a causal language model (decoder only)")


def _language_model(config: PretrainedConfig) -> type[PretrainedConfig]:
    """Returns the class of the configuration that the loaded model will have; a composite model is loaded without its
    other parts."""
    return cast(Any, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]).config_class


def check_head(config: PretrainedConfig, source: str, field: str) -> None:
    """Raises ValueError, naming `field`, if a model that must score has the configuration of a language model, and no
    weights of a score head among its files. Reads no weights."""
    names = config.architectures or ["unknown"]
    if not all(name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in names):
        return
    for file in Path(source).glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            if "score.weight" in weights.keys():  # noqa: SIM118 (not a mapping)
                return
    raise ValueError(f"{field}: {source!r} has no trained score head; train one with `fastrlhf reward`")
