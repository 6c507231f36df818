"""Log-probs of given tokens from existing logits, without a float32 copy of the logits or of their softmax.

    z[t, v]   = softcap(logit_scale * logits[t, v]) / temperature,   softcap(x) = c tanh(x / c)
    logprob   = z[t, y_t] - logsumexp_v z[t, v]
    entropy   = -sum_v p log p,   p = softmax(z[t])

Gradient, for upstream gradients g of logprob, l of logsumexp and e of entropy:

    dz[t, v]       = g (1[v = y_t] - p) + l p - e p (log p + entropy)
    dlogits[t, v]  = dz * softcap'(logit_scale * logits[t, v]) * logit_scale / temperature

The target's entry is computed as -expm1(logprob) g, because 1 - p loses digits when p is nearly 1.

The forward reads the logits once and keeps five numbers per row; the backward reads them once more and writes the
gradient in the logits' dtype, rounded once, to new memory or over the logits. Ignored rows are never read, rows without
an upstream gradient only by the forward. The torch path also holds up to five float32 blocks of rows (CPU: 2 MiB each).

Precision: float32. The largest logit of the row is subtracted before anything else is computed, so a constant added to
all logits changes no bit of a log-prob. The split of a row over programs depends only on V.

Legend: T rows, V vocabulary. Online normaliser: Milakov and Gimelshein 2018 (arXiv 1805.02867). If you have hidden
states, use `linear_logprob`, which does not store the logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastrlhf_kernels._blocks import Selection
from fastrlhf_kernels._checks import check_first_derivative, check_range, check_rows, check_tensor
from fastrlhf_kernels._tiles import FLOOR, cdiv, row_major, scales, transformed
from fastrlhf_kernels._triton import OPTIONS, constant, jit, tl, use_triton
from fastrlhf_kernels.linear_logprob import check_rows_that_count, positive_or_nan
from fastrlhf_kernels.types import TokenLogprobs

BIT = math.log(2)  # one bit in nats
LN_2 = constant(BIT)
VANISHED = -1e4  # replaces -inf: 2^-1e4 is 0 as well, but 0 * -1e4 is 0 whereas 0 * -inf is NaN
CPU_BLOCK_BYTES = 1 << 21  # bytes of a float32 block of rows; small enough for the cache of a core
GPU_BLOCK_BYTES = 1 << 27

SHARE = 16384  # columns that one forward program reduces; a row of 128256 columns takes 8 programs
DEPTH, LANES = 4, 1024  # shape of a block of columns; each thread reduces its own lanes, which merge once, at the end
BACKWARD_BLOCK = 4096  # columns that one backward program writes


def logprob_from_logits(
    logits: Tensor,  # [T, V] float32, bfloat16 or float16
    targets: Tensor,  # [T] int64
    *,
    temperature: float | Tensor = 1.0,  # a number or [T]; no gradient
    logit_scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    impl: str = "auto",
) -> TokenLogprobs:
    """Returns log_softmax(softcap(logit_scale * logits) / temperature)[t, targets[t]], [T] float32, in nats.

    A row whose target is `ignore_index` returns 0 in every output and has no gradient, even if it contains NaN.
    `max_logprob` and `mean_logit` are None.

    With `inplace_backward` the gradient overwrites the logits, so that the backward allocates nothing of their size. Do
    not read the logits afterwards. Another backward that needs their values raises RuntimeError.

    Raises ValueError for wrong shapes, dtypes and devices, and on the CPU for a target outside the vocabulary and a
    row's temperature that is not above 0 (on a GPU these give NaN); with `inplace_backward` also for logits that are a
    leaf or a view of a leaf, and for rows that overlap in memory.
    """
    check_rows("logits", logits, rank=2)
    (num_rows, vocab), device = logits.shape, logits.device
    if vocab == 0:
        raise ValueError("logits must have at least one column, got none")
    check_tensor("targets", targets, (num_rows,), device, (torch.int64,))
    row_temperature = None
    if isinstance(temperature, Tensor):
        check_tensor("temperature", temperature, (num_rows,), device)
        row_temperature, temperature = positive_or_nan(temperature), 1.0
    for name, value in (("temperature", temperature), ("logit_scale", logit_scale), ("softcap", softcap)):
        if value is not None:
            check_range(name, value, 0, float("inf"), open_ends=True)
    logits = row_major(logits)
    if inplace_backward:
        _check_expendable(logits)

    inner, outer = scales(float(logit_scale), softcap, float(temperature))
    bits = targets.new_full((num_rows,), outer / BIT, dtype=torch.float32)
    bits = bits if row_temperature is None else bits / row_temperature
    options = (inner, softcap is not None, ignore_index, entropy, inplace_backward, use_triton(impl, device))
    logprob, logsumexp, row_entropy, _, _ = _forward(logits, targets.contiguous(), bits, *options)
    return TokenLogprobs(logprob, logsumexp, row_entropy if entropy else None, None, None)


def logprob_from_logits_reference(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> TokenLogprobs:
    """Computes the log-probs by their definition, in the dtype of the logits."""
    logits = logit_scale * logits
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits = logits / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    logprobs, keep = logits.log_softmax(-1), targets != ignore_index
    at_target = logprobs.gather(1, targets.where(keep, 0)[:, None])[:, 0]
    rows = (at_target, logits.logsumexp(-1), -(logprobs.exp() * logprobs).sum(-1))
    logprob, logsumexp, entropy = (row.where(keep, 0) for row in rows)
    return TokenLogprobs(logprob, logsumexp, entropy, None, None)


def _check_expendable(logits: Tensor) -> None:
    """Raises ValueError if the gradient must not overwrite the logits."""
    for tensor in (logits, logits._base):
        if tensor is not None and tensor.is_leaf and tensor.requires_grad:
            raise ValueError("logits must not be a leaf with inplace_backward, which destroys its values: pass a clone")
    if logits.shape[0] > 1 and logits.stride(0) < logits.shape[1]:
        raise ValueError("logits must not overlap from row to row with inplace_backward: pass logits.contiguous()")


# Below, x is tanh(inner * logits) with a soft cap, otherwise the logits; bits[t] * (x - peak) is log2(exp(z - max z)).
# Custom operators are opaque to torch.compile, which could not trace a loop count that depends on T.
@torch.library.custom_op("fastrlhf::logprob_from_logits", mutates_args=())
def _forward(
    logits: Tensor,
    targets: Tensor,
    bits: Tensor,
    inner: float,
    capped: bool,
    ignore: int,
    entropy: bool,
    inplace: bool,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns (logprob, logsumexp, entropy, peak = max x, total = sum 2^(bits (x - peak))), [T] each; the entropy is
    empty unless requested."""
    keep, vocab = targets != ignore, logits.shape[1]
    chosen = Selection.of(keep, wait=False)
    check_rows_that_count(chosen, targets, vocab, bits)
    if triton and len(logits):
        logprob, logsumexp, peak, total = (torch.empty_like(bits) for _ in range(4))
        outputs = (logprob, logsumexp, torch.empty_like(bits if entropy else bits[:0]), peak, total)
        shares = cdiv(vocab, SHARE)
        width = 1 << (shares - 1).bit_length()
        inputs = (logits, targets, bits, bits.new_empty(len(logits), 3, width))
        rest = (logits.stride(0), vocab, inner, ignore, SHARE, width, capped, entropy)
        with torch.cuda.device_of(logits):
            forward_kernel[(len(logits) * shares,)](*inputs, *rest, DEPTH, LANES, num_warps=4, **OPTIONS)
            merge_kernel[(len(logits),)](*inputs, *outputs, *rest, num_warps=1, **OPTIONS)
        return outputs
    parts: list[tuple[Tensor, ...]] = []
    for rows, x in _blocks(logits, chosen, inner, capped):
        index = targets[rows].clamp(0, vocab - 1)[:, None]
        peak = x.amax(1)
        x.sub_(peak[:, None]).mul_(bits[rows, None])
        at_target = x.gather(1, index)[:, 0].where(index[:, 0] == targets[rows], float("nan"))
        mass = x.clamp_(min=VANISHED).exp2() if entropy else x.exp2_()
        total = mass.sum(1)
        gap = -mass.mul_(x).sum(1) if entropy else total.new_empty(0)
        parts.append((at_target, peak, total, gap))
    at_target, peak, total, gap = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    log_total = total.log2()
    return (
        chosen.put_back((at_target - log_total) * BIT),  # never above 0: the peak is one of the logits, so total >= 1
        chosen.put_back((peak * chosen.take(bits) + log_total) * BIT),
        chosen.put_back((log_total + gap / total) * BIT) if entropy else gap,
        chosen.put_back(peak),
        chosen.put_back(total),
    )


