"""What keys of sampling must be."""

from dataclasses import replace

import pytest

from fastrlhf.config import PPOConfig


def test_vllm_reads_a_model_from_a_folder_and_has_no_temperature_below_its_own_least():
    config = PPOConfig(engine="vllm")
    for field, value in (("model_config", '{"model_type": "llama"}'), ("temperature", 0.009)):
        with pytest.raises(ValueError, match=rf"^{field}: must be .* with engine vllm"):
            replace(config, **{field: value})
        replace(config, **{field: value, "engine": "transformers"})


def test_the_limit_of_the_samplers_log_probs_is_a_number_of_nats():
    assert PPOConfig(max_sampling_logp_difference=0).max_sampling_logp_difference == 0
    with pytest.raises(ValueError, match=r"^max_sampling_logp_difference: must be at least 0; got -0\.1$"):
        PPOConfig(max_sampling_logp_difference=-0.1)
