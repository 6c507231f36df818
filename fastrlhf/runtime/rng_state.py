"""Saves and restores the process-wide random generators of Python, numpy and torch."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


class GlobalRandomness:
    """State of the process-wide random generators. fastrlhf does not use these generators, but user-defined judges and
    rewards may."""

    def state_dict(self) -> dict[str, Any]:
        kind, keys, *rest = np.random.get_state(legacy=True)
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return {
            "python": random.getstate(),
            "numpy": [kind, np.asarray(keys).tolist(), *rest],
            "torch": torch.get_rng_state(),
            **{f"cuda.{i}": state for i, state in enumerate(devices)},
        }

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        version, keys, gauss = state["python"]
        random.setstate((version, tuple(keys), gauss))
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, np.array(keys, np.uint32), *rest))
        if "torch" in state:
            torch.set_rng_state(state["torch"])
        for device in range(torch.cuda.device_count()):  # the number of GPUs may have changed
            if f"cuda.{device}" in state:
                torch.cuda.set_rng_state(state[f"cuda.{device}"], device)
