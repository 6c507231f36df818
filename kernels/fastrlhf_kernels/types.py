"""The result types of the ops, and the metrics that come with a loss.

Metrics are detached tensors on the device. Their type says how they combine over micro-batches and ranks: a Sum is
added up, a Max keeps the larger value. Means are not stored: divide one Sum by another at the end, for example
`policy_loss` by `tokens`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class TokenLogprobs(NamedTuple):
    """Results of `linear_logprob` for every row, [T] float32, in nats; 0 in ignored rows."""

    logprob: Tensor
    """log p(target), never above 0; differentiable."""
    logsumexp: Tensor
    """log of the softmax normaliser, after scale, soft cap and temperature; differentiable (for a z-loss)."""
    entropy: Tensor | None
    """-sum p log p over the vocabulary; differentiable. None unless requested."""
    max_logprob: Tensor | None
    """Largest log-prob of the row, detached; equals logprob if the target is the greedy choice. None without stats."""
    mean_logit: Tensor | None
    """Mean logit over the vocabulary, after scale, soft cap and temperature, detached. None without stats."""


class TokenKL(NamedTuple):
    """Results of `linear_kl` for every row, [T] float32, in nats; 0 in ignored rows."""

    kl: Tensor
    """KL(policy || reference) over the whole vocabulary, never below 0; differentiable."""
    logprob: Tensor | None
    """log p(target) under the policy, never above 0; differentiable. None without targets."""
    reference_logprob: Tensor | None
    """log p(target) under the reference, detached. None without targets."""
    entropy: Tensor | None
    """-sum p log p of the policy; differentiable. None unless requested."""


@dataclass(frozen=True, slots=True)
class Sum:
    """A metric (0-dim float32) that is added up over micro-batches and ranks."""

    value: Tensor

    def __add__(self, other: Sum) -> Sum:
        if not isinstance(other, Sum):
            return NotImplemented
        return Sum(self.value + other.value)


@dataclass(frozen=True, slots=True)
class Max:
    """A metric (0-dim float32) whose maximum is kept over micro-batches and ranks; `+` takes the larger value."""

    value: Tensor

    def __add__(self, other: Max) -> Max:
        if not isinstance(other, Max):
            return NotImplemented
        return Max(torch.maximum(self.value, other.value))


Metric = Sum | Max


class LossOutput(NamedTuple):
    """The result of a loss op: the loss and its metrics."""

    loss: Tensor
    """0-dim float32; call `backward()` on it."""
    metrics: Mapping[str, Metric]


def merge(*metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """Merges the metrics of several micro-batches without waiting for the device. A name may be missing from some.

        merge({"tokens": Sum(3)}, {"tokens": Sum(4), "ratio_max": Max(2)})  ->  {"tokens": Sum(7), "ratio_max": Max(2)}

    Raises ValueError if a name is a Sum in one micro-batch and a Max in another.
    """
    merged: dict[str, Metric] = {}
    for mapping in metrics:
        for name, metric in mapping.items():
            earlier = merged.get(name)
            if earlier is not None and type(earlier) is not type(metric):
                raise ValueError(f"metric {name!r} is both a {type(earlier).__name__} and a {type(metric).__name__}")
            merged[name] = metric if earlier is None else earlier + metric  # pyright: ignore[reportOperatorIssue]
    return merged
