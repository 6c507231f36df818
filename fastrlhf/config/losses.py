"""Keys of on-policy runs for the losses and the estimation of advantages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastrlhf.config.checks import above_0, at_least, require


@dataclass(frozen=True, kw_only=True)
class LossKeys:
    """Keys for the clipped policy loss, the critic's loss, and the estimation of advantages."""

    num_ppo_epochs: int = 4
    """Passes over each batch of episodes."""
    num_mini_batches: int = 1
    """Optimiser steps per pass."""
    loss_type: Literal["ppo", "grpo", "dapo", "bnpo", "dr_grpo", "cispo", "gspo"] = "ppo"
    """Policy loss. ppo: the clipped ratio of each token, averaged as `loss_aggregation` says. The next four are the
    loss ppo with a fixed `loss_aggregation`: grpo (arXiv 2402.03300, eq. 3) with sequence, dapo (arXiv 2503.14476, eq.
    8) and bnpo with token, dr_grpo (arXiv 2503.20783) with constant. cispo (arXiv 2506.13585, eq. 4): the ratio, at
    most 1 + cliprange_high, is a constant factor of the log-prob, averaged over tokens. gspo (arXiv 2507.18071, eq. 5):
    the geometric mean of an episode's ratios is clipped, averaged over episodes."""
    cliprange: float = 0.2
    """The ratio is clipped to 1 - cliprange .. 1 + cliprange."""
    cliprange_high: float | None = None
    """Upper clip range: the ratio is clipped at 1 + cliprange_high from above (DAPO: 0.28). null: the value of
    `cliprange`. With loss_type cispo, `cliprange` serves only as this default."""
    dual_clip: float | None = None
    """For a negative advantage A, the loss is at most -dual_clip * A (Ye et al. 2020, who use 3); null: no such
    bound."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus: this times the entropy (nats per token) is subtracted from the loss."""
    loss_aggregation: Literal["token", "sequence", "constant"] = "token"
    """How the losses of policy and critic are averaged over a mini-batch. token: over all tokens. sequence: over the
    tokens of each episode, then over episodes. constant (policy only; the critic then uses token): the sum over tokens
    is divided by the number of episodes times response_length, so that a token of a long response counts as much as a
    token of a short one (Dr. GRPO)."""
    mask_truncated_completions: bool = False
    """Exclude episodes that were cut at the length limit from the policy loss (DAPO's overlong filtering)."""
    target_kl: float | None = None
    """Early stopping: if the KL between the sampling policy and the current one (nats per token), measured on a
    mini-batch, exceeds this value, the step on this mini-batch and the rest of the update are skipped. null: off."""
    sampler_is_cap: float | None = None
    """Truncated importance sampling (Yao et al. 2025, who use 2), for an engine whose log-probs differ from the
    trainer's: the loss of each token is multiplied by min(p_trainer / p_engine, sampler_is_cap). null: off."""
    critic_model_path: str = ""
    """Model that the critic starts from: a reward model, or the folder `value_model` of an earlier run. Empty:
    `reward_model_path`, or the policy with a new value head if `reward_model_path` is empty too."""
    cliprange_value: float = 0.2
    """The value prediction is clipped to its value at sampling time +- cliprange_value."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    head_learning_rate: float | None = None
    """Peak learning rate of the critic's value head, which may have new weights. null: the learning rate of the
    critic."""
    value_learning_rate: float | None = None
    """Peak learning rate of the critic; null: `learning_rate`."""
    value_warmup_steps: int = 0
    """Number of updates at the start in which only the critic is trained."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """GAE's lambda."""
    advantage_estimator: Literal["gae", "rloo", "grpo", "opo", "prime"] = "gae"
    """How advantages are estimated. gae: generalised advantage estimation with a critic. The other estimators have no
    critic: all tokens of an episode share one advantage, its return minus a baseline from its group of
    `num_generations` episodes. Baseline of rloo: the mean return of the other episodes (arXiv 2402.14740); of grpo: the
    mean of the whole group, with the difference scaled as `scale_rewards` says (arXiv 2402.03300); of opo: the mean of
    the whole group, weighted by length (arXiv 2505.23585). prime (PRIME, arXiv 2502.01456): the advantage is a sum of
    two parts. All rewards except those of a DPO model are treated as in rloo. From each DPO reward the mean DPO reward
    per token of the other episodes is subtracted, and each token gets the sum of these differences from itself to the
    end of its episode."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divisor of the advantages of advantage_estimator grpo. group: the standard deviation of the returns of
    the group. batch: the standard deviation of the returns of all episodes of the batch. none: they are not divided
    (Dr. GRPO, arXiv 2503.20783)."""
    whiten_rewards: bool = False
    """Divide rewards by their standard deviation over the batch, without shifting their mean."""

    @property
    def aggregation(self) -> str:
        """How losses are averaged: `loss_aggregation`, or the value that `loss_type` prescribes."""
        fixed = {"grpo": "sequence", "gspo": "sequence", "dr_grpo": "constant"}
        return self.loss_aggregation if self.loss_type == "ppo" else fixed.get(self.loss_type, "token")

    def check_losses(self) -> None:
        at_least(self, 1, "num_ppo_epochs", "num_mini_batches")
        at_least(self, 0, "vf_coef", "entropy_coef", "value_warmup_steps")
        above_0(self, "cliprange", "cliprange_value")
        optional = ("value_learning_rate", "head_learning_rate", "cliprange_high", "target_kl")
        above_0(self, *(name for name in optional if getattr(self, name) is not None))
        if self.sampler_is_cap is not None:
            at_least(self, 1, "sampler_is_cap")
        if self.dual_clip is not None:
            require(self.dual_clip > 1, "dual_clip", self.dual_clip, "above 1, since every update starts at ratio 1")
        for name in ("gamma", "lam"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in 0..1")
