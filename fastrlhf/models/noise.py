"""Turns off all randomness in a model, because log-probs of the same tokens must be equal in every pass.

This includes all kinds of dropout, layer drop, and jitter of routers and inputs. Evaluation mode is not enough, because
layers that are recomputed in the backward pass run in training mode.
"""

from __future__ import annotations

import re

from torch.nn import Module
from torch.nn.modules.dropout import _DropoutNd
from transformers import PretrainedConfig

RANDOM = re.compile(r"drop|pdrop|jitter|noise")
"""Matches the names of settings that are the probability or the amplitude of noise."""


def silent_config(config: PretrainedConfig) -> PretrainedConfig:
    """Sets all noise settings (`RANDOM`) of a configuration and its sub-configurations to 0, in place."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            silent_config(value)
        elif isinstance(value, float) and value and RANDOM.search(name):
            setattr(config, name, 0.0)
    return config


def silence(model: Module) -> None:
    """Sets all noise settings (`RANDOM`) of the modules of a model to 0, in place."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and value and RANDOM.search(name):
                setattr(module, name, 0.0)
