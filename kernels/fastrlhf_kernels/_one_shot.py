"""Computes a token-wise loss from hidden states together with its gradients, for `linear_nll` and `linear_policy_loss`.

The derivative of a token-wise loss with respect to a log-prob is known as soon as the logits of its row are known, so
one pass over chunks of rows gives the loss and all gradients. It needs three matrix products instead of the four of
`linear_logprob` with a loss after it, and two instead of three if the head is frozen.

    chunk of rows: products -> masses, logprob, entropy -> slopes of the loss -> gradient of the logits, in place
                   -> dhidden of these rows, dweight += ...

A trained head costs a float32 accumulator of its size, to which each chunk adds. The forward keeps the gradients; the
backward multiplies them by the upstream gradient. Legend: T rows, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf_kernels import _head
from fastrlhf_kernels._blocks import (
    Logits,
    Selection,
    add_product,
    gradient,
    gradients_like,
    merged,
    product,
    set_target,
    slopes,
    statistics,
)
from fastrlhf_kernels._checks import check_first_derivative
from fastrlhf_kernels._form import Needs, chunk_rows, gpu_memory
from fastrlhf_kernels._tiles import STORING, cdiv, choose_tiles, row_major
from fastrlhf_kernels.linear_logprob import check_rows_that_count

CAST_ROWS = 8192


class Head(NamedTuple):
    """Hidden states and head of an op, with the options of `Logits.of`."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    row_temperature: Tensor | None
    temperature: float
    scale: float
    softcap: float | None


