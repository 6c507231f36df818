"""Computes the token rewards that a DPO model implies: log(pi_dpo / pi_ref).

Summed over a response, they equal the implicit reward of the DPO model (or of a cDPO or IPO model), up to a constant
that depends on the prompt. Token by token they are that reward under potential-based shaping (Rafailov et al. 2024,
arXiv 2404.12358; RTO, arXiv 2404.18922, eq. 4.3). This holds for the distributions that were trained, so both log-probs
are computed at temperature 1, even if the run samples at another temperature.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.config import PPOConfig
from fastrlhf.data.identity import require_same_tokenizer
from fastrlhf.models.forward import token_logprobs
from fastrlhf.models.layers import LayerOptions
from fastrlhf.models.loading import check_vocabulary, load_policy
from fastrlhf.models.roles import holds_adapter, policy_role, policy_to_refine
from fastrlhf.models.vocabulary import limit_vocabulary
from fastrlhf.types import PackedBatch


@dataclass(frozen=True, kw_only=True)
class ImplicitReward:
    """A DPO model and the frozen reference with which it was or is trained."""

    model: PreTrainedModel
    """The DPO model. It is frozen or, with `dpo_refine`, trained during the run."""
    reference: PreTrainedModel | None
    """None: the DPO model was trained with the run's own reference."""
    trained: bool = False
    """Whether the run trains `model`."""

    @property
    def models(self) -> list[PreTrainedModel]:
        return [self.model] if self.reference is None else [self.model, self.reference]

    @property
    def frozen(self) -> list[PreTrainedModel]:
        return [model for model in self.models if not (self.trained and model is self.model)]

    @torch.no_grad()
    def log_ratio(
        self, batch: PackedBatch, run_reference: PreTrainedModel, run_reference_logprob: Tensor | None = None
    ) -> Tensor:
        """Returns log(model / reference) [R] float32, in nats, of every scored token of the pack.

        `run_reference_logprob` [R] are the log-probs under `run_reference` at temperature 1, if they are known already;
        its forward pass is then skipped.
        """
        logprob = token_logprobs(self.model, batch).logprob
        if self.reference is None and run_reference_logprob is not None:
            return logprob - run_reference_logprob
        return logprob - self.reference_logprob(batch, run_reference)

    @torch.no_grad()
    def reference_logprob(self, batch: PackedBatch, run_reference: PreTrainedModel) -> Tensor:
        """Returns the log-prob [R] float32, in nats, of every scored token of the pack under the reference of the DPO
        model."""
        return token_logprobs(run_reference if self.reference is None else self.reference, batch).logprob


def implicit_sources(config: PPOConfig) -> dict[str, str]:
    """Returns the paths of the models to load, by their keys; empty if no token gets a DPO reward."""
    if config.reward_shaping == "none" or not config.has_dpo_rewards:
        return {}
    sources = {"dpo_model_path": config.dpo_model_path, "dpo_ref_model_path": config.dpo_ref_model_path}
    if not config.dpo_model_path:
        del sources["dpo_model_path"]  # dpo_refine then starts from the policy
    if config.dpo_ref_model_path in ("", config.model_name_or_path):
        del sources["dpo_ref_model_path"]  # the run's own reference
    return sources


def open_implicit_reward(
    config: PPOConfig, tokenizer: PreTrainedTokenizerBase, base: PreTrainedModel, conversations: bool = False
) -> ImplicitReward | None:
    """Loads the models of `dpo_model_path` and `dpo_ref_model_path`; returns None if no token gets a DPO reward. A
    model that is an adapter shares the weights of `base`, the frozen reference of the run. With `dpo_refine` the DPO
    model is prepared for training. Raises ValueError, before any model is loaded, if a model has another tokenizer than
    the run or, for `conversations`, another chat template.
    """
    sources = implicit_sources(config)
    for field, source in sources.items():
        required = not holds_adapter(source)
        require_same_tokenizer(field, source, tokenizer, config, conversations=conversations, required=required)
    models = {
        field: policy_role(source, base, field)
        if holds_adapter(source)
        else load_policy(
            source,
            field=field,
            device=base.device,
            dtype=config.dtype,
            trust_remote_code=config.trust_remote_code,
            layers=LayerOptions.of(config),
        )
        for field, source in sources.items()
    }
    refines = config.dpo_refine != "none"
    if not models and not refines:
        return None
    check_vocabulary({"model_name_or_path": base, **models}, tokenizer)
    for model in models.values():
        limit_vocabulary(model, tokenizer)
    given, reference = models.get("dpo_model_path"), models.get("dpo_ref_model_path")
    if reference is not None:
        reference.requires_grad_(False)
    if refines:
        model = policy_to_refine(config, base, given)
        limit_vocabulary(model, tokenizer)
    else:
        model = models["dpo_model_path"].requires_grad_(False)
    return ImplicitReward(model=model, reference=reference, trained=refines)
