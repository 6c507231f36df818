"""Truncated sampling: top-k, top-p and min-p, and the tokens that they kept.

The policy of a run that truncates is the truncated distribution: its log-probs are renormalised over the kept tokens.
The trainer, the reference and later passes of an update restrict their distributions to the tokens that the sampler
kept, whatever they would keep themselves. Otherwise a sampled token could have probability 0 under the policy, and a
ratio would compare distributions on different supports (DeepSeek-AI 2025, arXiv 2512.02556, "Keep Sampling Mask").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from fastrlhf.config.sampling import TruncationKeys
from fastrlhf.types import KeptTokens, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncation:
    """Which tokens may be drawn, in the order of transformers: top-k, then top-p of what is left, then min-p. It is
    false if all tokens may be drawn."""

    top_k: int = 0
    """Number of most likely tokens; 0: all. Tokens that tie with the last of them stay too."""
    top_p: float = 1.0
    """The fewest most likely tokens with at least this probability together; 1: all."""
    min_p: float | None = None
    """Tokens with at least this share of the probability of the most likely token; None: all."""

    @classmethod
    def of(cls, config: TruncationKeys) -> Truncation:
        return cls(top_k=config.top_k, top_p=config.top_p, min_p=config.min_p)

    def __bool__(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or bool(self.min_p)

    def __call__(self, logits: Tensor) -> Tensor:
        """Tempered logits [N, V] float32 with -inf for tokens that may not be drawn."""
        unread = cast(torch.LongTensor, None)  # the tokens so far
        if self.top_k > 0:
            logits = TopKLogitsWarper(self.top_k)(unread, cast(torch.FloatTensor, logits))
        if self.top_p < 1:
            logits = TopPLogitsWarper(self.top_p)(unread, cast(torch.FloatTensor, logits))
        if self.min_p:
            logits = MinPLogitsWarper(self.min_p)(unread, cast(torch.FloatTensor, logits))
        return logits


@dataclass(slots=True)
class KeptRecord:
    """The tokens that were kept for each token of some episodes, recorded step by step."""

    _steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)
    """Episodes and positions of a step, the sizes of their sets, [n] int64 each, and the sets, [K] int32; on the CPU"""

    def add(self, episodes: Tensor, positions: Tensor, member: Tensor) -> None:
        """Records one token of each of n episodes; member [n, V] bool. It waits for the GPU."""
        ids = member.nonzero()[:, 1].int()
        self._steps.append((episodes.cpu(), positions.cpu(), member.sum(1).cpu(), ids.cpu()))

    def sets(self, counts: Sequence[int]) -> list[list[np.ndarray]]:
        """For each episode, the sets of its `counts` tokens, int32."""
        found: list[list[np.ndarray]] = [[np.empty(0, np.int32)] * count for count in counts]
        for episodes, positions, sizes, ids in self._steps:
            parts = np.split(ids.numpy(), sizes.cumsum(0)[:-1].numpy())
            for episode, position, part in zip(episodes.tolist(), positions.tolist(), parts, strict=True):
                found[episode][position] = part
        return found


def kept_tokens(rollouts: Sequence[Rollout], device: torch.device) -> KeptTokens | None:
    """The sets of the sampled tokens of rollouts, token after token; None if the rollouts have none."""
    sets = [one for rollout in rollouts for one in rollout.kept or ()]
    if not sets:
        return None
    cu_rows = np.cumsum([0, *map(len, sets)])
    ids = torch.from_numpy(np.concatenate(sets).astype(np.int64))
    return KeptTokens(ids.to(device), torch.from_numpy(cu_rows).to(device))
