"""Computes the logits of a language-model head one block (rows x vocabulary) at a time, for the chunked ops.

    for part in logits.parts():                 VOCAB rows of the weight, cast once
        for block in logits.row_blocks():       ROWS rows of hidden
            z = logits.block(block, part)       [ROWS, VOCAB] float32, scaled, capped and divided by the temperature

The vocabulary is the outer loop, so that each part of the weight's gradient is written once and never read again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# (ROWS, VOCAB). On an idle CPU all sizes from (512, 512) up are equally fast; larger blocks synchronise threads less.
CPU_BLOCK = (2048, 2048)
GPU_BLOCK = (4096, 8192)

LOG2_E = 1 / math.log(2)
LOWEST = -1e30  # used as the largest logit of a block whose logits are all -inf, because -inf - -inf is NaN
VANISHED = -1e4  # replaces -inf: exp(-1e4) is 0 as well, but 0 * -1e4 is 0 whereas 0 * -inf is NaN


class Part(NamedTuple):
    """A part of the vocabulary: rows start .. start + len(weight) of the head's weight, cast to the dtype in which they
    are multiplied."""

    start: int
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Logits:
    """z = softcap(scale * (hidden @ weight.T + bias)) / temperature, float32, computed block by block."""

    hidden: Tensor
    """Hidden states [T, D], already in the dtype in which hidden states and weight are multiplied."""
    weight: Tensor
    """Weight of the head [V, D], in its original dtype."""
    bias: Tensor | None
    scale: float
    softcap: float | None
    temperature: float | Tensor
    """Temperature: a number, or [T, 1]."""

    @staticmethod
    def of(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        row_temperature: Tensor | None,
        temperature: float,
        scale: float,
        softcap: float | None,
    ) -> Logits:
        # Only GPUs multiply bfloat16 with a float32 result. float16 is cast to float32 to keep small gradients.
        native = hidden.is_cuda and hidden.dtype == weight.dtype == torch.bfloat16
        hidden = hidden if native else hidden.float()
        return Logits(
            hidden, weight, bias, scale, softcap, temperature if row_temperature is None else row_temperature[:, None]
        )

    def row_blocks(self) -> list[slice]:
        """Returns slices that split the T rows into blocks. An empty pack gives one empty block, so it is not a special
        case."""
        step, num_rows = self._block_shape()[0], len(self.hidden)
        return [slice(start, min(start + step, num_rows)) for start in range(0, max(num_rows, 1), step)]

    def parts(self) -> Iterator[Part]:
        """Yields the head's weight and bias in parts of VOCAB rows."""
        step = self._block_shape()[1]
        for start in range(0, len(self.weight), step):
            rows = slice(start, start + step)
            bias = None if self.bias is None else self.bias[rows].float()
            yield Part(start, self.weight[rows].to(self.hidden.dtype), bias)

    def block(self, rows: slice, part: Part, out: Tensor | None = None) -> Tensor:
        """Returns the logits [rows, part], in new memory or in `out`. They are bit-identical in forward and
        backward."""
        z = product(self.hidden[rows], part.weight.T, out)
        if part.bias is not None:
            z += part.bias
        if self.scale != 1:
            z *= self.scale
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        if isinstance(self.temperature, Tensor):
            z /= self.temperature[rows]
        elif self.temperature != 1:
            z /= self.temperature
        return z

    def slope(self, rows: slice | Tensor, z: Tensor) -> Tensor:
        """Returns the derivative of the soft cap for these rows, computed from their logits z."""
        assert self.softcap is not None
        temperature = self.temperature[rows] if isinstance(self.temperature, Tensor) else self.temperature
        return 1 - (z * (temperature / self.softcap)).square()

    def _block_shape(self) -> tuple[int, int]:
        return CPU_BLOCK if self.hidden.device.type == "cpu" else GPU_BLOCK


def fold(state: tuple[Tensor, ...], z: Tensor, column: Tensor, entropy: bool, stats: bool) -> tuple[Tensor, ...]:
    """Updates the running statistics over the vocabulary with one more block of logits z, and overwrites z.

    `state` is () for the first block. Returns (peak = largest logit, total = sum exp(z - peak), target logit,
    gap = sum exp(z - peak) (peak - z), sum of logits), [rows] each; the last two are empty unless requested by
    `entropy` and `stats`.
    """
    return merged(state, statistics(z, column, entropy, stats))


