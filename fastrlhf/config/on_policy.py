"""Configurations of the on-policy commands `ppo`, `grpo`, `drpo` and `rto`, which differ only in their defaults. Most
of the keys are in rewards.py, sampling.py, losses.py, pairs.py and resets.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fastrlhf.config.checks import at_default, at_least, require
from fastrlhf.config.losses import LossKeys
from fastrlhf.config.pairs import PairKeys
from fastrlhf.config.resets import ResetKeys
from fastrlhf.config.rewards import RewardKeys
from fastrlhf.config.sampling import SamplingKeys
from fastrlhf.config.train import TrainConfig


@dataclass(frozen=True, kw_only=True)
class PPOConfig(ResetKeys, PairKeys, LossKeys, SamplingKeys, RewardKeys, TrainConfig):
    """Trains a policy on its own samples: PPO with a critic, GRPO if `advantage_estimator` is grpo, DR-PO if
    `reset_prob` is above 0, RTO with a `dpo_model_path`, and combinations of them. `model_name_or_path` is the SFT
    model, from which the policy starts and which is the reference model."""

    UNIT: ClassVar[str] = "episodes"
    BEST_METRIC: ClassVar[str] = "eval_objective/scores"

    learning_rate: float = 3e-6
    per_device_train_batch_size: int = 64
    num_train_epochs: float = 1.0
    total_episodes: int = 0
    """Number of episodes of the whole run, if `max_steps` is not given. 0: `num_train_epochs` passes over the
    prompts."""
    compat: Literal["fixed", "reference"] = "fixed"
    """What counts as an episode. fixed: the sampled tokens up to and including the EOS. reference: reproduces the code
    that the authors of DR-PO released, in which sampling continues after the EOS, and KL, values and whitening include
    the reset tokens and the tokens after the EOS."""
    num_sample_generations: int = 10
    """Number of times per run that samples are written to samples.jsonl; 0: never."""

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        at_least(self, 0, "total_episodes", "num_sample_generations")
        self.check_sampling()
        self.check_rewards()
        self.check_losses()
        self.check_pairs()
        self.check_resets()
        self._check_batch()
        self._check_engine()
        self._check_estimator()
        self._check_pair_update()
        self._check_outcomes()
        self._check_dynamic_sampling()
        self._check_compat()
        self._check_unread()
        self.check_truncation()

    def _check_batch(self) -> None:
        size, batch = self.num_generations, self.batch_size
        require(batch % size == 0, "num_generations", size, f"a divisor of the batch of {batch} episodes")
        groups, mini = batch // size, self.num_mini_batches
        told = "episodes" if groups == batch else "groups of episodes"
        require(groups % mini == 0, "num_mini_batches", mini, f"a divisor of the batch of {groups} {told}")
        require(self.response_length < self.max_length, "response_length", self.response_length, "below max_length")
        if self.kl_target:
            rule = f"at least the batch of {batch} episodes"
            require(self.kl_horizon >= batch, "kl_horizon", self.kl_horizon, rule)
        alone = bool(self.psi) and self.psi_opponents == "rollouts" and size == 1
        require(not alone, "num_generations", size, "at least 2 when psi_opponents is rollouts")

        rule = f"at most the {self.response_length} tokens of response_length"
        require(self.overlong_buffer <= self.response_length, "overlong_buffer", self.overlong_buffer, rule)
        rounds = len(self.temperatures) or 1
        rule = f"such that the {size} episodes of a group (num_generations) have each temperature equally often"
        require(size % rounds == 0, "temperatures", self.temperatures, rule)

    def _check_engine(self) -> None:
        if self.truncated:
            rule = "k1, k2 or k3 with top_k, top_p or min_p, because exact is over the whole vocabulary"
            require(self.kl_estimator != "exact", "kl_estimator", self.kl_estimator, rule)
            rule = "fixed with top_k, top_p or min_p, because reference scores tokens that were not sampled"
            require(self.compat == "fixed", "compat", self.compat, rule)
        require(self.decode == "eager" or self.device != "cpu", "decode", self.decode, "eager when device is cpu")
        if self.decode == "cuda_graph" and self.reset_source == "sample":
            rule = "false with decode cuda_graph and reset_source sample, since the graph reads the reference's weights"
            require(not self.ref_reward_offload, "ref_reward_offload", True, rule)

    def _check_estimator(self) -> None:
        if self.advantage_estimator == "gae":
            return
        because = f"with advantage_estimator {self.advantage_estimator}"
        size, start, compat = self.num_generations, self.reset_group, self.compat
        require(size >= 2, "num_generations", size, f"at least 2 {because}, which compares episodes")
        require(start == "point", "reset_group", start, f"point {because}, which compares episodes from one state")
        require(self.gamma == 1, "gamma", self.gamma, f"1 {because}, which uses only whole episodes")
        require(compat == "fixed", "compat", compat, f"fixed {because}: the authors' code has a critic")
        warmup = self.value_warmup_steps
        require(warmup == 0, "value_warmup_steps", warmup, f"0 {because}, which has no critic")
        if (self.kl_placement, self.kl_estimator) == ("reward", "exact"):
            advantage, rule = self.advantage_estimator, "gae, rloo, opo or prime with kl_estimator exact in the reward"
            require(advantage != "grpo", "advantage_estimator", advantage, f"{rule}, since grpo rescales every group")
        if self.advantage_estimator == "prime":
            rule = "another estimator without dpo_model_path and dpo_refine, since prime splits off the DPO rewards"
            require(self.has_dpo_rewards, "advantage_estimator", "prime", rule)
            require(not self.whiten_rewards, "whiten_rewards", True, f"false {because}, which separates the rewards")

    def _check_pair_update(self) -> None:
        if self.update != "pair":
            return
        because = "with update pair"
        estimator, size = self.advantage_estimator, self.num_generations
        rule = f"rloo, grpo or opo {because}, which has no critic"
        require(estimator not in ("gae", "prime"), "advantage_estimator", estimator, rule)
        rule = f"even {because} and pair_select neighbours"
        require(size % 2 == 0 or self.pair_select != "neighbours", "num_generations", size, rule)
        rule = f"true {because}, which computes the two episodes of a pair together"
        require(self.share_trunks, "share_trunks", self.share_trunks, rule)
        require(not self.whiten_rewards, "whiten_rewards", True, f"false {because}, which compares unscaled rewards")
        rule = f"reward {because}, since the pair loss has no KL term"
        require(self.kl_placement == "reward", "kl_placement", self.kl_placement, rule)
        rule = f"k1 {because}, which compares the rewards of whole episodes"
        require(self.kl_estimator == "k1", "kl_estimator", self.kl_estimator, rule)

    def _check_outcomes(self) -> None:
        if self.dpo_refine != "none":
            because = f"with dpo_refine {self.dpo_refine}"
            rule = f"another value {because}, whose rewards would be paid nowhere"
            require(self.reward_shaping != "none", "reward_shaping", self.reward_shaping, rule)
            rule = f"a number {because}: the mean of a group says nothing about a group of equal outcomes"
            require(self.success_threshold is not None, "success_threshold", self.success_threshold, rule)
        elif self.reset_source == "rollout" and self.reset_prob > 0:
            because = "with reset_source rollout"
        else:
            return
        rule = f"fixed {because}, since the other one samples past the end of a response"
        require(self.compat == "fixed", "compat", self.compat, rule)
        known = self.num_generations > 1 or self.success_threshold is not None
        rule = f"a number {because} and num_generations 1, which has no group to compare with"
        require(known, "success_threshold", self.success_threshold, rule)

    def _check_dynamic_sampling(self) -> None:
        if self.dynamic_sampling_factor == 1:
            return
        because = "with dynamic_sampling_factor above 1"
        rule = f"at least 2 {because}, which compares the episodes of a group"
        require(self.num_generations >= 2, "num_generations", self.num_generations, rule)
        rule = f"another source {because}, since rollout samples groups again by its own rule"
        require(self.reset_source != "rollout", "reset_source", self.reset_source, rule)

    def _check_compat(self) -> None:
        if self.compat == "reference":
            require(not self.stop, "stop", self.stop, "empty with compat reference, which samples past the end")
            only_these = (("kl_placement", "reward"), ("loss_aggregation", "token"), ("truncation", "terminal"))
            for name, only in (*only_these, ("loss_type", "ppo"), ("mask_truncated_completions", False)):
                value = getattr(self, name)
                require(value == only, name, value, f"{only} with compat reference, as in the authors' code")

    def _check_unread(self) -> None:
        dpo = ("dpo_reward_scale", "dpo_reward_norm", "dpo_reward_clip", "reward_shaping")
        resets = ("reset_min", "reset_source", "reset_curriculum", "reset_cut")
        own_resets, refines = self.reset_source == "rollout", self.dpo_refine != "none"
        critic = ("vf_coef", "cliprange_value", "value_learning_rate", "head_learning_rate")
        critic += ("lam", "truncation", "critic_model_path")
        no_grpo = f"when advantage_estimator is {self.advantage_estimator}, not grpo"
        clipped = ("cliprange", "cliprange_high", "dual_clip", "entropy_coef", "loss_type", "loss_aggregation")
        clipped += ("target_kl", "sampler_is_cap", "scale_rewards")
        in_pairs, rebel = self.update == "pair", self.pair_loss == "rebel"
        no_critic = f"with advantage_estimator {self.advantage_estimator}"
        grouped, one_step = self.num_generations > 1, self.num_ppo_epochs * self.num_mini_batches == 1
        at_default(
            self,
            [
                (self.has_dpo_rewards, "without a dpo_model_path", dpo),
                (refines, "without dpo_refine", ("dpo_refine_beta", "dpo_refine_learning_rate")),
                (bool(self.reward_functions), "without reward_functions", ("reward_weights",)),
                (self.reset_prob > 0, "when reset_prob is 0", (*resets, "reset_group")),
                (own_resets, "when reset_source is not rollout", ("reset_band",)),
                (own_resets or refines, "without reset_source rollout and dpo_refine", ("success_threshold",)),
                (grouped, "when num_generations is 1", ("reset_group", "share_trunks")),
                (not one_step, "when an update has only one step, which is always taken", ("target_kl",)),
                (self.advantage_estimator == "gae", no_critic, critic),
                (self.advantage_estimator == "grpo", no_grpo, ("scale_rewards",)),
                (
                    self.loss_type == "ppo",
                    f"with loss_type {self.loss_type}, which has a fixed one",
                    ("loss_aggregation",),
                ),
                (self.loss_type != "cispo", "with loss_type cispo", ("cliprange", "dual_clip")),
                (not in_pairs, "with update pair", clipped),
                (in_pairs, "when update is clipped", ("pair_loss", "pair_select", "pair_eta", "pair_beta")),
                (self.overlong_buffer > 0, "when overlong_buffer is 0", ("overlong_penalty",)),
                (rebel, "when pair_loss is not rebel", ("pair_eta",)),
                (not rebel, "when pair_loss is rebel", ("pair_beta",)),
                (
                    self.engine == "vllm",
                    "when engine is transformers",
                    ("vllm_gpu_memory_utilization", "vllm_devices", "vllm_enable_sleep_mode"),
                ),
                (self.kl_target > 0, "without a kl_target", ("kl_horizon",)),
                (bool(self.psi), "without psi", ("psi_opponents",)),
                (self.psi == "clipped_logit", "when psi is not clipped_logit", ("psi_clip",)),
            ],
        )


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(PPOConfig):
    """Trains a policy by GRPO (Shao et al. 2024, arXiv 2402.03300): PPO's loss with advantages from groups of responses
    to one prompt, without a critic. The defaults are those of TRL's GRPOConfig: no KL, one pass over each batch, groups
    of 8."""

    learning_rate: float = 1e-6
    num_train_epochs: float = 3.0
    response_length: int = 256
    temperature: float = 1.0
    kl_coef: float = 0.0
    num_ppo_epochs: int = 1
    loss_type: Literal["ppo", "grpo", "dapo", "bnpo", "dr_grpo", "cispo", "gspo"] = "dapo"
    advantage_estimator: Literal["gae", "rloo", "grpo", "opo", "prime"] = "grpo"
    num_generations: int = 8


@dataclass(frozen=True, kw_only=True)
class DRPOConfig(PPOConfig):
    """Trains a policy by DR-PO (Chang et al. 2024, arXiv 2404.08495): PPO whose episodes start inside responses of the
    dataset. Four defaults are the paper's (Table 5); the recipe drpo_tldr has all of the paper's settings."""

    reset_prob: float = 1.0
    missing_eos_score: float | None = -1.0
    whiten_rewards: bool = True
    adam_epsilon: float = 1e-5


@dataclass(frozen=True, kw_only=True)
class RTOConfig(PPOConfig):
    """Trains a policy by RTO (Zhong et al. 2024, arXiv 2404.18922): PPO with token rewards from a DPO model. Two
    defaults are the paper's (App. D); the recipe rto_ultrafeedback has all of the paper's settings."""

    kl_coef: float = 0.01
    temperature: float = 1.0
