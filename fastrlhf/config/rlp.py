"""Keys of `fastrlhf rlp`, reward learning on policy."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from fastrlhf.config.checks import above_0, at_default, at_least, check_types, require
from fastrlhf.config.train import HUB_KEYS, TrainConfig

RLP_READS = ("output_dir", "seed", "device", "dtype", "micro_batch_tokens", "push_to_hub", *HUB_KEYS)
"""The keys of TrainConfig that section `rlp` reads. The sections of the reward model and the policy read all of
them."""


@dataclass(frozen=True, kw_only=True)
class RLPConfig(TrainConfig):
    """Runs RLP (Lang et al. 2024, arXiv 2403.19279): trains a reward model and a policy, refits the reward model with
    the policy's answers, and trains the policy again from its starting weights.

    Section `reward` of the same file configures the reward models, and the section that `policy` names configures the
    policies. Of the keys that all trainers share, section `rlp` reads only `output_dir`, `seed`, `device`, `dtype` (for
    an NLI model), `micro_batch_tokens` (for scoring) and the keys of the hub, and refuses the others.
    """

    UNREAD: ClassVar[tuple[str, ...]] = tuple(
        field.name for field in fields(TrainConfig) if field.name not in RLP_READS
    )

    policy: Literal["ppo", "drpo", "rto"] = "ppo"
    """Section of the configuration file with the keys for training the policies."""
    refinement: Literal["none", "uml", "spg", "both"] = "spg"
    """How the reward model is refitted with the policy's answers. uml: two answers to a prompt are two views of it, and
    latent vectors computed from them are trained to have high mutual information. spg: synthetic preference pairs are
    made from groups of answers with the same meaning. both: uml and spg together, which the paper does not try. none:
    the reward model is not refitted; only the policy is trained."""
    rounds: int = 1
    """Number of refits of the reward model, each followed by training a policy; 1 in the paper."""
    refit_from: Literal["start", "reward"] = "start"
    """Model that a refit starts from. start: the model that section `reward` starts from. reward: the latest reward
    model. The paper does not say which it uses."""
    reward_model_path: str = ""
    """Trained model to use as the first reward model. Empty: the first reward model is trained."""
    policy_path: str = ""
    """Trained model to use as the first policy. Empty: the first policy is trained."""
    num_answers: int = 10
    """Number of answers sampled per prompt."""
    answer_temperature: float = 1.0
    """Sampling temperature of the answers."""
    num_answer_prompts: int = 0
    """Number of prompts that are answered, taken from the start of the policy's dataset; 0: all."""
    min_reward_variance: float = 0.25
    """The run stops if a refit reduces the variance of the scores among the answers to one prompt below this share of
    its value before the refit. The paper's loss on views can teach the reward model to ignore the answer. 0: the
    variance is not checked."""

    mib_weight: float = 0.5
    """Weight of the loss on views (the paper's lambda). 0: the reward model is trained again only on preference
    pairs."""
    mib_loss: Literal["mib", "mvi", "infomax", "cl"] = "mib"
    """Loss on views. mib: minus the mutual information of the two latent vectors plus beta times their divergence. The
    other losses are the paper's ablations. mvi: mib without the divergence. infomax: minus the mutual information of a
    view and its own latent vector. cl: contrastive loss (InfoNCE at temperature 0.1)."""
    mib_profile: Literal["robust", "paper"] = "robust"
    """Schedule of beta, the weight of the divergence. robust: beta rises geometrically from `beta_start` to `beta_end`
    over the first `beta_ramp` of the steps. paper: beta is `beta_end` throughout; with it, the latent vectors lost all
    information in each of our trials."""
    beta_start: float = 1e-3
    """Initial value of beta with mib_profile robust."""
    beta_end: float = 1.0
    """Final value of beta."""
    beta_ramp: float = 0.8
    """Share of the steps over which beta rises with mib_profile robust."""
    views_per_step: int = 16
    """Number of prompts, with two views each, that an optimiser step uses in addition to its preference pairs."""
    view_negatives: Literal["all", "roll"] = "all"
    """Prompts that serve as negative examples for a view. all: all other prompts of the step. roll: only the preceding
    prompt."""
    view_critic: Literal["mlp", "dot"] = "mlp"
    """Critic that estimates the mutual information. mlp: a network that reads both latent vectors. dot: their inner
    product."""
    view_learning_rate: float = 1e-3
    """Peak learning rate of the latent heads and the critic, which start from random weights and need a far higher
    learning rate than the reward model."""
    view_width: int = 1024
    """Number of hidden units of the latent heads and the critic."""
    view_latent: int = 64
    """Dimension of a latent vector."""

    pairing: Literal["spg", "reward", "rlaif"] = "spg"
    """How synthetic pairs are made. spg: the answer with the highest score in the largest group is preferred to a
    random answer outside this group. The two others are ablations with two random answers. reward: the answer with the
    higher score is preferred. rlaif: the answer with the higher mean log-prob per token under the policy is preferred
    (the paper asks the policy in words, which needs a model that follows instructions)."""
    min_confidence: float = 0.5
    """A prompt gives a synthetic pair only if its largest group holds at least this share of its answers (the paper's
    gamma). 0: every prompt gives a pair (Select-All)."""
    clustering: Literal["strict", "lax", "no_contra_2023", "lax_2024", "strict_2024"] = "strict"
    """Rule that groups answers by meaning. strict: an answer joins a group if it and the first answer of the group
    entail each other. The other rules are described in algorithms/rlp_spg.py."""
    early_reject: bool = True
    """Stop comparing the answers to a prompt as soon as it cannot reach min_confidence any more; this saves time and
    changes no pair."""
    num_calibration_prompts: int = 200
    """Number of prompts whose answers are grouped completely first, without early_reject, for a histogram of
    confidences; 0: none."""
    max_synthetic_pairs: int = 0
    """Maximum number of synthetic pairs; if more are found, a random subset is used. 0: all."""
    equivalence: str = "microsoft/deberta-large-mnli"
    """How to decide whether two answers have the same meaning: the folder or hub name of an NLI classifier; exact,
    which compares the texts ignoring case, punctuation and white space; or your own function (prompt, answer, answer)
    -> bool, given as module:function or file.py:function."""
    nli_side_tokens: int = 254
    """Maximum number of tokens of prompt and answer on each side of an NLI pair; longer prompts are cut first."""
    nli_batch_tokens: int = 16384
    """Maximum number of tokens of one NLI batch, padding included."""

    def __post_init__(self) -> None:
        check_types(self)
        because = f"in section rlp (set it in section reward, {self.policy} or shared)"
        # Checked first, because otherwise the message about a LoRA key would advise to set use_peft, which is refused
        # as well.
        at_default(self, [(False, because, self.UNREAD)])
        TrainConfig.__post_init__(self)
        at_least(self, 1, "rounds", "view_width", "view_latent", "nli_batch_tokens", "nli_side_tokens")
        at_least(self, 2, "num_answers", "views_per_step")
        at_least(self, 0, "num_answer_prompts", "num_calibration_prompts", "max_synthetic_pairs", "mib_weight")
        above_0(self, "answer_temperature", "beta_start", "beta_end", "view_learning_rate")
        for name in ("min_confidence", "beta_ramp", "min_reward_variance"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in 0..1")
        require(
            self.mib_loss != "infomax" or self.view_critic == "mlp",
            "view_critic",
            self.view_critic,
            "mlp when mib_loss is infomax, since its two vectors differ in size",
        )
        require(bool(self.equivalence), "equivalence", self.equivalence, "an NLI model, exact, or a function")
        first = (self.reward_model_path, self.policy_path)
        require(not first[1] or bool(first[0]), "reward_model_path", first[0], "given when policy_path is given")

        only = self.refinement != "none" or not first[1]
        require(only, "policy_path", first[1], "empty when refinement is none, since nothing is left to do")

    @property
    def with_views(self) -> bool:
        return self.refinement in ("uml", "both") and self.mib_weight > 0

    @property
    def with_pairs(self) -> bool:
        return self.refinement in ("spg", "both")