def statistics(z: Tensor, column: Tensor, entropy: bool, stats: bool) -> tuple[Tensor, ...]:
    """Returns the statistics of `fold` for one block of logits z, with a target of NaN in rows whose target lies
    outside. Without `entropy` it replaces z by exp(z - peak)."""
    inside, index = locate(column, z)
    target = z.gather(1, index)[:, 0].where(inside, float("nan"))
    logit_sum = z.sum(1) if stats else z.new_empty(0)
    peak = z.amax(1).clamp_(min=LOWEST)
    z -= peak[:, None]
    if entropy:
        mass = exp_(z.clamp_(min=VANISHED).clone())
        total, gap = mass.sum(1), -mass.mul_(z).sum(1)
    else:
        total, gap = exp_(z).sum(1), z.new_empty(0)
    return peak, total, target, gap, logit_sum


def merged(state: tuple[Tensor, ...], block: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Merges the running statistics `state`, which are () before the first block, with those of another block."""
    if not state:
        return block
    peak, total, target, gap, logit_sum = block
    old_peak, old_total, old_target, old_gap, old_sum = state
    top = torch.maximum(peak, old_peak)
    new, old = (peak - top).exp(), (old_peak - top).exp()
    if len(gap):
        gap = new * (gap + (top - peak) * total) + old * (old_gap + (top - old_peak) * old_total)
    return top, new * total + old * old_total, target.where(~target.isnan(), old_target), gap, logit_sum + old_sum


def locate(column: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Returns whether each target lies in this block ([rows] bool), and its column [rows, 1], clamped to the block."""
    width = z.shape[1]
    return (column >= 0) & (column < width), column.clamp(0, width - 1)[:, None]


def gradient(z: Tensor, column: Tensor, peak: Tensor, level: Tensor, tilt: Tensor | None, at_target: Tensor) -> Tensor:
    """Returns dx / slope [rows, width] for a block of logits z, where dx is the gradient defined in `slopes`.

    Overwrites z. `column` [rows] is the target's column relative to this block, and may lie outside it. `peak`,
    `level`, `tilt` and `at_target` are [rows] as well.
    """
    z -= peak[:, None]
    if tilt is None:
        dx = exp_(z).mul_(level[:, None])
    else:
        dx = exp_(z.clamp_(min=VANISHED).clone()).mul_(z.mul_(-tilt[:, None]).add_(level[:, None]))
    return set_target(dx, column, at_target)


def set_target(dx: Tensor, column: Tensor, at_target: Tensor) -> Tensor:
    """Writes `at_target` [rows] into the column of each row's target, if that column lies in this block."""
    inside, index = locate(column, dx)
    return dx.scatter_(1, index, at_target[:, None].where(inside[:, None], dx.gather(1, index)))


def slopes(
    g: Tensor,
    on_logsumexp: Tensor | float,
    on_entropy: Tensor | None,
    factor: Tensor | float,
    logprob: Tensor,
    entropy: Tensor | None,
    total: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Returns coefficients (level, tilt, at_target), [T] each, of the gradient dx with respect to hidden @ weight.T.

        dx = slope * exp(z - peak) * (level - tilt * (z - peak))      in every column except the target's
        dx = slope * at_target                                        in the target's column

    The upstream gradients are g (of logprob), `on_logsumexp` and `on_entropy`. `slope` is the derivative of the soft
    cap; `factor` is the rest of the derivative of a logit with respect to its product, scale / temperature.
    """
    level, at_target = on_logsumexp - g, on_logsumexp * logprob.exp() - g * logprob.expm1()
    if on_entropy is None:
        return factor * level / total, None, factor * at_target
    assert entropy is not None
    level = level - on_entropy * (entropy - total.log())
    at_target = at_target - on_entropy * logprob.exp() * (logprob + entropy)
    return factor * level / total, factor * on_entropy / total, factor * at_target


def multiply_parts(
    logits: Logits,
    parts: Iterable[tuple[Part, Callable[[slice], Tensor]]],
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Computes the gradients of hidden, weight and bias from dx, the gradient with respect to hidden @ weight.T.

    Works on one part of the vocabulary at a time. Each part comes with a function that returns dx [rows, part] float32
    for a block of rows. Adds to `grad_hidden` [T, D] float32 and overwrites `grad_weight` and `grad_bias`; a gradient
    that is None is skipped.
    """
    for part, gradient_of in parts:
        columns = slice(part.start, part.start + len(part.weight))
        weight_sum = None if grad_weight is None else torch.zeros_like(part.weight, dtype=torch.float32)
        bias_sum = None if grad_bias is None else grad_bias.new_zeros(len(part.weight), dtype=torch.float32)
        for block in logits.row_blocks():
            dx = gradient_of(block)
            if bias_sum is not None:
                bias_sum += dx.sum(0)
            dx = dx.to(logits.hidden.dtype)
            if grad_hidden is not None:
                add_product(grad_hidden[block], dx, part.weight)
            if weight_sum is not None:
                add_product(weight_sum, dx.T, logits.hidden[block])
        if grad_weight is not None and weight_sum is not None:
            grad_weight[columns] = weight_sum
        if grad_bias is not None and bias_sum is not None:
            grad_bias[columns] = bias_sum


def gradients_like(
    leaves: tuple[Tensor, Tensor, Tensor | None], needs: tuple[bool, bool, bool], scalar_like: Tensor
) -> tuple[Tensor, ...]:
    """Allocates gradients of (hidden, weight, bias) with the shapes and strides that the operators return.

    A gradient that is not needed has shape [0] and the dtype of `scalar_like`. The gradient of hidden is always
    contiguous.
    """
    hidden, *others = leaves
    likes = (torch.empty_like(hidden, memory_format=torch.contiguous_format), *others)
    return tuple(
        torch.empty_like(like) if need and like is not None else scalar_like.new_empty(0)
        for like, need in zip(likes, needs, strict=True)
    )


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Returns a @ b in float32, in new memory or in `out`."""
    if a.dtype == torch.float32 or not a.is_cuda:
        return torch.mm(a.float(), b.float(), out=out)
    found = torch.mm(a, b, out_dtype=torch.float32)
    return found if out is None else out.copy_(found)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds a @ b to the float32 tensor `total` in place."""
    if a.dtype == torch.float32 or not a.is_cuda:
        total.addmm_(a.float(), b.float())
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def exp_(z: Tensor) -> Tensor:
    """Replaces z by e^z, computed with exp2: on a CPU 3 times as fast as exp (measured), and as exact near z = 0."""
    return z.mul_(LOG2_E).exp2_()


def can_select(device: torch.device, wait: bool) -> bool:
    """Returns whether the live rows (see `Selection`) may be counted. On a GPU counting waits for the device, which is
    impossible while a CUDA graph is captured."""
    return device.type == "cpu" or (wait and not torch.cuda.is_current_stream_capturing())


class Selection(NamedTuple):
    """The rows of a pack that an op processes: only the live rows if they can be counted, otherwise all rows."""

    live: Tensor
    """[T] bool, True for rows that have a result or a gradient."""
    rows: Tensor | None
    """Indices of the processed rows; None if all rows are processed."""
    dead: Tensor | None
    """[T, 1] bool, True for processed rows that are not live and must be masked; None if only live rows are processed
    or all rows are live."""

    @staticmethod
    def of(live: Tensor, *, wait: bool) -> Selection:
        """Selects the live rows. On a GPU the live rows are counted only with `wait=True`, which waits for the device
        once."""
        if not can_select(live.device, wait):
            return Selection(live, None, ~live[:, None])
        rows = live.nonzero()[:, 0]  # waits for a GPU, because the shape depends on the number of live rows
        return Selection(live, None if len(rows) == len(live) else rows, None)

    def take(self, tensor: Tensor, filler: float | None = None) -> Tensor:
        """Returns the processed rows of `tensor`. `filler`, if given, replaces the values of rows that are not live,
        because a NaN in them would survive a multiplication by 0."""
        if self.rows is not None:
            return tensor[self.rows]
        return tensor if self.dead is None or filler is None else self._fill(tensor, filler)

    def put_back(self, tensor: Tensor) -> Tensor:
        """Puts processed rows back to their places in [T, ...]; rows that are not live become 0."""
        if self.dead is not None:
            return self._fill(tensor, 0)
        if self.rows is None:
            return tensor
        return tensor.new_zeros(len(self.live), *tensor.shape[1:]).index_copy_(0, self.rows, tensor)

    def _fill(self, tensor: Tensor, filler: float) -> Tensor:
        assert self.dead is not None
        return tensor.masked_fill(self.dead if tensor.dim() == 2 else self.dead[:, 0], filler)
