"""The configuration of every command: one flat, frozen dataclass per command, with its checks.

A key that Hugging Face's TrainingArguments or TRL also has keeps its name and default. A YAML file sets some of the
keys, command-line flags of the same names override it, and all other keys have the defaults below. Every value that a
run used is written to `config.yaml` in its output directory.
"""

from __future__ import annotations

from fastrlhf.config.checks import check_config, require
from fastrlhf.config.commands import CacheConfig, ChatConfig, DemoConfig, EvalConfig, MergeConfig
from fastrlhf.config.offline import DPOConfig, KTOConfig, ReferenceConfig, RewardConfig, SFTConfig
from fastrlhf.config.on_policy import DRPOConfig, GRPOConfig, PPOConfig, RTOConfig
from fastrlhf.config.rlp import RLPConfig
from fastrlhf.config.sources import COLUMNS, Source, parse_columns
from fastrlhf.config.train import TrainConfig, parse_model_config, parse_template_kwargs

CONFIGS: dict[str, type] = {
    "sft": SFTConfig,
    "reward": RewardConfig,
    "dpo": DPOConfig,
    "kto": KTOConfig,
    "ppo": PPOConfig,
    "grpo": GRPOConfig,
    "drpo": DRPOConfig,
    "rto": RTOConfig,
    "rlp": RLPConfig,
    "eval": EvalConfig,
    "chat": ChatConfig,
    "merge": MergeConfig,
    "demo": DemoConfig,
    "cache": CacheConfig,
}
"""The configuration class of each command. These commands take keys and may have a section in a configuration file."""

TRAIN_NOTHING = frozenset({"eval", "chat", "merge", "demo", "cache"})
"""Commands in `CONFIGS` that are no trainers."""

__all__ = [
    "COLUMNS",
    "CONFIGS",
    "TRAIN_NOTHING",
    "CacheConfig",
    "ChatConfig",
    "DPOConfig",
    "DRPOConfig",
    "DemoConfig",
    "EvalConfig",
    "GRPOConfig",
    "KTOConfig",
    "MergeConfig",
    "PPOConfig",
    "RLPConfig",
    "RTOConfig",
    "ReferenceConfig",
    "RewardConfig",
    "SFTConfig",
    "Source",
    "TrainConfig",
    "check_config",
    "parse_columns",
    "parse_model_config",
    "parse_template_kwargs",
    "require",
]
