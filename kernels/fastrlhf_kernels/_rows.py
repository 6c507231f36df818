"""Code shared by the kernels of per-token losses: splitting rows over programs, partial sums, and the backward.

A loss kernel reads every input once. Besides the loss it writes the slope of each row, which is the derivative of the
loss with respect to that row. The backward then only multiplies the slopes by the upstream gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrlhf_kernels._checks import check_first_derivative
from fastrlhf_kernels._tiles import cdiv
from fastrlhf_kernels._triton import jit, tl

BLOCK = 1024  # rows per program; in a program that loops over a segment, rows per step of the loop


def num_programs(num_rows: int) -> int:
    """Returns the number of programs for `num_rows` rows. It is at least one, so that a sum over no rows is written as
    0."""
    return max(cdiv(num_rows, BLOCK), 1)


def masked(tensor: Tensor, mask: Tensor) -> Tensor:
    """Converts `tensor` to float32 and sets rows outside the mask to 0."""
    return tensor.float().where(mask, 0)


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Makes every tensor contiguous; None stays None."""
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def differentiate_by_slopes(op: str, leaves: tuple[int, ...]) -> None:
    """Registers the backward of a custom op that returns its own derivatives ("slopes") as its last outputs.

    The slopes are the derivatives of the first output with respect to the inputs at the positions `leaves`. A slope is
    float32 and has the shape of its input, or is empty if that input is None. Only the first output is differentiable.
    """

    def save(ctx, inputs, output):
        ctx.save_for_backward(*output[-len(leaves) :])
        ctx.num_inputs = len(inputs)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    def backward(ctx, grad, *_):
        check_first_derivative(op.split("::")[1])
        gradients: list[Tensor | None] = [None] * ctx.num_inputs
        for leaf, slope in zip(leaves, ctx.saved_tensors, strict=True):
            if ctx.needs_input_grad[leaf]:
                gradients[leaf] = grad * slope  # autograd rounds it to the dtype of the leaf
        return tuple(gradients)

    torch.library.register_autograd(op, backward, setup_context=save)


@jit
def block_of_rows(mask, num_rows, BLOCK: tl.constexpr):
    """Returns (indices of this program's rows, whether each exists, whether each is in the mask), [BLOCK] each."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < num_rows
    return rows, inside, tl.load(mask + rows, mask=inside, other=0).to(tl.int1)


@jit
def load_float32(pointer, rows, keep):
    """Loads rows as float32, with 0 for rows that are not in `keep`."""
    return tl.load(pointer + rows, mask=keep, other=0.0).to(tl.float32)


@jit
def store_sum(partials, index: tl.constexpr, x):
    """Stores sum(x) as this program's part of sum number `index`; `partials` is [sums, programs]."""
    tl.store(partials + index * tl.num_programs(0) + tl.program_id(0), tl.sum(x, 0))
