"""Conditions that stop an on-policy run: the policy is too far from its reference, the samples come from another model,
or a number is not finite.

An error ends the run, which then leaves its last weights in `interrupted/` (runtime/run.py). KL and samples are checked
between two updates, so those are the weights of the last whole update. Scores are checked where a judge returns them
(`checked_scores`), gradients before any weight moves (`Optimizer.step`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrlhf.config import PPOConfig
from fastrlhf.types import Rollout


def check_kl(config: PPOConfig, update: int, kl: float) -> None:
    """Raises ValueError where the policy that sampled for update number `update`, counted from 1, is more than
    `max_kl` away from its reference: `kl`, in nats per response."""
    if config.max_kl is not None and kl > config.max_kl:
        raise ValueError(
            f"max_kl: the policy that sampled for update {update} is {kl:.4g} nats per response away from its "
            f"reference (objective/kl), more than {config.max_kl:g}; it is not trained further. Raise kl_coef, lower "
            "learning_rate, or raise max_kl"
        )


def check_sampler(config: PPOConfig, update: int, difference: float, policy: PreTrainedModel, *, own: bool) -> None:
    """Raises ValueError where the log-probs that the engine reported of its samples for update number `update`, counted
    from 1, are on average `difference` nats per token away from those of the trainer's own forward, and this is more
    than rounding explains. `own`: the caller passed the engine as an object."""
    limit = sampler_limit(config, policy.dtype, own=own)
    if not difference > limit > 0:  # NaN is reported by `raise_not_finite`
        return
    name = "your own engine" if own else f"engine {config.engine}"
    causes = {
        "transformers": "its cached decoding computes something else than the packed forward; please report the model",
        "vllm": "the weights of the policy have not reached vLLM, or its implementation of the model differs; take "
        "engine transformers, or another version of vLLM",
    }
    cause = "it samples from other weights or reports log-probs at another temperature" if own else ""
    raise ValueError(
        f"max_sampling_logp_difference: {name} samples from another model than the trainer's: for update {update} its "
        f"log-probs are {difference:.3g} nats per token away from those of {type(policy).__name__} "
        f"(sampling/sampling_logp_difference/mean), more than {limit:.3g}; nothing is trained on these samples. Likely "
        f"cause: {cause or causes[config.engine]}"
    )


def sampler_limit(config: PPOConfig, dtype: torch.dtype, *, own: bool = False) -> float:
    """Nats per token. Rounding of logits grows with the inverse of a temperature below 1."""
    if config.max_sampling_logp_difference is not None:
        return config.max_sampling_logp_difference
    exact = config.engine == "transformers" and not own and dtype == torch.float32
    return (0.1 if exact else 0.3) / min(1.0, config.temperature, *config.temperatures)


def raise_not_finite(numbers: Mapping[str, Tensor], cu_rows: Tensor, rollouts: Sequence[Rollout]) -> None:
    """Raises ValueError naming the first of `numbers`, each [R], that has an entry that is not finite, and the row of
    the prompt of its episode. `cu_rows` (N+1,) says which entries belong to which of the N episodes."""
    for name, values in numbers.items():
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            first = bad[0, 0]
            episode = int(torch.searchsorted(cu_rows, first, right=True)) - 1
            raise ValueError(
                f"{name}: {values[first].item()} for a token of the response to row {rollouts[episode].prefix.row}; "
                "nothing is trained on it"
            )
