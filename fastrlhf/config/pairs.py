"""Keys of on-policy runs that train with a loss on pairs of rollouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastrlhf.config.checks import above_0


@dataclass(frozen=True, kw_only=True)
class PairKeys:
    """Keys of the losses on pairs of rollouts from one state: REBEL, REFUEL, online DPO and online IPO."""

    update: Literal["clipped", "pair"] = "clipped"
    """Kind of loss. clipped: the clipped policy loss that `loss_type` names. pair: the loss `pair_loss` on pairs of
    episodes that start in the same state, without a critic."""
    pair_loss: Literal["rebel", "dpo", "ipo"] = "rebel"
    """Loss on a pair. Let D be the difference of log(policy / base) between the two responses, r and r' their returns.
    rebel (Gao et al. 2024, arXiv 2404.16767; with `reset_prob` above 0 REFUEL, arXiv 2410.04612): (D - pair_eta
    (r - r'))^2, where the base is the policy that sampled them. dpo (online DPO, Guo et al. 2024, arXiv 2402.04792):
    -log sigmoid(pair_beta D) for the response with the higher return, where the base is the reference. ipo (online IPO,
    Calandriello et al. 2024, arXiv 2403.08635): (D - (p - 1/2) / pair_beta)^2 with p = sigmoid(r - r'), where the base
    is the reference."""
    pair_select: Literal["neighbours", "best_worst"] = "neighbours"
    """Which episodes of a group are paired. neighbours: the first with the second, the third with the fourth, and so
    on. best_worst: the highest return with the lowest."""
    pair_eta: float = 1.0
    """pair_loss rebel fits the log-ratio D to pair_eta times the difference of returns; a larger value moves the policy
    further."""
    pair_beta: float = 0.1
    """beta of pair_loss dpo and tau of pair_loss ipo: the smaller it is, the further the policy may move from the
    reference."""

    def check_pairs(self) -> None:
        above_0(self, "pair_eta", "pair_beta")
