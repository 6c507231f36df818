"""Logits of a head, one block of rows x vocabulary at a time: what the chunked ops share.

    for part in logits.parts():                 VOCAB rows of the weight, cast once
        for block in logits.row_blocks():       ROWS rows of hidden
            z = logits.block(block, part)       [ROWS, VOCAB] float32, transformed

The vocabulary is the outer loop, so that a gradient of the weight is written once per part and never read again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# (ROWS, VOCAB). Any size from (512, 512) on is as fast on an idle CPU; a larger one has fewer threads to wait for.
CPU_BLOCK = (2048, 2048)
GPU_BLOCK = (4096, 8192)

LOG2_E = 1 / math.log(2)


class Part(NamedTuple):
    """Rows start .. start + len(weight) of the head, in the dtype of the products."""

    start: int
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Logits:
    """z = softcap(scale * (hidden @ weight.T + bias)) / temperature, float32, computed block by block."""

    hidden: Tensor
    """[T, D] in the dtype of the products"""
    weight: Tensor
    """[V, D] as given"""
    bias: Tensor | None
    scale: float
    softcap: float | None
    temperature: float | Tensor
    """a number, or [T, 1]"""

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
        # Only a GPU accumulates bfloat16 products in float32 and hands them out so; float16 would lose small gradients.
        native = hidden.is_cuda and hidden.dtype == weight.dtype == torch.bfloat16
        hidden = hidden if native else hidden.float()
        return Logits(
            hidden, weight, bias, scale, softcap, temperature if row_temperature is None else row_temperature[:, None]
        )

    def row_blocks(self) -> list[slice]:
        """At least one, be it empty, so that an empty pack takes no path of its own."""
        step, num_rows = self._block_shape()[0], len(self.hidden)
        return [slice(start, min(start + step, num_rows)) for start in range(0, max(num_rows, 1), step)]

    def parts(self) -> Iterator[Part]:
        step = self._block_shape()[1]
        for start in range(0, len(self.weight), step):
            rows = slice(start, start + step)
            bias = None if self.bias is None else self.bias[rows].float()
            yield Part(start, self.weight[rows].to(self.hidden.dtype), bias)

    def block(self, rows: slice, part: Part) -> Tensor:
        """Logits [rows, part] in fresh memory; the same call gives the same bits in forward and backward."""
        z = product(self.hidden[rows], part.weight.T)
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

    def slope(self, rows: slice, z: Tensor) -> Tensor:
        """The derivative of the soft cap at logits z of these rows."""
        assert self.softcap is not None
        temperature = self.temperature[rows] if isinstance(self.temperature, Tensor) else self.temperature
        return 1 - (z * (temperature / self.softcap)).square()

    def _block_shape(self) -> tuple[int, int]:
        return CPU_BLOCK if self.hidden.device.type == "cpu" else GPU_BLOCK


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32."""
    return a @ b if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, for a float32 total."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def exp_(z: Tensor) -> Tensor:
    """e^z in place, by exp2: three times as fast as exp on a CPU (measured), and as exact where it counts, near 0."""
    return z.mul_(LOG2_E).exp2_()


def can_select(device: torch.device, wait: bool) -> bool:
    """Whether rows may be counted: on a GPU it waits for all work so far, and no graph that is captured can do it."""
    return device.type == "cpu" or (wait and not torch.cuda.is_current_stream_capturing())


class Selection(NamedTuple):
    """The rows of a pack that an op works on: the live ones where they can be counted, else all of them."""

    live: Tensor
    """[T] bool"""
    rows: Tensor | None
    """Indices of the rows worked on; None for all."""
    dead: Tensor | None
    """[T, 1] bool, True where a row is worked on for nothing and must be masked; None where there can be none."""

    @staticmethod
    def of(live: Tensor, *, wait: bool) -> Selection:
        """`wait` allows to wait for a GPU, once, to know how many there are."""
        if not can_select(live.device, wait):
            return Selection(live, None, ~live[:, None])
        return Selection(live, None if bool(live.all()) else live.nonzero()[:, 0], None)

    def take(self, tensor: Tensor) -> Tensor:
        return tensor if self.rows is None else tensor[self.rows]

    def put_back(self, tensor: Tensor) -> Tensor:
        """The inverse of `take`, with 0 in the rows that are not live."""
        if self.dead is not None:
            return tensor.masked_fill(self.dead if tensor.dim() == 2 else self.dead[:, 0], 0)
        if self.rows is None:
            return tensor
        return tensor.new_zeros(len(self.live), *tensor.shape[1:]).index_copy_(0, self.rows, tensor)
