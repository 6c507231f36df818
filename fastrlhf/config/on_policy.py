"""The on-policy trainer, with the defaults of PPO, of DR-PO and of RTO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastrlhf.config.checks import above_0, at_default, at_least, require
from fastrlhf.config.train import TrainConfig

KL_ALLOWED = {"reward": "k1 or exact", "loss": "k2, k3 or exact"}
KL_REFUSED = {
    ("reward", "k2"): "the mean of k2 is not the KL",
    ("reward", "k3"): "the policy gradient of k3 is that of KL(policy || reference) minus that of "
    "KL(reference || policy)",
    ("loss", "k1"): "the gradient of k1 is 0 in the mean, nothing but noise",
}
"""(kl_placement, kl_estimator) -> what is wrong with it (Liu et al. 2025, arXiv 2510.01555; Tang and Munos 2025, arXiv
2506.09477)."""


@dataclass(frozen=True, kw_only=True)
class PPOConfig(TrainConfig):
    """PPO with a critic, DR-PO by `reset_prob`, RTO by `dpo_model_path`, and any mix of them. `model_name_or_path` is
    the SFT model, which is also the reference."""

    learning_rate: float = 3e-6
    per_device_train_batch_size: int = 64
    reward_model_path: str = ""
    """The judge; the critic starts from it too, where there is one. As `adapter/` of a run that started from
    `model_name_or_path` it shares those weights in memory; so do the other models below."""
    eval_reward_model_path: str = ""
    """A second judge, for evaluation alone: where its score falls while the training judge's rises, the policy is
    over-optimised. Empty: none."""
    ref_reward_offload: bool = False
    """Keep the reference, the judges and the DPO model in CPU memory but while they score; weights that the policy or
    the critic shares with them (`use_peft`) stay."""
    total_episodes: int = 0
    """Episodes of the run, where `max_steps` is not given; 0: by epochs over the prompts."""
    num_train_epochs: float = 1.0
    num_ppo_epochs: int = 4
    """Passes over each batch of episodes."""
    num_mini_batches: int = 1
    """Optimiser steps per pass."""
    response_length: int = 53
    """Tokens of a response at most; the tokens of a reset count."""
    temperature: float = 0.7
    """Divides the logits when sampling and in every log-prob of the run."""
    rollout_batch_size: int = 64
    """Episodes that are generated side by side."""
    decode: Literal["eager", "cuda_graph"] = "eager"
    """How the transformers engine takes its steps. cuda_graph: a step is recorded and replayed, which gives the same
    samples without the cost of launching kernels; a model that cannot be recorded is refused. Not yet run on a GPU."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What generates them. vllm: an engine of vLLM in this process (install fastrlhf[vllm]), which is handed the
    weights of the policy before each batch; evaluation stays with transformers. Not yet run on a GPU."""
    vllm_gpu_memory_utilization: float = 0.3
    """Share of the GPU's memory that vLLM takes, its copy of the weights included."""
    psi: str = ""
    """Instead of its score r a response earns the mean over `psi_opponents` y' of Psi(sigmoid(r(y) - r(y'))), PsiPO's g
    (Azar et al. 2023, arXiv 2310.12036, eq. 7); kl_coef is then tau. identity (IPO), logit, clipped_logit, or a
    function of yours, as module:function or file.py:function. Empty: the score itself."""
    psi_clip: float = 3.0
    """Nats; of clipped_logit."""
    psi_opponents: Literal["reference", "chosen", "rejected", "rollouts"] = "reference"
    """The response of the dataset to the same prompt, or the other rollouts of its group."""
    missing_eos_penalty: float | None = None
    """Subtracted from the score of a response that did not end (TRL)."""
    missing_eos_score: float | None = None
    """Replaces the score of a response that did not end (the DR-PO paper: -1)."""
    truncation: Literal["terminal", "bootstrap"] = "terminal"
    """What the end of the budget is to a response without an EOS. terminal: its end, where it is judged as it is.
    bootstrap: a pause (Pardo et al. 2018, arXiv 1712.00378): the return goes on with the critic's value of the state
    after the last token, which expects the score of the whole response, so nothing but its tokens' rewards is paid."""
    kl_coef: float = 0.05
    """Weight of the KL to the reference, per nat: each token earns -kl_coef * log(policy / reference), unless the next
    two keys say otherwise. RTO's beta2."""
    kl_placement: Literal["reward", "loss"] = "reward"
    """reward: what a token does to the KL of later tokens counts, through the returns. loss: the KL of each state
    alone."""
    kl_estimator: Literal["k1", "k2", "k3", "exact"] = "k1"
    """In the reward k1, log(policy / reference) of the token drawn. In the loss k2 or k3, which share a gradient and
    differ in what is logged. In either exact, over the whole vocabulary; in the reward that is of the states that
    follow, with k1 of the token itself."""
    kl_target: float = 0.0
    """Nats per episode that `kl_coef` is steered to (Ziegler et al. 2019); 0: it stays as it is."""
    kl_horizon: int = 10_000
    """Episodes over which it is: it grows or shrinks by at most 0.2 / kl_horizon per episode."""
    max_kl: float | None = None
    """Nats per response: training stops where `objective/kl`, of the sampled tokens, exceeds it. null: no limit."""
    score_coef: float = 1.0
    """Weight of the judge's score. RTO's beta3 (arXiv 2404.18922, eq. 4.7)."""
    score_norm: Literal["none", "running"] = "none"
    """Of the score, before its weight. running: minus the mean of all scores of the run so far, over their standard
    deviation."""
    score_clip: float = 0.0
    """Scores are clipped to +-score_clip, after score_norm; 0 is off."""
    dpo_model_path: str = ""
    """A model trained by DPO or IPO, or its `adapter/`, that rewards every token by log(it / its reference) at
    temperature 1: RTO's r_DPO. Empty: no such reward."""
    dpo_ref_model_path: str = ""
    """The reference of its training; empty: `model_name_or_path`."""
    dpo_reward_scale: float = 0.05
    """Reward per nat of that log-ratio, the DPO beta included; negative is allowed. RTO's beta1."""
    dpo_reward_norm: Literal["none", "running"] = "none"
    """Of that log-ratio, before the scale, which is then per standard deviation. running: as of the score, over tokens;
    a response's sum is no longer the reward that its model implies, and does not grow with its length."""
    dpo_reward_clip: float = 0.0
    """Each token's DPO reward is clipped to +-dpo_reward_clip, after the scale; 0 is off (the authors' code: 0.05)."""
    reward_shaping: Literal["token", "sentence", "eos", "rs", "none"] = "token"
    """Where the DPO rewards are paid: at each token, at ends of sentences (. ! ? or a new line), at the end of the
    response, at each token and taken back at the end (rs), nowhere (then the model is not loaded)."""
    length_coef: float = 0.0
    """Each sampled token costs this much."""
    reward_function: str = ""
    """One more reward: "module:function" or "file.py:function" of a Rollout, giving a number, or one per token. One
    with a parameter called completions is of texts: (prompts, completions, **kwargs), giving a list of numbers."""
    reward_function_norm: Literal["none", "running"] = "none"
    """Of what each function gives. running: as of the score, over its numbers, or over those of tokens."""
    reward_function_clip: float = 0.0
    """What a function gives is clipped to +-reward_function_clip, after reward_function_norm; 0 is off."""
    cliprange: float = 0.2
    """The ratio is clipped to 1 - cliprange .. 1 + cliprange."""
    cliprange_high: float | None = None
    """The upper one, where it differs (DAPO: 0.28); null: `cliprange`."""
    dual_clip: float | None = None
    """Where the advantage A is negative the loss is at most -dual_clip * A (Ye et al. 2020: 3); null is off."""
    entropy_coef: float = 0.0
    """Weight of the entropy of the policy, in nats per token, which the loss rewards."""
    loss_aggregation: Literal["token", "sequence"] = "token"
    """How the policy's loss averages. token: over all tokens of the mini-batch; sequence: over the tokens of an
    episode, then over episodes."""
    target_kl: float | None = None
    """Nats per token: once a mini-batch finds the policy further than this from the sampler, that step and the others
    left in the update are not taken; null is off."""
    sampler_is_cap: float | None = None
    """For an engine whose log-probs are not the trainer's: each token's loss is weighted by min(trainer / engine,
    sampler_is_cap), truncated importance sampling (Yao et al. 2025: 2); null is off."""
    cliprange_value: float = 0.2
    """The value moves this far from its value at sampling time, at most."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    value_learning_rate: float | None = None
    """The critic's; null: `learning_rate`."""
    value_warmup_steps: int = 0
    """First updates, in which only the critic is trained."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """GAE's lambda."""
    advantage_estimator: Literal["gae", "rloo", "grpo"] = "gae"
    """gae needs a critic. The others have none and give every token the advantage of its episode among the
    `num_generations` that start where it does: rloo its return minus the mean of the others', grpo minus the mean of
    all, over their standard deviation."""
    whiten_rewards: bool = False
    """Divide rewards by their standard deviation over the batch; the mean stays."""
    reset_prob: float = 0.0
    """Share of episodes that start inside a dataset response; 0 is PPO."""
    reset_min: int = 1
    """Fewest tokens of a reset: 1 as published, 0 so that the initial state is among the reset states."""
    reset_source: Literal["reference", "chosen", "both", "sample"] = "reference"
    """Which response is copied from. both: one of the two, with equal probability. sample: one that the frozen
    reference policy writes to the prompt, at `temperature` (PPO++)."""
    reset_curriculum: float = 0.0
    """Share of the run over which resets move from the end of a response to its beginning: k is uniform on {m, ..., L -
    1}, and m falls linearly from L - 1 to `reset_min`. 0: m is `reset_min` throughout, as published."""
    num_generations: int = 1
    """Episodes per prompt of a batch, which has that many times fewer prompts."""
    reset_group: Literal["point", "response"] = "point"
    """Where they start: all at one reset point, or each at a point of its own in one response."""
    share_trunks: bool = True
    """Compute the prefixes of a group once, its episodes hanging on them; the same numbers with fewer tokens."""
    compat: Literal["fixed", "reference"] = "fixed"
    """fixed: an episode is its sampled tokens up to the EOS. reference: what the authors' released code does:
    sampling goes on past the EOS, and KL, values and whitening include the reset tokens and what follows the EOS."""
    num_sample_generations: int = 10
    """Times per run that samples are written to samples.jsonl; 0 is never."""

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        at_least(self, 1, "num_ppo_epochs", "num_mini_batches", "response_length", "rollout_batch_size")
        at_least(self, 1, "num_generations", "kl_horizon")
        at_least(self, 0, "kl_coef", "vf_coef", "total_episodes", "num_sample_generations")
        at_least(self, 0, "score_coef", "score_clip", "dpo_reward_clip", "length_coef", "reward_function_clip")
        at_least(self, 0, "kl_target", "entropy_coef", "value_warmup_steps")
        above_0(self, "temperature", "cliprange", "cliprange_value")
        share = self.vllm_gpu_memory_utilization
        require(0 < share < 1, "vllm_gpu_memory_utilization", share, "above 0 and below 1")
        require(self.decode == "eager" or self.device != "cpu", "decode", self.decode, "eager where device is cpu")
        if self.engine == "vllm":
            require(not self.model_config, "model_config", self.model_config, "empty with engine vllm, which reads it")
            require(self.temperature >= 0.01, "temperature", self.temperature, "at least 0.01 with engine vllm")
        optional = ("value_learning_rate", "cliprange_high", "target_kl", "max_kl")
        above_0(self, *(name for name in optional if getattr(self, name) is not None))
        if self.sampler_is_cap is not None:
            at_least(self, 1, "sampler_is_cap")
        if self.dual_clip is not None:
            require(self.dual_clip > 1, "dual_clip", self.dual_clip, "above 1, where no update begins")
        if self.missing_eos_penalty is not None:
            at_least(self, 0, "missing_eos_penalty")
        for name in ("gamma", "lam", "reset_prob", "reset_curriculum"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in 0..1")
        above_0(self, "psi_clip")
        alone = bool(self.psi) and self.psi_opponents == "rollouts" and self.num_generations == 1
        require(not alone, "num_generations", self.num_generations, "at least 2 where psi_opponents is rollouts")
        require(self.reset_min in (0, 1), "reset_min", self.reset_min, "0 or 1")
        require(
            self.missing_eos_penalty is None or self.missing_eos_score is None,
            "missing_eos_penalty",
            self.missing_eos_penalty,
            "null where missing_eos_score is given: one subtracts, the other replaces",
        )
        require(
            self.batch_size % self.num_generations == 0,
            "num_generations",
            self.num_generations,
            f"a divisor of the batch of {self.batch_size} episodes",
        )
        if self.advantage_estimator != "gae":
            because = f"with advantage_estimator {self.advantage_estimator}"
            size, start, compat = self.num_generations, self.reset_group, self.compat
            require(size >= 2, "num_generations", size, f"at least 2 {because}, which compares episodes")
            require(start == "point", "reset_group", start, f"point {because}, which compares episodes of one state")
            require(self.gamma == 1, "gamma", self.gamma, f"1 {because}, which knows whole episodes only")
            require(compat == "fixed", "compat", compat, f"fixed {because}: the authors' code has a critic")
            warmup = self.value_warmup_steps
            require(warmup == 0, "value_warmup_steps", warmup, f"0 {because}, which has no critic")
        groups = self.batch_size // self.num_generations
        require(
            groups % self.num_mini_batches == 0,
            "num_mini_batches",
            self.num_mini_batches,
            f"a divisor of the batch of {groups} {'episodes' if groups == self.batch_size else 'groups of episodes'}",
        )
        require(self.response_length < self.max_length, "response_length", self.response_length, "below max_length")
        require(
            not self.dpo_ref_model_path or bool(self.dpo_model_path),
            "dpo_ref_model_path",
            self.dpo_ref_model_path,
            "empty where there is no dpo_model_path",
        )
        self._check_kl()
        if self.compat == "reference":
            for name, only in (("kl_placement", "reward"), ("loss_aggregation", "token"), ("truncation", "terminal")):
                value = getattr(self, name)
                require(value == only, name, value, f"{only} under compat reference, as in the authors' code")
        dpo = ("dpo_reward_scale", "dpo_reward_norm", "dpo_reward_clip", "reward_shaping")
        resets = ("reset_min", "reset_source", "reset_curriculum")
        critic = ("vf_coef", "cliprange_value", "value_learning_rate", "lam", "truncation")
        no_critic = f"with advantage_estimator {self.advantage_estimator}"
        grouped, one_step = self.num_generations > 1, self.num_ppo_epochs * self.num_mini_batches == 1
        at_default(
            self,
            [
                (bool(self.dpo_model_path), "without a dpo_model_path", dpo),
                (self.reset_prob > 0, "where reset_prob is 0", (*resets, "reset_group")),
                (grouped, "where num_generations is 1", ("reset_group", "share_trunks")),
                (not one_step, "where an update is one step, which is always taken", ("target_kl",)),
                (self.advantage_estimator == "gae", no_critic, critic),
                (self.engine == "vllm", "where engine is transformers", ("vllm_gpu_memory_utilization",)),
                (self.kl_target > 0, "without a kl_target", ("kl_horizon",)),
                (bool(self.psi), "without psi", ("psi_opponents",)),
                (self.psi == "clipped_logit", "where psi is not clipped_logit", ("psi_clip",)),
            ],
        )
        if self.truncation == "bootstrap":
            for name in ("missing_eos_penalty", "missing_eos_score"):
                value, rule = getattr(self, name), "null where truncation is bootstrap, which pays no score to change"
                require(value is None, name, value, rule)
            shaping, rule = self.reward_shaping, "token or none where truncation is bootstrap, with no end to pay at"
            require(shaping in ("token", "none"), "reward_shaping", shaping, rule)

    def _check_kl(self) -> None:
        placement, estimator = self.kl_placement, self.kl_estimator
        if (placement, estimator) == ("loss", "exact"):
            rule = "false with kl_estimator exact in the loss, which reads the head of the reference"
            require(not self.ref_reward_offload, "ref_reward_offload", True, rule)
        if self.decode == "cuda_graph" and self.reset_source == "sample":
            rule = "false where decode cuda_graph records the reference's weights, which reset_source sample reads"
            require(not self.ref_reward_offload, "ref_reward_offload", True, rule)
        reason = KL_REFUSED.get((placement, estimator))
        require(reason is None, "kl_estimator", estimator, f"{KL_ALLOWED[placement]} in the {placement}: {reason}")
        if (placement, estimator) == ("reward", "exact"):
            advantage, rule = self.advantage_estimator, "gae or rloo with kl_estimator exact in the reward"
            require(advantage != "grpo", "advantage_estimator", advantage, f"{rule}: grpo rescales every group")
        if self.kl_target:
            coef, horizon, batch = self.kl_coef, self.kl_horizon, self.batch_size
            require(coef > 0, "kl_coef", coef, "above 0 where kl_target is given, which multiplies it")
            require(horizon >= batch, "kl_horizon", horizon, f"at least the batch of {batch} episodes")


@dataclass(frozen=True, kw_only=True)
class DRPOConfig(PPOConfig):
    """PPO from reset states, with the paper's settings (Chang et al. 2024, arXiv 2404.08495, Table 5)."""

    reset_prob: float = 1.0
    missing_eos_score: float | None = -1.0
    whiten_rewards: bool = True
    adam_epsilon: float = 1e-5


@dataclass(frozen=True, kw_only=True)
class RTOConfig(PPOConfig):
    """PPO on token rewards of a DPO model, with the paper's settings (Zhong et al. 2024, arXiv 2404.18922, App. D)."""

    kl_coef: float = 0.01
    temperature: float = 1.0
