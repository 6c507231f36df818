"""Every setting of every run: one flat frozen dataclass per command, checked where it is defined.

Names and defaults are those of Hugging Face's TrainingArguments and TRL wherever they have one. A YAML file gives some
of the keys, flags of the same names override it, and the rest take the defaults below. Nothing is derived silently:
every value that a run used is written to `config.yaml` in its output directory.
"""

from __future__ import annotations

from fastrlhf.config.checks import check_config, require
from fastrlhf.config.commands import DemoConfig, EvalConfig
from fastrlhf.config.offline import DPOConfig, RewardConfig, SFTConfig
from fastrlhf.config.on_policy import DRPOConfig, GRPOConfig, PPOConfig, RTOConfig
from fastrlhf.config.rlp import RLPConfig
from fastrlhf.config.train import COLUMNS, TrainConfig, parse_columns, parse_model_config, parse_template_kwargs

CONFIGS: dict[str, type] = {
    "sft": SFTConfig,
    "reward": RewardConfig,
    "dpo": DPOConfig,
    "ppo": PPOConfig,
    "grpo": GRPOConfig,
    "drpo": DRPOConfig,
    "rto": RTOConfig,
    "rlp": RLPConfig,
    "eval": EvalConfig,
    "demo": DemoConfig,
}
"""Command -> its configuration: the commands that take keys and may have a section of their own in a file."""

__all__ = [
    "COLUMNS",
    "CONFIGS",
    "DPOConfig",
    "DRPOConfig",
    "DemoConfig",
    "EvalConfig",
    "GRPOConfig",
    "PPOConfig",
    "RLPConfig",
    "RTOConfig",
    "RewardConfig",
    "SFTConfig",
    "TrainConfig",
    "check_config",
    "parse_columns",
    "parse_model_config",
    "parse_template_kwargs",
    "require",
]
