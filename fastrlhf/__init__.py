"""Preference learning for language models: SFT, reward models, DPO, IPO, PPO, DR-PO, RTO and RLP on packed batches.

Importing this costs nothing: a public name loads its module when it is first asked for, so that the base install, which
lacks the trainers' libraries, can use the losses.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS: dict[str, str] = {
    **dict.fromkeys(
        ("SFTConfig", "RewardConfig", "DPOConfig", "PPOConfig", "DRPOConfig", "RTOConfig", "RLPConfig", "EvalConfig"),
        "fastrlhf.config",
    ),
    **dict.fromkeys(("Example", "Prefix", "Rollout", "PackedBatch", "Segment"), "fastrlhf.types"),
    "load_examples": "fastrlhf.data.examples",
    "train_sft": "fastrlhf.algorithms.sft",
    "train_reward_model": "fastrlhf.algorithms.reward_model",
    "train_dpo": "fastrlhf.algorithms.dpo",
    **dict.fromkeys(("train_ppo", "train_on_policy"), "fastrlhf.algorithms.ppo"),
    "train_rlp": "fastrlhf.algorithms.rlp",
    "TrainResult": "fastrlhf.runtime.run",
    "evaluate_models": "fastrlhf.evaluation.evaluate",
}
"""Public name -> the module that defines it."""


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'fastrlhf' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
