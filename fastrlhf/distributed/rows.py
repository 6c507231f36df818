"""Holds the rows of a large tensor on the ranks that computed them, and sends rows only to the ranks that need them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fastrlhf.distributed.ranks import by_rank, rank, world_size


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a tensor [R, D], some of which this rank has."""

    values: Tensor
    """[n, D] the rows of this rank"""
    place: Tensor
    """[R] int64, the place of each row in `values`; undefined for rows that this rank does not have"""

    def at(self, index: Tensor) -> Tensor:
        """Returns the rows `index` [m], all of which this rank must have: [m, D]."""
        return self.values[self.place[index]]


class SpreadRows:
    """A tensor [R, D], each of whose rows is held by one rank."""

    def __init__(self, values: Tensor, index: Tensor) -> None:
        """`values` [n, D] are the rows `index` [n] int64 of this rank. Every rank must call it."""
        parts = by_rank(index)
        num_rows = sum(map(len, parts))
        self._holder = index.new_empty(num_rows)
        for number, part in enumerate(parts):
            self._holder[part] = number
        self._own = Rows(values, _places(index, num_rows))

    def rows(self, index: Tensor) -> Rows:
        """Returns a set of rows that holds, on this rank, at least the rows at `index` [m] int64. If any rank needs a
        row that another rank holds, the ranks exchange rows; otherwise nothing is copied. Every rank must call it."""
        if world_size() == 1:
            return self._own
        needed = by_rank(index)
        holders = [self._holder[part] for part in needed]
        if all(bool((holder == number).all()) for number, holder in enumerate(holders)):
            return self._own
        sent = [part[holder == rank()] for part, holder in zip(needed, holders, strict=True)]
        received = [index[holders[rank()] == number] for number in range(world_size())]
        values = _exchanged(self._own.at(torch.cat(sent)), list(map(len, sent)), list(map(len, received)))
        return Rows(values, _places(torch.cat(received), len(self._holder)))


def _places(index: Tensor, num_rows: int) -> Tensor:
    places = index.new_full((num_rows,), -1)
    places[index] = torch.arange(len(index), device=index.device)
    return places


def _exchanged(rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
    """Sends the first `sent[0]` rows to rank 0, the next `sent[1]` rows to rank 1, and so on. Returns the rows that
    this rank receives, in rank order."""
    raw = rows.contiguous().view(torch.uint8)  # some backends cannot send every dtype
    found = raw.new_empty(sum(received), raw.shape[1])
    dist.all_to_all_single(found, raw, received, sent)
    return found.view(rows.dtype)
