"""Keys of `fastrlhf rlp`, reward learning on policy."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from fastrlhf.config.checks import above_0, at_default, at_least, check_types, require
from fastrlhf.config.train import TrainConfig

RLP_READS = ("output_dir", "seed", "device", "dtype", "micro_batch_tokens")
"""The keys of all trainers that section `rlp` reads; the sections of reward model and policy have all of them."""


@dataclass(frozen=True, kw_only=True)
class RLPConfig(TrainConfig):
    """RLP (Lang et al. 2024, arXiv 2403.19279): trains a reward model and a policy, refits the reward model with the
    policy's answers, and trains the policy again from its start.

    The reward models are trained by the section `reward` of the same file, the policies by the section that `policy`
    names. Of the keys that all trainers share only `output_dir`, `seed`, `device`, `dtype` (of an NLI judge) and
    `micro_batch_tokens` (of scoring) are read here; the others are refused.
    """

    UNREAD: ClassVar[tuple[str, ...]] = tuple(
        field.name for field in fields(TrainConfig) if field.name not in RLP_READS
    )

    policy: Literal["ppo", "drpo", "rto"] = "ppo"
    """Section of the file that configures the policies."""
    refinement: Literal["none", "uml", "spg", "both"] = "spg"
    """How the policy's answers refit the reward model. uml: two answers to a prompt are two views of it, and latents
    computed from them are trained to have high mutual information. spg: synthetic preference pairs are made from groups
    of answers that mean the same. both: uml and spg together, which the paper does not try. none: no refit; only the
    policy is trained."""
    rounds: int = 1
    """Number of refits, each followed by training a policy; the paper has one."""
    refit_from: Literal["start", "reward"] = "start"
    """Model that a refit starts from. start: the starting model of section `reward`. reward: the latest reward model.
    The paper does not say which."""
    reward_model_path: str = ""
    """Trained reward model to use as the first one. Empty: it is trained."""
    policy_path: str = ""
    """Trained policy to use as the first one. Empty: it is trained."""
    num_answers: int = 10
    """Answers sampled per prompt."""
    answer_temperature: float = 1.0
    """Temperature at which answers are sampled."""
    num_answer_prompts: int = 0
    """Number of prompts to answer, the first ones of the policy's dataset; 0: all."""
    min_reward_variance: float = 0.25
    """The run stops where the variance of the refitted model's scores among answers to one prompt falls below this
    share of its value before the refit, because the paper's loss on views can teach the model to ignore the answer. 0:
    never."""

    mib_weight: float = 0.5
    """Weight of the loss on views, the paper's lambda. 0: the reward model is trained again on the pairs alone."""
    mib_loss: Literal["mib", "mvi", "infomax", "cl"] = "mib"
    """Loss on views. mib: minus the mutual information of the two latents plus beta times their divergence. The
    ablations of the paper: mvi leaves out the divergence, infomax takes the mutual information of a view and its own
    latent, cl is contrastive (InfoNCE at temperature 0.1)."""
    mib_profile: Literal["robust", "paper"] = "robust"
    """Schedule of beta. robust: it rises geometrically from `beta_start` to `beta_end` over the first `beta_ramp` of
    the steps. paper: it is `beta_end` throughout; the latents lost all information in every trial that we ran with
    it."""
    beta_start: float = 1e-3
    """First value of beta with mib_profile robust."""
    beta_end: float = 1.0
    """Last value of beta."""
    beta_ramp: float = 0.8
    """Share of the steps over which beta rises with mib_profile robust."""
    views_per_step: int = 16
    """Prompts with two views each in an optimiser step, beside its pairs; each prompt is a negative for all others."""
    view_negatives: Literal["all", "roll"] = "all"
    """Prompts that a view is contrasted with. all: all others of the step. roll: only the one before it."""
    view_critic: Literal["mlp", "dot"] = "mlp"
    """Critic of the mutual information: a network (mlp) that reads both latents, or their inner product (dot)."""
    view_learning_rate: float = 1e-3
    """Peak learning rate of heads and critic; they start from random weights and need a far higher one than the reward
    model."""
    view_width: int = 1024
    """Hidden units of heads and critic."""
    view_latent: int = 64
    """Dimension of a latent."""

    pairing: Literal["spg", "reward", "rlaif"] = "spg"
    """How synthetic pairs are made. spg: the best-scored answer of the largest group is preferred to a random one
    outside it. Two ablations compare two random answers: reward prefers the one with the higher score, rlaif the one
    that the policy finds likelier per token (the paper asks the policy in words, which needs a model that follows
    instructions)."""
    min_confidence: float = 0.5
    """Least share of a prompt's answers that the largest group must hold for the prompt to give a pair, the paper's
    gamma. 0: every prompt gives one (Select-All)."""
    clustering: Literal["strict", "lax", "no_contra_2023", "lax_2024", "strict_2024"] = "strict"
    """Rule by which two answers count as the same and groups are formed (algorithms/rlp_spg.py). strict: each answer is
    compared with the first one of each group, and both must entail each other."""
    early_reject: bool = True
    """Stop comparing the answers to a prompt that can no longer reach min_confidence; the same pairs for less work."""
    num_calibration_prompts: int = 200
    """Prompts that are grouped completely first, for a histogram of confidences; 0: none."""
    max_synthetic_pairs: int = 0
    """Maximum number of synthetic pairs, a random subset of those found; 0: all."""
    equivalence: str = "microsoft/deberta-large-mnli"
    """What decides whether two answers mean the same: an NLI classifier by folder or hub name; exact, which compares
    the text without case, punctuation and white space; or your own function (prompt, answer, answer) -> bool, as
    module:function or file.py:function."""
    nli_side_tokens: int = 254
    """Maximum number of tokens of prompt and answer on each side of an NLI pair; longer prompts are cut first."""
    nli_batch_tokens: int = 16384
    """Maximum number of tokens of one NLI batch, padding included."""

    def __post_init__(self) -> None:
        check_types(self)
        because = f"in section rlp (its place is in section reward, {self.policy} or shared)"
        # Checked first: otherwise a LoRA key would be refused with advice to set use_peft, which is refused as well.
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
            "mlp where mib_loss is infomax, whose two sides differ in size",
        )
        require(bool(self.equivalence), "equivalence", self.equivalence, "an NLI model, exact, or a function")
        first = (self.reward_model_path, self.policy_path)
        require(not first[1] or bool(first[0]), "reward_model_path", first[0], "given where policy_path is")

        only = self.refinement != "none" or not first[1]
        require(only, "policy_path", first[1], "empty where refinement is none, or nothing is left to do")

    @property
    def with_views(self) -> bool:
        return self.refinement in ("uml", "both") and self.mib_weight > 0

    @property
    def with_pairs(self) -> bool:
        return self.refinement in ("spg", "both")
