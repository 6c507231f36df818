"""What a token earns: a list of named addends, each a float32 [R] over the flat rows of a batch of episodes.

The sum of the addends is the reward. A term is a pure function of what is known about the rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def score_term(score: Tensor, end_rows: Tensor, num_rows: int) -> Tensor:
    """score [N] float32, earned at `end_rows` [N] int64, the row of each episode's last valid token; 0 elsewhere."""
    return torch.zeros(num_rows, device=score.device).index_copy(0, end_rows, score)


def kl_term(logprob: Tensor, reference_logprob: Tensor, coef: float) -> Tensor:
    """-coef * (logprob - reference_logprob): k1 of the KL to the reference, in the reward (Ziegler et al. 2019, eq.
    2)."""
    return -coef * (logprob - reference_logprob)


def judged_scores(
    score: Tensor, missing_eos: Tensor, *, missing_eos_penalty: float | None, missing_eos_score: float | None
) -> Tensor:
    """score [N] as the policy earns it: where `missing_eos` [N] bool, lowered by the penalty or replaced by the
    score."""
    if missing_eos_score is not None:
        return torch.where(missing_eos, missing_eos_score, score)
    return score - (missing_eos_penalty or 0.0) * missing_eos
