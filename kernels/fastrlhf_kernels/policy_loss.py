"""The clipped policy loss of PPO, with everything that is added to it per token.

    r_t    = exp(clamp(logprob - sampler_logprob, +-20))
    l_t    = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_coef w k - entropy_coef H
    loss   = sum_t mask weight l_t / num_tokens

With dual_clip c the first term is at most -c A where A < 0. k is k2 or k3 of `kl_estimate`, with its weight w.

Gradient of the first term with respect to logprob: -r A where the token is active, 0 elsewhere. Active:

    |logprob - sampler_logprob| <= 20  and  (A >= 0: r <= 1 + clip_high,   A < 0: r >= 1 - clip_low and r <= c)

bounds included; with r = 1 everywhere it is REINFORCE's. Of the others: kl_coef w delta, and -entropy_coef for H.

What lies in rows with mask False, NaN and infinities too, reaches neither the loss nor a gradient.

On a GPU one kernel reads the inputs once and writes the gradients: 17 T bytes in float32, 4 T more for each further
tensor and for the gradient of the entropy. The backward moves 8 T for each gradient.

Legend: T tokens, A advantage, H entropy. Schulman et al. 2017 (arXiv 1707.06347) eq. 7; dual clip: Ye et al. 2020
(arXiv 1912.09729); asymmetric clip: Yu et al. 2025 (arXiv 2503.14476).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrlhf_kernels import _rows
from fastrlhf_kernels._checks import check_choice, check_range, check_rows, check_tensor, divisor
from fastrlhf_kernels._rows import block_of_rows, contiguous, differentiate_by_slopes, load_float32, masked, store_sum
from fastrlhf_kernels._triton import jit, tl, use_triton
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
from fastrlhf_kernels.types import LossOutput, Max, Metric, Sum

SUMS = ("policy_loss", "ratio", "clip_fraction", "approx_kl", "tokens", "kl", "entropy")


def policy_loss(
    logprob: Tensor,  # [T] nats; gradient flows here and to entropy
    sampler_logprob: Tensor,  # [T] of the policy that drew the tokens, under the same temperature
    advantage: Tensor,  # [T]
    mask: Tensor,  # [T] bool, True where the token is trained
    *,
    num_tokens: float | Tensor,  # trained tokens of the whole optimiser step, over all micro-batches and ranks
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    reference_logprob: Tensor | None = None,  # [T]
    kl_coef: float = 0.0,
    kl_kind: str = "k2",
    weight: Tensor | None = None,  # [T] multiplies all of l_t; no gradient
    entropy: Tensor | None = None,  # [T] nats
    entropy_coef: float = 0.0,
    impl: str = "auto",
) -> LossOutput:
    """sum_t mask weight (-min(r A, clip(r) A) + kl_coef w k - entropy_coef H) / num_tokens, float32.

    Metrics, sums over the trained tokens: policy_loss (the first term, weighted), ratio, clip_fraction (tokens that the
    clip leaves no gradient), approx_kl (k3 estimate of KL(sampler || policy)), tokens; kl (w k) and entropy where the
    inputs are given; and the maximum ratio_max. Raises ValueError for bad arguments.
    """
    check_rows("logprob", logprob)
    shape, device = tuple(logprob.shape), logprob.device
    count, scalars = checked_policy_options(
        shape, device, sampler_logprob, advantage, mask, num_tokens, clip_low, clip_high, dual_clip,
        reference_logprob, kl_coef, kl_kind, weight, entropy_coef,
    )  # fmt: skip
    if entropy_coef and entropy is None:
        raise ValueError("entropy_coef needs entropy: ask linear_logprob for it with entropy=True")
    if entropy is not None:
        check_tensor("entropy", entropy, shape, device)

    loss, sums, ratio_max, _, _ = _policy_loss(
        logprob,
        sampler_logprob.detach(),
        advantage.detach(),
        mask,
        None if reference_logprob is None else reference_logprob.detach(),
        None if weight is None else weight.detach(),
        entropy if entropy is None or entropy_coef else entropy.detach(),  # else its backward would run for zeros
        *scalars,
        use_triton(impl, device),
    )
    return LossOutput(loss / count, policy_metrics(sums, ratio_max, reference_logprob is not None, entropy is not None))


def checked_policy_options(
    shape: tuple[int, ...],
    device: torch.device,
    sampler_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    num_tokens: float | Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    reference_logprob: Tensor | None,
    kl_coef: float,
    kl_kind: str,
    weight: Tensor | None,
    entropy_coef: float,
) -> tuple[float | Tensor, tuple[float, float, float, float, str, float]]:
    """(what the sum is divided by, the scalars of `_policy_loss`). Raises ValueError for bad arguments."""
    check_tensor("mask", mask, shape, device, (torch.bool,))
    check_range("clip_low", clip_low, 0, 1)
    check_range("clip_high", clip_high, 0, float("inf"))
    check_choice("kl_kind", kl_kind, ("k2", "k3"))
    if dual_clip is not None:
        check_range("dual_clip", dual_clip, 1, float("inf"), open_ends=True)
    if kl_coef and reference_logprob is None:
        raise ValueError("kl_coef needs reference_logprob")
    check_tensor("sampler_logprob", sampler_logprob, shape, device)
    check_tensor("advantage", advantage, shape, device)
    for name, tensor in (("reference_logprob", reference_logprob), ("weight", weight)):
        if tensor is not None:
            check_tensor(name, tensor, shape, device)
    bounds = (1 - clip_low, 1 + clip_high, float("inf") if dual_clip is None else float(dual_clip))
    return divisor("num_tokens", num_tokens), (*bounds, float(kl_coef), kl_kind, float(entropy_coef))


def policy_loss_reference(
    logprob: Tensor,
    sampler_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    num_tokens: float,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = float("inf"),
) -> Tensor:
    """The first term of the loss by its definition, in the dtype given; log-ratios within +-20, all values finite."""
    ratio = torch.exp(logprob - sampler_logprob)
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
    gain = torch.where(advantage < 0, torch.maximum(gain, dual_clip * advantage), gain)
    return -gain[mask].sum() / num_tokens


@torch.library.custom_op("fastrlhf::policy_loss", mutates_args=())
def _policy_loss(
    logprob: Tensor,
    sampler_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    reference_logprob: Tensor | None,
    weight: Tensor | None,
    entropy: Tensor | None,
    low: float,
    high: float,
    dual_clip: float,
    kl_coef: float,
    kl_kind: str,
    entropy_coef: float,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(sum of the loss [], SUMS [7], largest ratio [], slope by logprob [T], slope by entropy [T] or [0])."""
    scalars = (low, high, dual_clip, kl_coef, entropy_coef, kl_kind)
    if not triton:
        scale = mask.float() if weight is None else masked(weight, mask)
        reference, bonus = (None if x is None else masked(x, mask) for x in (reference_logprob, entropy))
        logprob, sampler_logprob, advantage = (masked(x, mask) for x in (logprob, sampler_logprob, advantage))
        terms = torch_policy_terms(logprob, sampler_logprob, advantage, scale, reference, bonus, *scalars)
        none, ratio = scale.new_empty(0), terms.ratio.where(mask, 0)
        rows = (terms.surrogate, ratio, terms.clipped.float(), terms.approx_kl, mask.float(), terms.kl)
        sums = torch.stack([x.sum() for x in (*rows, none if bonus is None else bonus)])
        largest = F.pad(ratio, (0, 1)).amax()  # the pad is for T = 0
        return terms.loss.sum(), sums, largest, terms.d_logprob, none if bonus is None else terms.d_entropy
    num_rows, num_programs = len(logprob), _rows.num_programs(len(logprob))
    partials = logprob.new_empty(2 + len(SUMS), num_programs, dtype=torch.float32)
    d_logprob = logprob.new_empty(num_rows, dtype=torch.float32)
    d_entropy = logprob.new_empty(0 if entropy is None else num_rows, dtype=torch.float32)
    tensors = contiguous(logprob, sampler_logprob, advantage, mask, reference_logprob, weight, entropy)
    with torch.cuda.device_of(logprob):
        policy_kernel[(num_programs,)](*tensors, partials, d_logprob, d_entropy, num_rows, *scalars, _rows.BLOCK)
    return partials[0].sum(), partials[1:-1].sum(1), partials[-1].amax(), d_logprob, d_entropy


