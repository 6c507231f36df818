"""Keys of the trainers that learn from a dataset alone: `fastrlhf sft`, `reward` and `dpo`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastrlhf.config.checks import above_0, at_default, at_least, require
from fastrlhf.config.train import TrainConfig

PAIR_LOSSES = ("sigmoid", "ipo", "hinge", "robust", "sft")


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainConfig):
    """Supervised fine-tuning: maximises the log-likelihood of each response given its prompt."""

    learning_rate: float = 2e-5
    response: Literal["reference", "chosen"] = "reference"
    """Which response is imitated: chosen, or reference, which is the completion of prompt-completion rows."""
    completion_only_loss: bool = True
    """Train only the tokens of the response. False: those of the prompt as well."""
    train_on: Literal["last_assistant", "all_assistant", "all"] = "last_assistant"
    """Which tokens of a conversation are trained. last_assistant: the response, which is the last turn of `messages`.
    all_assistant: every assistant turn, including those in the prompt (TRL's assistant_only_loss). all: every token,
    like completion_only_loss false. In a response of several turns, only the assistant turns are trained."""
    train_suffix: bool = False
    """Train what the chat template writes behind the end of a turn too, as TRL does: the newline of ChatML."""

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        rule = "last_assistant where completion_only_loss is false, which trains every token"
        require(self.completion_only_loss or self.train_on == "last_assistant", "train_on", self.train_on, rule)


@dataclass(frozen=True, kw_only=True)
class RewardConfig(TrainConfig):
    """A reward model trained on preference pairs with the Bradley-Terry loss."""

    learning_rate: float = 1e-4
    num_train_epochs: float = 1.0
    truncation_mode: Literal["keep_start", "keep_end", "drop"] = "drop"
    center_rewards_coefficient: float = 0.0
    """Coefficient of (score of chosen + score of rejected)^2 in the loss, a penalty that centres scores on 0
    (Eisenstein et al. 2023, arXiv 2312.09244, eq. 2); TRL recommends 0.01."""
    margin_scale: float = 0.0
    """Factor on the column `margin`, the amount by which the scores of a pair must differ (Touvron et al. 2023, arXiv
    2307.09288, eq. 2); 0: the column is not read."""
    share_prompts: bool = True
    """Compute the prompt of a pair once for both responses; the same numbers with fewer tokens."""

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        at_least(self, 0, "center_rewards_coefficient", "margin_scale")


@dataclass(frozen=True, kw_only=True)
class DPOConfig(TrainConfig):
    """Direct preference optimisation (DPO), or IPO with loss_type ipo, from preference pairs. With `psi`, `psi_backend`
    and `label_source` IPO becomes the general PsiPO (Azar et al. 2023, arXiv 2310.12036), which sums log-ratios over a
    response."""

    learning_rate: float = 1e-6
    num_train_epochs: float = 1.0
    beta: float = 0.1
    """Strength of the tie to the reference; for ipo it is the paper's tau."""
    train_suffix: bool = False
    """Count what the chat template writes behind the end of a turn as a part of the response, as TRL does: the newline
    of ChatML."""
    loss_type: str | tuple[str, ...] = "sigmoid"
    """sigmoid (DPO), ipo, hinge or robust; or a list whose losses are added up, which may include sft: minus the mean
    log-prob of the tokens of the chosen responses."""
    loss_weights: tuple[float, ...] = ()
    """Weight of each loss where `loss_type` is a list. Empty: 1 each."""
    margin_scale: float = 0.0
    """Factor on the column `margin`, which is subtracted from beta times the difference of log-ratios (Amini et al.
    2024, arXiv 2402.10571); not for ipo. 0: the column is not read."""
    label_smoothing: float = 0.0
    """Assumed share of pairs with swapped labels (cDPO; robust needs it below 0.5)."""
    length_norm: Literal["auto", "sum", "mean", "pair_mean"] = "auto"
    """How the log-ratio of a response is formed from its tokens. auto: the mean for ipo with hard labels (as in TRL),
    the sum otherwise, as in the papers."""
    ref_model_name_or_path: str = ""
    """Folder or hub name of the reference model. Empty: the model before training."""
    precompute_ref_log_probs: bool = True
    """Compute the log-probs of the reference once, before the first step, and keep no second model. False: compute them
    at every step from a frozen copy."""
    ref_cache_dir: str = ""
    """Folder that keeps precomputed log-probs under a fingerprint of reference, tokens and dtype, so that the next run
    with the same ones need not compute them. Empty: they are not kept."""
    share_prompts: bool = True
    """Compute the prompt of a pair once for both responses; the same numbers with fewer tokens."""
    psi: str = "identity"
    """Function that PsiPO applies to the probability that a response is better: identity (IPO), logit (the optimum of
    RLHF), clipped_logit, or your own non-decreasing function, as module:function or file.py:function."""
    psi_clip: float = 3.0
    """Bound of clipped_logit, in nats: no preference probability counts as higher than sigmoid(psi_clip), which is
    0.953 for 3."""
    psi_backend: Literal["pairwise", "groupwise"] = "pairwise"
    """pairwise: rows are pairs, for a psi that is odd about 1/2. groupwise: rows have a list of `responses`, drawn from
    one policy, with `preferences` or `scores`; 2 responses per prompt suffice where psi is odd, otherwise 3."""
    label_source: Literal["data", "label_prob", "counts", "reward_model"] = "data"
    """Where the probability that a response is better comes from. data: the chosen response is better; in groups
    `preferences`, or the sigmoid of differences of `scores`. label_prob: the column of that name. counts: the columns
    wins and num_labels. reward_model: the sigmoid of differences of its scores. hinge and robust take data only."""
    label_prior: float = 0.5
    """Pseudo-count of label_source counts: the probability is (label_prior + wins) / (2 label_prior + num_labels)."""
    score_scale: float = 1.0
    """Factor on scores before the sigmoid: how many nats one point of a rating is worth."""
    reward_model_path: str = ""
    """Folder or hub name of the reward model of label_source reward_model; it scores every response once, before
    training."""

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        above_0(self, "beta", "psi_clip", "score_scale")
        at_least(self, 0, "margin_scale", "label_prior")
        require(0 <= self.label_smoothing < 0.5, "label_smoothing", self.label_smoothing, "at least 0 and below 0.5")
        losses, weights = self.losses, self.loss_weights
        require(bool({*losses} - {"sft"}), "loss_type", self.loss_type, "at least one loss on pairs")
        require({*losses} <= {*PAIR_LOSSES}, "loss_type", self.loss_type, f"of {', '.join(PAIR_LOSSES)}")
        require(len({*losses}) == len(losses), "loss_type", losses, "without repeats")
        require(len(weights) in (0, len(losses)), "loss_weights", weights, f"{len(losses)} numbers, one per loss_type")
        require(all(weight > 0 for weight in weights), "loss_weights", weights, "above 0")
        smooth, soft = self.label_smoothing > 0, self.label_source != "data"
        if "hinge" in losses:
            require(not smooth, "label_smoothing", self.label_smoothing, "0 where loss_type is hinge")
        if soft:
            hard = {"hinge", "robust"} & {*losses}
            require(not hard, "label_source", self.label_source, "data for hinge and robust")
            require(not smooth, "label_smoothing", self.label_smoothing, "0 where label_source is not data")
        judged, path = self.label_source == "reward_model", self.reward_model_path
        require(
            bool(path) == judged, "reward_model_path", path, "given where label_source is reward_model, and only there"
        )
        self._check_psi()
        if "ipo" in losses:
            require(not self.margin_scale, "margin_scale", self.margin_scale, "0 where loss_type is ipo")
        scored = judged or self.psi_backend == "groupwise"
        at_default(
            self,
            [
                (self.label_source == "counts", "where label_source is not counts", ("label_prior",)),
                (scored, "where no scores give probabilities", ("score_scale",)),
                (self.psi == "clipped_logit", "where psi is not clipped_logit", ("psi_clip",)),
            ],
        )
        cache = self.ref_cache_dir
        require(
            not cache or self.precompute_ref_log_probs, "ref_cache_dir", cache, "empty where nothing is precomputed"
        )

    @property
    def losses(self) -> tuple[str, ...]:
        return (self.loss_type,) if isinstance(self.loss_type, str) else self.loss_type

    def _check_psi(self) -> None:
        groups = self.psi_backend == "groupwise"
        if groups or self.psi != "identity":
            because = "where psi_backend is groupwise" if groups else "where psi is not identity"
            require(self.losses == ("ipo",), "loss_type", self.loss_type, f"ipo {because}")
            require(self.length_norm in ("auto", "sum"), "length_norm", self.length_norm, f"auto or sum {because}")
            require(not self.label_smoothing, "label_smoothing", self.label_smoothing, f"0 {because}")
        if groups:
            require(not self.loss_weights, "loss_weights", self.loss_weights, f"empty {because}")
            sources = ("data", "reward_model")
            require(self.label_source in sources, "label_source", self.label_source, f"data or reward_model {because}")
