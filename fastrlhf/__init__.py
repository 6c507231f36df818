"""Preference learning for language models: SFT, reward models, DPO, IPO, KTO, PPO, DR-PO, RTO, RLP, on packed batches.

Importing the package is fast: a public name loads its module when it is first used. The base install, which lacks the
trainers' libraries, can therefore use the losses.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastrlhf.algorithms.dpo import train_dpo
    from fastrlhf.algorithms.kto import train_kto
    from fastrlhf.algorithms.ppo import train_on_policy, train_ppo
    from fastrlhf.algorithms.reward_model import train_reward_model
    from fastrlhf.algorithms.rlp import train_rlp
    from fastrlhf.algorithms.sft import train_sft
    from fastrlhf.config import (
        DPOConfig,
        DRPOConfig,
        EvalConfig,
        GRPOConfig,
        KTOConfig,
        PPOConfig,
        RewardConfig,
        RLPConfig,
        RTOConfig,
        SFTConfig,
    )
    from fastrlhf.data.examples import load_examples
    from fastrlhf.evaluation.evaluate import evaluate_models
    from fastrlhf.models.loading import load_policy, load_reward_model
    from fastrlhf.runtime.callbacks import Callback
    from fastrlhf.runtime.result import TrainResult
    from fastrlhf.types import Example, PackedBatch, Prefix, Rollout, Segment

__version__ = "0.1.0"

__all__ = [
    "Callback",
    "DPOConfig",
    "DRPOConfig",
    "EvalConfig",
    "Example",
    "GRPOConfig",
    "KTOConfig",
    "PPOConfig",
    "PackedBatch",
    "Prefix",
    "RLPConfig",
    "RTOConfig",
    "RewardConfig",
    "Rollout",
    "SFTConfig",
    "Segment",
    "TrainResult",
    "evaluate_models",
    "load_examples",
    "load_policy",
    "load_reward_model",
    "train_dpo",
    "train_kto",
    "train_on_policy",
    "train_ppo",
    "train_reward_model",
    "train_rlp",
    "train_sft",
]

_EXPORTS: dict[str, str] = {
    **dict.fromkeys(
        (
            "SFTConfig",
            "RewardConfig",
            "DPOConfig",
            "KTOConfig",
            "PPOConfig",
            "GRPOConfig",
            "DRPOConfig",
            "RTOConfig",
            "RLPConfig",
        ),
        "fastrlhf.config",
    ),
    "EvalConfig": "fastrlhf.config",
    **dict.fromkeys(("Example", "Prefix", "Rollout", "PackedBatch", "Segment"), "fastrlhf.types"),
    "load_examples": "fastrlhf.data.examples",
    **dict.fromkeys(("load_policy", "load_reward_model"), "fastrlhf.models.loading"),
    "train_sft": "fastrlhf.algorithms.sft",
    "train_reward_model": "fastrlhf.algorithms.reward_model",
    "train_dpo": "fastrlhf.algorithms.dpo",
    "train_kto": "fastrlhf.algorithms.kto",
    **dict.fromkeys(("train_ppo", "train_on_policy"), "fastrlhf.algorithms.ppo"),
    "train_rlp": "fastrlhf.algorithms.rlp",
    "Callback": "fastrlhf.runtime.callbacks",
    "TrainResult": "fastrlhf.runtime.result",
    "evaluate_models": "fastrlhf.evaluation.evaluate",
}
"""Public name -> the module that defines it. The imports above are only for type checkers and editors."""


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'fastrlhf' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
