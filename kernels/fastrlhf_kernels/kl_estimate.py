"""Per-token estimates of KL(policy || reference) from the tokens that were sampled.

    delta = logprob - reference_logprob,   w = exp(logprob - sampler_logprob), or 1
    k1 = delta        k2 = delta^2 / 2        k3 = exp(-delta) - 1 + delta        value = w k

Gradient with respect to logprob: w delta for k2 and k3, which is, in expectation over the sampler's tokens, that of the
token-wise KL(policy || reference). (Differentiating k3 itself gives the gradient of KL(reference || policy); k1 gives
noise of mean 0, so it has none here: it belongs in the reward.) Nothing flows to the other arguments.

Both log-ratios are clamped to +-20: the value cannot overflow, and the gradient stays at w 20 where it would be needed
most. Near 0, k3 is a polynomial: exp(-d) - 1 + d has no correct digit left at d = 1e-4.

Legend: T tokens. Schulman 2020, "Approximating KL divergence"; gradients: Liu et al. 2025 (arXiv 2510.01555), Tang and
Munos 2025 (arXiv 2506.09477).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrlhf_kernels._checks import check_choice, check_impl, check_rows, check_tensor

KINDS = ("k1", "k2", "k3")
MAX_LOG_RATIO = 20.0


def kl_estimate(
    logprob: Tensor,  # [T] nats; gradient flows here and only here
    reference_logprob: Tensor,  # [T]
    *,
    kind: str = "k1",
    sampler_logprob: Tensor | None = None,  # [T], of the policy that drew the tokens; None where that is this policy
    impl: str = "auto",
) -> Tensor:
    """w k [T] float32, nats, with gradient w delta for k2 and k3, none for k1. Raises ValueError for bad arguments."""
    check_impl(impl)
    check_choice("kind", kind, KINDS)
    check_rows("logprob", logprob)
    check_tensor("reference_logprob", reference_logprob, tuple(logprob.shape), logprob.device)
    if sampler_logprob is not None:
        check_tensor("sampler_logprob", sampler_logprob, tuple(logprob.shape), logprob.device)
        sampler_logprob = sampler_logprob.float()
    return weighted_kl(logprob.float(), reference_logprob.float(), sampler_logprob, kind)


def weighted_kl(logprob: Tensor, reference_logprob: Tensor, sampler_logprob: Tensor | None, kind: str) -> Tensor:
    """`kl_estimate` of float32 tensors, without its checks."""
    current = logprob.detach()
    delta = _clamped(current - reference_logprob.detach())
    weight = 1.0 if sampler_logprob is None else _clamped(current - sampler_logprob.detach()).exp()
    value = weight * estimator(delta, kind)
    return value if kind == "k1" else _WithGradient.apply(logprob, value, weight * delta)


def estimator(delta: Tensor, kind: str) -> Tensor:
    """k1, k2 or k3 of log-ratios delta."""
    if kind == "k1":
        return delta
    if kind == "k2":
        return delta.square() / 2
    series = delta.square() * (0.5 - delta * (1 / 6 - delta * (1 / 24 - delta / 120)))
    return torch.where(delta.abs() < 0.1, series, torch.expm1(-delta) + delta)


def kl_estimate_reference(
    logprob: Tensor, reference_logprob: Tensor, *, kind: str, sampler_logprob: Tensor | None = None
) -> Tensor:
    """The definition, in the dtype given and without clamps: autograd finds w delta by itself.

    It is the gradient of w k3 where w is differentiated too, and of w k2 where it is not.
    """
    weight = torch.exp(logprob - (logprob.detach() if sampler_logprob is None else sampler_logprob.detach()))
    delta = logprob - reference_logprob.detach()
    if kind == "k1":
        return (weight * delta).detach()
    return weight.detach() * delta**2 / 2 if kind == "k2" else weight * (torch.exp(-delta) - 1 + delta)


def _clamped(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


class _WithGradient(torch.autograd.Function):
    """`value`, differentiated as if its derivative with respect to `x` were `slope`."""

    @staticmethod
    def forward(ctx, x, value, slope):
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None
