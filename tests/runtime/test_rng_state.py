"""Tests that the state of the global random generators, restored from JSON, reproduces every draw."""

import json
import random

import numpy as np
import torch

from fastrlhf.runtime.rng_state import GlobalRandomness


def draws() -> list[float]:
    return [random.random(), random.gauss(0, 1), float(np.random.standard_normal()), torch.rand(()).item()]


def test_a_restored_state_repeats_the_draws():
    before = GlobalRandomness().state_dict()
    tensors = {name: value for name, value in before.items() if isinstance(value, torch.Tensor)}
    rest = json.loads(json.dumps({name: value for name, value in before.items() if name not in tensors}))
    expected = [draws(), draws()]
    assert expected[0] != expected[1]
    GlobalRandomness().load_state_dict({**rest, **tensors})
    assert [draws(), draws()] == expected


def test_states_of_absent_devices_are_skipped(monkeypatch):
    set_to = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: set_to.append((state, device)))
    GlobalRandomness().load_state_dict(GlobalRandomness().state_dict() | {"cuda.0": "first", "cuda.1": "second"})
    assert set_to == [("first", 0)]
