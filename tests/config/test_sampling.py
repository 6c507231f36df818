"""Tests of the checks of sampling keys."""

from dataclasses import replace

import pytest

from fastrlhf.config import PPOConfig


def test_vllm_has_no_temperature_below_its_own_least():
    config = PPOConfig(engine="vllm")
    with pytest.raises(ValueError, match=r"^temperature: must be at least 0\.01 with engine vllm; got 0\.009$"):
        replace(config, temperature=0.009)
    assert replace(config, temperature=0.009, engine="transformers").temperature == 0.009


@pytest.mark.parametrize(("devices", "rule"), [((0, -1), "numbers of GPUs"), ((1, 0, 1), "different GPUs")])
def test_the_gpus_of_vllm_are_different_numbers(devices, rule):
    with pytest.raises(ValueError, match=rf"^vllm_devices: must be {rule}; got"):
        PPOConfig(engine="vllm", vllm_devices=devices)


def test_the_limit_of_the_samplers_log_probs_is_a_number_of_nats():
    assert PPOConfig(max_sampling_logp_difference=0).max_sampling_logp_difference == 0
    with pytest.raises(ValueError, match=r"^max_sampling_logp_difference: must be at least 0; got -0\.1$"):
        PPOConfig(max_sampling_logp_difference=-0.1)
