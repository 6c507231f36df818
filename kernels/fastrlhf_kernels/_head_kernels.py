"""The Triton kernels of `linear_logprob`: a tile of logits is folded, or turned into its gradient, before it is stored.

    forward    a program walks over its rows' tiles in one share of the vocabulary and keeps five numbers per row; a
               second kernel merges the shares in order
    gradient   the same product again, turned into the gradient of the logits and stored, for one part of the
               vocabulary; cuBLAS multiplies it with the weight and with the hidden states

How the vocabulary is shared out depends on its size alone: a row has the same bits in any pack, at any place in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrlhf_kernels._blocks import add_product
from fastrlhf_kernels._tiles import (
    FLOOR,
    FORWARD,
    GRADIENT,
    GROUP,
    PRECISION,
    cdiv,
    choose_tiles,
    operand,
    product_tile,
    row_major,
    row_scale,
    scales,
    transformed,
)
from fastrlhf_kernels._triton import jit, tl

FAR = 1e30  # as the peak of a row: each of its probabilities is 0
SHARE = 4096  # columns of the vocabulary that one forward program walks over
MERGED = 128  # rows of a program of the merge
PART_BYTES = 1 << 27  # of the gradient of the logits that exists at a time
SMALLEST_PART = 2048  # columns: below, the products are too thin to be fast


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    scale: float,
    softcap: float | None,
    ignore: int,
    entropy: bool,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `linear_logprob`'s operator returns."""
    num_rows, vocab = len(hidden), len(weight)

    def rows(wanted: bool = True) -> Tensor:
        return hidden.new_empty(num_rows if wanted else 0, dtype=torch.float32)

    outputs = (rows(), rows(), rows(entropy), rows(stats), rows(stats), rows(), rows())
    if num_rows == 0:
        return outputs
    hidden, weight, targets = row_major(hidden), row_major(weight), targets.contiguous()
    heavy = bias is not None or softcap is not None or row_temperature is not None
    tiles = choose_tiles(FORWARD, hidden, weight, heavy)
    shares = cdiv(vocab, SHARE)
    partial = hidden.new_empty(5, shares, num_rows, dtype=torch.float32)
    forward_kernel[(cdiv(num_rows, tiles.rows) * shares,)](
        operand(hidden, tiles, tiles.rows, tiles.inner),
        operand(weight, tiles, tiles.vocab, tiles.inner),
        None if bias is None else bias.contiguous(),
        row_temperature,
        targets,
        partial,
        num_rows,
        vocab,
        hidden.shape[1],
        hidden.stride(0),
        weight.stride(0),
        *scales(scale, softcap, temperature),
        ignore,
        tiles.rows,
        tiles.vocab,
        tiles.inner,
        SHARE,
        GROUP,
        bias is not None,
        softcap is not None,
        row_temperature is not None,
        entropy,
        stats,
        tiles.descriptors,
        tiles.specialize,
        PRECISION,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    merge_kernel[(cdiv(num_rows, MERGED),)](
        partial, targets, *outputs, num_rows, shares, vocab, ignore, entropy, stats, MERGED
    )
    return outputs


def backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    scale: float,
    softcap: float | None,
    dead: Tensor | None,
    peak: Tensor,
    level: Tensor,
    tilt: Tensor | None,
    at_target: Tensor,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Adds to `grad_hidden` [T, D] float32, and fills `grad_weight` and `grad_bias`, as far as they are given.

    The gradient of the logits is rounded once, to the inputs' dtype; to float32 where that is float16, which would
    lose small gradients.
    """
    num_rows, vocab = len(hidden), len(weight)
    hidden, weight, targets = row_major(hidden), row_major(weight), targets.contiguous()
    if dead is not None:
        peak = peak.masked_fill(dead[:, 0], FAR)
    heavy = bias is not None or softcap is not None or row_temperature is not None
    tiles = choose_tiles(GRADIENT, hidden, weight, heavy)
    dtype = torch.bfloat16 if hidden.dtype == weight.dtype == torch.bfloat16 else torch.float32
    inputs = hidden.to(dtype) if grad_weight is not None else hidden
    width = max(PART_BYTES // (num_rows * dtype.itemsize) // tiles.vocab * tiles.vocab, SMALLEST_PART)
    # 16 columns more than asked for at the end of an odd vocabulary: cuBLAS wants rows at multiples of 16 bytes.
    buffer = hidden.new_empty(num_rows, min(width, cdiv(vocab, 16) * 16), dtype=dtype)
    for start in range(0, vocab, width):
        stop = min(start + width, vocab)
        dx = buffer[:, : stop - start]
        gradient_kernel[(cdiv(num_rows, tiles.rows) * cdiv(stop - start, tiles.vocab),)](
            operand(hidden, tiles, tiles.rows, tiles.inner),
            operand(weight, tiles, tiles.vocab, tiles.inner),
            None if bias is None else bias.contiguous(),
            row_temperature,
            targets,
            peak,
            level,
            tilt,
            at_target,
            operand(dx, tiles, tiles.rows, tiles.vocab),
            num_rows,
            start,
            stop,
            vocab,
            hidden.shape[1],
            hidden.stride(0),
            weight.stride(0),
            dx.stride(0),
            *scales(scale, softcap, temperature),
            tiles.rows,
            tiles.vocab,
            tiles.inner,
            GROUP,
            bias is not None,
            softcap is not None,
            row_temperature is not None,
            tilt is not None,
            tiles.descriptors,
            PRECISION,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        if grad_hidden is not None:
            add_product(grad_hidden, dx, weight[start:stop].to(dtype))
        if grad_weight is not None:
            if grad_weight.dtype == dtype:
                torch.mm(dx.T, inputs, out=grad_weight[start:stop])
            else:
                grad_weight[start:stop] = dx.T @ inputs
        if grad_bias is not None:
            grad_bias[start:stop] = dx.sum(0, dtype=torch.float32)


@jit
def _fold(peak, total, gap, new_peak, new_total, new_gap):
    """Two parts of the vocabulary as one: total = sum exp(z - peak), gap = sum exp(z - peak) (peak - z)."""
    top = tl.maximum(peak, new_peak)
    old = tl.exp(peak - top)
    new = tl.exp(new_peak - top)
    gap = old * (gap + (top - peak) * total) + new * (new_gap + (top - new_peak) * new_total)
    return top, old * total + new * new_total, gap


@jit
def forward_kernel(
    hidden,
    weight,
    bias,
    row_temperature,
    targets,
    partial,  # [5, shares, T]: peak, total, target logit, gap, sum of logits
    num_rows,
    vocab,
    size,
    stride_hidden,
    stride_weight,
    inner_scale,
    outer_scale,
    ignore,
    ROWS: tl.constexpr,
    VOCAB: tl.constexpr,
    INNER: tl.constexpr,
    SHARE: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    STATS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_tiles = tl.cdiv(num_rows, ROWS)
    shares = tl.cdiv(vocab, SHARE)
    first = tl.program_id(0) // (GROUP * shares) * GROUP
    in_group = tl.minimum(row_tiles - first, GROUP)
    place = tl.program_id(0) % (GROUP * shares)
    row = (first + place % in_group) * ROWS
    share = place // in_group
    rows = row + tl.arange(0, ROWS)
    target = tl.load(targets + rows, mask=rows < num_rows, other=ignore)
    outer = row_scale(outer_scale, row_temperature, rows, num_rows, ROW_TEMPERATURE)
    peak = tl.full([ROWS], FLOOR, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    gap = tl.zeros([ROWS], tl.float32)
    at_target = tl.zeros([ROWS], tl.float32)
    logit_sum = tl.zeros([ROWS], tl.float32)
    stop = tl.minimum((share + 1) * SHARE, vocab)
    live = tl.sum((target != ignore).to(tl.int32), 0)
    stop = tl.where(live == 0, 0, stop)  # a tile of ignored rows costs nothing
    for column in tl.range(share * SHARE, stop, VOCAB, warp_specialize=SPECIALIZE):  # pyright: ignore
        z = product_tile(
            hidden, weight, row, column, num_rows, vocab, size, stride_hidden, stride_weight,
            ROWS, VOCAB, INNER, DESCRIPTORS, PRECISION,
        )  # fmt: skip
        columns = column + tl.arange(0, VOCAB)
        z = transformed(z, bias, columns, vocab, inner_scale, outer, HAS_BIAS, SOFTCAP)
        if STATS:
            logit_sum += tl.sum(tl.where((columns < stop)[None, :], z, 0.0), 1)
        z = tl.where((columns < stop)[None, :], z, FLOOR)
        z = tl.maximum(z, FLOOR, propagate_nan=tl.PropagateNan.ALL)
        at_target += tl.sum(tl.where(columns[None, :] == target[:, None], z, 0.0), 1)
        top = tl.maximum(peak, tl.max(z, 1))
        old = tl.exp(peak - top)
        z -= top[:, None]
        mass = tl.exp(z)
        if ENTROPY:
            gap = old * (gap + (top - peak) * total) - tl.sum(mass * z, 1)
        total = old * total + tl.sum(mass, 1)
        peak = top
    out = partial + share.to(tl.int64) * num_rows + rows
    step = shares.to(tl.int64) * num_rows
    inside = rows < num_rows
    tl.store(out, peak, mask=inside)
    tl.store(out + step, total, mask=inside)
    tl.store(out + 2 * step, at_target, mask=inside)
    if ENTROPY:
        tl.store(out + 3 * step, gap, mask=inside)
    if STATS:
        tl.store(out + 4 * step, logit_sum, mask=inside)


@jit
def merge_kernel(
    partial,
    targets,
    logprob,
    logsumexp,
    entropy,
    max_logprob,
    mean_logit,
    peaks,
    totals,
    num_rows,
    shares,
    vocab,
    ignore,
    ENTROPY: tl.constexpr,
    STATS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < num_rows
    target = tl.load(targets + rows, mask=inside, other=ignore)
    keep = inside & (target != ignore)
    peak = tl.full([BLOCK], FLOOR, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    gap = tl.zeros([BLOCK], tl.float32)
    at_target = tl.zeros([BLOCK], tl.float32)
    logit_sum = tl.zeros([BLOCK], tl.float32)
    step = tl.cast(shares, tl.int64) * num_rows
    for share in range(0, shares):
        at = partial + tl.cast(share, tl.int64) * num_rows + rows
        new_gap = gap * 0
        if ENTROPY:
            new_gap = tl.load(at + 3 * step, mask=keep, other=0.0)
        if STATS:
            logit_sum += tl.load(at + 4 * step, mask=keep, other=0.0)
        at_target += tl.load(at + 2 * step, mask=keep, other=0.0)
        new_peak = tl.load(at, mask=keep, other=0.0)
        peak, total, gap = _fold(peak, total, gap, new_peak, tl.load(at + step, mask=keep, other=1.0), new_gap)
    at_target = tl.where((target < 0) | (target >= vocab), float("nan"), at_target)
    log_total = tl.log(total)
    tl.store(logprob + rows, tl.where(keep, (at_target - peak - log_total), 0.0), mask=inside)
    tl.store(logsumexp + rows, tl.where(keep, (peak + log_total), 0.0), mask=inside)
    tl.store(peaks + rows, tl.where(keep, peak, 0.0), mask=inside)
    tl.store(totals + rows, tl.where(keep, total, 1.0), mask=inside)
    if ENTROPY:
        tl.store(entropy + rows, tl.where(keep, (log_total + gap / total), 0.0), mask=inside)
    if STATS:
        tl.store(max_logprob + rows, tl.where(keep, -log_total, 0.0), mask=inside)
        tl.store(mean_logit + rows, tl.where(keep, logit_sum / vocab, 0.0), mask=inside)


@jit
def gradient_kernel(
    hidden,
    weight,
    bias,
    row_temperature,
    targets,
    peaks,  # [T]
    levels,  # [T] dx = exp(z - peak) (level - tilt (z - peak)) slope; at the target at_target slope
    tilts,
    at_targets,
    out,  # [T, stop - start], rows stride_out apart
    num_rows,
    start,
    stop,
    vocab,
    size,
    stride_hidden,
    stride_weight,
    stride_out,
    inner_scale,
    outer_scale,
    ROWS: tl.constexpr,
    VOCAB: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr,
    TILT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_tiles = tl.cdiv(num_rows, ROWS)
    column_tiles = tl.cdiv(stop - start, VOCAB)
    first = tl.program_id(0) // (GROUP * column_tiles) * GROUP
    in_group = tl.minimum(row_tiles - first, GROUP)
    place = tl.program_id(0) % (GROUP * column_tiles)
    row = (first + place % in_group) * ROWS
    column = start + place // in_group * VOCAB
    rows = row + tl.arange(0, ROWS)
    columns = column + tl.arange(0, VOCAB)
    inside = rows < num_rows
    z = product_tile(
        hidden, weight, row, column, num_rows, vocab, size, stride_hidden, stride_weight,
        ROWS, VOCAB, INNER, DESCRIPTORS, PRECISION,
    )  # fmt: skip
    outer = row_scale(outer_scale, row_temperature, rows, num_rows, ROW_TEMPERATURE)
    z = transformed(z, bias, columns, vocab, inner_scale, outer, HAS_BIAS, SOFTCAP)
    z = tl.maximum(z, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    peak = tl.load(peaks + rows, mask=inside, other=0.0)[:, None]
    z -= peak
    dx = tl.exp(z)
    level = tl.load(levels + rows, mask=inside, other=0.0)[:, None]
    if TILT:
        tilt = tl.load(tilts + rows, mask=inside, other=0.0)[:, None]
        dx *= level - tilt * z
    else:
        dx *= level
    target = tl.load(targets + rows, mask=inside, other=-1)
    at_target = tl.load(at_targets + rows, mask=inside, other=0.0)
    dx = tl.where(columns[None, :] == target[:, None], at_target[:, None], dx)
    if SOFTCAP:
        tanh = (z + peak) / outer
        dx *= 1 - tanh * tanh
    if DESCRIPTORS:
        out.store([row, column - start], dx.to(out.dtype))
    else:
        place = out + rows.to(tl.int64)[:, None] * stride_out + (columns - start)[None, :]
        tl.store(place, dx.to(out.dtype.element_ty), mask=inside[:, None] & (columns < stop)[None, :])