Derivatives = Callable[[slice, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
"""(rows of a chunk, their logprob, their entropy or None) -> derivatives of the loss with respect to both"""


def one_shot(
    head: Head,
    targets: Tensor,
    chosen: Selection,
    derivatives: Derivatives,
    *,
    ignore: int,
    entropy: bool,
    needs: Needs,
    triton: bool,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Returns (logprob [T], entropy [T] or None, gradients of hidden, weight and bias) of a loss with the given
    `derivatives`. `targets` are those of all rows, of which only the rows `chosen` are processed.

    A gradient that is not needed has shape [0]. Results of rows that are not live are 0.
    """
    hidden, weight, bias, row_temperature, temperature, scale, softcap = head
    check_rows_that_count(chosen, targets, len(weight), row_temperature)
    targets, taken = chosen.take(targets), chosen.take(hidden)
    heat = None if row_temperature is None else chosen.take(row_temperature, 1)
    factor = scale / (temperature if heat is None else heat)
    own = Head(taken, weight, bias, heat, temperature, scale, softcap)
    logprob, row_entropy = (hidden.new_zeros(len(taken), dtype=torch.float32) for _ in range(2))
    with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
        chunks = (_TritonChunks if triton else _TorchChunks)(own, chosen.dead, needs, entropy)
        for start in range(0, len(taken), chunks.step):
            block = slice(start, min(start + chunks.step, len(taken)))
            logprob[block], row_entropy[block], peak, total = chunks.fold(block, targets[block], ignore, entropy)
            if not any(needs):
                continue
            g, on_entropy = derivatives(block, logprob[block], row_entropy[block] if entropy else None)
            row_factor = factor[block] if isinstance(factor, Tensor) else factor
            known = None if on_entropy is None else row_entropy[block]
            coefficients = slopes(g, 0.0, on_entropy, row_factor, logprob[block], known, total)
            chunks.add_gradient(block, targets[block], peak, *coefficients)
    grad_hidden, *others = chunks.sums.finished()
    if grad_hidden is not None and chosen.rows is not None:
        grad_hidden = chosen.put_back(grad_hidden)  # already 0 in processed rows that are not live
    gradients = [
        hidden.new_empty(0) if leaf is None or grad is None else grad.to(kept_dtype(leaf))
        for leaf, grad in zip((hidden, weight, bias), (grad_hidden, *others), strict=True)
    ]
    return chosen.put_back(logprob), chosen.put_back(row_entropy) if entropy else None, gradients


def fake_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Needs) -> tuple[Tensor, ...]:
    """Allocates gradients with the shapes, dtypes and strides of those that `one_shot` returns."""
    kept = (hidden.to(kept_dtype(hidden)), weight.to(kept_dtype(weight)))
    return gradients_like((*kept, None if bias is None else bias.to(kept_dtype(bias))), needs, hidden)


def save_gradients(ctx, inputs, output) -> None:
    """The `setup_context` of an op whose last three outputs are gradients of its first three inputs, and whose first
    output is the loss."""
    ctx.save_for_backward(*output[-3:])
    ctx.dtypes = [None if leaf is None else leaf.dtype for leaf in inputs[:3]]
    ctx.num_inputs = len(inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def scaled_gradients(op: str) -> Callable[..., tuple[Tensor | None, ...]]:
    """Returns the backward of an op that used `save_gradients`: multiplies the saved gradients by the upstream one."""

    def backward(ctx, grad, *_):
        check_first_derivative(op)
        gradients: list[Tensor | None] = [None] * ctx.num_inputs
        # Only on a CPU, because reading the number would make a GPU wait.
        plain = type(grad) is Tensor and grad.device.type == "cpu" and not torch.compiler.is_compiling()
        is_one = plain and grad.item() == 1
        for leaf, saved in enumerate(ctx.saved_tensors):
            if ctx.needs_input_grad[leaf]:
                same = is_one and saved.dtype == ctx.dtypes[leaf]
                gradients[leaf] = saved if same else _scaled(saved, grad, ctx.dtypes[leaf])
        return tuple(gradients)

    return backward


def kept_dtype(leaf: Tensor) -> torch.dtype:
    """Returns the dtype in which the forward keeps the gradient of a tensor: its own dtype, or float32 for float16.

    The forward does not know the upstream gradient, which may contain a loss scale. Without the loss scale, float16
    would underflow.
    """
    return torch.float32 if leaf.dtype == torch.float16 else leaf.dtype


@torch.library.custom_op("fastrlhf::scaled", mutates_args=())
def _scaled(tensor: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Computes tensor * factor in float32 and rounds once to `dtype`, without a float32 copy of the whole tensor."""
    out = torch.empty_like(tensor, dtype=dtype)
    for some, part in zip(tensor.split(8192), out.split(8192), strict=True):
        part.copy_(some.float() * factor)
    return out


@_scaled.register_fake
def _(tensor, factor, dtype):
    return torch.empty_like(tensor, dtype=dtype)


class Sums:
    """Gradients of hidden, weight and bias, to which every chunk adds its part; None if not needed."""

    def __init__(self, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.begun = False
        """Whether a chunk has written the weight's gradient, whose memory is not initialised."""

    @staticmethod
    def of(head: Head, needs: Needs, *, num_chunks: int, on_hidden: torch.dtype) -> Sums:
        """Allocates the sums. A single chunk writes the gradient of the weight once, in the dtype of the result;
        several chunks add in float32."""
        need_hidden, need_weight, need_bias = needs
        dtype = kept_dtype(head.weight) if num_chunks <= 1 else torch.float32
        return Sums(
            torch.zeros_like(head.hidden, dtype=on_hidden, memory_format=torch.contiguous_format)
            if need_hidden
            else None,
            torch.empty_like(head.weight, dtype=dtype) if need_weight else None,
            torch.zeros_like(head.bias, dtype=torch.float32) if need_bias and head.bias is not None else None,
        )

    def add_to_weight(self, dx: Tensor, hidden: Tensor, columns: slice) -> None:
        """Adds dx.T @ hidden to the rows `columns` of the weight's gradient, or writes it if no chunk has done so."""
        if self.weight is None:
            return
        total = self.weight[columns]
        if self.begun:
            add_product(total, dx.T, hidden)
        elif total.dtype == dx.dtype:
            torch.mm(dx.T, hidden, out=total)
        else:
            total.copy_(product(dx.T, hidden))

    def finished(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if self.weight is not None and not self.begun:
            self.weight.zero_()  # no row has a gradient
        return self.hidden, self.weight, self.bias


class _TorchChunks:
    """Processes rows in chunks in torch; holds the logits of the current chunk and the gradients summed so far.

    On a CPU, if neither entropy nor soft cap is asked for, the logits of a part of the vocabulary are replaced by
    exp(z - largest logit of the part), and no exponential is computed twice. Otherwise the logits are kept. The
    log-probs have the bits of `linear_logprob`, so that the ratio of a policy that has not moved is exactly 1.
    """

    def __init__(self, head: Head, dead: Tensor | None, needs: Needs, entropy: bool) -> None:
        hidden = head.hidden if dead is None else head.hidden.masked_fill(dead, 0)
        self.logits = Logits.of(hidden, *head[1:])
        on_cpu = hidden.device.type == "cpu"
        self.keeps_masses, self.counts = on_cpu and not entropy and head.softcap is None, on_cpu
        self.step = chunk_rows(len(hidden), len(head.weight) * 4, gpu_memory(hidden.device))
        self.sums = Sums.of(head, needs, num_chunks=cdiv(len(hidden), self.step), on_hidden=torch.float32)
        rows, widths = min(self.step, len(hidden)), [len(part.weight) for part in self.logits.parts()]
        # One tensor per part of the vocabulary: products with rows that lie far apart in memory are slower.
        self.z = [hidden.new_empty(rows, width, dtype=torch.float32) for width in widths]
        self.factors: list[Tensor] = []

    def fold(self, block: slice, targets: Tensor, ignore: int, entropy: bool) -> tuple[Tensor, ...]:
        """Computes the logits of a chunk, keeps them or their exponentials in `z`, and returns (logprob, entropy or 0,
        peak, total = sum exp(z - peak)), [rows] each."""
        state: tuple[Tensor, ...] = ()
        peaks = []
        for z, part in zip(self.z, self.logits.parts(), strict=True):
            own = self.logits.block(block, part, out=z[: len(targets)])
            found = statistics(own if self.keeps_masses else own.clone(), targets - part.start, entropy, False)
            state = merged(state, found)
            peaks.append(found[0])
        peak, total, target, gap, _ = state  # pyright: ignore[reportAssignmentType]
        log_total = total.log()
        if self.keeps_masses:
            self.factors = [(own - peak).exp() for own in peaks]
        row_entropy = log_total + gap / total if entropy else torch.zeros_like(peak)
        return target - peak - log_total, row_entropy, peak, total

    def add_gradient(
        self, block: slice, targets: Tensor, peak: Tensor, level: Tensor, tilt: Tensor | None, at_target: Tensor
    ) -> None:
        """Adds the gradients of a chunk; `level`, `tilt` and `at_target` are the coefficients that `slopes` returns.

        Rows whose coefficients are all 0 have no gradient (a clipped token, an advantage of 0). On a CPU they are left
        out of both products, like in the backward of `linear_logprob`.
        """
        rows, index = block, None
        if self.counts:
            live = (level != 0) | (at_target != 0) | (0 if tilt is None else tilt != 0)
            if not live.all():
                index = live.nonzero()[:, 0]
                rows = index + block.start
                targets, peak, level, at_target = (x[index] for x in (targets, peak, level, at_target))
                tilt = None if tilt is None else tilt[index]
        if not len(targets):
            return
        hidden = self.logits.hidden[rows]
        own = hidden.new_zeros(hidden.shape, dtype=torch.float32)
        for i, part in enumerate(self.logits.parts()):
            columns = slice(part.start, part.start + len(part.weight))
            z, column = self.z[i][: block.stop - block.start], targets - part.start
            z = z if index is None else z[index]
            if self.keeps_masses:
                factor = level * (self.factors[i] if index is None else self.factors[i][index])
                dx = set_target(z.mul_(factor[:, None]), column, at_target)
            else:
                slope = None if self.logits.softcap is None else self.logits.slope(rows, z)
                dx = gradient(z, column, peak, level, tilt, at_target)
                dx = dx if slope is None else dx.mul_(slope)
            if self.sums.bias is not None:
                self.sums.bias[columns] += dx.sum(0)
            dx = dx.to(hidden.dtype)
            if self.sums.hidden is not None:
                add_product(own, dx, part.weight)
            self.sums.add_to_weight(dx, hidden, columns)
        self.sums.begun = True
        if self.sums.hidden is not None:
            self.sums.hidden[rows] = own


class _TritonChunks:
    """Processes rows in chunks like `_TorchChunks`, with the Triton kernels of `_head_kernels.py`.

    The logits of a chunk are kept as masses exp(z - top), in bfloat16 if hidden states and weight are bfloat16: their
    relative error of 2^-9 is that of a bfloat16 gradient (bfloat16 logits would be off by up to 0.06 nats).
    """

    def __init__(self, head: Head, dead: Tensor | None, needs: Needs, entropy: bool) -> None:
        self.head = head._replace(hidden=row_major(head.hidden), weight=row_major(head.weight))
        self.dead, num_rows, device = dead, len(head.hidden), head.hidden.device
        native = head.hidden.dtype == head.weight.dtype == torch.bfloat16
        self.dtype = torch.bfloat16 if native else torch.float32
        vocab = cdiv(len(head.weight), 16) * 16  # cuBLAS and TMA need rows that start at multiples of 16 bytes
        self.step = chunk_rows(num_rows, vocab * self.dtype.itemsize, gpu_memory(device))
        self.sums = Sums.of(head, needs, num_chunks=cdiv(num_rows, self.step), on_hidden=self.dtype)
        heavy = _head.is_heavy(head.bias, head.row_temperature, head.softcap)
        self.tiles = choose_tiles(STORING, self.head.hidden, self.head.weight, heavy)
        rows = min(self.step, num_rows)
        self.masses = head.hidden.new_empty(rows, vocab, dtype=self.dtype)[:, : len(head.weight)]
        self.tops = head.hidden.new_empty(cdiv(len(head.weight), self.tiles.vocab) * rows, dtype=torch.float32)

    def fold(self, block: slice, targets: Tensor, ignore: int, entropy: bool) -> tuple[Tensor, ...]:
        hidden, row_temperature = self.head.hidden[block], _rows_of(self.head.row_temperature, block)
        stored = (self.tiles, self.masses[: len(hidden)], self.tops)
        options = (self.head.temperature, self.head.scale, self.head.softcap, ignore, entropy, False)
        logprob, _, row_entropy, _, _, peak, total = _head.forward(
            hidden, self.head.weight, self.head.bias, targets, row_temperature, *options, *stored
        )
        self.logit = logprob + peak + total.log()  # logits of the targets
        return logprob, row_entropy if entropy else torch.zeros_like(logprob), peak, total

    def add_gradient(
        self, block: slice, targets: Tensor, peak: Tensor, level: Tensor, tilt: Tensor | None, at_target: Tensor
    ) -> None:
        hidden, weight, _, row_temperature, temperature, scale, softcap = self.head
        hidden, row_temperature = hidden[block], _rows_of(row_temperature, block)
        if softcap is not None:
            z = self.logit * (temperature if row_temperature is None else row_temperature)
            at_target = at_target * (1 - (z / softcap).square())
        dx = self.masses[: len(hidden)]
        rows = (peak, level, tilt, at_target)
        transform = (row_temperature, temperature, scale, softcap)
        _head.scale_masses(dx, self.tops, targets, *transform, self.tiles, *rows)
        if self.sums.bias is not None:
            self.sums.bias += dx.sum(0, dtype=torch.float32)
        if self.sums.hidden is not None and self.dtype == torch.bfloat16:
            torch.mm(dx, weight, out=self.sums.hidden[block])
        elif self.sums.hidden is not None:
            for start in range(0, len(weight), CAST_ROWS):  # casts a few rows of the weight at a time
                part = slice(start, start + CAST_ROWS)
                add_product(self.sums.hidden[block], dx[:, part], weight[part].float())
        if self.sums.weight is not None:
            hidden = hidden if self.dead is None else hidden.masked_fill(self.dead[block], 0)
            self.sums.add_to_weight(dx, hidden.to(self.dtype), slice(None))
        self.sums.begun = True


def _rows_of(tensor: Tensor | None, block: slice) -> Tensor | None:
    return None if tensor is None else tensor[block]
