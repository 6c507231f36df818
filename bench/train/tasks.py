"""The compared training tasks (SFT, DPO, reward model): settings of our trainer and of TRL's, and data formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from fastrlhf.algorithms.dpo import train_dpo
from fastrlhf.algorithms.reward_model import train_reward_model
from fastrlhf.algorithms.sft import train_sft
from fastrlhf.config import DPOConfig, RewardConfig, SFTConfig, TrainConfig
from fastrlhf.runtime.result import TrainResult
from fastrlhf.types import TokenizedExample

MODELS: dict[str, PretrainedConfig] = {
    "tiny": LlamaConfig(
        vocab_size=2000, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=True,
    ),
    "qwen3-0.6b": AutoConfig.for_model(
        "qwen3", vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, max_position_embeddings=4096,
        tie_word_embeddings=True,
    ),
    "llama-3.2-1b": LlamaConfig(
        vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=4096, tie_word_embeddings=True,
    ),
}  # fmt: skip
"""Model name -> architecture. Weights are random, which affects neither speed nor memory."""

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One training algorithm, with its settings for our trainer and for TRL's."""

    config: type[TrainConfig]
    train: Callable[..., TrainResult]
    fields: tuple[str, ...]
    """Columns of the dataset besides the prompt."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of our trainer that this task adds to the shared ones."""
    ways: Mapping[str, Mapping[str, Any]]
    """Variants of our trainer: name -> settings."""
    gpu_ways: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Variants of our trainer that only make sense on a GPU: name -> settings."""
    trl: str
    """Prefix of the names of TRL's classes, such as DPO for DPOTrainer and DPOConfig."""
    to_row: Callable[[TokenizedExample], Row]
    """Converts an example to a tokenised row of TRL's dataset."""
    trl_settings: Callable[[int], Mapping[str, Any]] = lambda batch_size: {}
    """Returns the settings of TRL's configuration for a given batch size."""
    trl_ways: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Variants of TRL's trainer besides padded batches: name -> settings."""
    is_classifier: bool = False
    """Whether the model is a sequence classifier, with one score per sequence."""


def _completion(example: TokenizedExample) -> Row:
    assert example.chosen is not None
    return {
        "input_ids": [*example.prompt, *example.chosen],
        "labels": [-100] * len(example.prompt) + [*example.chosen],
    }


def _pair(example: TokenizedExample) -> Row:
    return {"prompt_ids": example.prompt, "chosen_ids": example.chosen, "rejected_ids": example.rejected}


def _whole_pair(example: TokenizedExample) -> Row:
    assert example.chosen is not None
    assert example.rejected is not None
    return {
        "chosen_ids": [*example.prompt, *example.chosen],
        "rejected_ids": [*example.prompt, *example.rejected],
    }


SHARED = {"ours": {"share_prompts": True}, "ours, prompts twice": {"share_prompts": False}}

TASKS = {
    "sft": Task(
        config=SFTConfig,
        train=train_sft,
        fields=("chosen",),
        settings={"response": "chosen"},
        ways={"ours": {}},
        trl="SFT",
        to_row=_completion,
        # TRL's packing would change the examples of a step; padding-free batches cost as much and keep the examples.
        trl_ways={"padding-free": {"padding_free": True}},
    ),
    "dpo": Task(
        config=DPOConfig,
        train=train_dpo,
        fields=("chosen", "rejected"),
        ways=SHARED,
        gpu_ways={
            "ours, layers again": {"activation_checkpointing": True},
            "ours, offloaded": {"activation_checkpointing": True, "activation_offloading": True},
        },
        trl="DPO",
        to_row=_pair,
        trl_settings=lambda batch_size: {"precompute_ref_log_probs": True, "precompute_ref_batch_size": batch_size},
    ),
    "reward": Task(
        config=RewardConfig,
        train=train_reward_model,
        fields=("chosen", "rejected"),
        ways=SHARED,
        trl="Reward",
        to_row=_whole_pair,
        is_classifier=True,
    ),
}
