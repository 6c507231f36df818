"""Keys of on-policy runs that define the reward of a response and of its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastrlhf.config.checks import above_0, at_least, require

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
class RewardKeys:
    """The reward model (judge), reward functions, the KL, the token rewards of a DPO model, and the treatment of a
    missing EOS."""

    reward_model_path: str = ""
    """The reward model that scores responses. Empty: only `reward_functions` give rewards. The critic starts from it
    too, unless `critic_model_path` says otherwise. If it is the `adapter/` of a run that started from
    `model_name_or_path`, it shares those weights in memory; the same holds for the other models below."""
    eval_reward_model_path: str = ""
    """A second reward model, for evaluation only: where its score falls while the first one's rises, the policy is
    over-optimised. Empty: none."""
    ref_reward_offload: bool = False
    """Keep the reference, the reward models and the DPO model in CPU memory except while they score; weights that the
    policy or the critic shares with them (`use_peft`) stay."""
    reward_functions: tuple[str, ...] = ()
    """Functions that reward responses: "module:function", "file.py:function", or a ready-made one: exact_match,
    math_answer, hash_format, boxed_format, think_format, num_tokens. One with a parameter `prompts`, `completions` or
    `completion_ids` is called as TRL's are: with lists of one item per response, including every column of the dataset,
    and returns a list of numbers. Any other function is called with one Rollout and returns a number, or one per
    token."""
    reward_weights: tuple[float, ...] = ()
    """Weight of each reward function, in the same order; empty: 1 each."""
    reward_function_norm: Literal["none", "running"] = "none"
    """Normalisation of each function's output, before its weight. running: subtract the mean of all its outputs in the
    run so far and divide by their standard deviation."""
    reward_function_clip: float = 0.0
    """The output of a function is clipped to +-reward_function_clip, after reward_function_norm and before its weight;
    0 is off."""
    reward_retries: int = 0
    """Number of retries of a reward function that raises, after 1, 2, 4, ... seconds; if the last one fails too, the
    run ends."""
    psi: str = ""
    """The reward of a response is, instead of its score r, the mean over `psi_opponents` y' of Psi(sigmoid(r(y) -
    r(y'))), PsiPO's g (Azar et al. 2023, arXiv 2310.12036, eq. 7); kl_coef is then tau. identity (IPO), logit,
    clipped_logit, or your own function, as module:function or file.py:function. Empty: the score itself."""
    psi_clip: float = 3.0
    """Bound of clipped_logit, in nats."""
    psi_opponents: Literal["reference", "chosen", "rejected", "rollouts"] = "reference"
    """What psi compares a response with: the dataset's response to the same prompt, or the other rollouts of the
    group."""
    missing_eos_penalty: float | None = None
    """Subtracted from the reward of a response that did not end (TRL)."""
    missing_eos_score: float | None = None
    """Replaces the score of a response that did not end (the DR-PO paper: -1). It needs a reward model."""
    truncation: Literal["terminal", "bootstrap"] = "terminal"
    """How a response without an EOS is treated at the length limit. terminal: it ends there and is scored like any
    other. bootstrap: it counts as interrupted (Pardo et al. 2018, arXiv 1712.00378): the return goes on with the
    critic's value of the state after the last token, which expects the score of the whole response, so only token
    rewards are paid."""
    kl_coef: float = 0.05
    """Weight of the KL to the reference, per nat: each token earns -kl_coef * log(policy / reference), unless the next
    two keys say otherwise. RTO's beta2."""
    kl_placement: Literal["reward", "loss"] = "reward"
    """reward: the KL is part of the returns, so the effect of a token on the KL of later tokens counts. loss: only the
    KL of each state itself counts."""
    kl_estimator: Literal["k1", "k2", "k3", "exact"] = "k1"
    """In the reward k1, log(policy / reference) of the token drawn. In the loss k2 or k3, which share a gradient and
    differ in what is logged. In both, exact: the KL over the whole vocabulary; in the reward, a token is charged its
    own k1 and the exact KL of the states that follow."""
    kl_target: float = 0.0
    """Target KL in nats per episode, towards which `kl_coef` is adapted (Ziegler et al. 2019); 0: `kl_coef` is
    constant."""
    kl_horizon: int = 10_000
    """Horizon, in episodes, of the adaptation of `kl_coef`: it grows or shrinks by at most 0.2 / kl_horizon per
    episode."""
    max_kl: float | None = None
    """Training stops when `objective/kl` (nats per response, over the sampled tokens) exceeds this. null: no limit."""
    score_coef: float = 1.0
    """Weight of the reward model's score. RTO's beta3 (arXiv 2404.18922, eq. 4.7)."""
    score_norm: Literal["none", "running"] = "none"
    """Normalisation of the score, before its weight. running: subtract the mean of all scores of the run so far and
    divide by their standard deviation."""
    score_clip: float = 0.0
    """Scores are clipped to +-score_clip, after score_norm; 0 is off."""
    dpo_model_path: str = ""
    """A model trained by DPO or IPO, or its `adapter/`, that gives every token the reward log(model / its reference) at
    temperature 1: RTO's r_DPO. Empty: no such reward."""
    dpo_ref_model_path: str = ""
    """The reference that the DPO model was trained against; empty: `model_name_or_path`."""
    dpo_reward_scale: float = 0.05
    """Reward per nat of that log-ratio, the DPO beta included; negative is allowed. RTO's beta1."""
    dpo_reward_norm: Literal["none", "running"] = "none"
    """Normalisation of that log-ratio, before the scale, which is then per standard deviation. running: as for the
    score, but over tokens; the sum over a response is then no longer the implicit reward of the DPO model and does not
    grow with length."""
    dpo_reward_clip: float = 0.0
    """Each token's DPO reward is clipped to +-dpo_reward_clip, after the scale; 0 is off (the authors' code: 0.05)."""
    reward_shaping: Literal["token", "sentence", "eos", "rs", "none"] = "token"
    """Where the DPO rewards are paid: at each token, at ends of sentences (. ! ? or a new line), at the end of the
    response, at each token with their sum subtracted at the end (rs), or nowhere (the model is then not loaded)."""
    length_coef: float = 0.0
    """Cost of each sampled token."""

    def check_rewards(self) -> None:
        at_least(self, 1, "kl_horizon")
        at_least(self, 0, "kl_coef", "kl_target", "score_coef", "score_clip", "dpo_reward_clip", "length_coef")
        at_least(self, 0, "reward_function_clip", "reward_retries")
        above_0(self, "psi_clip")
        if self.max_kl is not None:
            above_0(self, "max_kl")
        if self.missing_eos_penalty is not None:
            at_least(self, 0, "missing_eos_penalty")
        num, weights = len(self.reward_functions), self.reward_weights
        require(not weights or len(weights) == num, "reward_weights", weights, f"one per reward function, {num} here")
        require(
            self.missing_eos_penalty is None or self.missing_eos_score is None,
            "missing_eos_penalty",
            self.missing_eos_penalty,
            "null where missing_eos_score is given: one subtracts, the other replaces",
        )
        require(
            not self.dpo_ref_model_path or bool(self.dpo_model_path),
            "dpo_ref_model_path",
            self.dpo_ref_model_path,
            "empty where there is no dpo_model_path",
        )
        reason = KL_REFUSED.get((self.kl_placement, self.kl_estimator))
        rule = f"{KL_ALLOWED[self.kl_placement]} in the {self.kl_placement}: {reason}"
        require(reason is None, "kl_estimator", self.kl_estimator, rule)
        if (self.kl_placement, self.kl_estimator) == ("loss", "exact"):
            rule = "false with kl_estimator exact in the loss, which reads the head of the reference"
            require(not self.ref_reward_offload, "ref_reward_offload", True, rule)
        if self.kl_target:
            require(self.kl_coef > 0, "kl_coef", self.kl_coef, "above 0 where kl_target is given, which multiplies it")

    def check_truncation(self) -> None:
        if self.truncation == "bootstrap":
            for name in ("missing_eos_penalty", "missing_eos_score"):
                value, rule = getattr(self, name), "null where truncation is bootstrap, which pays no score to change"
                require(value is None, name, value, rule)
            shaping, rule = self.reward_shaping, "token or none where truncation is bootstrap, with no end to pay at"
            require(shaping in ("token", "none"), "reward_shaping", shaping, rule)
