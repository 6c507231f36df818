"""Reward learning on policy."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from fastrlhf.config.checks import above_0, at_default, at_least, require
from fastrlhf.config.train import TrainConfig

RLP_READS = ("output_dir", "seed", "device", "dtype", "micro_batch_tokens")
"""The keys of trainers that the section `rlp` reads; `reward` and the policy's section have their own of all."""


@dataclass(frozen=True, kw_only=True)
class RLPConfig(TrainConfig):
    """RLP (Lang et al. 2024, arXiv 2403.19279): a reward model, a policy, the policy's answers, the reward model
    refitted with them, the policy again from its start.

    The reward models are trained by the section `reward` of the same file, the policies by the section that `policy`
    names. Of the keys that all trainers share only `output_dir`, `seed`, `device`, `dtype` (of an NLI judge) and
    `micro_batch_tokens` (of scoring) are read here; the others are refused.
    """

    UNREAD: ClassVar[tuple[str, ...]] = tuple(
        field.name for field in fields(TrainConfig) if field.name not in RLP_READS
    )

    policy: Literal["ppo", "drpo", "rto"] = "ppo"
    """The section that trains the policies."""
    refinement: Literal["none", "uml", "spg", "both"] = "spg"
    """How the policy's answers refit the reward model. uml: two answers to a prompt are views of it, and what the score
    reads of them is trained to be informative of each other. spg: preference pairs from groups of answers that mean the
    same. both: together, which the paper does not try. none: no refit, the section of the policy alone."""
    rounds: int = 1
    """Refits, each followed by a policy; the paper has one."""
    refit_from: Literal["start", "reward"] = "start"
    """Where a refit starts: from the model of the section `reward`, or from the reward model before it. The paper does
    not say."""
    reward_model_path: str = ""
    """A trained reward model that takes the place of the first one; empty: it is trained."""
    policy_path: str = ""
    """A trained policy that takes the place of the first one; empty: it is trained."""
    num_answers: int = 10
    """Answers per prompt."""
    answer_temperature: float = 1.0
    """Of their sampling."""
    num_answer_prompts: int = 0
    """Prompts that are answered, the first ones of the policy's; 0 is all."""
    min_reward_variance: float = 0.25
    """The run stops where the variance of the refitted model's scores among answers to one prompt falls below this
    share of what it was: the paper's views can teach it to ignore the answer. 0 is off."""

    mib_weight: float = 0.5
    """The paper's lambda, of the loss on views. 0: the reward model is trained again, on the pairs alone."""
    mib_loss: Literal["mib", "mvi", "infomax", "cl"] = "mib"
    """mib: minus the mutual information of the views' latents plus beta times their divergence. Its ablations: mvi
    without the divergence, infomax between a view and its own latent, cl contrastive (InfoNCE at temperature 0.1)."""
    mib_profile: Literal["robust", "paper"] = "robust"
    """Of beta. robust: it rises geometrically from `beta_start` to `beta_end` over the first `beta_ramp` of the steps.
    paper: `beta_end` throughout, under which the latents have lost all information in every trial of ours."""
    beta_start: float = 1e-3
    """See mib_profile."""
    beta_end: float = 1.0
    """See mib_profile."""
    beta_ramp: float = 0.8
    """See mib_profile."""
    views_per_step: int = 16
    """Prompts with two views each, beside the pairs of a step; each is a negative for all others."""
    view_negatives: Literal["all", "roll"] = "all"
    """The prompts that a view is told apart from: all others of the step, or the one before it."""
    view_critic: Literal["mlp", "dot"] = "mlp"
    """Of the mutual information: a network of both latents, or their inner product."""
    view_learning_rate: float = 1e-3
    """Peak, of heads and critic, which are new; a reward model's own is far too low for them."""
    view_width: int = 1024
    """Hidden units of heads and critic."""
    view_latent: int = 64
    """Dimensions of a latent."""

    pairing: Literal["spg", "reward", "rlaif"] = "spg"
    """Where synthetic pairs come from. spg: the best-scored answer of the largest group over a random one outside it.
    Its ablations, on two random answers: reward prefers the higher score, rlaif what the policy itself finds likelier
    per token (the paper asks the policy in words, which needs a model that follows instructions)."""
    min_confidence: float = 0.5
    """The paper's gamma: a prompt gives a pair where the largest group holds this share of its answers. 0 is
    Select-All."""
    clustering: Literal["strict", "lax", "no_contra_2023", "lax_2024", "strict_2024"] = "strict"
    """When two answers mean the same, and how groups are made of that (algorithms/rlp_spg.py). strict: both directions
    entail, compared with the first of each group."""
    early_reject: bool = True
    """Stop comparing the answers to a prompt that can no longer reach min_confidence; the same pairs for less."""
    num_calibration_prompts: int = 200
    """Prompts that are first grouped in full, for the histogram of confidences; 0 is off."""
    max_synthetic_pairs: int = 0
    """Synthetic pairs at most, a random subset; 0 is all."""
    equivalence: str = "microsoft/deberta-large-mnli"
    """Who says what two answers have to do with each other: an NLI classifier by folder or hub name; `exact`, the same
    text but for case, punctuation and white space; or a function (prompt, answer, answer) -> bool, as module:function
    or file.py:function."""
    nli_side_tokens: int = 254
    """Tokens of prompt and answer on either side of an NLI pair; of longer ones the prompt is cut first."""
    nli_batch_tokens: int = 16384
    """Tokens of one NLI batch, padding included."""

    def __post_init__(self) -> None:
        because = f"in section rlp (its place is in section reward, {self.policy} or shared)"
        # First, or a key of LoRA would be told to wait for use_peft, which is refused as well.
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