@_policy_loss.register_fake
def _(logprob, sampler_logprob, advantage, mask, reference_logprob, weight, entropy, *_):
    shapes = ((), len(SUMS), (), logprob.shape, 0 if entropy is None else entropy.shape)
    return tuple(logprob.new_empty(shape, dtype=torch.float32) for shape in shapes)


differentiate_by_slopes("fastrlhf::policy_loss", leaves=(0, 6))


def policy_metrics(sums: Tensor, ratio_max: Tensor, kl: bool, entropy: bool) -> dict[str, Metric]:
    """What `policy_loss` reports; `sums` [7] in the order of SUMS."""
    metrics: dict[str, Metric] = {name: Sum(total) for name, total in zip(SUMS, sums.unbind(), strict=True)}
    metrics["ratio_max"] = Max(ratio_max)
    return {name: metrics[name] for name in metrics if (name != "kl" or kl) and (name != "entropy" or entropy)}


class PolicyTerms(NamedTuple):
    """Of each row, [T] float32, and bool for `clipped`."""

    loss: Tensor
    d_logprob: Tensor
    d_entropy: Tensor
    surrogate: Tensor
    """The clipped term, weighted."""
    ratio: Tensor
    clipped: Tensor
    """True where the token counts with a bound of the clip, which leaves it no gradient."""
    approx_kl: Tensor
    """k3 estimate of KL(sampler || policy)."""
    kl: Tensor
    """w k to the reference, 0 without one."""


