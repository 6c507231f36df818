"""The per-token terms of `policy_loss`, in torch and in Triton, and the Triton kernel that sums them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf_kernels._rows import block_of_rows, load_float32, store_sum
from fastrlhf_kernels._triton import jit, tl
from fastrlhf_kernels.kl_estimate import (
    LIMIT,
    MAX_LOG_RATIO,
    clamped,
    estimator,
    kl_terms,
    torch_clamped,
    torch_estimator,
    torch_kl_terms,
)


class PolicyTerms(NamedTuple):
    """Loss, gradients and metrics of each token, [T]. `clipped` and `dual_clipped` are bool, all others float32."""

    loss: Tensor
    d_logprob: Tensor
    d_entropy: Tensor
    surrogate: Tensor
    """The weighted first term of the loss, -g_t in `policy_loss`."""
    ratio: Tensor
    clipped: Tensor
    """True where a bound of the clip or of the dual clip replaces the token's ratio."""
    dual_clipped: Tensor
    """True where the bound of the dual clip replaces the token's ratio."""
    approx_kl: Tensor
    """k3 estimate of KL(sampler || policy)."""
    kl: Tensor
    """Weighted KL estimate w k to the reference (see `kl_estimate`); 0 without a reference."""


def torch_policy_terms(
    logprob: Tensor,
    sampler_logprob: Tensor,
    advantage: Tensor,
    weight: Tensor,
    reference_logprob: Tensor | None,
    entropy: Tensor | None,
    sequence_log_ratio: Tensor | None,
    low: float,
    high: float,
    dual_clip: float,
    kl_coef: float,
    entropy_coef: float,
    kl_kind: str,
    loss_type: str,
) -> PolicyTerms:
    """Computes the terms of each token in torch; `policy_terms` is the Triton version."""
    log_ratio = torch_clamped(logprob - sampler_logprob)
    token_ratio = log_ratio.exp()
    difference = logprob - sampler_logprob if sequence_log_ratio is None else sequence_log_ratio
    ratio = token_ratio if sequence_log_ratio is None else torch_clamped(difference).exp()
    # Comparisons with NaN are False: a NaN ratio does not count as clipped, and so it reaches loss and gradient.
    rises, beyond = advantage >= 0, ratio > dual_clip
    dual_clipped = ~rises & beyond
    clipped = torch.where(rises, ratio > high, (ratio < low) | beyond)
    bound = torch.full_like(ratio, low).masked_fill(beyond, dual_clip).masked_fill(rises, high)
    if loss_type == "cispo":
        clipped, dual_clipped = (ratio < low) | (ratio > high), torch.zeros_like(clipped)
        bound = torch.full_like(ratio, low).masked_fill(ratio > high, high)
        d_logprob = -weight * (bound.where(clipped, ratio) * advantage)
        loss = surrogate = d_logprob * logprob
    else:
        loss = surrogate = -weight * (bound.where(clipped, ratio) * advantage)
        d_logprob = (-weight * (ratio * advantage)).masked_fill(clipped | (difference.abs() > MAX_LOG_RATIO), 0)
    d_entropy, kl = -entropy_coef * weight, torch.zeros_like(ratio)
    if reference_logprob is not None:
        kl, slope = torch_kl_terms(logprob, reference_logprob, token_ratio, kl_kind)
        loss = loss + kl_coef * weight * kl
        d_logprob = d_logprob + kl_coef * weight * slope
    if entropy is not None:
        loss = loss + d_entropy * entropy
    approx_kl = torch_estimator(-log_ratio, "k3")
    return PolicyTerms(loss, d_logprob, d_entropy, surrogate, ratio, clipped, dual_clipped, approx_kl, kl)


