"""Conditions that stop an on-policy run: the policy is too far from its reference, the samples come from another model,
or a number is not finite.

An error ends the run, which saves its last weights (runtime/run.py). KL and samples are checked between two updates, so
these are the weights of the last whole update. Scores are checked when a judge returns them (`checked_scores`), and
gradients before any weight changes (`Optimizer.step`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrlhf.config import PPOConfig
from fastrlhf.types import Rollout


def check_kl(config: PPOConfig, update: int, kl: float) -> None:
    """Raises ValueError if the KL between the policy that sampled for update number `update` (from 1) and the reference
    exceeds `max_kl`. `kl` is in nats per response."""
    if config.max_kl is not None and kl > config.max_kl:
        raise ValueError(
            f"max_kl: the policy that sampled for update {update} is {kl:.4g} nats per response away from its "
            f"reference (objective/kl), more than {config.max_kl:g}; it is not trained further. Raise kl_coef, lower "
            "learning_rate, or raise max_kl"
        )


def check_sampler(config: PPOConfig, update: int, difference: float, policy: PreTrainedModel, *, own: bool) -> None:
    """Raises ValueError if the engine's log-probs differ from the trainer's by more than rounding can explain.
    `difference` is the mean absolute difference in nats per token for update number `update` (from 1). `own`: whether
    the engine is an object passed by the user."""
    limit = sampler_limit(config, policy.dtype, own=own)
    if not difference > limit > 0:  # NaN is reported by `raise_not_finite`
        return
    name = "your own engine" if own else f"engine {config.engine}"
    causes = {
        "transformers": "cached decoding and the packed forward give different results; please report the model",
        "vllm": "the weights of the policy did not reach vLLM, or its implementation of the model differs; use "
        "engine transformers, or another version of vLLM",
    }
    cause = "it samples from other weights or reports log-probs at another temperature" if own else ""
    raise ValueError(
        f"max_sampling_logp_difference: {name} samples from another model than the trainer's: for update {update} its "
        f"log-probs differ by {difference:.3g} nats per token from those of {type(policy).__name__} "
        f"(sampling/sampling_logp_difference/mean), more than {limit:.3g}; nothing is trained on these samples. Likely "
        f"cause: {cause or causes[config.engine]}"
    )


def sampler_limit(config: PPOConfig, dtype: torch.dtype, *, own: bool = False) -> float:
    """Returns the largest accepted difference in nats per token. Rounding of logits grows with the inverse of a
    temperature below 1."""
    if config.max_sampling_logp_difference is not None:
        return config.max_sampling_logp_difference
    exact = config.engine == "transformers" and not own and dtype == torch.float32
    return (0.1 if exact else 0.3) / min(1.0, config.temperature, *config.temperatures)


def raise_not_finite(numbers: Mapping[str, Tensor], cu_rows: Tensor, rollouts: Sequence[Rollout]) -> None:
    """Raises ValueError if one of `numbers`, each [R], has an entry that is not finite; the message names the number
    and the row of the prompt. `cu_rows` (N+1,) delimits the entries of the N episodes."""
    for name, values in numbers.items():
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            first = bad[0, 0]
            episode = int(torch.searchsorted(cu_rows, first, right=True)) - 1
            raise ValueError(
                f"{name}: {values[first].item()} for a token of the response to row {rollouts[episode].prefix.row}; "
                "nothing is trained on it"
            )
