"""Triton kernels of `linear_kl`: like `_head_kernels.py`, with a second tile of logits for the reference model.

    forward    each program computes the logits of policy and reference for some rows in one share of the vocabulary,
               tile by tile, and keeps eight numbers per row; a second kernel merges the shares in order
    gradient   computes both models' logits again and stores the gradient of the policy's logits

Policy and reference run through the same code, so that equal inputs give equal bits and a divergence of exactly 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrlhf_kernels import _head
from fastrlhf_kernels._tiles import (
    FLOOR,
    KL_FORWARD,
    KL_GRADIENT,
    LOG2_E,
    PRECISION,
    Pinned,
    Tiles,
    cdiv,
    choose_tiles,
    logits_tile,
    operand,
    place_of_program,
    row_major,
    row_scale,
    scales,
)
from fastrlhf_kernels._triton import OPTIONS, jit, tl

Transform = tuple[Tensor | None, float, float, float | None]
"""(temperature per row, temperature, scale, soft cap) of both models"""


class Head(NamedTuple):
    """Hidden states [T, D], weight [V, D] and bias [V] of the policy or of the reference."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


class Slopes(NamedTuple):
    """Coefficients, [T] each, of the gradient dx of a row, with a = z - peak and b = z' - reference_peak.

        dx = slope * exp(a) * (level - tilt * a + pull * (a - b))     in every column except the target's
        dx = slope * (at_target + exp(a) * pull * (a - b))            in the target's column

    `level`, `tilt` and `at_target` are those of `slopes` in `_blocks.py`; `pull` is the weight of the KL term.
    """

    peak: Tensor
    level: Tensor
    tilt: Tensor | None
    at_target: Tensor
    reference_peak: Tensor
    pull: Tensor