@_forward.register_fake
def _(logits, targets, bits, inner, capped, ignore, entropy, inplace, triton):
    return tuple(torch.empty_like(bits if wanted else bits[:0]) for wanted in (True, True, entropy, True, True))


def _blocks(logits: Tensor, chosen: Selection, inner: float, capped: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields blocks of the chosen rows: indices, and float32 logits (with a soft cap: tanh(inner * logits)).

    An empty pack gives one empty block and needs no special case.
    """
    rows = torch.arange(len(logits), device=logits.device) if chosen.rows is None else chosen.rows
    size = CPU_BLOCK_BYTES if logits.device.type == "cpu" else GPU_BLOCK_BYTES
    for block in rows.split(max(size // (4 * logits.shape[1]), 1)):
        x = logits.index_select(0, block).float()
        yield block, x.mul_(inner).tanh_() if capped else x


def _save(ctx, inputs, output):
    """Saves the logits and five numbers per row for the backward."""
    logits, targets, bits, *ctx.options = inputs
    logprob, _, entropy, peak, total = output
    ctx.save_for_backward(logits, targets, bits, logprob, entropy, peak, total)
    ctx.mark_non_differentiable(peak, total)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_logprob, grad_logsumexp, grad_entropy, *_):
    logits, targets, bits, logprob, entropy, peak, total = ctx.saved_tensors
    inner, capped, ignore, _, inplace, triton = ctx.options
    check_first_derivative("logprob_from_logits")
    on_logprob, on_total = (0 if grad is None else grad for grad in (grad_logprob, grad_logsumexp))
    logprob = logprob.clamp(min=VANISHED)  # -inf if the target's logit is -inf
    prob = logprob.exp()
    level = on_total - on_logprob
    tilt = torch.zeros_like(total)
    at_target = on_total * prob - on_logprob * logprob.expm1()
    live = (on_logprob != 0) | (on_total != 0)
    if grad_entropy is not None:
        level = level - grad_entropy * (entropy - total.log())
        tilt = grad_entropy * BIT
        at_target = at_target - grad_entropy * prob * (logprob + entropy)
        live = live | (grad_entropy != 0)
    slope = bits * (BIT * inner if capped else BIT)
    terms = slope * torch.stack([level / total, tilt / total, at_target])
    terms = terms.where(live & (targets != ignore), 0)
    rest = (targets, bits, peak, terms, inner, capped, grad_entropy is not None, triton)
    grad = logits.detach() if inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
    _backward(grad, None if inplace else logits, *rest)
    return grad, *[None] * 8


torch.library.register_autograd("fastrlhf::logprob_from_logits", _differentiate, setup_context=_save)


# `mutates_args` tells autograd's version counter and torch.compile that the op overwrites `grad`.
@torch.library.custom_op("fastrlhf::logprob_from_logits_backward", mutates_args=("grad",))
def _backward(
    grad: Tensor,
    logits: Tensor | None,
    targets: Tensor,
    bits: Tensor,
    peak: Tensor,
    terms: Tensor,
    inner: float,
    capped: bool,
    tilted: bool,
    triton: bool,
) -> None:
    """Writes the gradient to `grad` [T, V]; if `logits` is None, `grad` contains the logits and is overwritten.

    `terms` [3, T] are level, tilt and at_target. With z = bits (x - peak), the gradient is 2^z (level - tilt z), or
    at_target in the target's column; a soft cap multiplies both by 1 - x^2. Rows whose terms are all 0 are not read.
    """
    logits = grad if logits is None else logits
    vocab = logits.shape[1]
    if triton and len(logits):
        inputs = (logits, targets, bits, peak, *terms, grad, logits.stride(0), grad.stride(0), vocab, inner)
        grid = (len(logits) * cdiv(vocab, BACKWARD_BLOCK),)
        with torch.cuda.device_of(logits):
            backward_kernel[grid](*inputs, capped, tilted, BACKWARD_BLOCK, num_warps=4, **OPTIONS)
        return
    chosen = Selection.of((terms != 0).any(0), wait=False)
    if chosen.rows is not None:
        grad.index_fill_(0, (~chosen.live).nonzero()[:, 0], 0)
    for rows, x in _blocks(logits, chosen, inner, capped):
        level, tilt, at_target = terms[:, rows, None]
        slope = 1 - x.square() if capped else None
        x.sub_(peak[rows, None]).mul_(bits[rows, None])
        mass = x.clamp_(min=VANISHED).exp2() if tilted else x.exp2_()
        dx = mass.mul_(x.mul_(-tilt).add_(level) if tilted else level)
        index = targets[rows].clamp(0, vocab - 1)[:, None]
        dx.scatter_(1, index, at_target.where(index == targets[rows, None], dx.gather(1, index)))
        if slope is not None:
            dx *= slope
        if chosen.dead is not None:
            dx.masked_fill_(chosen.dead[rows], 0)
        grad.index_copy_(0, rows, dx.to(grad.dtype))


_backward.register_fake(lambda *inputs: None)


@jit
def _load(pointer, inside, inner, SOFTCAP: tl.constexpr):
    """Loads logits as float32 and applies tanh(inner * logits) if there is a soft cap."""
    return transformed(tl.load(pointer, mask=inside, other=0.0).to(tl.float32), None, 0, 0, inner, 1.0, SOFTCAP)


@jit
def _fold(peak, total, gap, x, bits, ENTROPY: tl.constexpr):
    """Adds a block x [DEPTH, LANES] to the statistics of each lane [LANES]."""
    top = tl.maximum(peak, tl.max(x, 0))
    shift = (peak - top) * bits
    old = tl.exp2(shift)
    z = (x - top[None, :]) * bits
    if ENTROPY:
        z = tl.maximum(z, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    mass = tl.exp2(z)
    if ENTROPY:
        gap = old * (gap - shift * total) - tl.sum(mass * z, 0)
    return top, old * total + tl.sum(mass, 0), gap


@jit
def _merge(peak, total, gap, bits):
    """Merges the statistics of several parts of a row: total = sum 2^z, gap = -sum 2^z z, with z = bits (x - peak)."""
    top = tl.max(peak, 0)
    shift = (peak - top) * bits
    old = tl.exp2(shift)
    return top, tl.sum(old * total, 0), tl.sum(old * (gap - shift * total), 0)


@jit
def forward_kernel(
    logits, targets, bits,
    partial,  # [T, 3, SHARES]: peak, total, gap
    stride_logits, vocab, inner, ignore,
    SHARE: tl.constexpr, SHARES: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
    DEPTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    shares = tl.cdiv(vocab, SHARE)
    row = (tl.program_id(0) // shares).to(tl.int64)
    share = tl.program_id(0) % shares
    if tl.load(targets + row) == ignore:
        return
    bits = tl.load(bits + row)
    peak = tl.full([LANES], FLOOR, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    gap = tl.zeros([LANES], tl.float32)
    columns = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    place = logits + row * stride_logits + share * SHARE + columns
    size = tl.minimum(SHARE, vocab - share * SHARE)
    whole = size // (DEPTH * LANES) * (DEPTH * LANES)
    for start in range(0, whole, DEPTH * LANES):
        x = _load(place + start, True, inner, SOFTCAP)
        peak, total, gap = _fold(peak, total, gap, x, bits, ENTROPY)
    if whole < size:
        inside = columns < size - whole
        x = tl.where(inside, _load(place + whole, inside, inner, SOFTCAP), float("-inf"))
        peak, total, gap = _fold(peak, total, gap, x, bits, ENTROPY)
    peak, total, gap = _merge(peak, total, gap, bits)
    part = partial + row * (3 * SHARES) + share
    tl.store(part, peak)
    tl.store(part + SHARES, total)
    tl.store(part + 2 * SHARES, gap)


@jit
def merge_kernel(
    logits, targets, bits, partial, logprob, logsumexp, entropy, peaks, totals,
    stride_logits, vocab, inner, ignore,
    SHARE: tl.constexpr, SHARES: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    keep = target != ignore
    known = (target >= 0) & (target < vocab)
    bits = tl.load(bits + row)
    share = tl.arange(0, SHARES)
    there = share < tl.where(keep, tl.cdiv(vocab, SHARE), 0)
    part = partial + row * (3 * SHARES) + share
    peak = tl.load(part, mask=there, other=FLOOR)
    total = tl.load(part + SHARES, mask=there, other=1.0)
    peak, total, gap = _merge(peak, total, tl.load(part + 2 * SHARES, mask=there, other=0.0), bits)
    log_total = tl.log2(total)
    at_target = (_load(logits + row * stride_logits + target, known, inner, SOFTCAP) - peak) * bits
    at_target = tl.where(known, at_target, float("nan"))
    tl.store(logprob + row, tl.where(keep, (at_target - log_total) * LN_2, 0.0))
    tl.store(logsumexp + row, tl.where(keep, (peak * bits + log_total) * LN_2, 0.0))
    tl.store(peaks + row, tl.where(keep, peak, 0.0))
    tl.store(totals + row, tl.where(keep, total, 1.0))
    if ENTROPY:
        tl.store(entropy + row, tl.where(keep, (log_total + gap / total) * LN_2, 0.0))


@jit
def backward_kernel(
    logits, targets, bits, peaks, levels, tilts, at_targets,
    grad,  # [T, V]; may be the same memory as the logits
    stride_logits, stride_grad, vocab, inner,
    SOFTCAP: tl.constexpr, TILT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(vocab, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    level = tl.load(levels + row)
    tilt = tl.load(tilts + row)
    at_target = tl.load(at_targets + row)
    live = (level != 0) | (tilt != 0) | (at_target != 0)
    peak = tl.where(live, tl.load(peaks + row), 0.0)
    bits = tl.where(live, tl.load(bits + row), 0.0)
    x = _load(logits + row * stride_logits + columns, columns < tl.where(live, vocab, 0), inner, SOFTCAP)
    z = (x - peak) * bits
    if TILT:
        z = tl.maximum(z, FLOOR)
        dx = tl.exp2(z) * (level - tilt * z)
    else:
        dx = tl.exp2(z) * level
    dx = tl.where(columns == tl.load(targets + row).to(tl.int32), at_target, dx)
    if SOFTCAP:
        dx *= 1 - x * x
    tl.store(grad + row * stride_grad + columns, dx.to(grad.dtype.element_ty), mask=columns < vocab)