def torch_policy_terms(
    logprob: Tensor,
    sampler_logprob: Tensor,
    advantage: Tensor,
    weight: Tensor,
    reference_logprob: Tensor | None,
    entropy: Tensor | None,
    low: float,
    high: float,
    dual_clip: float,
    kl_coef: float,
    entropy_coef: float,
    kl_kind: str,
) -> PolicyTerms:
    """`policy_terms` in torch."""
    difference = logprob - sampler_logprob
    log_ratio = torch_clamped(difference)
    ratio = log_ratio.exp()
    # In terms of what is clipped, not of what is active: a NaN then goes on into the loss and the gradient.
    rises, beyond = advantage >= 0, ratio > dual_clip
    clipped = torch.where(rises, ratio > high, (ratio < low) | beyond)
    bound = torch.full_like(ratio, low).masked_fill(beyond, dual_clip).masked_fill(rises, high)
    loss = surrogate = -weight * (bound.where(clipped, ratio) * advantage)
    d_logprob = (-weight * (ratio * advantage)).masked_fill(clipped | (difference.abs() > MAX_LOG_RATIO), 0)
    d_entropy, kl = -entropy_coef * weight, torch.zeros_like(ratio)
    if reference_logprob is not None:
        kl, slope = torch_kl_terms(logprob, reference_logprob, ratio, kl_kind)
        loss = loss + kl_coef * weight * kl
        d_logprob = d_logprob + kl_coef * weight * slope
    if entropy is not None:
        loss = loss + d_entropy * entropy
    approx_kl = torch_estimator(-log_ratio, "k3")
    return PolicyTerms(loss, d_logprob, d_entropy, surrogate, ratio, clipped, approx_kl, kl)


@jit
def policy_terms(
    logprob,
    sampler_logprob,
    advantage,
    weight,
    reference_logprob,  # or None
    entropy,  # or None
    low,
    high,
    dual_clip,
    kl_coef,
    entropy_coef,
    KL_KIND: tl.constexpr,
):
    """(loss, d_logprob, d_entropy, surrogate, ratio, clipped, approx_kl, kl) of float32 rows: `PolicyTerms`."""
    difference = logprob - sampler_logprob
    log_ratio = clamped(difference)
    ratio = tl.exp(log_ratio)
    rises = advantage >= 0
    beyond = ratio > dual_clip
    clipped = tl.where(rises, ratio > high, (ratio < low) | beyond)
    bound = tl.where(rises, high, tl.where(beyond, dual_clip, low))
    surrogate = -weight * (tl.where(clipped, bound, ratio) * advantage)
    loss = surrogate
    d_logprob = tl.where(clipped | (tl.abs(difference) > LIMIT), 0.0, -weight * (ratio * advantage))
    d_entropy = -entropy_coef * weight
    kl = tl.zeros_like(ratio)
    if reference_logprob is not None:
        kl, slope = kl_terms(logprob, reference_logprob, ratio, KL_KIND)
        loss += kl_coef * weight * kl
        d_logprob += kl_coef * weight * slope
    if entropy is not None:
        loss += d_entropy * entropy
    return loss, d_logprob, d_entropy, surrogate, ratio, clipped, estimator(-log_ratio, "k3"), kl


@jit
def policy_kernel(
    logprob,
    sampler_logprob,
    advantage,
    mask,
    reference_logprob,  # or None
    weight,  # or None
    entropy,  # or None
    partials,  # [9, programs]: loss, SUMS, largest ratio
    d_logprob,
    d_entropy,
    num_rows,
    low,
    high,
    dual_clip,
    kl_coef,
    entropy_coef,
    KL_KIND: tl.constexpr,
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
    loss, slope, entropy_slope, surrogate, ratio, clipped, approx_kl, kl = policy_terms(
        load_float32(logprob, rows, keep),
        load_float32(sampler_logprob, rows, keep),
        load_float32(advantage, rows, keep),
        scale,
        reference,
        bonus,
        low,
        high,
        dual_clip,
        kl_coef,
        entropy_coef,
        KL_KIND,
    )
    tl.store(d_logprob + rows, slope, mask=inside)
    ratio = tl.where(keep, ratio, 0.0)
    store_sum(partials, 0, loss)
    store_sum(partials, 1, surrogate)
    store_sum(partials, 2, ratio)
    store_sum(partials, 3, clipped.to(tl.float32))
    store_sum(partials, 4, approx_kl)
    store_sum(partials, 5, keep.to(tl.float32))
    store_sum(partials, 6, kl)
    store_sum(partials, 7, tl.zeros_like(ratio) if entropy is None else bonus)
    if entropy is not None:
        tl.store(d_entropy + rows, entropy_slope, mask=inside)
    largest = tl.where(tl.sum((ratio != ratio).to(tl.int32), 0) == 0, tl.max(ratio, 0), float("nan"))  # max drops NaN
    tl.store(partials + 8 * tl.num_programs(0) + tl.program_id(0), largest)
