"""Triton kernels that fuse the product of a language-model head with the reduction of its logits.

    forward    each program computes the logits of some rows in one share of the vocabulary, tile by tile, and keeps
               five numbers per row; a second kernel merges the shares in order
    gradient   computes the same logits again for one part of the vocabulary and stores their gradient; cuBLAS
               multiplies the gradient with the weight and with the hidden states

The split of the vocabulary depends only on its size, so that a row gives the same bits in any pack and at any
position.
"""

from __future__ import annotations

from fastrlhf_kernels._tiles import (
    FLOOR,
    LN_2,
    LOG2_E,
    place_of_program,
    product_tile,
    row_scale,
    transformed,
)
from fastrlhf_kernels._triton import jit, tl


@jit
def either(a, b):
    return a | b


@jit
def forward_kernel(
    hidden,
    weight,
    bias,  # or None
    row_temperature,  # or None
    targets,
    partial,  # [5, shares, T]: peak, total, target logit, gap, sum of logits
    masses,  # [T, V] exp(z - top), or None
    tops,  # [tiles of the vocabulary, T], or None
    num_rows,
    vocab,
    size,
    stride_hidden,
    stride_weight,
    stride_masses,
    inner_scale,
    outer_scale,
    ignore,
    ROWS: tl.constexpr,
    VOCAB: tl.constexpr,
    INNER: tl.constexpr,
    SHARE: tl.constexpr,
    GROUP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    STATS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    shares = tl.cdiv(vocab, SHARE)
    row, share = place_of_program(num_rows, shares, ROWS, GROUP)
    rows = row + tl.arange(0, ROWS)
    target = tl.load(targets + rows, mask=rows < num_rows, other=ignore).to(tl.int32)  # int32 compares faster
    outer = outer_scale + tl.zeros([ROWS], tl.float32)  # logits are x * outer
    if row_temperature is not None:
        outer /= tl.load(row_temperature + rows, mask=rows < num_rows, other=1.0)
    bits = (outer * LOG2_E)[:, None]
    peak = tl.full([ROWS], FLOOR, tl.float32)  # the largest x
    total = tl.zeros([ROWS], tl.float32)
    gap = tl.zeros([ROWS], tl.float32)  # in bits
    at_target = tl.zeros([ROWS], tl.float32)
    x_sum = tl.zeros([ROWS], tl.float32)
    start = share * SHARE
    stop = tl.minimum(start + SHARE, vocab)
    within = (target >= start) & (target < stop)
    tile = tl.where(within, target - start, 0) // VOCAB
    hits = tl.reduce(tl.where(within, 1 << tile, 0), 0, either)  # bit i: tile i of the share contains a target
    live = tl.sum((target != ignore).to(tl.int32), 0)
    stop = tl.where(live == 0, 0, stop)  # a tile of ignored rows is skipped
    for column in range(start, stop, VOCAB):
        x = product_tile(
            hidden, weight, row, column, num_rows, vocab, size, stride_hidden, stride_weight,
            ROWS, VOCAB, INNER, DESCRIPTORS, PRECISION,
        )  # fmt: skip
        columns = column + tl.arange(0, VOCAB)
        x = transformed(x, bias, columns, vocab, inner_scale, 1.0, SOFTCAP)
        if bias is not None:
            x = tl.maximum(x, FLOOR, propagate_nan=tl.PropagateNan.ALL)  # a bias may be -inf
        last = column + VOCAB > stop
        if STATS:
            x_sum += tl.sum(tl.where((columns < stop)[None, :], x, 0.0), 1)
        if last:
            x = tl.where((columns < stop)[None, :], x, FLOOR)
        if hits & 1:  # pyright: ignore[reportOperatorIssue]
            at_target += tl.sum(tl.where(columns[None, :] == target[:, None], x, 0.0), 1)
        hits = hits >> 1  # pyright: ignore[reportOperatorIssue]
        top = tl.maximum(peak, tl.max(x, 1))
        shift = tl.maximum((peak - top) * outer * LOG2_E, FLOOR)
        old = tl.exp2(shift)
        x = (x - top[:, None]) * bits
        if last:
            x = tl.where((columns < stop)[None, :], x, FLOOR)  # for a tiny or a huge temperature too
        mass = tl.exp2(x)
        if ENTROPY:
            gap = old * (gap - shift * total) - tl.sum(mass * x, 1)
        total = old * total + tl.sum(mass, 1)
        peak = top
        if masses is not None:
            place = tops + tl.cast(column // VOCAB, tl.int64) * num_rows + rows
            tl.store(place, top * outer, mask=rows < num_rows)
            if DESCRIPTORS:
                masses.store([row, column], mass.to(masses.dtype))
            else:
                stored = masses + rows.to(tl.int64)[:, None] * stride_masses + columns[None, :]
                exists = (rows < num_rows)[:, None] & (columns < vocab)[None, :]
                tl.store(stored, mass.to(masses.dtype.element_ty), mask=exists)
    out = partial + share.to(tl.int64) * num_rows + rows
    step = shares.to(tl.int64) * num_rows
    inside = rows < num_rows
    tl.store(out, peak * outer, mask=inside)
    tl.store(out + step, total, mask=inside)
    tl.store(out + 2 * step, tl.where(at_target <= FLOOR, FLOOR, at_target * outer), mask=inside)
    if ENTROPY:
        tl.store(out + 3 * step, gap * LN_2, mask=inside)
    if STATS:
        tl.store(out + 4 * step, x_sum * outer, mask=inside)


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
    SHARES: tl.constexpr,
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
    for first in range(0, shares, SHARES):  # in a fixed order; SHARES parts at once hide the latency of the loads
        some = first + tl.arange(0, SHARES)[:, None]
        exists = (some < shares) & keep[None, :]
        at = partial + some.to(tl.int64) * num_rows + rows[None, :]
        new_peak = tl.load(at, mask=exists, other=FLOOR)
        new_total = tl.load(at + step, mask=exists, other=0.0)
        at_target += tl.sum(tl.load(at + 2 * step, mask=exists, other=0.0), 0)
        if STATS:
            logit_sum += tl.sum(tl.load(at + 4 * step, mask=exists, other=0.0), 0)
        top = tl.maximum(peak, tl.max(new_peak, 0))
        old = tl.exp(peak - top)
        new = tl.exp(new_peak - top[None, :])
        if ENTROPY:
            new_gap = tl.load(at + 3 * step, mask=exists, other=0.0)
            gap = old * (gap + (top - peak) * total)
            gap += tl.sum(new * (new_gap + (top[None, :] - new_peak) * new_total), 0)
        total = old * total + tl.sum(new * new_total, 0)
        peak = top
    at_target = tl.where(at_target <= FLOOR, float("-inf"), at_target)
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
    bias,  # or None
    row_temperature,  # or None
    targets,
    peaks,  # [T]
    levels,  # [T]; dx = exp(z - peak) (level - tilt (z - peak)) slope, and at_target slope in the target's column
    tilts,  # or None
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
    SOFTCAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row, column_tile = place_of_program(num_rows, tl.cdiv(stop - start, VOCAB), ROWS, GROUP)
    column = start + column_tile * VOCAB
    rows = row + tl.arange(0, ROWS)
    columns = column + tl.arange(0, VOCAB)
    inside = rows < num_rows
    z = product_tile(
        hidden, weight, row, column, num_rows, vocab, size, stride_hidden, stride_weight,
        ROWS, VOCAB, INNER, DESCRIPTORS, PRECISION,
    )  # fmt: skip
    outer = row_scale(outer_scale, row_temperature, rows, num_rows)
    z = transformed(z, bias, columns, vocab, inner_scale, outer, SOFTCAP)
    if bias is not None:
        z = tl.maximum(z, FLOOR, propagate_nan=tl.PropagateNan.ALL)  # a bias may be -inf
    peak = tl.load(peaks + rows, mask=inside, other=0.0)[:, None]
    z -= peak
    dx = tl.exp2(z * LOG2_E)
    level = tl.load(levels + rows, mask=inside, other=0.0)[:, None]
    if tilts is not None:
        tilt = tl.load(tilts + rows, mask=inside, other=0.0)[:, None]
        dx *= level - tilt * z
    else:
        dx *= level
    target = tl.load(targets + rows, mask=inside, other=-1).to(tl.int32)
    at_target = tl.load(at_targets + rows, mask=inside, other=0.0)
    if tl.sum(((target >= column) & (target < column + VOCAB)).to(tl.int32), 0) != 0:
        dx = tl.where(columns[None, :] == target[:, None], at_target[:, None], dx)
    if SOFTCAP:
        tanh = (z + peak) / outer
        dx *= 1 - tanh * tanh
    if DESCRIPTORS:
        out.store([row, column - start], dx.to(out.dtype))
    else:
        place = out + rows.to(tl.int64)[:, None] * stride_out + (columns - start)[None, :]
        tl.store(place, dx.to(out.dtype.element_ty), mask=inside[:, None] & (columns < stop)[None, :])


@jit
def scale_kernel(
    masses,  # [T, V] from `forward_kernel`; overwritten with the gradient with respect to hidden @ weight.T
    tops,
    targets,
    peaks,  # [T], as in `gradient_kernel`
    levels,
    tilts,  # or None
    at_targets,  # includes the soft cap's derivative, which cannot be recovered from a mass that has underflowed
    row_temperature,  # or None
    num_rows,
    vocab,
    stride_masses,
    outer_scale,
    ROWS: tl.constexpr,
    VOCAB: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    columns = tile * VOCAB + tl.arange(0, VOCAB)
    place = masses + rows.to(tl.int64)[:, None] * stride_masses + columns[None, :]
    within = (rows < num_rows)[:, None] & (columns < vocab)[None, :]
    # Masses of rows without a gradient are not read: `forward_kernel` writes nothing for a tile of ignored rows.
    level = tl.load(levels + rows, mask=rows < num_rows, other=0.0)
    at_target = tl.load(at_targets + rows, mask=rows < num_rows, other=0.0)
    live = (level != 0) | (at_target != 0)
    tilt = tl.zeros_like(level)
    if tilts is not None:
        tilt = tl.load(tilts + rows, mask=rows < num_rows, other=0.0)
        live = live | (tilt != 0)
    mass = tl.load(place, mask=within & live[:, None], other=0.0).to(tl.float32)
    top = tl.load(tops + tl.cast(tile, tl.int64) * num_rows + rows, mask=(rows < num_rows) & live, other=0.0)
    peak = tl.load(peaks + rows, mask=rows < num_rows, other=0.0)
    target = tl.load(targets + rows, mask=rows < num_rows, other=-1).to(tl.int32)
    dx = mass * (tl.exp(tl.minimum(top - peak, 0.0)) * level)[:, None]
    if tilts is not None or SOFTCAP:
        z = tl.log(tl.maximum(mass, 1e-37)) + top[:, None]  # for a smaller mass, dx is 0 for any z
    if tilts is not None:
        dx -= mass * (tl.exp(tl.minimum(top - peak, 0.0)) * tilt)[:, None] * (z - peak[:, None])
    if SOFTCAP:
        tanh = z / row_scale(outer_scale, row_temperature, rows, num_rows)
        dx *= 1 - tanh * tanh
    dx = tl.where(columns[None, :] == target[:, None], at_target[:, None], dx)
    tl.store(place, tl.where(live[:, None], dx, 0.0).to(masses.dtype.element_ty), mask=within)
