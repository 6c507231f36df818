"""Computes the loss on preference pairs from hidden states: `pair_loss(linear_logprob(...))` in one call.

A pair's loss needs every token of both responses before any gradient is known, so fusing it with the products of the
head gains nothing. This function runs the two ops one after the other; values, gradients, time and memory equal theirs.

Legend: T rows, B pairs, V vocabulary, D hidden size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastrlhf_kernels.linear_logprob import linear_logprob, linear_logprob_reference
from fastrlhf_kernels.pair_loss import pair_loss, pair_loss_reference
from fastrlhf_kernels.types import LossOutput


def linear_pair_loss(
    hidden: Tensor,  # [T, D]; hidden, weight and bias have gradients
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [T] int64
    reference_logprob: Tensor | None,  # [T], or [2B] sums over the rows of each sequence in the mask, or None for 0
    cu_seqlens: Tensor,  # [2B+1]; sequences 2i and 2i+1 are the chosen and the rejected response of pair i
    mask: Tensor,  # [T] bool
    *,
    num_pairs: float | Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    kind: str = "dpo",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    label_prob: Tensor | None = None,  # [B]
    margin: Tensor | None = None,  # [B]
    pair_weight: Tensor | None = None,  # the `weight` [B] of pair_loss
    target: Tensor | None = None,  # [B]
    length_norm: str = "sum",
    impl: str = "auto",
) -> LossOutput:
    """Returns loss and metrics of `pair_loss` for the log-probs of `targets`. Raises ValueError for bad arguments."""
    rows = linear_logprob(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
        impl=impl,
    )
    return pair_loss(
        rows.logprob,
        reference_logprob,
        cu_seqlens,
        mask,
        num_pairs=num_pairs,
        kind=kind,
        beta=beta,
        label_smoothing=label_smoothing,
        label_prob=label_prob,
        margin=margin,
        weight=pair_weight,
        target=target,
        length_norm=length_norm,
        impl=impl,
    )


def linear_pair_loss_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    reference_logprob: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor,
    *,
    softcap: float | None = None,
    **options: Any,
) -> Tensor:
    """Computes log-probs and then the loss by their definitions, in the dtype of the inputs."""
    logprob = linear_logprob_reference(hidden, weight, targets, softcap=softcap).logprob
    return pair_loss_reference(logprob, reference_logprob, cu_seqlens, mask, **options)
