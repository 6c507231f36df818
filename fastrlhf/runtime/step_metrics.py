"""Metrics of the losses of one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastrlhf.distributed.ranks import from_all, is_first, largest, rank, total, world_size
from fastrlhf_kernels import Max, Metric, Sum, merge


class StepMetrics:
    """Sums metrics of the losses on the device over the micro-batches of a step (or the passes of an update), then over
    ranks."""

    def __init__(self) -> None:
        self._totals: dict[str, Metric] = {}

    def add(self, metrics: Mapping[str, Metric]) -> None:
        self._totals = merge(self._totals, metrics)

    def means(self, count: str) -> dict[str, float]:
        """Returns every sum divided by the sum called `count`, and maxima unchanged. It waits for the GPU once."""
        names = list(self._totals)
        own = torch.stack([self._totals[name].value for name in names])
        sums, maxima = torch.stack([total(own), largest(own)]).tolist()
        number = max(sums[names.index(count)], 1.0)
        return {
            name: maximum if isinstance(self._totals[name], Max) else value / number
            for name, value, maximum in zip(names, sums, maxima, strict=True)
        }

    def own_mean(self, name: str, count: str) -> float:
        """Returns the sum called `name` divided by the sum called `count`, both of this rank only; 0 if nothing has
        been added. It waits for the GPU once."""
        if not self._totals:
            return 0.0
        value, number = torch.stack([self._totals[one].value for one in (name, count)]).tolist()
        return value / max(number, 1.0)

    def by_rank(self) -> list[dict[str, tuple[str, float]]]:
        """Returns the metrics so far as JSON values, for a checkpoint: for each rank, name -> (kind, value). Every rank
        must call it."""
        return from_all({name: (type(one).__name__, one.value.item()) for name, one in self._totals.items()})

    def load(self, by_rank: Sequence[Mapping[str, Sequence[Any]]], device: torch.device) -> None:
        """Continues from the result of `by_rank`. If the number of ranks has changed, rank 0 takes the values of all
        ranks."""
        self._totals = {}
        same = len(by_rank) == world_size()
        for number, saved in enumerate(by_rank):
            metrics = {
                name: {"Sum": Sum, "Max": Max}[kind](torch.tensor(value, device=device))
                for name, (kind, value) in saved.items()
            }
            if number == rank() if same else is_first():
                self.add(metrics)
            elif not self._totals:  # `means` needs the names on every rank
                self.add({name: type(one)(torch.zeros_like(one.value)) for name, one in metrics.items()})
