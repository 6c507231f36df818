"""Merges adapters into their base model: `fastrlhf merge`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrlhf.config import MergeConfig, check_config, require
from fastrlhf.data.specials import special_ids
from fastrlhf.data.tokenizer import load_tokenizer
from fastrlhf.models.adapters import merged_copy, weighted_weights
from fastrlhf.models.four_bit import plain_weight
from fastrlhf.models.loading import DTYPES
from fastrlhf.models.roles import holds_adapter, is_reward_adapter, open_base, policy_role, score_role
from fastrlhf.runtime.checkpoint import check_output_dir, save_model


def merge_adapters(config: MergeConfig) -> float:
    """Saves in `output_dir` the base model plus the sum of the adapters' updates, each times its factor, with the
    tokenizer of the first adapter. The sum is computed in float32 and saved in `dtype`.

    Returns the share of the updates that rounding to `dtype` loses: the norm of the rounding error of the
    adapted weights, divided by the norm of the updates; 0 for float32. Raises ValueError if an adapter cannot be read,
    if the adapters have different bases, or if they cannot be added.
    """
    check_config(config, MergeConfig, "merge_adapters")
    require(bool(config.adapters), "adapters", config.adapters, "the folder of at least one adapter")
    num = len(config.adapter_weights)
    require(num in (0, len(config.adapters)), "adapter_weights", config.adapter_weights, "one number per adapter")
    require(bool(config.output_dir), "output_dir", config.output_dir, "the folder of the merged model")
    check_output_dir(config.output_dir)
    sources = [_adapter(source) for source in config.adapters]
    factors = config.adapter_weights or (1.0,) * len(sources)
    base = open_base(replace(config, dtype="float32"), [("adapters", source) for source in sources])
    assert base is not None  # open_base raises ValueError if it cannot be loaded
    place = sources[0] if (Path(sources[0]) / "tokenizer_config.json").exists() else str(base.name_or_path)
    tokenizer = load_tokenizer(place, trust_remote_code=config.trust_remote_code)
    models = [_role(source, base, special_ids(tokenizer)[1]) for source in sources]
    before = {name: plain_weight(weight).float() for name, weight in base.named_parameters()}
    dtype, lost, changed = DTYPES[config.dtype], 0.0, 0.0

    def rounded() -> Iterator[tuple[str, Tensor]]:
        nonlocal lost, changed
        for name, weight in weighted_weights(models, factors, torch.float32):
            if name in before and (update := squared_norm(weight - before[name])):
                changed += update
                lost += squared_norm(weight - weight.to(dtype))
            yield name, weight.to(dtype)

    save_model(merged_copy(models[0], dtype, rounded()), tokenizer, Path(config.output_dir))
    return (lost / changed) ** 0.5 if changed else 0.0


def _role(source: str, base: PreTrainedModel, pad_token_id: int | None) -> PreTrainedModel:
    if is_reward_adapter(source, "adapters"):
        return score_role(source, base, "adapters", pad_token_id)
    return policy_role(source, base, "adapters")


def squared_norm(tensor: Tensor) -> float:
    return tensor.detach().double().square().sum().item()


def _adapter(source: str) -> str:
    """Returns the folder of the adapter, which may be in the folder of a run. Raises ValueError if there is none."""
    for place in (source, str(Path(source) / "adapter")):
        if holds_adapter(place):
            return place
    raise ValueError(f"adapters: {source!r} holds no adapter (adapter_config.json); give the folder of an adapter")
