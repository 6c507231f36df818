"""Truncated sampling by top-k, top-p and min-p, and records of the tokens that were kept.

The policy of a run that truncates is the truncated distribution: its log-probs are renormalised over the kept tokens.
The trainer, the reference and later passes of an update restrict their distributions to the same tokens that the
sampler kept, even if they would keep others themselves. Otherwise a sampled token could have probability 0 under the
policy, and a ratio would compare distributions on different supports (DeepSeek-AI 2025, arXiv 2512.02556, "Keep
Sampling Mask").
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
    """Selects the tokens that may be drawn, in the order of transformers: by top-k, then by top-p of the rest, then by
    min-p. The object is false if all tokens may be drawn."""

    top_k: int = 0
    """Number of most likely tokens to keep; 0: all. Tokens as likely as the last of them are kept too."""
    top_p: float = 1.0
    """Keep the smallest number of most likely tokens whose total probability is at least this; 1: all."""
    min_p: float | None = None
    """Keep tokens with at least this share of the probability of the most likely token; None: all."""

    @classmethod
    def of(cls, config: TruncationKeys) -> Truncation:
        return cls(top_k=config.top_k, top_p=config.top_p, min_p=config.min_p)

    def __bool__(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or bool(self.min_p)

    def __call__(self, logits: Tensor) -> Tensor:
        """Sets the logits of tokens that may not be drawn to -inf; logits [N, V] float32 at the sampling
        temperature."""
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
    """Records, step by step, which tokens were kept when each token of the episodes was drawn."""

    _steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)
    """For each step: episodes, positions and sizes of the sets, [n] int64 each, and the concatenated sets, [K] int32;
    on the CPU"""

    def add(self, episodes: Tensor, positions: Tensor, member: Tensor, ids: Tensor | None = None) -> None:
        """Records the set of kept tokens of one sampled token for each of n episodes. `member` [n, V] bool says whether
        the token of a column is in the set; `ids` [V] are the tokens of the columns (None: the column numbers). Waits
        for the GPU."""
        columns = member.nonzero()[:, 1]
        tokens = (columns if ids is None else ids[columns]).int()
        self._steps.append((episodes.cpu(), positions.cpu(), member.sum(1).cpu(), tokens.cpu()))

    def sets(self, counts: Sequence[int]) -> list[list[np.ndarray]]:
        """Returns, for each episode, the sets of its first `counts` tokens, int32."""
        found: list[list[np.ndarray]] = [[np.empty(0, np.int32)] * count for count in counts]
        for episodes, positions, sizes, ids in self._steps:
            parts = np.split(ids.numpy(), sizes.cumsum(0)[:-1].numpy())
            for episode, position, part in zip(episodes.tolist(), positions.tolist(), parts, strict=True):
                found[episode][position] = part
        return found


def kept_tokens(rollouts: Sequence[Rollout], device: torch.device) -> KeptTokens | None:
    """Concatenates the sets of all sampled tokens of rollouts; returns None if sampling was not truncated."""
    sets = [one for rollout in rollouts for one in rollout.kept or ()]
    if not sets:
        return None
    cu_rows = np.cumsum([0, *map(len, sets)])
    ids = torch.from_numpy(np.concatenate(sets).astype(np.int64))
    return KeptTokens(ids.to(device), torch.from_numpy(cu_rows).to(device))
