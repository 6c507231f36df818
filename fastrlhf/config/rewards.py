"""Keys of on-policy runs that define the reward of a response and of its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastrlhf.config.checks import above_0, at_least, require

KL_ALLOWED = {"reward": "k1 or exact", "loss": "k2, k3 or exact"}
KL_REFUSED = {
    ("reward", "k2"): "the mean of k2 is not the KL",
    ("reward", "k3"): "its policy gradient is the gradient of KL(policy || reference) minus that of "
    "KL(reference || policy)",
    ("loss", "k1"): "the expected gradient of k1 is 0, so it adds only noise",
}
"""(kl_placement, kl_estimator) -> why this combination is refused (Liu et al. 2025, arXiv 2510.01555; Tang and Munos
2025, arXiv 2506.09477)."""


@dataclass(frozen=True, kw_only=True)
class RewardKeys:
    """Keys of the reward model (judge), reward functions, the KL, the token rewards of a DPO model, and the treatment
    of a missing EOS."""

    reward_model_path: str = ""
    """Folder or hub name of the reward model that scores responses. Empty: only `reward_functions` give rewards. The
    critic also starts from it, unless `critic_model_path` is given. If this or another of the models below is the
    `adapter/` of a run that started from `model_name_or_path`, it shares the weights of the policy in memory."""
    eval_reward_model_path: str = ""
    """A second reward model, for evaluation only. If its score falls while that of the first reward model rises, the
    policy is over-optimised. Empty: none."""
    ref_reward_offload: bool = False
    """Keep the reference, the reward models and the DPO model in CPU memory except while they score. Weights that they
    share with the policy or the critic (`use_peft`) stay on the GPU."""
    reward_functions: tuple[str, ...] = ()
    """Functions that reward responses: your own, given as "module:function" or "file.py:function", or built in:
    exact_match, math_answer, hash_format, boxed_format, think_format, num_tokens. A function with a parameter
    `prompts`, `completions` or `completion_ids` is called as in TRL: with lists that have one item per response,
    including every column of the dataset; it returns a list of numbers. Any other function is called with one Rollout
    and returns one number, or a list with one number per token."""
    reward_weights: tuple[float, ...] = ()
    """Weight of each reward function, in the same order; empty: 1 each."""
    reward_function_norm: Literal["none", "running"] = "none"
    """Normalisation of each function's outputs, before they are multiplied by its weight. running: subtract the mean of
    all outputs of this function in the run so far and divide by their standard deviation."""
    reward_function_clip: float = 0.0
    """Each output of a function is clipped to +-reward_function_clip, after reward_function_norm and before the weight.
    0: no clipping."""
    reward_retries: int = 0
    """Number of retries after a reward function has raised an exception, with waits of 1, 2, 4, ... seconds. If the
    last retry fails too, the run ends."""
    psi: str = ""
    """Replaces the score r(y) of a response y by the mean over the `psi_opponents` y' of psi(sigmoid(r(y) - r(y'))),
    which is the objective of PsiPO (Azar et al. 2023, arXiv 2310.12036, eq. 7) with kl_coef as tau. psi is identity
    (IPO), logit, clipped_logit, or your own function, given as module:function or file.py:function. Empty: the reward
    is the score."""
    psi_clip: float = 3.0
    """Bound of psi clipped_logit, in nats: its values are clipped to +-psi_clip."""
    psi_opponents: Literal["reference", "chosen", "rejected", "rollouts"] = "reference"
    """Responses that psi compares a response with. reference, chosen, rejected: the response to the same prompt in that
    column of the dataset. rollouts: the other rollouts of its group."""
    missing_eos_penalty: float | None = None
    """Amount subtracted from the reward of a response without an EOS, as in TRL; null: none."""
    missing_eos_score: float | None = None
    """Score of a response without an EOS, in place of the reward model's score (-1 in the DR-PO paper); null: no
    replacement."""
    truncation: Literal["terminal", "bootstrap"] = "terminal"
    """How a response that reaches the length limit without an EOS is treated. terminal: it ends there and is scored
    like every other response. bootstrap: it counts as interrupted (Pardo et al. 2018, arXiv 1712.00378): it gets token
    rewards only, and the critic's value of the state after its last token replaces the rest of its return."""
    success_threshold: float | None = None
    """Lowest outcome at which a response counts as a success, read by reset_source rollout and dpo_refine outcome. The
    outcome is the score plus the weighted rewards of the reward functions, without normalisation and without the KL.
    null: the mean outcome of the group, so that no response fails in a group of equal outcomes; dpo_refine needs a
    number."""
    kl_coef: float = 0.05
    """Weight of the KL to the reference, in reward per nat. By default each token is rewarded with -kl_coef *
    log(policy / reference); `kl_placement` and `kl_estimator` change this. It is RTO's beta2."""
    kl_placement: Literal["reward", "loss"] = "reward"
    """Where the KL enters. reward: it is part of the rewards, so a token is also charged for the KL of the tokens that
    follow it. loss: it is a term of the loss, which counts only the KL at each token itself."""
    kl_estimator: Literal["k1", "k2", "k3", "exact"] = "k1"
    """Estimator of the KL. k1, for kl_placement reward only: log(policy / reference) of the sampled token. k2 and k3,
    for kl_placement loss only: they have the same gradient and log different estimates. exact, for both: the KL over
    the whole vocabulary; in the reward, a token is charged its own k1 and the exact KL at the tokens that follow."""
    kl_target: float = 0.0
    """`kl_coef` is adapted so that the KL approaches this target, in nats per episode (Ziegler et al. 2019). 0:
    `kl_coef` is constant."""
    kl_horizon: int = 10_000
    """Speed at which `kl_coef` adapts to `kl_target`: it changes by at most a factor 1 +- 0.2 / kl_horizon per
    episode."""
    max_kl: float | None = None
    """Training stops when `objective/kl` (nats per response, over the sampled tokens) exceeds this. null: no limit."""
    score_coef: float = 1.0
    """Weight of the reward model's score in the reward. It is RTO's beta3 (arXiv 2404.18922, eq. 4.7)."""
    score_norm: Literal["none", "running"] = "none"
    """Normalisation of the score, before it is multiplied by score_coef. running: subtract the mean of all scores of
    the run so far and divide by their standard deviation."""
    score_clip: float = 0.0
    """Scores are clipped to +-score_clip, after score_norm. 0: no clipping."""
    dpo_model_path: str = ""
    """A model trained by DPO or IPO, or the `adapter/` of its run. Each token is rewarded with its log-ratio between
    this model and its reference, at temperature 1 (RTO's r_DPO). Empty: no such reward."""
    dpo_refine: Literal["none", "outcome"] = "none"
    """Training of the DPO model during the run. outcome: before each update of the policy, it is trained to predict
    which responses of the batch succeed (PRIME, arXiv 2502.01456). Its weights at the start of the run are those of
    `dpo_model_path`, or, if that is empty, of `model_name_or_path`."""
    dpo_refine_beta: float = 0.05
    """Scale of the prediction: a response is predicted to succeed with probability sigmoid(dpo_refine_beta *
    log(DPO model / its reference)), the log-ratio summed over its tokens."""
    dpo_refine_learning_rate: float = 1e-6
    """Peak learning rate of the DPO model with dpo_refine outcome. 0: the DPO model does not change."""
    dpo_ref_model_path: str = ""
    """The reference with which the DPO model was trained. Empty: `model_name_or_path`."""
    dpo_reward_scale: float = 0.05
    """Reward per nat of the DPO log-ratio; it includes the beta of DPO and may be negative. It is RTO's beta1."""
    dpo_reward_norm: Literal["none", "running", "batch"] = "none"
    """Normalisation of the DPO log-ratio, before it is multiplied by dpo_reward_scale. running: as for the score, with
    mean and standard deviation over tokens. The sum over a response is then no longer the DPO model's implicit reward
    and does not grow with length. batch: divide by the largest absolute sum from a token to the end of its response, in
    the batch (the released code of PRIME)."""
    dpo_reward_clip: float = 0.0
    """The DPO reward of each token is clipped to +-dpo_reward_clip, after dpo_reward_scale. 0: no clipping (the RTO
    authors' code clips at 0.05)."""
    reward_shaping: Literal["token", "sentence", "eos", "rs", "none"] = "token"
    """Tokens to which the DPO rewards are given. token: each token gets its own. sentence: the last token of a sentence
    (. ! ? or a new line) gets the sum over the sentence. eos: the last token of the response gets the whole sum. rs:
    each token gets its own, and their sum is subtracted again at the last token. none: no token; the DPO model is not
    loaded."""
    length_coef: float = 0.0
    """Amount subtracted from the reward of each sampled token, a length penalty."""

    overlong_buffer: int = 0
    """Number of tokens before `response_length` over which a penalty for long responses grows linearly from 0 to
    `overlong_penalty` (DAPO's soft overlong punishment, arXiv 2503.14476, eq. 13); 0: no penalty."""
    overlong_penalty: float = 1.0
    """Subtracted from the reward of a response of `response_length` tokens."""

    @property
    def has_dpo_rewards(self) -> bool:
        """Whether a DPO model rewards the tokens."""
        return bool(self.dpo_model_path) or self.dpo_refine != "none"

    def check_rewards(self) -> None:
        at_least(self, 1, "kl_horizon")
        at_least(self, 0, "kl_coef", "kl_target", "score_coef", "score_clip", "dpo_reward_clip", "length_coef")
        at_least(self, 0, "reward_function_clip", "reward_retries", "overlong_buffer", "overlong_penalty")
        at_least(self, 0, "dpo_refine_learning_rate")
        above_0(self, "psi_clip", "dpo_refine_beta")
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
            "null when missing_eos_score is given: the penalty subtracts and the score replaces",
        )
        require(
            not self.dpo_ref_model_path or self.has_dpo_rewards,
            "dpo_ref_model_path",
            self.dpo_ref_model_path,
            "empty when there is no dpo_model_path and no dpo_refine",
        )
        reason = KL_REFUSED.get((self.kl_placement, self.kl_estimator))
        rule = f"{KL_ALLOWED[self.kl_placement]} in the {self.kl_placement}: {reason}"
        require(reason is None, "kl_estimator", self.kl_estimator, rule)
        if (self.kl_placement, self.kl_estimator) == ("loss", "exact"):
            rule = "false with kl_placement loss and kl_estimator exact, which need the reference's output layer"
            require(not self.ref_reward_offload, "ref_reward_offload", True, rule)
        if self.kl_target:
            rule = "above 0 when kl_target is given, since adaptation multiplies it"
            require(self.kl_coef > 0, "kl_coef", self.kl_coef, rule)

    def check_truncation(self) -> None:
        if self.truncation == "bootstrap":
            for name in ("missing_eos_penalty", "missing_eos_score"):
                value = getattr(self, name)
                rule = "null when truncation is bootstrap, since an interrupted response gets no score"
                require(value is None, name, value, rule)
            rule = "0 when truncation is bootstrap, since an interrupted response has no final length"
            require(self.overlong_buffer == 0, "overlong_buffer", self.overlong_buffer, rule)
            shaping = self.reward_shaping
            rule = "token or none when truncation is bootstrap, since an interrupted response has no end"
            require(shaping in ("token", "none"), "reward_shaping", shaping, rule)
