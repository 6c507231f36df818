"""The batch of an optimiser step: its size per process or in all, and the number of processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from fastrlhf.config.checks import UNREAD, at_least, require

BATCH_KEYS = ("per_device_train_batch_size", "gradient_accumulation_steps", "train_batch_size")


def processes() -> int:
    """Returns the number of processes that train together: those of torch.distributed if it is initialised, otherwise
    those that torchrun has started."""
    dist = sys.modules.get("torch.distributed")  # the configuration of a single process needs no torch
    if dist is not None and dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def replaced_batch_keys(flags: Collection[str]) -> tuple[str, ...]:
    """Returns the keys of a file that flags replace, because they determine the same batch: `train_batch_size` replaces
    the other two keys, and either of these replaces it."""
    factors = BATCH_KEYS[:2]
    if "train_batch_size" in flags:
        return factors
    return BATCH_KEYS[2:] if any(name in flags for name in factors) else ()


@dataclass(frozen=True, kw_only=True)
class BatchKeys:
    """The keys that determine the batch of an optimiser step."""

    UNIT: ClassVar[str] = "rows"
    """The items that a batch counts."""

    per_device_train_batch_size: int = 8
    """Number of sequences, pairs or episodes per process. The batch of an optimiser step (on-policy: of an update) is
    this number times the number of processes times `gradient_accumulation_steps`."""
    train_batch_size: int = 0
    """Number of sequences, pairs or episodes per optimiser step (on-policy: per update) over all processes, in place of
    `per_device_train_batch_size` and `gradient_accumulation_steps`. 0: those two keys determine the batch."""
    gradient_accumulation_steps: int = 1
    """Factor on the batch size, as in TRL. It does not change memory use; `micro_batch_tokens` does."""

    @property
    def batch_size(self) -> int:
        """Number of rows (on-policy: episodes) per optimiser step or update, over all processes."""
        return self.train_batch_size or self._product

    @property
    def _product(self) -> int:
        return self.per_device_train_batch_size * processes() * self.gradient_accumulation_steps

    @property
    def batch_key(self) -> str:
        """The key to name in a message about the batch size."""
        return "train_batch_size" if self.train_batch_size else "per_device_train_batch_size"

    def describe_batch(self) -> str:
        """Returns the batch of a step in words: "8 x 2 processes x 1 = 16 rows"."""
        if self.train_batch_size:
            return f"{self.train_batch_size} {self.UNIT} over {_count(processes())}"
        return f"{_factors(self)} = {self._product} {self.UNIT}"

    def check_batch(self) -> None:
        """Raises ValueError for a number out of range and for keys that contradict `train_batch_size`."""
        at_least(self, 1, "per_device_train_batch_size", "gradient_accumulation_steps")
        at_least(self, 0, "train_batch_size")
        if self.train_batch_size in (0, self._product):
            return
        defaults = {field.name: field.default for field in fields(self)}
        rule = f"absent when train_batch_size is {self.train_batch_size}, {UNREAD}: {_factors(self)} is {self._product}"
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            value = getattr(self, name)
            require(value == defaults[name], name, value, rule)


def batch_written(values: Mapping[str, Any]) -> int:
    """Returns the batch of a step of a configuration as it is written to config.yaml, which has `train_batch_size` if
    several processes have trained."""
    if values["train_batch_size"]:
        return values["train_batch_size"]
    return values["per_device_train_batch_size"] * values["gradient_accumulation_steps"]


def _factors(keys: BatchKeys) -> str:
    per_process, accumulated = keys.per_device_train_batch_size, keys.gradient_accumulation_steps
    return f"{per_process} x {_count(processes())} x {accumulated}"


def _count(number: int) -> str:
    return f"{number} process" if number == 1 else f"{number} processes"
