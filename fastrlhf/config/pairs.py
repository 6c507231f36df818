"""Keys of on-policy runs whose update is a loss on pairs of rollouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastrlhf.config.checks import above_0


@dataclass(frozen=True, kw_only=True)
class PairKeys:
    """Pair losses on rollouts from one state: REBEL, REFUEL, online DPO, online IPO."""

    update: Literal["clipped", "pair"] = "clipped"
    """Loss of an update. clipped: the clipped loss of `loss_type`. pair: `pair_loss` on pairs of episodes that
    start in the same state; it needs no critic."""
    pair_loss: Literal["rebel", "dpo", "ipo"] = "rebel"
    """With D = log(policy / base) of one response minus that of the other, and r their returns. rebel (Gao et al. 2024,
    arXiv 2404.16767, eq. 4; with `reset_prob` above 0 REFUEL, arXiv 2410.04612): (D - pair_eta (r - r'))^2, the base is
    the sampler. dpo (online DPO, Guo et al. 2024, arXiv 2402.04792): -log sigmoid(pair_beta D) of the response with the
    higher return, the base is the reference. ipo (online IPO, Calandriello et al. 2024, arXiv 2403.08635): (D - (p -
    1/2) / pair_beta)^2 with p = sigmoid(r - r'), the base is the reference."""
    pair_select: Literal["neighbours", "best_worst"] = "neighbours"
    """Which episodes of a group are paired. neighbours: the first with the second, the third with the fourth, and so
    on. best_worst: the highest return with the lowest."""
    pair_eta: float = 1.0
    """Log-ratio per unit of reward that rebel regresses to; a larger one moves the policy further."""
    pair_beta: float = 0.1
    """beta of dpo, tau of ipo: the smaller it is, the further the policy may move from the reference."""

    def check_pairs(self) -> None:
        above_0(self, "pair_eta", "pair_beta")