@jit
def policy_terms(
    logprob,
    sampler_logprob,
    advantage,
    weight,
    reference_logprob,  # or None
    entropy,  # or None
    sequence_log_ratio,  # or None
    low,
    high,
    dual_clip,
    kl_coef,
    entropy_coef,
    KL_KIND: tl.constexpr,
    LOSS_TYPE: tl.constexpr,
):
    """Returns the fields of `PolicyTerms` for float32 rows, in their order."""
    difference = logprob - sampler_logprob
    log_ratio = clamped(difference)
    token_ratio = tl.exp(log_ratio)
    ratio = token_ratio
    if sequence_log_ratio is not None:
        difference = sequence_log_ratio
        ratio = tl.exp(clamped(difference))
    if LOSS_TYPE == "cispo":
        clipped = (ratio < low) | (ratio > high)
        dual_clipped = ratio != ratio
        d_logprob = -weight * (tl.where(clipped, tl.where(ratio > high, high, low), ratio) * advantage)
        surrogate = d_logprob * logprob
    else:
        rises = advantage >= 0
        beyond = ratio > dual_clip
        clipped = tl.where(rises, ratio > high, (ratio < low) | beyond)
        dual_clipped = (advantage < 0) & beyond
        bound = tl.where(rises, high, tl.where(beyond, dual_clip, low))
        surrogate = -weight * (tl.where(clipped, bound, ratio) * advantage)
        d_logprob = tl.where(clipped | (tl.abs(difference) > LIMIT), 0.0, -weight * (ratio * advantage))
    loss = surrogate
    d_entropy = -entropy_coef * weight
    kl = tl.zeros_like(ratio)
    if reference_logprob is not None:
        kl, slope = kl_terms(logprob, reference_logprob, token_ratio, KL_KIND)
        loss += kl_coef * weight * kl
        d_logprob += kl_coef * weight * slope
    if entropy is not None:
        loss += d_entropy * entropy
    return loss, d_logprob, d_entropy, surrogate, ratio, clipped, dual_clipped, estimator(-log_ratio, "k3"), kl


@jit
def policy_kernel(
    logprob,
    sampler_logprob,
    advantage,
    mask,
    reference_logprob,  # or None
    weight,  # or None
    entropy,  # or None
    sequence_log_ratio,  # or None
    partials,  # [10, programs]: loss, SUMS, largest ratio
    d_logprob,
    d_entropy,
    num_rows,
    low,
    high,
    dual_clip,
    kl_coef,
    entropy_coef,
    KL_KIND: tl.constexpr,
    LOSS_TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows, inside, keep = block_of_rows(mask, num_rows, BLOCK)
    scale = keep.to(tl.float32)
    if weight is not None:
        scale = load_float32(weight, rows, keep)
    reference = reference_logprob
    if reference_logprob is not None:
        reference = load_float32(reference_logprob, rows, keep)
    bonus = entropy
    if entropy is not None:
        bonus = load_float32(entropy, rows, keep)
    of_sequence = sequence_log_ratio
    if sequence_log_ratio is not None:
        of_sequence = load_float32(sequence_log_ratio, rows, keep)
    loss, slope, entropy_slope, surrogate, ratio, clipped, dual_clipped, approx_kl, kl = policy_terms(
        load_float32(logprob, rows, keep),
        load_float32(sampler_logprob, rows, keep),
        load_float32(advantage, rows, keep),
        scale,
        reference,
        bonus,
        of_sequence,
        low,
        high,
        dual_clip,
        kl_coef,
        entropy_coef,
        KL_KIND,
        LOSS_TYPE,
    )
    tl.store(d_logprob + rows, slope, mask=inside)
    ratio = tl.where(keep, ratio, 0.0)
    store_sum(partials, 0, loss)
    store_sum(partials, 1, surrogate)
    store_sum(partials, 2, ratio)
    store_sum(partials, 3, clipped.to(tl.float32))
    store_sum(partials, 4, dual_clipped.to(tl.float32))
    store_sum(partials, 5, approx_kl)
    store_sum(partials, 6, keep.to(tl.float32))
    store_sum(partials, 7, kl)
    store_sum(partials, 8, tl.zeros_like(ratio) if entropy is None else bonus)
    if entropy is not None:
        tl.store(d_entropy + rows, entropy_slope, mask=inside)
    largest = tl.where(tl.sum((ratio != ratio).to(tl.int32), 0) == 0, tl.max(ratio, 0), float("nan"))  # max ignores NaN
    tl.store(partials + 9 * tl.num_programs(0) + tl.program_id(0), largest)
