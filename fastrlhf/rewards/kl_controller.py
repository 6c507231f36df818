"""Adapts the coefficient of the KL so that the KL approaches a target (Ziegler et al. 2019, arXiv 1909.08593, section
2.2)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class KLController:
    """The coefficient of the KL. After every batch of episodes it becomes coef (1 + clip(kl / target - 1, +-0.2)
    num_episodes / horizon).

    With a target of 0 the coefficient is constant. The coefficient is the only state.
    """

    coef: float
    """Current coefficient, in reward per nat."""
    target: float
    """Target of the KL, in nats per episode."""
    horizon: int
    """Number of episodes over which the coefficient adapts."""

    def update(self, kl: float, num_episodes: int) -> None:
        """Adapts the coefficient. `kl`, in nats, is the mean over the episodes of the batch of the KL summed over
        sampled tokens."""
        if self.target:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * num_episodes / self.horizon

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef = state["coef"]
