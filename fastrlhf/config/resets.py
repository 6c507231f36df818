"""Keys of on-policy runs that say where episodes start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastrlhf.config.checks import at_least, require


@dataclass(frozen=True, kw_only=True)
class ResetKeys:
    """Resets into responses (DR-PO), and groups of episodes that share a start."""

    reset_prob: float = 0.0
    """Share of episodes that start inside a response instead of at the prompt; 0 is PPO."""
    reset_min: int = 1
    """Fewest tokens of a reset: 1 as published, 0 so that the initial state is among the reset states."""
    reset_source: Literal["reference", "chosen", "both", "sample"] = "reference"
    """Response that a reset copies from. both: reference or chosen, with equal probability. sample: one that the frozen
    reference policy writes to the prompt, at `temperature` (PPO++)."""
    reset_curriculum: float = 0.0
    """Share of the run over which resets move from the end of a response to its beginning: k is uniform on {m, ..., L -
    1}, and m falls linearly from L - 1 to `reset_min`. 0: m is `reset_min` throughout, as published."""
    num_generations: int = 1
    """Episodes per prompt of a batch; the number of prompts in a batch is divided by this."""
    reset_group: Literal["point", "response"] = "point"
    """Where the episodes of a group start: all at one reset point, or each at its own point of one response."""
    share_trunks: bool = True
    """Compute the shared prefix of a group once; the same numbers with fewer tokens."""

    def check_resets(self) -> None:
        at_least(self, 1, "num_generations")
        for name in ("reset_prob", "reset_curriculum"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in 0..1")
        require(self.reset_min in (0, 1), "reset_min", self.reset_min, "0 or 1")
