"""Results of the ops.

Metrics stay on the device, detached, and define how they combine over micro-batches and ranks: a Sum adds up, a Max
takes the larger value. A mean is a Sum over another Sum (`policy_loss` over `tokens`), divided once, at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class TokenLogprobs(NamedTuple):
    """Results of `linear_logprob` per row; [T] float32, nats. Ignored rows are 0."""

    logprob: Tensor
    """log p(target), never above 0; differentiable."""
    logsumexp: Tensor
    """log of the normaliser of the transformed logits; differentiable (z-loss)."""
    entropy: Tensor | None
    """-sum p log p over the vocabulary; differentiable. None unless asked for."""
    max_logprob: Tensor | None
    """Largest log-prob of the row, detached; the target is the greedy choice where they agree. None without stats."""
    mean_logit: Tensor | None
    """Mean of the transformed logits over the vocabulary, detached. None without stats."""


class TokenKL(NamedTuple):
    """Results of `linear_kl` per row; [T] float32, nats. Ignored rows are 0."""

    kl: Tensor
    """KL(policy || reference) over the whole vocabulary, never below 0; differentiable."""
    logprob: Tensor | None
    """log p(target) under the policy, never above 0; differentiable. None without targets."""
    reference_logprob: Tensor | None
    """log p(target) under the reference, detached. None without targets."""
    entropy: Tensor | None
    """-sum p log p of the policy; differentiable. None unless asked for."""


@dataclass(frozen=True, slots=True)
class Sum:
    """A 0-dim float32 tensor that adds up over micro-batches and ranks."""

    value: Tensor

    def __add__(self, other: Sum) -> Sum:
        if not isinstance(other, Sum):
            return NotImplemented
        return Sum(self.value + other.value)


@dataclass(frozen=True, slots=True)
class Max:
    """A 0-dim float32 tensor whose maximum is kept over micro-batches and ranks; + is that maximum."""

    value: Tensor

    def __add__(self, other: Max) -> Max:
        if not isinstance(other, Max):
            return NotImplemented
        return Max(torch.maximum(self.value, other.value))


Metric = Sum | Max


class LossOutput(NamedTuple):
    """A loss with its metrics."""

    loss: Tensor
    """0-dim float32; call backward on it."""
    metrics: Mapping[str, Metric]


def merge(*metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """Merges the metrics of several micro-batches; a name may be missing from some. Does not wait for the device.

        merge({"tokens": Sum(3)}, {"tokens": Sum(4), "ratio_max": Max(2)})  ->  {"tokens": Sum(7), "ratio_max": Max(2)}

    Raises ValueError for a name that is a Sum here and a Max there.
    """
    merged: dict[str, Metric] = {}
    for mapping in metrics:
        for name, metric in mapping.items():
            earlier = merged.get(name)
            if earlier is not None and type(earlier) is not type(metric):
                raise ValueError(f"metric {name!r} is both a {type(earlier).__name__} and a {type(metric).__name__}")
            merged[name] = metric if earlier is None else earlier + metric  # pyright: ignore[reportOperatorIssue]
    return merged
