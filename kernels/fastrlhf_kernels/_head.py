"""Launches the Triton kernels of `_head_kernels.py` for `linear_logprob` and `linear_policy_loss`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastrlhf_kernels._blocks import add_product
from fastrlhf_kernels._head_kernels import forward_kernel, gradient_kernel, merge_kernel, scale_kernel
from fastrlhf_kernels._tiles import (
    FORWARD,
    GRADIENT,
    GROUP,
    PRECISION,
    Tiles,
    cdiv,
    choose_tiles,
    operand,
    row_major,
    scales,
)
from fastrlhf_kernels._triton import OPTIONS

FAR = 1e30  # used as the peak of a row, it makes every exp(z - peak) of the row 0
SHARE = 1536  # vocabulary columns that one program of the forward kernel processes; see `waves` in bench/aot.py
MERGED = 128  # rows that one program of the merge kernel of `linear_kl` processes
MERGED_ROWS, MERGED_SHARES = 32, 16  # rows and shares that the merge kernel of the other ops processes at once
PART_BYTES = 1 << 27  # the logits' gradient is computed and stored in parts of this size
SCALED_ROWS = 16  # rows that one program of the scale kernel processes
SMALLEST_PART = 2048  # vocabulary columns of a part; products with fewer columns are slow


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
    tiles: Tiles | None = None,
    masses: Tensor | None = None,
    tops: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Runs the forward kernels; returns the seven outputs of the operator of `linear_logprob`.

    If `masses` and `tops` are given, with `tiles` from the table STORING, `masses` [T, V] is filled with exp(z - top)
    and `tops` [tiles of the vocabulary, T] with the largest logit of the row in all tiles up to this tile.
    """
    num_rows, vocab = len(hidden), len(weight)

    def rows(wanted: bool = True) -> Tensor:
        return hidden.new_empty(num_rows if wanted else 0, dtype=torch.float32)

    outputs = (rows(), rows(), rows(entropy), rows(stats), rows(stats), rows(), rows())
    if num_rows == 0:
        return outputs
    hidden, weight, targets = row_major(hidden), row_major(weight), targets.contiguous()
    if tiles is None:
        tiles = choose_tiles(FORWARD, hidden, weight, is_heavy(bias, row_temperature, softcap))
    shares = cdiv(vocab, SHARE)
    partial = hidden.new_empty(5, shares, num_rows, dtype=torch.float32)
    forward_kernel[(cdiv(num_rows, tiles.rows) * shares,)](
        operand(hidden, tiles, tiles.rows, tiles.inner),
        operand(weight, tiles, tiles.vocab, tiles.inner),
        None if bias is None else bias.contiguous(),
        row_temperature,
        targets,
        partial,
        None if masses is None else operand(masses, tiles, tiles.rows, tiles.vocab),
        tops,
        num_rows,
        vocab,
        hidden.shape[1],
        hidden.stride(0),
        weight.stride(0),
        0 if masses is None else masses.stride(0),
        *scales(scale, softcap, temperature),
        ignore,
        tiles.rows,
        tiles.vocab,
        tiles.inner,
        SHARE,
        GROUP,
        softcap is not None,
        entropy,
        stats,
        tiles.descriptors,
        PRECISION,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **OPTIONS,
    )
    merge_kernel[(cdiv(num_rows, MERGED_ROWS),)](
        partial,
        targets,
        *outputs,
        num_rows,
        shares,
        vocab,
        ignore,
        entropy,
        stats,
        MERGED_ROWS,
        MERGED_SHARES,
        **OPTIONS,
    )
    return outputs


def is_heavy(bias: Tensor | None, row_temperature: Tensor | None, softcap: float | None) -> bool:
    """Returns whether the head has options that need more registers per program and therefore smaller tiles."""
    return bias is not None or row_temperature is not None or softcap is not None


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
    """Adds to `grad_hidden` [T, D] float32 and overwrites `grad_weight` and `grad_bias`; None gradients are skipped."""
    num_rows, vocab = len(hidden), len(weight)
    hidden, weight, targets = row_major(hidden), row_major(weight), targets.contiguous()
    if dead is not None:
        peak = peak.masked_fill(dead[:, 0], FAR)
    tiles = choose_tiles(GRADIENT, hidden, weight, is_heavy(bias, row_temperature, softcap))

    def launch(dx: Tensor, start: int, stop: int) -> None:
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
            softcap is not None,
            tiles.descriptors,
            PRECISION,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            **OPTIONS,
        )

    multiply_parts(launch, hidden, weight, tiles.vocab, grad_hidden, grad_weight, grad_bias)


def multiply_parts(
    launch: Callable[[Tensor, int, int], None],
    hidden: Tensor,
    weight: Tensor,
    multiple: int,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Computes the gradients of hidden, weight and bias from dx, the gradient with respect to hidden @ weight.T.

    Works on one part of the vocabulary at a time: `launch(dx, start, stop)` fills dx [T, stop - start]. The width of a
    part is a multiple of `multiple`, the columns of a tile. Adds to `grad_hidden` [T, D] float32 and overwrites
    `grad_weight` and `grad_bias`; a gradient that is None is skipped. dx is rounded once, to bfloat16 if hidden and
    weight are both bfloat16; otherwise it stays float32, because float16 would lose small gradients.
    """
    num_rows, vocab = len(hidden), len(weight)
    dtype = torch.bfloat16 if hidden.dtype == weight.dtype == torch.bfloat16 else torch.float32
    inputs = hidden.to(dtype) if grad_weight is not None else hidden
    width = max(PART_BYTES // (num_rows * dtype.itemsize) // multiple * multiple, SMALLEST_PART)
    # The buffer has up to 15 spare columns, because cuBLAS needs rows that start at multiples of 16 bytes.
    buffer = hidden.new_empty(num_rows, min(width, cdiv(vocab, 16) * 16), dtype=dtype)
    for start in range(0, vocab, width):
        stop = min(start + width, vocab)
        dx = buffer[:, : stop - start]
        launch(dx, start, stop)
        if grad_hidden is not None:
            add_product(grad_hidden, dx, weight[start:stop].to(dtype))
        if grad_weight is not None:
            if grad_weight.dtype == dtype:
                torch.mm(dx.T, inputs, out=grad_weight[start:stop])
            else:
                grad_weight[start:stop] = dx.T @ inputs
        if grad_bias is not None:
            grad_bias[start:stop] = dx.sum(0, dtype=torch.float32)


def scale_masses(
    masses: Tensor,
    tops: Tensor,
    targets: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    scale: float,
    softcap: float | None,
    tiles: Tiles,
    peak: Tensor,
    level: Tensor,
    tilt: Tensor | None,
    at_target: Tensor,
) -> None:
    """Turns the `masses` that `forward` stored into the gradient with respect to hidden @ weight.T, in place.

    `at_target` is the gradient in the target's column. It must include the derivative of the soft cap, which cannot
    be recovered from a mass that has underflowed to 0.
    """
    num_rows, vocab = masses.shape
    scale_kernel[(cdiv(num_rows, SCALED_ROWS), cdiv(vocab, tiles.vocab))](
        masses,
        tops,
        targets,
        peak,
        level,
        tilt,
        at_target,
        row_temperature,
        num_rows,
        vocab,
        masses.stride(0),
        scales(scale, softcap, temperature)[1],
        SCALED_ROWS,
        tiles.vocab,
        softcap is not None,
        **OPTIONS,
    )
