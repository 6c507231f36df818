"""Splits the metrics of a step or of an evaluation by dataset, if a run has several weighted datasets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastrlhf.data.token_set import TokenSet
from fastrlhf.distributed.ranks import total
from fastrlhf.types import TokenizedExample


@dataclass(frozen=True, kw_only=True)
class ByDataset:
    """The dataset of each row. A run with a single dataset has no names, and then no metric is split."""

    names: Sequence[str]
    numbers: np.ndarray
    """[N] int64, for each row the index of its dataset in `names`"""

    @classmethod
    def of(cls, rows: Sequence[TokenizedExample]) -> ByDataset:
        names, numbers = TokenSet.of(rows).datasets()
        return cls(names=[] if names in ([], [""]) else names, numbers=numbers)

    @classmethod
    def single(cls, num: int) -> ByDataset:
        """Returns the split of `num` rows that all belong to one dataset."""
        return cls(names=[], numbers=np.zeros(num, np.int64))

    def __bool__(self) -> bool:
        return bool(self.names)

    def sums(self, values: Tensor, indices: Sequence[int]) -> Tensor:
        """Sums values [n] float32 of the rows `indices` by dataset, [len(names)] float32, in a fixed order."""
        if not self:
            return values.new_zeros(0)
        own = torch.from_numpy(self.numbers[np.asarray(indices, np.int64)]).to(values.device, non_blocking=True)
        each = torch.arange(len(self.names), device=values.device)[:, None]
        return torch.where(own == each, values, 0.0).sum(1)

    def totals(self, values: Tensor, indices: Sequence[int]) -> Tensor:
        """Returns `sums` over the rows of all ranks."""
        return total(self.sums(values, indices)) if self else self.sums(values, indices)

    def counts(self, indices: Sequence[int], weights: Sequence[int] | None = None) -> list[float]:
        """Returns the number of the rows `indices` in each dataset, or the sum of their `weights`."""
        if not self:
            return []
        own = self.numbers[np.asarray(indices, np.int64)]
        return np.bincount(own, weights, minlength=len(self.names)).tolist()

    def losses(self, sums: Sequence[float], counts: Sequence[float], *, evaluation: bool) -> dict[str, float]:
        """Returns the mean loss of each dataset as the metric dataset/NAME/loss, or eval_NAME_loss for an `evaluation`.
        A dataset without rows is left out."""
        form = "eval_{}_loss" if evaluation else "dataset/{}/loss"
        found = zip(self.names, sums, counts, strict=True)
        return {form.format(name): value / count for name, value, count in found if name and count}
