"""The clipped policy loss of PPO, with everything that is added to it per token.

    r_t    = exp(clamp(logprob - sampler_logprob, +-20))
    l_t    = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_coef w k - entropy_coef H
    loss   = sum_t mask weight l_t / num_tokens

With dual_clip c the first term is at most -c A where A < 0. k is k2 or k3 of `kl_estimate`, with its weight w.

Gradient of the first term with respect to logprob: -r A where the token is active, 0 elsewhere. Active:

    |logprob - sampler_logprob| <= 20  and  (A >= 0: r <= 1 + clip_high,   A < 0: r >= 1 - clip_low and r <= c)

bounds included; with r = 1 everywhere it is REINFORCE's. Of the others: kl_coef w delta, and -entropy_coef for H.

What lies in rows with mask False, NaN and infinities too, reaches neither the loss nor a gradient.

Legend: T tokens, A advantage, H entropy. Schulman et al. 2017 (arXiv 1707.06347) eq. 7; dual clip: Ye et al. 2020
(arXiv 1912.09729); asymmetric clip: Yu et al. 2025 (arXiv 2503.14476).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrlhf_kernels._checks import check_choice, check_impl, check_range, check_rows, check_tensor, divisor
from fastrlhf_kernels.kl_estimate import MAX_LOG_RATIO, estimator, weighted_kl
from fastrlhf_kernels.types import LossOutput, Max, Metric, Sum


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
    check_impl(impl)
    check_rows("logprob", logprob)
    shape, device = tuple(logprob.shape), logprob.device
    check_tensor("mask", mask, shape, device, (torch.bool,))
    check_range("clip_low", clip_low, 0, 1)
    check_range("clip_high", clip_high, 0, float("inf"))
    check_choice("kl_kind", kl_kind, ("k2", "k3"))
    if dual_clip is not None:
        check_range("dual_clip", dual_clip, 1, float("inf"), open_low=True)
    if kl_coef and reference_logprob is None:
        raise ValueError("kl_coef needs reference_logprob")
    if entropy_coef and entropy is None:
        raise ValueError("entropy_coef needs entropy: ask linear_logprob for it with entropy=True")

    def trained(name: str, tensor: Tensor) -> Tensor:
        check_tensor(name, tensor, shape, device)
        return tensor.float().where(mask, 0)

    logprob = trained("logprob", logprob)
    sampler_logprob = trained("sampler_logprob", sampler_logprob)
    advantage = trained("advantage", advantage).detach()
    scale = mask.float() if weight is None else trained("weight", weight).detach()

    log_ratio = (logprob - sampler_logprob.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    gain, active = _clipped_gain(ratio, advantage, clip_low, clip_high, dual_clip)
    per_token = -scale * gain
    metrics: dict[str, Metric] = {
        "policy_loss": Sum(per_token.detach().sum()),
        "ratio": Sum(ratio.detach().where(mask, 0).sum()),
        "ratio_max": Max(F.pad(ratio.detach().where(mask, 0), (0, 1)).amax()),  # the pad is for T = 0
        "clip_fraction": Sum((~active).float().sum()),  # outside the mask r is 1 and active
        "approx_kl": Sum(estimator(-log_ratio.detach(), "k3").sum()),
        "tokens": Sum(mask.float().sum()),
    }
    if reference_logprob is not None:
        kl = weighted_kl(logprob, trained("reference_logprob", reference_logprob), sampler_logprob, kl_kind)
        per_token = per_token + kl_coef * scale * kl
        metrics["kl"] = Sum(kl.detach().sum())
    if entropy is not None:
        entropy = trained("entropy", entropy)
        per_token = per_token - entropy_coef * scale * entropy
        metrics["entropy"] = Sum(entropy.detach().sum())
    return LossOutput(per_token.sum() / divisor("num_tokens", num_tokens), metrics)


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


def _clipped_gain(
    ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> tuple[Tensor, Tensor]:
    """min(r A, clip(r) A), dually clipped, and where its gradient is A dr. Equality counts as active."""
    current = ratio.detach()
    bounded = current.clamp(1 - clip_low, 1 + clip_high)
    active = torch.where(advantage >= 0, current <= 1 + clip_high, current >= 1 - clip_low)
    if dual_clip is not None:
        within = (advantage >= 0) | (current <= dual_clip)
        active, bounded = active & within, bounded.where(within, dual_clip)
    return torch.where(active, ratio, bounded) * advantage, active
