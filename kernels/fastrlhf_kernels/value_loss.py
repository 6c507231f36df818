"""The clipped squared error of a critic.

    clipped = rollout_value + clamp(value - rollout_value, +-clip)
    loss    = sum_t mask weight max((value - returns)^2, (clipped - returns)^2) / 2 / num_tokens

The gradient with respect to value is weight (value - returns) if the first square is at least as large as the second.
Otherwise it is 0, because the second can only be larger while the clamp is active. With clip None it is always
weight (value - returns).

Rows with mask False affect neither the loss nor a gradient, even if they hold NaN or infinity.

On a GPU one kernel reads the inputs once and writes the gradient: 17 T bytes in float32, 4 T more for a
weight. The backward moves 8 T.

Legend: T tokens. Source: PPO2's critic loss (Dhariwal et al. 2017, OpenAI Baselines); Schulman et al. 2017 eq. 9.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrlhf_kernels import _rows
from fastrlhf_kernels._checks import check_range, check_rows, check_tensor, divisor
from fastrlhf_kernels._rows import block_of_rows, contiguous, differentiate_by_slopes, load_float32, masked, store_sum
from fastrlhf_kernels._triton import OPTIONS, jit, tl, use_triton
from fastrlhf_kernels.types import LossOutput, Sum


def value_loss(
    value: Tensor,  # [T]; the only argument with a gradient
    rollout_value: Tensor,  # [T] the critic's values at the time of the rollout
    returns: Tensor,  # [T]
    mask: Tensor,  # [T] bool
    *,
    num_tokens: float | Tensor,  # rows with mask True in the whole optimiser step, over all micro-batches and ranks
    clip: float | None = 0.2,
    weight: Tensor | None = None,  # [T], no gradient; for example 1 / sequence length, to average per sequence
    impl: str = "auto",
) -> LossOutput:
    """Returns the critic's loss sum_t mask weight max((V - R)^2, (V_clipped - R)^2) / 2 / num_tokens, float32.

    V is `value`, R is `returns`. Metrics, summed over the rows in the mask: value_loss (weighted),
    value_clip_fraction, rows. Raises ValueError for bad arguments.
    """
    check_rows("value", value)
    check_tensor("mask", mask, tuple(value.shape), value.device, (torch.bool,))
    if clip is not None:
        check_range("clip", clip, 0, float("inf"))
    for name, tensor in (("rollout_value", rollout_value), ("returns", returns)):
        check_tensor(name, tensor, tuple(value.shape), value.device)
    if weight is not None:
        check_tensor("weight", weight, tuple(value.shape), value.device)
    count, triton = divisor("num_tokens", num_tokens), use_triton(impl, value.device)
    total, num_clipped, num_rows, _ = _value_loss(
        value, rollout_value.detach(), returns.detach(), mask, None if weight is None else weight.detach(), clip, triton
    )
    sums = {"value_loss": total.detach(), "value_clip_fraction": num_clipped, "rows": num_rows}
    return LossOutput(total / count, {name: Sum(value) for name, value in sums.items()})


def value_loss_reference(
    value: Tensor,
    rollout_value: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    num_tokens: float,
    clip: float | None = 0.2,
    weight: float | Tensor = 1.0,
) -> Tensor:
    """Computes the loss by its definition, in the dtype of the inputs; all values must be finite."""
    clip = float("inf") if clip is None else clip
    clipped = rollout_value + (value - rollout_value).clamp(-clip, clip)
    return (weight * torch.maximum((value - returns) ** 2, (clipped - returns) ** 2))[mask].sum() / 2 / num_tokens


@torch.library.custom_op("fastrlhf::value_loss", mutates_args=())
def _value_loss(
    value: Tensor,
    rollout_value: Tensor,
    returns: Tensor,
    mask: Tensor,
    weight: Tensor | None,
    clip: float | None,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (sum of the loss [], clipped rows [], rows in the mask [], slope [T]), float32."""
    if not triton:
        value, rollout_value, returns = (masked(x, mask) for x in (value, rollout_value, returns))
        loss, slope, clipped = torch_value_terms(value, rollout_value, returns, clip)
        if weight is not None:
            scale = masked(weight, mask)
            loss, slope = loss * scale, slope * scale
        return loss.sum(), clipped.float().sum(), mask.float().sum(), slope
    num_rows, num_programs = len(value), _rows.num_programs(len(value))
    partials = value.new_empty(3, num_programs, dtype=torch.float32)
    slope = value.new_empty(num_rows, dtype=torch.float32)
    tensors = contiguous(value, rollout_value, returns, mask, weight)
    with torch.cuda.device_of(value):
        value_kernel[(num_programs,)](*tensors, partials, slope, num_rows, clip, _rows.BLOCK, **OPTIONS)
    return partials[0].sum(), partials[1].sum(), partials[2].sum(), slope


@_value_loss.register_fake
def _(value, rollout_value, returns, mask, weight, clip, triton):
    return tuple(value.new_empty(shape, dtype=torch.float32) for shape in ((), (), (), value.shape))


differentiate_by_slopes("fastrlhf::value_loss", leaves=(0,))


def torch_value_terms(
    value: Tensor, rollout_value: Tensor, returns: Tensor, clip: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (loss, slope, whether the clipped square is used) per row; `value_terms` is the Triton version."""
    error = value - returns
    if clip is None:
        return error.square() / 2, error, torch.zeros_like(error, dtype=torch.bool)
    moved = value - rollout_value
    bounded = rollout_value + moved.clamp(-clip, clip) - returns
    clipped = (moved.abs() > clip) & (bounded.square() > error.square())
    return bounded.where(clipped, error).square() / 2, error.masked_fill(clipped, 0), clipped


@jit
def value_terms(value, rollout_value, returns, clip):
    """Returns (loss, slope, whether the clipped square is used) for float32 rows; clip may be None."""
    error = value - returns
    if clip is None:
        return error * error * 0.5, error, error * 0
    else:
        moved = value - rollout_value
        bounded = rollout_value + tl.clamp(moved, -clip, clip) - returns
        clipped = (tl.abs(moved) > clip) & (bounded * bounded > error * error)
        used = tl.where(clipped, bounded, error)
        return used * used * 0.5, tl.where(clipped, 0.0, error), clipped.to(tl.float32)


@jit
def value_kernel(
    value,
    rollout_value,
    returns,
    mask,
    weight,  # or None
    partials,  # [3, programs]: loss, clipped rows, rows in the mask
    slope,
    num_rows,
    clip,  # or None
    BLOCK: tl.constexpr,
):
    rows, inside, keep = block_of_rows(mask, num_rows, BLOCK)
    loss, row_slope, clipped = value_terms(
        load_float32(value, rows, keep),
        load_float32(rollout_value, rows, keep),
        load_float32(returns, rows, keep),
        clip,
    )
    if weight is not None:
        scale = load_float32(weight, rows, keep)
        loss *= scale
        row_slope *= scale
    tl.store(slope + rows, row_slope, mask=inside)
    store_sum(partials, 0, loss)
    store_sum(partials, 1, clipped)
    store_sum(partials, 2, keep.to(tl.float32))
