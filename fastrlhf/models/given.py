"""Prepares model objects that a program passes to a trainer in place of the models that the configuration names."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.config import TrainConfig, require
from fastrlhf.models.adapters import has_adapter
from fastrlhf.models.layers import LayerOptions
from fastrlhf.models.loading import (
    DTYPES,
    _ready,
    check_vocabulary,
    float_score_head,
    make_trainable,
    open_policy,
    resolve_device,
)


def policy_or_given(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, given: PreTrainedModel | None
) -> PreTrainedModel:
    """Returns the given model, or the model that `config` names, on the device of the run and ready to train."""
    if given is None:
        return open_policy(config, tokenizer)
    model = adopt(given, config, tokenizer)
    make_trainable(model, config, "")
    return model


def adopt(model: PreTrainedModel, config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Moves a model object to the device of the run and checks it like a model that the run loads.

    Raises ValueError if `config` names a model too, asks for 4 bits or has another dtype, if the model has an adapter,
    or if its vocabulary is smaller than the tokenizer's.
    """
    kind = type(model).__name__
    require(isinstance(model, PreTrainedModel), "model", kind, "a PreTrainedModel, without peft's wrapper")
    require(not has_adapter(model), "model", f"{kind} with an adapter", "without an adapter; merge or remove it first")
    for key, unset in (("model_name_or_path", ""), ("model_config", ""), ("load_in_4bit", False)):
        value = getattr(config, key)
        require(value == unset, key, value, f"{unset!r} when a model is given")
    require(model.dtype == DTYPES[config.dtype], "dtype", config.dtype, f"that of the model given, {model.dtype}")
    check_vocabulary({"model": model}, tokenizer)
    return _ready(model.requires_grad_(True), resolve_device(config.device), LayerOptions.of(config))


def adopt_reward_model(
    model: PreTrainedModel, config: TrainConfig, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Moves and checks a reward model like `adopt`. Raises ValueError if it is not a sequence classifier with one
    label."""
    float_score_head(model, "the model given", "model")
    return adopt(model, config, tokenizer)
