"""The clipped squared error of a critic.

    clipped = rollout_value + clamp(value - rollout_value, +-clip)
    loss    = sum_t mask max((value - returns)^2, (clipped - returns)^2) / 2 / num_tokens

Gradient with respect to value: value - returns where the first square is the larger or they are equal; elsewhere 0, as
the second is only larger where the clamp holds. With clip None: value - returns.

What lies in rows with mask False, NaN and infinities too, reaches neither the loss nor a gradient.

Legend: T tokens. The critic's part of PPO2 (Dhariwal et al. 2017, OpenAI Baselines); Schulman et al. 2017 eq. 9.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrlhf_kernels._checks import check_impl, check_range, check_rows, check_tensor, divisor
from fastrlhf_kernels.types import LossOutput, Sum


def value_loss(
    value: Tensor,  # [T]; gradient flows here and only here
    rollout_value: Tensor,  # [T] the critic's value when the rollout was made
    returns: Tensor,  # [T]
    mask: Tensor,  # [T] bool
    *,
    num_tokens: float | Tensor,  # masked-in rows of the whole optimiser step
    clip: float | None = 0.2,
    impl: str = "auto",
) -> LossOutput:
    """sum_t mask max((V - R)^2, (V_clipped - R)^2) / 2 / num_tokens, float32.

    Metrics, sums over the rows in the mask: value_loss, value_clip_fraction, rows. Raises ValueError for bad arguments.
    """
    check_impl(impl)
    check_rows("value", value)
    check_tensor("mask", mask, tuple(value.shape), value.device, (torch.bool,))
    if clip is not None:
        check_range("clip", clip, 0, float("inf"))
    for name, tensor in (("rollout_value", rollout_value), ("returns", returns)):
        check_tensor(name, tensor, tuple(value.shape), value.device)
    value, old, target = (x.float().where(mask, 0) for x in (value, rollout_value.detach(), returns.detach()))

    error = (value - target).square()
    clipped = torch.zeros_like(mask)
    if clip is not None:
        bounded = (old + (value - old).clamp(-clip, clip) - target).square()
        clipped = bounded > error
        error = torch.where(clipped, bounded, error)
    total = error.sum() / 2
    sums = {"value_loss": total.detach(), "value_clip_fraction": clipped.float().sum(), "rows": mask.float().sum()}
    metrics = {name: Sum(total_of) for name, total_of in sums.items()}
    return LossOutput(total / divisor("num_tokens", num_tokens), metrics)


def value_loss_reference(
    value: Tensor, rollout_value: Tensor, returns: Tensor, mask: Tensor, *, num_tokens: float, clip: float | None = 0.2
) -> Tensor:
    """The definition, in the dtype given; all values finite."""
    clip = float("inf") if clip is None else clip
    clipped = rollout_value + (value - rollout_value).clamp(-clip, clip)
    return torch.maximum((value - returns) ** 2, (clipped - returns) ** 2)[mask].sum() / 2 / num_tokens
