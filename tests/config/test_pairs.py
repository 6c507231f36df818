"""Tests of the checks of pair-loss keys."""

import pytest

from fastrlhf.config import GRPOConfig


def test_coefficients_of_pair_losses_must_be_positive():
    for field in ("pair_eta", "pair_beta"):
        for value in (0.0, -1.0):
            with pytest.raises(ValueError, match=rf"^{field}: must be above 0; got {value}"):
                GRPOConfig(update="pair", **{field: value})
    assert GRPOConfig(update="pair", pair_loss="dpo", pair_beta=0.5).pair_beta == 0.5
