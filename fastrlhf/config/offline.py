"""Keys of the offline trainers, which sample nothing during training: `fastrlhf sft`, `reward` and `dpo`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastrlhf.config.checks import above_0, at_default, at_least, require
from fastrlhf.config.train import TrainConfig

REFERENCE_FREE = ("simpo", "cpo", "orpo")
PAIR_LOSSES = ("sigmoid", "ipo", "hinge", "robust", "apo_zero", "apo_down", *REFERENCE_FREE, "sft")


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainConfig):
    """Supervised fine-tuning: maximises the log-likelihood of each response given its prompt."""

    learning_rate: float = 2e-5
    response: Literal["reference", "chosen"] = "reference"
    """Column of the response to learn: chosen or reference. The completion of a prompt-completion row is its
    reference."""
    completion_only_loss: bool = True
    """Train only the tokens of the response. false: train the tokens of the prompt as well."""
    train_on: Literal["last_assistant", "all_assistant", "all"] = "last_assistant"
    """Which tokens of a conversation are trained. last_assistant: the response, which is the last turn of `messages`.
    all_assistant: every assistant turn, including those in the prompt (TRL's assistant_only_loss). all: every token,
    like completion_only_loss false. In a response of several turns, only the assistant turns are trained."""
    train_suffix: bool = False
    """Also train the text that the chat template writes after the end of a turn, as TRL does: for ChatML, a newline."""

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        rule = "last_assistant when completion_only_loss is false, since every token is trained then"
        require(self.completion_only_loss or self.train_on == "last_assistant", "train_on", self.train_on, rule)


@dataclass(frozen=True, kw_only=True)
class RewardConfig(TrainConfig):
    """Trains a reward model on preference pairs with the Bradley-Terry loss."""

    learning_rate: float = 1e-4
    num_train_epochs: float = 1.0
    head_learning_rate: float | None = None
    """Peak learning rate of the score head, which has new weights unless the run starts from a reward model. null:
    `learning_rate`."""
    truncation_mode: Literal["keep_start", "keep_end", "drop"] = "drop"
    center_rewards_coefficient: float = 0.0
    """Coefficient of (score of chosen + score of rejected)^2 in the loss, a penalty that keeps scores centred on 0
    (Eisenstein et al. 2023, arXiv 2312.09244, eq. 2); TRL recommends 0.01."""
    margin_scale: float = 0.0
    """Factor on the column `margin`, the amount by which the scores of a pair must differ (Touvron et al. 2023, arXiv
    2307.09288, eq. 2); 0: the column is not read."""
    share_prompts: bool = True
    """Compute the prompt of a pair once for both responses, which saves time and changes no result."""

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        at_least(self, 0, "center_rewards_coefficient", "margin_scale")
        if self.head_learning_rate is not None:
            above_0(self, "head_learning_rate")


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig(TrainConfig):
    """The keys of trainers that compare the policy with a frozen reference."""

    ref_model_name_or_path: str = ""
    """Folder or hub name of the reference model. Empty: the model before training."""
    precompute_ref_log_probs: bool = True
    """Compute the log-probs of the reference once, before the first step, so that no second model stays in memory. They
    are saved while they are computed. false: compute them at every step with a frozen copy of the model."""
    ref_cache_dir: str = ""
    """Folder in which the precomputed log-probs are cached. A later run with the same reference, tokens and dtype reads
    them from there. Empty: they are saved in output_dir and deleted at the end of the run."""

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        cache = self.ref_cache_dir
        rule = "empty when precompute_ref_log_probs is false"
        require(not cache or self.precompute_ref_log_probs, "ref_cache_dir", cache, rule)


@dataclass(frozen=True, kw_only=True)
class DPOConfig(ReferenceConfig):
    """Trains a policy on preference pairs by direct preference optimisation (DPO), or by IPO with loss_type ipo. `psi`,
    `psi_backend` and `label_source` extend IPO to PsiPO (Azar et al. 2023, arXiv 2310.12036), which sums log-ratios
    over a response."""

    learning_rate: float = 1e-6
    num_train_epochs: float = 1.0
    beta: float = 0.1
    """Strength of the regularisation towards the reference: the larger it is, the closer the policy stays. For ipo it
    is the paper's tau, for orpo its lambda, the weight of the loss."""
    train_suffix: bool = False
    """Count the text that the chat template writes after the end of a turn as a part of the response, as TRL does: for
    ChatML, a newline."""
    loss_type: str | tuple[str, ...] = "sigmoid"
    """Loss on pairs: sigmoid (DPO), ipo, hinge, robust, apo_zero, apo_down; simpo, cpo, orpo, which read no reference;
    or your own function of the log-ratios of the chosen and of the rejected responses, as file.py:function. A list of
    losses is added up and may include sft: minus the mean log-prob of the tokens of the chosen responses. cpo and orpo
    without a list mean [cpo, sft] and [orpo, sft], as in their papers."""
    loss_weights: tuple[float, ...] = ()
    """Weight of each loss if `loss_type` is a list. Empty: 1 each."""
    margin_scale: float = 0.0
    """Factor on the column `margin`, which is subtracted from beta times the difference of log-ratios (Amini et al.
    2024, arXiv 2402.10571); not for ipo. 0: the column is not read."""
    simpo_gamma: float = 0.5
    """Margin of simpo, in the units of beta times nats per token (Meng et al. 2024, arXiv 2405.14734, eq. 6, whose beta
    is 2 to 10)."""
    reference_free: bool = False
    """Leave the reference out of every loss: log-ratios become log-probs. simpo, cpo and orpo never read one."""
    label_smoothing: float = 0.0
    """Assumed share of pairs whose labels are swapped, below 0.5 (cDPO, and loss_type robust)."""
    length_norm: Literal["auto", "sum", "mean", "pair_mean"] = "auto"
    """How the log-ratio of a response is computed from those of its tokens. sum: their sum. mean: their mean.
    pair_mean: their sum divided by the mean length of the two responses of the pair. auto: the mean for ipo with hard
    labels (as in TRL), simpo and orpo, the sum otherwise (as in the papers)."""
    share_prompts: bool = True
    """Compute the prompt of a pair once for both responses, which saves time and changes no result."""
    psi: str = "identity"
    """Function that PsiPO applies to the probability that a response is preferred: identity (IPO), logit (has the same
    optimum as RLHF), clipped_logit, or your own non-decreasing function, given as module:function or
    file.py:function."""
    psi_clip: float = 3.0
    """Bound of clipped_logit, in nats: a preference probability above sigmoid(psi_clip), which is 0.953 for 3, counts
    as sigmoid(psi_clip)."""
    psi_backend: Literal["pairwise", "groupwise"] = "pairwise"
    """pairwise: rows are pairs, for a psi that is odd about 1/2. groupwise: rows have a list of `responses`, drawn from
    one policy, with `preferences` or `scores`; 2 responses per prompt suffice if psi is odd about 1/2; otherwise 3 are
    needed."""
    label_source: Literal["data", "label_prob", "counts", "reward_model"] = "data"
    """Source of the probability that one response is preferred to another. data: 1 for the chosen response; in groups,
    the column `preferences`, or the sigmoid of differences of the column `scores`. label_prob: the column label_prob.
    counts: the columns wins and num_labels. reward_model: the sigmoid of the difference of the reward model's scores.
    The losses hinge and robust accept only data."""
    label_prior: float = 0.5
    """Pseudo-count of label_source counts: the probability is (label_prior + wins) / (2 label_prior + num_labels)."""
    score_scale: float = 1.0
    """Scores are multiplied by this before the sigmoid: the number of nats that one point of score is worth."""
    reward_model_path: str = ""
    """Folder or hub name of the reward model for label_source reward_model, which scores every response once, before
    training."""

    def __post_init__(self) -> None:
        ReferenceConfig.__post_init__(self)
        above_0(self, "beta", "psi_clip", "score_scale")
        at_least(self, 0, "margin_scale", "label_prior")
        require(0 <= self.label_smoothing < 0.5, "label_smoothing", self.label_smoothing, "at least 0 and below 0.5")
        losses, weights = self.losses, self.loss_weights
        require(bool({*losses} - {"sft"}), "loss_type", self.loss_type, "at least one loss on pairs")
        known = {*PAIR_LOSSES, *self.functions}
        rule = f"one of {', '.join(PAIR_LOSSES)}, or file.py:function"
        if "kto" in losses:
            rule += " (KTO is a separate command, fastrlhf kto, because its rows are not pairs)"
        require({*losses} <= known, "loss_type", self.loss_type, rule)
        require(len({*losses}) == len(losses), "loss_type", losses, "without repeats")
        one = f"1 number, for {losses[0]}"
        rule = one if len(losses) == 1 else f"{len(losses)} numbers, one for each of {', '.join(losses)}"
        require(len(weights) in (0, len(losses)), "loss_weights", weights, rule)
        require(all(weight > 0 for weight in weights), "loss_weights", weights, "above 0")
        self._check_labels()
        self._check_reference()
        judged, path = self.label_source == "reward_model", self.reward_model_path
        require(
            bool(path) == judged, "reward_model_path", path, "given when label_source is reward_model, and only then"
        )
        self._check_psi()
        if fixed := {"ipo", "apo_zero", "apo_down", "orpo", *self.functions} & {*losses}:
            rule = f"0 when loss_type is {', '.join(sorted(fixed))}"
            require(not self.margin_scale, "margin_scale", self.margin_scale, rule)
        for name in {"simpo", "orpo"} & {*losses}:
            require(self.length_norm in ("auto", "mean"), "length_norm", self.length_norm, f"auto or mean for {name}")
        scored = judged or self.psi_backend == "groupwise"
        at_default(
            self,
            [
                (self.label_source == "counts", "when label_source is not counts", ("label_prior",)),
                (scored, "when probabilities are not computed from scores", ("score_scale",)),
                (self.psi == "clipped_logit", "when psi is not clipped_logit", ("psi_clip",)),
                ("simpo" in losses, "when loss_type is not simpo", ("simpo_gamma",)),
            ],
        )

    @property
    def losses(self) -> tuple[str, ...]:
        """The names in `loss_type`; a single cpo or orpo is replaced by [cpo, sft] or [orpo, sft]."""
        if not isinstance(self.loss_type, str):
            return self.loss_type
        return (self.loss_type, "sft") if self.loss_type in ("cpo", "orpo") else (self.loss_type,)

    @property
    def functions(self) -> tuple[str, ...]:
        """The names of the user-defined losses in `losses`."""
        return tuple(name for name in self.losses if ":" in name)

    @property
    def reference_free_losses(self) -> tuple[str, ...]:
        """The losses on pairs that read no reference."""
        return tuple(name for name in self.losses if name in REFERENCE_FREE or self.reference_free)

    @property
    def has_reference(self) -> bool:
        return not {*self.losses} <= {"sft", *self.reference_free_losses}

    def length_norm_of(self, loss: str) -> str:
        """Returns `length_norm`, with auto resolved for the loss called `loss`: the mean over tokens for simpo, orpo,
        and ipo with hard labels (as in TRL); otherwise, PsiPO included, the sum."""
        if self.length_norm != "auto":
            return self.length_norm
        hard = self.psi == "identity" and self.label_source == "data"
        return "mean" if loss in ("simpo", "orpo") or (loss == "ipo" and hard) else "sum"

    def _check_labels(self) -> None:
        losses, smooth, soft = {*self.losses}, self.label_smoothing > 0, self.label_source != "data"
        only_hard = losses & {"hinge", "apo_zero", "apo_down", "orpo", *self.functions}
        if only_hard:
            rule = f"0 when loss_type is {', '.join(sorted(only_hard))}"
            require(not smooth, "label_smoothing", self.label_smoothing, rule)
        if soft:
            only_hard |= losses & {"robust"}
            rule = f"data when loss_type is {', '.join(sorted(only_hard))}"
            require(not only_hard, "label_source", self.label_source, rule)
            require(not smooth, "label_smoothing", self.label_smoothing, "0 when label_source is not data")

    def _check_reference(self) -> None:
        free, others = {*self.losses} & {*REFERENCE_FREE}, {*self.losses} - {*REFERENCE_FREE, "sft"}
        if free and others:
            rule = f"true when {', '.join(sorted(free))} and {', '.join(sorted(others))} are added up"
            require(self.reference_free, "reference_free", self.reference_free, rule)
        elif free:
            rule = f"false when loss_type is {', '.join(sorted(free))}, which never reads a reference"
            require(not self.reference_free, "reference_free", self.reference_free, rule)
        keys = ("ref_model_name_or_path", "precompute_ref_log_probs", "ref_cache_dir")
        at_default(self, [(self.has_reference, "when no loss has a reference", keys)])

    def _check_psi(self) -> None:
        groups = self.psi_backend == "groupwise"
        if groups or self.psi != "identity":
            because = "when psi_backend is groupwise" if groups else "when psi is not identity"
            require(self.losses == ("ipo",), "loss_type", self.loss_type, f"ipo {because}")
            require(self.length_norm in ("auto", "sum"), "length_norm", self.length_norm, f"auto or sum {because}")
            require(not self.label_smoothing, "label_smoothing", self.label_smoothing, f"0 {because}")
            require(not self.reference_free, "reference_free", self.reference_free, f"false {because}")
        if groups:
            require(not self.loss_weights, "loss_weights", self.loss_weights, f"empty {because}")
            sources = ("data", "reward_model")
            require(self.label_source in sources, "label_source", self.label_source, f"data or reward_model {because}")


@dataclass(frozen=True, kw_only=True)
class KTOConfig(ReferenceConfig):
    """Kahneman-Tversky optimisation (KTO, Ethayarajh et al. 2024, arXiv 2402.01306) from single responses, each
    labelled as desirable or undesirable."""

    learning_rate: float = 1e-6
    num_train_epochs: float = 1.0
    beta: float = 0.1
    """Strength of the regularisation towards the reference: the larger it is, the closer the policy stays."""
    desirable_weight: float = 1.0
    """Weight of the losses of desirable responses, lambda_D in the paper."""
    undesirable_weight: float = 1.0
    """Weight of the losses of undesirable responses, lambda_U in the paper."""
    balance_weights: bool = False
    """Multiply the weight of the rarer kind of response by (number of the other kind) / (its number), counted over the
    training rows, so that both kinds weigh as much as the two weights say."""
    train_suffix: bool = False
    """Count the text that the chat template writes after the end of a turn as a part of the response, as TRL does: for
    ChatML, a newline."""

    def __post_init__(self) -> None:
        ReferenceConfig.__post_init__(self)
        above_0(self, "beta", "desirable_weight", "undesirable_weight")
        require(self.batch_size > 1, self.batch_key, self.batch_size, "2 or more: the KL pairs two rows")
