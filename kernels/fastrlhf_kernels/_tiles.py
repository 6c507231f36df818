"""Computes the logits of a language-model head in Triton, one tile (rows x vocabulary) at a time.

The product of a tile is summed over the hidden size in one fixed order, so forward and backward see the same bits.
Logits stay in nats until the exponential. Multiplying them by log2(e) earlier would lose digits when all logits share a
large constant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf_kernels._triton import INTERPRETED, constant, jit, tl, triton

LOG2_E = constant(1 / math.log(2))
LN_2 = constant(math.log(2))
UPCAST = constant(INTERPRETED)  # the interpreter's tl.dot reads the bits of bfloat16 numbers as integers
FLOOR = constant(-1e30)  # replaces logits that are -inf or beyond the vocabulary, because -inf - -inf is NaN
GROUP = 16  # number of row tiles processed together, so that a weight tile is read from DRAM once per group


class Tiles(NamedTuple):
    """Tile sizes and launch options of a kernel: ROWS x VOCAB logits per tile, INNER hidden dimensions per step."""

    rows: int
    vocab: int
    inner: int
    warps: int
    stages: int
    descriptors: bool
    """Loads tiles by TMA (sm_90 and later); rows must start at multiples of 16 bytes."""


class Pinned(NamedTuple):
    """The tile sizes of a kernel on one GPU architecture."""

    light: Tiles
    heavy: Tiles
    """Used with a bias, a soft cap or a temperature per row, which need more registers."""


# On sm_90, the storing forward with the wide tile spills from Triton 3.8 on.
OLDER = triton is not None and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
INTERPRETER = Tiles(16, 64, 32, 4, 1, descriptors=False)
SMALL = Tiles(64, 128, 32, 8, 3, descriptors=False)
FLOAT32 = Tiles(64, 64, 32, 8, 3, descriptors=False)
AMPERE = Tiles(128, 128, 64, 8, 3, descriptors=False)
HOPPER_WIDE = Tiles(128, 256, 64, 8, 3, descriptors=True)
SQUARE = Tiles(128, 128, 64, 8, 4, descriptors=True)
NARROW = Tiles(128, 64, 64, 8, 4, descriptors=True)
FORWARD = {
    8: Pinned(AMPERE, AMPERE),
    9: Pinned(HOPPER_WIDE, SQUARE),
    10: Pinned(SQUARE, SQUARE),
}
STORING = {
    8: Pinned(AMPERE, AMPERE._replace(vocab=64)),
    9: Pinned(HOPPER_WIDE if OLDER else SQUARE, SQUARE),
    10: Pinned(NARROW, NARROW),
}
"""Tile sizes of the forward that also stores exp(z - top), from which `linear_policy_loss` computes the gradient."""
GRADIENT = {8: Pinned(AMPERE, AMPERE), 9: Pinned(HOPPER_WIDE, SQUARE), 10: Pinned(SQUARE, NARROW)}
KL_FORWARD = {
    8: Pinned(AMPERE._replace(vocab=64), AMPERE._replace(vocab=64)),
    9: Pinned(SQUARE, NARROW),
    10: Pinned(NARROW, NARROW),
    12: Pinned(AMPERE._replace(vocab=64), SMALL),
}
KL_GRADIENT = {**KL_FORWARD, 12: KL_FORWARD[8], 10: Pinned(SQUARE, NARROW)}
"""Major compute capability -> the largest tiles that compile without register spills, as in the tables above. The tiles
of the KL kernels are smaller, because they hold the logits of two models. GPUs without an entry take the tiles of 8,
which fit into the 99 KB of shared memory of sm_86, sm_89 and sm_120."""


def choose_tiles(
    table: dict[int, Pinned], hidden: Tensor, weight: Tensor, heavy: bool, reference: Sequence[Tensor] = ()
) -> Tiles:
    """Chooses the tile sizes for the device and the dtypes of hidden, weight and the matrices of the reference."""
    if hidden.device.type != "cuda":
        return INTERPRETER
    matrices = (hidden, weight, *reference)
    # float16 does not use TMA: its gradient is float32, and with TMA a float32 tile does not fit into shared memory.
    loadable = all(matrix.dtype == torch.bfloat16 and _aligned(matrix) for matrix in matrices)
    width = max(matrix.element_size() for matrix in matrices)
    pinned = pinned_tiles(table, torch.cuda.get_device_capability(hidden.device), width, loadable)
    return pinned.heavy if heavy else pinned.light


def pinned_tiles(table: dict[int, Pinned], capability: tuple[int, int], width: int, loadable: bool) -> Pinned:
    """Returns the tile sizes for a compute capability of 8.0 or more. `width` is the largest number of bytes per number
    of the matrices; `loadable` says whether TMA can load the matrices."""
    major, _ = capability
    if width > 2:
        tiles = FLOAT32._replace(vocab=32) if major == 12 and table is KL_FORWARD else FLOAT32
        return Pinned(tiles, tiles)
    return table.get(major if loadable or major == 12 else 8, table[8])


def _aligned(matrix: Tensor) -> bool:
    """Returns whether the address and the strides of a matrix meet the requirements of a TMA descriptor."""
    width = matrix.element_size()
    apart = matrix.stride(0) * width % 16 == 0 and matrix.stride(0) >= matrix.shape[1]
    return matrix.data_ptr() % 16 == 0 and apart and matrix.stride(1) == 1


@jit
def place_of_program(num_rows, column_tiles, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """Returns (first row, column tile) of this program. The row tiles of a group run together, so that they share
    weight tiles in the L2 cache."""
    first = tl.program_id(0) // (GROUP * column_tiles) * GROUP
    in_group = tl.minimum(tl.cdiv(num_rows, ROWS) - first, GROUP)
    place = tl.program_id(0) % (GROUP * column_tiles)
    return (first + place % in_group) * ROWS, place // in_group


@jit
def product_tile(
    a,  # [num_rows, size]: a descriptor, or a pointer to rows stride_a apart
    b,  # [num_columns, size]
    row,
    column,
    num_rows,
    num_columns,
    size,
    stride_a,
    stride_b,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes a[row:] @ b[column:].T, [ROWS, COLUMNS] float32. Entries beyond num_rows and num_columns are
    undefined."""
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    if DESCRIPTORS:
        for k in range(0, size, INNER):
            x = a.load([row, k])
            y = b.load([column, k]).T
            if UPCAST:
                x = x.to(tl.float32)
                y = y.to(tl.float32)
            total = tl.dot(x, y, total, input_precision=PRECISION)
    else:
        inner = tl.arange(0, INNER)
        rows = tl.minimum(row + tl.arange(0, ROWS), num_rows - 1).to(tl.int64)
        columns = tl.minimum(column + tl.arange(0, COLUMNS), num_columns - 1).to(tl.int64)
        a_tile = a + rows[:, None] * stride_a + inner[None, :]
        b_tile = b + columns[None, :] * stride_b + inner[:, None]
        for k in range(0, size, INNER):
            inside = inner < size - k
            x = tl.load(a_tile + k, mask=inside[None, :], other=0.0)
            y = tl.load(b_tile + k, mask=inside[:, None], other=0.0)
            if UPCAST or x.dtype != y.dtype:
                x = x.to(tl.float32)
                y = y.to(tl.float32)
            total = tl.dot(x, y, total, input_precision=PRECISION)
    return total


