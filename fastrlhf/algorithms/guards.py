"""Where an on-policy run stops: the policy is too far from its reference, or a number is not finite.

An error ends the run, which then leaves its last weights in `interrupted/` (runtime/run.py). Between two updates,
where the KL is looked at and scores are, those are the weights of its last whole update.
Scores are checked as they come (`checked_scores`), gradients before any weight moves (`Optimizer.step`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastrlhf.config import PPOConfig
from fastrlhf.types import Rollout


def check_kl(config: PPOConfig, update: int, kl: float) -> None:
    """Raises ValueError where the policy that sampled for update number `update`, counted from 1, is more than
    `max_kl` away from its reference: `kl`, in nats per response."""
    if config.max_kl is not None and kl > config.max_kl:
        raise ValueError(
            f"max_kl: the policy that sampled for update {update} is {kl:.4g} nats per response away from its "
            f"reference (objective/kl), more than {config.max_kl:g}; it is not trained further. Raise kl_coef, lower "
            "learning_rate, or raise max_kl"
        )


def raise_not_finite(numbers: Mapping[str, Tensor], cu_rows: Tensor, rollouts: Sequence[Rollout]) -> None:
    """Raises ValueError naming the first of `numbers`, each [R], that has an entry that is not finite, and the row of
    the prompt of its episode. `cu_rows` (N+1,) says which entries belong to which of the N episodes."""
    for name, values in numbers.items():
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            first = bad[0, 0]
            episode = int(torch.searchsorted(cu_rows, first, right=True)) - 1
            raise ValueError(
                f"{name}: {values[first].item()} for a token of the response to row {rollouts[episode].prefix.row}; "
                "nothing is trained on it"
            )
