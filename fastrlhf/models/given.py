"""Model objects that a program holds, in place of those that a configuration names."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.config import TrainConfig, require
from fastrlhf.models.adapters import has_adapter
from fastrlhf.models.layers import LayerOptions
from fastrlhf.models.loading import (
    DTYPES,
    _ready,
    check_same_vocabulary,
    float_score_head,
    make_trainable,
    open_policy,
    resolve_device,
)


def policy_or_given(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, given: PreTrainedModel | None
) -> PreTrainedModel:
    """The model given, or the one that `config` names: on the device of the run, ready to train."""
    if given is None:
        return open_policy(config, tokenizer)
    model = adopt(given, config, tokenizer)
    make_trainable(model, config, "")
    return model


def adopt(model: PreTrainedModel, config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model object on the device of the run, checked as if it had been loaded.

    Raises ValueError where `config` names a model too, asks for 4 bits or has another dtype, for a model with an
    adapter, and for a vocabulary smaller than the tokenizer's.
    """
    kind = type(model).__name__
    require(isinstance(model, PreTrainedModel), "model", kind, "a PreTrainedModel, without peft's wrapper")
    require(not has_adapter(model), "model", f"{kind} with an adapter", "without an adapter; merge or remove it first")
    for key, unset in (("model_name_or_path", ""), ("model_config", ""), ("load_in_4bit", False)):
        value = getattr(config, key)
        require(value == unset, key, value, f"{unset!r} when a model is given")
    require(model.dtype == DTYPES[config.dtype], "dtype", config.dtype, f"that of the model given, {model.dtype}")
    check_same_vocabulary({"model": model}, len(tokenizer))
    return _ready(model.requires_grad_(True), resolve_device(config.device), LayerOptions.of(config))


def adopt_reward_model(
    model: PreTrainedModel, config: TrainConfig, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """A sequence classifier with one label, as `adopt`. Raises ValueError where the model given is of another kind."""
    float_score_head(model, "the model given", "model")
    return adopt(model, config, tokenizer)