@jit
def transformed(z, bias, columns, num_columns, inner_scale, outer_scale, SOFTCAP: tl.constexpr):
    """Turns products z into logits: adds the bias, then applies scale, soft cap and temperature."""
    if bias is not None:
        z += tl.load(bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[None, :]
    if SOFTCAP:
        z = 1 - 2 / (tl.exp2(z * (inner_scale * 2 * LOG2_E)) + 1)  # tanh
    return z * outer_scale


@jit
def row_scale(outer_scale, row_temperature, rows, num_rows):
    """Returns the outer scale divided by the temperature of each row, [ROWS, 1], or a number if all rows share one
    temperature."""
    scale = outer_scale
    if row_temperature is not None:
        scale = (outer_scale / tl.load(row_temperature + rows, mask=rows < num_rows, other=1.0))[:, None]
    return scale


@jit
def logits_tile(
    hidden,
    weight,
    bias,  # or None
    row_temperature,  # or None
    row,
    column,
    num_rows,
    vocab,
    size,
    stride_hidden,
    stride_weight,
    inner_scale,
    outer_scale,
    ROWS: tl.constexpr,
    VOCAB: tl.constexpr,
    INNER: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes the logits of one tile, [ROWS, VOCAB] float32; FLOOR replaces -inf."""
    z = product_tile(
        hidden, weight, row, column, num_rows, vocab, size, stride_hidden, stride_weight,
        ROWS, VOCAB, INNER, DESCRIPTORS, PRECISION,
    )  # fmt: skip
    outer = row_scale(outer_scale, row_temperature, row + tl.arange(0, ROWS), num_rows)
    z = transformed(z, bias, column + tl.arange(0, VOCAB), vocab, inner_scale, outer, SOFTCAP)
    return tl.maximum(z, FLOOR, propagate_nan=tl.PropagateNan.ALL)


def scales(scale: float, softcap: float | None, temperature: float) -> tuple[float, float]:
    """Returns the factors (inner_scale, outer_scale) that `transformed` needs."""
    return (0.0, scale / temperature) if softcap is None else (scale / softcap, softcap / temperature)


def operand(matrix: Tensor, tiles: Tiles, rows: int, columns: int):
    """Returns the kernel argument for a matrix: a TMA descriptor of tiles [rows, columns], or the tensor itself."""
    if not tiles.descriptors:
        return matrix
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, [rows, columns])


# Precision of float32 products: "tf32x3" is as exact as float32. Half-precision products ignore this setting.
PRECISION = "ieee" if INTERPRETED else "tf32x3"


def row_major(matrix: Tensor) -> Tensor:
    """Returns the matrix, or a copy if the elements of a row are not adjacent in memory. Gaps between rows are
    allowed."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] <= 1 else matrix.contiguous()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
