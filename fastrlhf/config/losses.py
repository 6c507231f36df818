"""Keys of on-policy runs that say how advantages are estimated and what the losses are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastrlhf.config.checks import above_0, at_least, require


@dataclass(frozen=True, kw_only=True)
class LossKeys:
    """The clipped loss of the policy, the critic's, and the advantages that they are given."""

    num_ppo_epochs: int = 4
    """Passes over each batch of episodes."""
    num_mini_batches: int = 1
    """Optimiser steps per pass."""
    cliprange: float = 0.2
    """The ratio is clipped to 1 - cliprange .. 1 + cliprange."""
    cliprange_high: float | None = None
    """Upper clip range, where it differs (DAPO: 0.28); null: `cliprange`."""
    dual_clip: float | None = None
    """Where the advantage A is negative the loss is at most -dual_clip * A (Ye et al. 2020: 3); null is off."""
    entropy_coef: float = 0.0
    """Weight of the entropy of the policy, in nats per token, which the loss rewards."""
    loss_aggregation: Literal["token", "sequence"] = "token"
    """How the policy's loss averages. token: over all tokens of the mini-batch; sequence: over the tokens of an
    episode, then over episodes."""
    target_kl: float | None = None
    """Nats per token: once a mini-batch finds the policy further than this from the sampler, that step and the rest of
    the update are skipped; null is off."""
    sampler_is_cap: float | None = None
    """For an engine whose log-probs are not the trainer's: each token's loss is weighted by min(trainer / engine,
    sampler_is_cap), truncated importance sampling (Yao et al. 2025: 2); null is off."""
    cliprange_value: float = 0.2
    """The value moves at most this far from its value at sampling time."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    value_learning_rate: float | None = None
    """Peak learning rate of the critic; null: `learning_rate`."""
    value_warmup_steps: int = 0
    """First updates, in which only the critic is trained."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """GAE's lambda."""
    advantage_estimator: Literal["gae", "rloo", "grpo"] = "gae"
    """gae needs a critic. The others have none and give every token the advantage of its episode among the
    `num_generations` that start in the same state: rloo its return minus the mean of the others', grpo minus the mean
    of all, over their standard deviation."""
    whiten_rewards: bool = False
    """Divide rewards by their standard deviation over the batch; the mean stays."""

    def check_losses(self) -> None:
        at_least(self, 1, "num_ppo_epochs", "num_mini_batches")
        at_least(self, 0, "vf_coef", "entropy_coef", "value_warmup_steps")
        above_0(self, "cliprange", "cliprange_value")
        optional = ("value_learning_rate", "cliprange_high", "target_kl")
        above_0(self, *(name for name in optional if getattr(self, name) is not None))
        if self.sampler_is_cap is not None:
            at_least(self, 1, "sampler_is_cap")
        if self.dual_clip is not None:
            require(self.dual_clip > 1, "dual_clip", self.dual_clip, "above 1, the ratio at which every update starts")
        for name in ("gamma", "lam"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in 0..1")
