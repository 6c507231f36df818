"""Keys of on-policy runs for the states in which episodes start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastrlhf.config.checks import at_least, require


@dataclass(frozen=True, kw_only=True)
class ResetKeys:
    """Keys for resets into responses (DR-PO) and for groups of episodes that share a start."""

    reset_prob: float = 0.0
    """Share of episodes that start inside a response of the dataset (a reset) instead of right after the prompt; 0:
    plain PPO."""
    reset_min: int = 1
    """Minimum number of response tokens that a reset keeps: 1 as in the paper, or 0, which also allows a start right
    after the prompt."""
    reset_source: Literal["reference", "chosen", "both", "sample", "rollout"] = "reference"
    """Response that a reset copies tokens from. reference, chosen: the column of that name. both: one of the two
    columns, with equal probability. sample: a response that the frozen reference model samples at `temperature`
    (PPO++). rollout: a response that the policy itself has just sampled and that failed (RRPO, arXiv 2605.25507). Every
    group is first sampled from the prompt and scored; a group with a failed response is sampled again from a cut of
    that response and is trained on the new tokens only, and every other group is trained on its first responses. The
    key `success_threshold` says which responses fail."""
    reset_cut: Literal["uniform", "sentence"] = "uniform"
    """Positions at which a reset may cut a response. uniform: after any token. sentence: after a token that ends a
    sentence (. ! ? or a new line); responses without such a token are not used for resets."""
    reset_band: tuple[float, ...] = (0.0, 1.0)
    """Lowest and highest share of successes, both included, at which reset_source rollout resets a group. 0 0: only
    groups in which every response failed, the rule of BREAD (arXiv 2506.17211)."""
    reset_curriculum: float = 0.0
    """Share of the run over which resets move from the end of a response to its beginning. The number of copied tokens
    is uniform on {m, ..., L - 1} for a response of L tokens, and m falls linearly from L - 1 to `reset_min`. 0: m is
    `reset_min` throughout, as in the paper."""
    num_generations: int = 1
    """Number of episodes per prompt in a batch; a batch has batch size / num_generations prompts."""
    reset_group: Literal["point", "response"] = "point"
    """Where the episodes of a group start. point: all at the same reset point. response: each at its own point of the
    same response."""
    share_trunks: bool = True
    """Compute the prefix that the episodes of a group share only once, which saves time and changes no result."""

    def check_resets(self) -> None:
        at_least(self, 1, "num_generations")
        for name in ("reset_prob", "reset_curriculum"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in 0..1")
        require(self.reset_min in (0, 1), "reset_min", self.reset_min, "0 or 1")
        band = self.reset_band
        fits = len(band) == 2 and 0 <= band[0] <= band[1] <= 1
        require(fits, "reset_band", list(band), "two numbers, the lower one first, in 0..1")
