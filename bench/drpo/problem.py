"""The update that is measured: models of a given shape with random weights, and episodes as long as those of TL;DR.

Speed and memory do not depend on the weights, but they depend on when a response ends. So one unit of the policy is
constant and only the EOS reads it: the EOS has the same probability at every token, and every side samples from the
same distribution of lengths.
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
PROMPT_LENGTH, RESPONSE_LENGTH = 512, 53  # maximum number of tokens, from the released code
PROMPT_QUANTILES = {0.0: 130, 0.1: 216, 0.5: 350, 0.9: 475, 0.99: 510, 1.0: PROMPT_LENGTH}
"""Tokens of a TL;DR prompt, measured on 1,945 posts of the validation split; the shortest one is a guess."""
REFERENCE_LENGTH = NormalDist(33.9, 6.5)
"""Tokens of a human summary and its EOS, on the same posts, where they lie in 16..50."""

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
    """The input of every side. Fields are JSON values, because a problem is sent to a separate process."""

    shape: str
    episodes: int
    device: str
    micro_batch: int
    """Episodes of a micro-batch of the padded sides."""
    micro_batch_tokens: int
    """Tokens of a micro-batch of ours."""
    rollout_batch: int
    """Number of episodes generated together, for every side."""
    epochs: int = 4
    seed: int = 0
    optim: Any = "adamw_torch_fused"
    master_weights: Any = "float32"
    """The keys `optim` and `master_weights` of ours and of the padded reference; TRL's AdamW works in the dtype of the
    weights."""

    def config(self) -> DRPOConfig:
        """The paper's settings; one schedule-free step of AdamW per epoch, without weight decay or clipping."""
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
    """Random ids. Lengths stand at evenly spaced quantiles, shuffled, so that few episodes are as long as many."""
    draw = np.random.default_rng([problem.seed, 1])
    quantiles = (np.arange(problem.episodes) + 0.5) / problem.episodes
    prompts = np.interp(draw.permutation(quantiles), list(PROMPT_QUANTILES), list(PROMPT_QUANTILES.values()))
    references = [REFERENCE_LENGTH.inv_cdf(quantile) for quantile in draw.permutation(quantiles)]
    last = SHAPES[problem.shape]["vocab_size"] - 1  # TRL's padding, which no text may hold

    def ids(count: int) -> list[int]:
        return draw.integers(1, last, count).tolist()

    return [
        TokenizedExample(
            prompt=ids(round(prompt)), reference=[*ids(min(max(round(reference), 16), 50) - 1), EOS], row=row
        )
        for row, (prompt, reference) in enumerate(zip(prompts, references, strict=True))
    ]


def eos_probability(examples: Sequence[TokenizedExample], prefixes: Sequence[Prefix]) -> float:
    """The probability that a token is the EOS, such that responses, resets included, have the same mean length as the
    references.

    With probability p at every token, an episode with b tokens left samples (1 - (1 - p)^b) / p of them on average.
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
    """A sequence classifier: the reward model, from which the critic starts too."""


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
    """Unit 0 of the last hidden state becomes 1, and only the logit of the EOS reads it.

    The other logits are normal with variance std^2 (D - 1), the norm of a normalised state: the log of the sum of their
    exponentials is that of a log-normal, to 1e-2 at these sizes.
    """
    norm = cast(LayerNorm, policy.base_model.final_layer_norm)
    head = cast(Linear, policy.get_output_embeddings()).weight
    norm.weight[0], norm.bias[0] = 0.0, 1.0
    head[:, 0] = 0.0
    variance = head[1:].float().var().item() * (head.shape[1] - 1) / temperature**2
    others = math.log(head.shape[0] - 1) + variance / 2
    head[EOS] = 0.0
    head[EOS, 0] = temperature * (others + math.log(probability / (1 - probability)))
