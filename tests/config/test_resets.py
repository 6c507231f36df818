"""Tests of the checks of reset keys."""

import pytest

from fastrlhf.config import PPOConfig


def test_keys_of_resets_are_refused_without_resets():
    for field, value in (("reset_min", 0), ("reset_source", "chosen"), ("reset_curriculum", 0.5)):
        with pytest.raises(
            ValueError, match=rf"^{field}: must be .* when reset_prob is 0, since it would have no effect"
        ):
            PPOConfig(**{field: value})
        assert getattr(PPOConfig(reset_prob=0.5, **{field: value}), field) == value