def forward(
    policy: Head, reference: Head, targets: Tensor, transform: Transform, ignore: int, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Runs the forward kernels; returns the eight outputs of the operator of `linear_kl`."""
    num_rows, vocab = len(policy.hidden), len(policy.weight)

    def rows(wanted: bool = True) -> Tensor:
        return policy.hidden.new_empty(num_rows if wanted else 0, dtype=torch.float32)

    outputs = (rows(), rows(), rows(), rows(entropy), rows(), rows(), rows(), rows())
    if num_rows == 0:
        return outputs
    tiles, arguments, constants = _prepare(KL_FORWARD, policy, reference, targets, transform)
    shares = cdiv(vocab, _head.SHARE)
    partial = policy.hidden.new_empty(8, shares, num_rows, dtype=torch.float32)
    forward_kernel[(cdiv(num_rows, tiles.rows) * shares,)](
        *arguments, partial, ignore, SHARE=_head.SHARE, ENTROPY=entropy, **constants
    )
    merge_kernel[(cdiv(num_rows, _head.MERGED),)](
        partial,
        targets.contiguous(),
        *outputs,
        num_rows,
        shares,
        vocab,
        ignore,
        entropy,
        _head.MERGED,
        **OPTIONS,
    )
    return outputs


def backward(
    policy: Head,
    reference: Head,
    targets: Tensor,
    transform: Transform,
    slopes: Slopes,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Adds to `grad_hidden` [T, D] float32 and overwrites `grad_weight` and `grad_bias`; None gradients are skipped."""
    tiles, arguments, constants = _prepare(KL_GRADIENT, policy, reference, targets, transform)

    def launch(dx: Tensor, start: int, stop: int) -> None:
        gradient_kernel[(cdiv(len(dx), tiles.rows) * cdiv(stop - start, tiles.vocab),)](
            *arguments, *slopes, operand(dx, tiles, tiles.rows, tiles.vocab), start, stop, dx.stride(0), **constants
        )

    _head.multiply_parts(launch, policy.hidden, policy.weight, tiles.vocab, grad_hidden, grad_weight, grad_bias)


def _prepare(
    table: dict[int, Pinned], policy: Head, reference: Head, targets: Tensor, transform: Transform
) -> tuple[Tiles, list[Any], dict[str, Any]]:
    """Returns the tile sizes of a kernel, its first arguments and its compile-time constants."""
    row_temperature, temperature, scale, softcap = transform
    heavy = _head.is_heavy(policy.bias, row_temperature, softcap) or reference.bias is not None
    matrices = [row_major(matrix) for matrix in (*policy[:2], *reference[:2])]
    tiles = choose_tiles(table, matrices[0], matrices[1], heavy, matrices[2:])
    heights = (tiles.rows, tiles.vocab) * 2
    arguments: list[Any] = [operand(m, tiles, height, tiles.inner) for m, height in zip(matrices, heights, strict=True)]
    arguments += [None if bias is None else bias.contiguous() for bias in (policy.bias, reference.bias)]
    arguments += [row_temperature, targets.contiguous(), len(policy.hidden), len(policy.weight)]
    arguments += [matrices[0].shape[1], matrices[2].shape[1], *(matrix.stride(0) for matrix in matrices)]
    arguments += scales(scale, softcap, temperature)
    constants = {
        "ROWS": tiles.rows, "VOCAB": tiles.vocab, "INNER": tiles.inner, "GROUP": _head.GROUP, "PRECISION": PRECISION,
        "SOFTCAP": softcap is not None, "DESCRIPTORS": tiles.descriptors,
        "num_warps": tiles.warps, "num_stages": tiles.stages, **OPTIONS,
    }  # fmt: skip
    return tiles, arguments, constants


@jit
def raised(total, cross, gap, rise, reference_rise):
    """Rescales sums of exp(z - peak) when the peaks of policy and reference rise by `rise` and `reference_rise`."""
    weight = tl.exp(-rise)
    return weight * total, weight * (cross + (reference_rise - rise) * total), weight * (gap + rise * total)


@jit
def picked(found, z, columns, target):
    """Adds the logits of the targets that lie in these columns to `found`, one sum per row."""
    if tl.sum(((target >= tl.min(columns, 0)) & (target <= tl.max(columns, 0))).to(tl.int32), 0) != 0:
        found += tl.sum(tl.where(columns[None, :] == target[:, None], z, 0.0), 1)
    return found


@jit
def forward_kernel(
    hidden,
    weight,
    reference_hidden,
    reference_weight,
    bias,  # or None
    reference_bias,  # or None
    row_temperature,  # or None
    targets,
    num_rows,
    vocab,
    size,
    reference_size,
    stride_hidden,
    stride_weight,
    stride_reference_hidden,
    stride_reference_weight,
    inner_scale,
    outer_scale,
    partial,  # [8, shares, T]: peak, total and target logit (each for policy, then reference), cross, gap
    ignore,
    ROWS: tl.constexpr,
    VOCAB: tl.constexpr,
    INNER: tl.constexpr,
    SHARE: tl.constexpr,
    GROUP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    shares = tl.cdiv(vocab, SHARE)
    row, share = place_of_program(num_rows, shares, ROWS, GROUP)
    rows = row + tl.arange(0, ROWS)
    inside = rows < num_rows
    target = tl.load(targets + rows, mask=inside, other=ignore)
    nothing = tl.zeros([ROWS], tl.float32)
    peak, reference_peak = nothing + FLOOR, nothing + FLOOR
    total, reference_total, cross, gap = nothing, nothing, nothing, nothing
    at_target, reference_at_target = nothing, nothing
    stop = tl.minimum((share + 1) * SHARE, vocab)
    live = tl.sum((target != ignore).to(tl.int32), 0)
    stop = tl.where(live == 0, 0, stop)  # a tile of ignored rows is skipped
    for column in range(share * SHARE, stop, VOCAB):
        columns = column + tl.arange(0, VOCAB)
        exists = (columns < stop)[None, :]
        last = column + VOCAB > stop
        y = logits_tile(
            reference_hidden, reference_weight, reference_bias, row_temperature, row, column, num_rows, vocab,
            reference_size, stride_reference_hidden, stride_reference_weight,
            inner_scale, outer_scale, ROWS, VOCAB, INNER, SOFTCAP, DESCRIPTORS, PRECISION,
        )  # fmt: skip
        if last:
            y = tl.where(exists, y, FLOOR)
        reference_at_target = picked(reference_at_target, y, columns, target)
        reference_top = tl.maximum(reference_peak, tl.max(y, 1))
        reference_rise = reference_top - reference_peak
        y -= reference_top[:, None]
        reference_total = tl.exp(-reference_rise) * reference_total + tl.sum(tl.exp2(y * LOG2_E), 1)
        z = logits_tile(
            hidden, weight, bias, row_temperature, row, column, num_rows, vocab, size, stride_hidden, stride_weight,
            inner_scale, outer_scale, ROWS, VOCAB, INNER, SOFTCAP, DESCRIPTORS, PRECISION,
        )  # fmt: skip
        if last:
            z = tl.where(exists, z, FLOOR)
        at_target = picked(at_target, z, columns, target)
        top = tl.maximum(peak, tl.max(z, 1))
        total, cross, gap = raised(total, cross, gap, top - peak, reference_rise)
        z -= top[:, None]
        mass = tl.exp2(z * LOG2_E)
        total += tl.sum(mass, 1)
        if ENTROPY:
            gap -= tl.sum(mass * z, 1)
        cross += tl.sum(mass * (z - y), 1)
        peak = top
        reference_peak = reference_top
    out = partial + share.to(tl.int64) * num_rows + rows
    step = shares.to(tl.int64) * num_rows
    tl.store(out, peak, mask=inside)
    tl.store(out + step, reference_peak, mask=inside)
    tl.store(out + 2 * step, total, mask=inside)
    tl.store(out + 3 * step, reference_total, mask=inside)
    tl.store(out + 4 * step, at_target, mask=inside)
    tl.store(out + 5 * step, reference_at_target, mask=inside)
    tl.store(out + 6 * step, cross, mask=inside)
    if ENTROPY:
        tl.store(out + 7 * step, gap, mask=inside)


@jit
def merge_kernel(
    partial,
    targets,
    kl,
    logprob,
    reference_logprob,
    entropy,
    peaks,
    totals,
    reference_peaks,
    drifts,
    num_rows,
    shares,
    vocab,
    ignore,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < num_rows
    target = tl.load(targets + rows, mask=inside, other=ignore)
    keep = inside & (target != ignore)
    nothing = tl.zeros([BLOCK], tl.float32)
    peak, reference_peak = nothing + FLOOR, nothing + FLOOR
    total, reference_total, cross, gap = nothing, nothing, nothing, nothing
    at_target, reference_at_target = nothing, nothing
    step = tl.cast(shares, tl.int64) * num_rows
    for share in range(0, shares):
        at = partial + tl.cast(share, tl.int64) * num_rows + rows
        peak = tl.maximum(peak, tl.load(at, mask=keep, other=0.0))
        reference_peak = tl.maximum(reference_peak, tl.load(at + step, mask=keep, other=0.0))
    for share in range(0, shares):
        at = partial + tl.cast(share, tl.int64) * num_rows + rows
        rise = peak - tl.load(at, mask=keep, other=0.0)
        reference_rise = reference_peak - tl.load(at + step, mask=keep, other=0.0)
        new_total = tl.load(at + 2 * step, mask=keep, other=1.0)
        new_cross = tl.load(at + 6 * step, mask=keep, other=0.0)
        new_gap = nothing
        if ENTROPY:
            new_gap = tl.load(at + 7 * step, mask=keep, other=0.0)
        new_total, new_cross, new_gap = raised(new_total, new_cross, new_gap, rise, reference_rise)
        total += new_total
        reference_total += tl.exp(-reference_rise) * tl.load(at + 3 * step, mask=keep, other=1.0)
        at_target += tl.load(at + 4 * step, mask=keep, other=0.0)
        reference_at_target += tl.load(at + 5 * step, mask=keep, other=0.0)
        cross += new_cross
        gap += new_gap
    wrong = (target < 0) | (target >= vocab)
    at_target = tl.where(wrong, float("nan"), at_target - peak - tl.log(total))
    reference_at_target = tl.where(wrong, float("nan"), reference_at_target - reference_peak - tl.log(reference_total))
    drift = cross / total
    divergence = drift + tl.log(tl.div_rn(reference_total, total))
    divergence = tl.maximum(divergence, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(kl + rows, tl.where(keep, divergence, 0.0), mask=inside)
    tl.store(logprob + rows, tl.where(keep, at_target, 0.0), mask=inside)
    tl.store(reference_logprob + rows, tl.where(keep, reference_at_target, 0.0), mask=inside)
    if ENTROPY:
        tl.store(entropy + rows, tl.where(keep, tl.log(total) + gap / total, 0.0), mask=inside)
    # Ignored rows were not loaded; the defaults of the loads above make their values finite.
    tl.store(peaks + rows, peak, mask=inside)
    tl.store(totals + rows, total, mask=inside)
    tl.store(reference_peaks + rows, reference_peak, mask=inside)
    tl.store(drifts + rows, drift, mask=inside)


@jit
def gradient_kernel(
    hidden,
    weight,
    reference_hidden,
    reference_weight,
    bias,  # or None
    reference_bias,  # or None
    row_temperature,  # or None
    targets,
    num_rows,
    vocab,
    size,
    reference_size,
    stride_hidden,
    stride_weight,
    stride_reference_hidden,
    stride_reference_weight,
    inner_scale,
    outer_scale,
    peaks,  # [T]; this argument and the next five are the fields of `Slopes`
    levels,
    tilts,  # or None
    at_targets,
    reference_peaks,
    pulls,
    out,  # [T, stop - start], rows stride_out apart
    start,
    stop,
    stride_out,
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
    y = logits_tile(
        reference_hidden, reference_weight, reference_bias, row_temperature, row, column, num_rows, vocab,
        reference_size, stride_reference_hidden, stride_reference_weight,
        inner_scale, outer_scale, ROWS, VOCAB, INNER, SOFTCAP, DESCRIPTORS, PRECISION,
    )  # fmt: skip
    y -= tl.load(reference_peaks + rows, mask=inside, other=0.0)[:, None]
    z = logits_tile(
        hidden, weight, bias, row_temperature, row, column, num_rows, vocab, size, stride_hidden, stride_weight,
        inner_scale, outer_scale, ROWS, VOCAB, INNER, SOFTCAP, DESCRIPTORS, PRECISION,
    )  # fmt: skip
    peak = tl.load(peaks + rows, mask=inside, other=0.0)[:, None]
    z -= peak
    mass = tl.exp2(z * LOG2_E)
    level = tl.load(levels + rows, mask=inside, other=0.0)[:, None]
    if tilts is not None:
        level -= tl.load(tilts + rows, mask=inside, other=0.0)[:, None] * z
    target = tl.load(targets + rows, mask=inside, other=-1).to(tl.int32)
    at_target = tl.load(at_targets + rows, mask=inside, other=0.0)
    dx = tl.where(columns[None, :] == target[:, None], at_target[:, None], mass * level)
    dx += mass * (tl.load(pulls + rows, mask=inside, other=0.0)[:, None] * (z - y))
    if SOFTCAP:
        tanh = (z + peak) / row_scale(outer_scale, row_temperature, rows, num_rows)
        dx *= 1 - tanh * tanh
    if DESCRIPTORS:
        out.store([row, column - start], dx.to(out.dtype))
    else:
        place = out + rows.to(tl.int64)[:, None] * stride_out + (columns - start)[None, :]
        tl.store(place, dx.to(out.dtype.element_ty), mask=inside[:, None] & (columns < stop)[None, :])
