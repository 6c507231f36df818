"""Tests of the checks of loss keys."""

import pytest

from fastrlhf.config import PPOConfig


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("dual_clip", 1.0, "above 1"),
        ("sampler_is_cap", 0.9, "at least 1"),
        ("cliprange_high", 0.0, "above 0"),
        ("target_kl", 0.0, "above 0"),
        ("entropy_coef", -0.1, "at least 0"),
    ],
)
def test_the_bounds_of_the_optional_terms(field, value, rule):
    with pytest.raises(ValueError, match=rf"^{field}: must be {rule}"):
        PPOConfig(**{field: value})


def test_a_critic_warmup_needs_a_critic():
    with pytest.raises(ValueError, match=r"^value_warmup_steps: must be 0 with advantage_estimator rloo"):
        PPOConfig(advantage_estimator="rloo", num_generations=2, value_warmup_steps=1)
