"""The update that `bench train drpo` measures: random models of a given size, and episodes with TL;DR lengths.

Speed and memory depend on the weights only through the lengths of responses. To fix the distribution of lengths, one
hidden unit of the policy is set to a constant, and only the logit of the EOS reads it. The EOS then has the same
probability at every token, in every implementation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, cast

import numpy as np
import torch
from torch.nn import LayerNorm, Linear
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from fastrlhf.algorithms.ppo import draw_prefixes
from fastrlhf.config import DRPOConfig
from fastrlhf.models.loading import DTYPES, build_policy
from fastrlhf.types import Prefix, TokenizedExample

EOS = 0
PROMPT_LENGTH, RESPONSE_LENGTH = 512, 53  # maximum numbers of tokens, from DR-PO's released code
PROMPT_QUANTILES = {0.0: 130, 0.1: 216, 0.5: 350, 0.9: 475, 0.99: 510, 1.0: PROMPT_LENGTH}
"""Quantile -> number of tokens of a TL;DR prompt, measured on 1,945 validation posts. The value for quantile 0 is a
guess."""
REFERENCE_LENGTH = NormalDist(33.9, 6.5)
"""Distribution of the number of tokens of a human TL;DR summary, EOS included; measured lengths are 16 to 50."""

_COMMON = {"model_type": "gpt_neox", "rotary_pct": 0.25, "max_position_embeddings": 2048, "classifier_dropout": 0.0}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _COMMON | {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "initializer_range": 0.06,
    },
    "pythia-70m": _COMMON | {
        "vocab_size": 50_304, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6,
        "num_attention_heads": 8,
    },
    "pythia-1b": _COMMON | {
        "vocab_size": 50_304, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 8,
    },
    "pythia-2.8b": _COMMON | {
        "vocab_size": 50_304, "hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The settings of the measured update. Fields are JSON values, because they are sent to a separate process."""

    shape: str
    episodes: int
    device: str
    micro_batch: int
    """Episodes per micro-batch of the padded implementations."""
    micro_batch_tokens: int
    """Tokens per micro-batch of our implementation."""
    rollout_batch: int
    """Number of episodes generated together, in every implementation."""
    epochs: int = 4
    seed: int = 0
    optim: Any = "adamw_torch_fused"
    master_weights: Any = "float32"
    """`optim` and `master_weights` apply to our implementation and the padded reference; TRL's AdamW works in the dtype
    of the weights."""

    def config(self) -> DRPOConfig:
        """Returns the trainer's configuration: the paper's settings, with one AdamW step per epoch, a constant learning
        rate, no weight decay and no gradient clipping.
        """
        return DRPOConfig(
            per_device_train_batch_size=self.episodes,
            num_ppo_epochs=self.epochs,
            max_length=PROMPT_LENGTH + RESPONSE_LENGTH,
            response_length=RESPONSE_LENGTH,
            micro_batch_tokens=self.micro_batch_tokens,
            rollout_batch_size=self.rollout_batch,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            dtype="bfloat16" if self.device == "cuda" else "float32",
            device=self.device,
            seed=self.seed,
            optim=self.optim,
            master_weights=self.master_weights,
        )


def make_examples(problem: Problem) -> list[TokenizedExample]:
    """Makes prompts and references of random ids.

    Lengths are evenly spaced quantiles, shuffled, so that even a few episodes have the right mean length.
    """
    draw = np.random.default_rng([problem.seed, 1])
    quantiles = (np.arange(problem.episodes) + 0.5) / problem.episodes
    prompts = np.interp(draw.permutation(quantiles), list(PROMPT_QUANTILES), list(PROMPT_QUANTILES.values()))
    references = [REFERENCE_LENGTH.inv_cdf(quantile) for quantile in draw.permutation(quantiles)]
    last = SHAPES[problem.shape]["vocab_size"] - 1  # the padding id of TRL, which must not occur in a text

    def ids(count: int) -> list[int]:
        return draw.integers(1, last, count).tolist()

    return [
        TokenizedExample(
            prompt=ids(round(prompt)), reference=[*ids(min(max(round(reference), 16), 50) - 1), EOS], row=row
        )
        for row, (prompt, reference) in enumerate(zip(prompts, references, strict=True))
    ]


def eos_probability(examples: Sequence[TokenizedExample], prefixes: Sequence[Prefix]) -> float:
    """Returns the EOS probability at which responses (resets included) have the mean length of the references.

    With an EOS probability of p at every token, an episode with room for b more tokens samples (1 - (1 - p)^b) / p of
    them on average.
    """
    wanted = sum(len(example.reference or ()) for example in examples) - sum(prefix.num_reset for prefix in prefixes)
    low, high = 1e-6, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        sampled = sum((1 - (1 - middle) ** (RESPONSE_LENGTH - prefix.num_reset)) / middle for prefix in prefixes)
        low, high = (middle, high) if sampled > wanted else (low, middle)
    return low


@dataclass(frozen=True, kw_only=True)
class Models:
    policy: PreTrainedModel
    critic: PreTrainedModel
    """A sequence classifier, from which the critic starts."""


def make_models(problem: Problem, examples: Sequence[TokenizedExample]) -> Models:
    config = problem.config()
    shape = SHAPES[problem.shape]
    device = torch.device(config.device)
    size = shape["vocab_size"]
    policy = build_policy(shape, vocab_size=size, eos_token_id=EOS, seed=config.seed, device=device, dtype=config.dtype)
    probability = eos_probability(examples, draw_prefixes(config, examples, first_group=0))
    _set_eos_probability(policy, probability, config.temperature)
    settings = AutoConfig.for_model(**shape, num_labels=1, pad_token_id=size - 1)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed + 1)
        critic = AutoModelForSequenceClassification.from_config(settings, dtype=DTYPES[config.dtype])
    return Models(policy=policy, critic=critic.to(device))


@torch.no_grad()
def _set_eos_probability(policy: PreTrainedModel, probability: float, temperature: float) -> None:
    """Changes the policy so that the EOS has the given probability at every token.

    Unit 0 of the last hidden state becomes 1, and only the logit of the EOS reads it. The other logits are normal with
    variance std^2 (D - 1), because the norm of the hidden state is fixed. The log of the sum of their exponentials
    therefore follows from the mean of a log-normal distribution, to within 1e-2 at these sizes.
    """
    norm = cast(LayerNorm, policy.base_model.final_layer_norm)
    head = cast(Linear, policy.get_output_embeddings()).weight
    norm.weight[0], norm.bias[0] = 0.0, 1.0
    head[:, 0] = 0.0
    variance = head[1:].float().var().item() * (head.shape[1] - 1) / temperature**2
    others = math.log(head.shape[0] - 1) + variance / 2
    head[EOS] = 0.0
    head[EOS, 0] = temperature * (others + math.log(probability / (1 - probability)))
