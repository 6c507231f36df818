"""Keys of on-policy runs that say how advantages are estimated and what the losses are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastrlhf.config.checks import above_0, at_least, require


@dataclass(frozen=True, kw_only=True)
class LossKeys:
    """The clipped policy loss, the critic's loss, and how advantages are estimated."""

    num_ppo_epochs: int = 4
    """Passes over each batch of episodes."""
    num_mini_batches: int = 1
    """Optimiser steps per pass."""
    loss_type: Literal["ppo", "grpo", "dapo", "bnpo", "dr_grpo", "cispo", "gspo"] = "ppo"
    """Policy loss. ppo: clipped ratio of each token, averaged as `loss_aggregation` says. grpo (arXiv 2402.03300, eq.
    3), dapo (arXiv 2503.14476, eq. 8) and bnpo, dr_grpo (arXiv 2503.20783): the same with the average fixed to
    sequence, token, token and constant. cispo (arXiv 2506.13585, eq. 4): the ratio, at most 1 + cliprange_high, is a
    constant factor of the log-prob, averaged over tokens. gspo (arXiv 2507.18071, eq. 5): the geometric mean of an
    episode's ratios is clipped, averaged over episodes."""
    cliprange: float = 0.2
    """The ratio is clipped to 1 - cliprange .. 1 + cliprange."""
    cliprange_high: float | None = None
    """Upper clip range, where it differs (DAPO: 0.28); null: `cliprange`. With loss_type cispo, `cliprange` is read
    only as this default."""
    dual_clip: float | None = None
    """Where the advantage A is negative, the loss is at most -dual_clip * A (Ye et al. 2020: 3); null is off."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus (nats per token), which is subtracted from the loss."""
    loss_aggregation: Literal["token", "sequence", "constant"] = "token"
    """Average of the losses of policy and critic over a mini-batch. token: over all tokens. sequence: over the tokens
    of each episode, then over episodes. constant (policy alone): the sum over tokens divided by episodes times
    response_length, so that long responses are not discounted (Dr. GRPO)."""
    mask_truncated_completions: bool = False
    """Leave episodes that the length limit cut out of the policy's loss (DAPO's overlong filtering)."""
    target_kl: float | None = None
    """Early stop: once a mini-batch measures a KL from the sampler above this (nats per token), that step and the rest
    of the update are skipped; null is off."""
    sampler_is_cap: float | None = None
    """For an engine whose log-probs are not the trainer's: each token's loss is weighted by min(trainer / engine,
    sampler_is_cap), truncated importance sampling (Yao et al. 2025: 2); null is off."""
    critic_model_path: str = ""
    """What the critic starts from: a reward model, or `value_model` of an earlier run (a warm start). Empty:
    `reward_model_path`, and where that is empty too, the policy with a new value head."""
    cliprange_value: float = 0.2
    """The value moves at most this far from its value at sampling time."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    value_learning_rate: float | None = None
    """Peak learning rate of the critic; null: `learning_rate`."""
    value_warmup_steps: int = 0
    """Number of updates at the start in which only the critic is trained."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """GAE's lambda."""
    advantage_estimator: Literal["gae", "rloo", "grpo", "opo"] = "gae"
    """gae needs a critic. The others have no critic: all tokens of an episode share one advantage, computed from its
    group of `num_generations` episodes. rloo: return minus the mean return of the others (arXiv 2402.14740). grpo:
    return minus the mean of all, scaled as `scale_rewards` says (arXiv 2402.03300). opo: return minus the mean weighted
    by length (arXiv 2505.23585)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What grpo's advantages are divided by. group: the standard deviation of the group; batch: of all episodes of the
    batch; none: nothing (Dr. GRPO, arXiv 2503.20783)."""
    whiten_rewards: bool = False
    """Divide rewards by their standard deviation over the batch; the mean stays."""

    @property
    def aggregation(self) -> str:
        """How the losses are averaged: `loss_aggregation`, or the value that `loss_type` fixes."""
        fixed = {"grpo": "sequence", "gspo": "sequence", "dr_grpo": "constant"}
        return self.loss_aggregation if self.loss_type == "ppo" else fixed.get(self.loss_type, "token")

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
