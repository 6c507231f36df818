"""Tests of the adaptive KL coefficient, with values computed by hand."""

import pytest

from fastrlhf.rewards.kl_controller import KLController


def controller(**settings) -> KLController:
    return KLController(**{"coef": 0.1, "target": 6.0, "horizon": 1000} | settings)


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),
        (6.6, 1.01),  # relative error 0.1 for a tenth of the horizon: 1 + 0.1 * 0.1
        (5.4, 0.99),
        (60.0, 1.02),  # the relative error is clipped to 0.2
        (0.0, 0.98),
        (-3.0, 0.98),  # a sampled estimate of the KL may be negative
    ],
)
def test_the_coefficient_follows_the_relative_error_clipped_to_a_fifth(kl, factor):
    steered = controller()
    steered.update(kl, num_episodes=100)
    assert steered.coef == pytest.approx(0.1 * factor, rel=1e-12)


def test_updates_multiply():
    steered = controller()
    for _ in range(3):
        steered.update(60.0, num_episodes=500)
    assert steered.coef == pytest.approx(0.1 * 1.1**3, rel=1e-12)


def test_without_a_target_it_stays():
    fixed = controller(target=0.0)
    fixed.update(60.0, num_episodes=100)
    assert fixed.coef == 0.1


def test_what_is_saved_restores_it():
    steered, other = controller(), controller()
    steered.update(60.0, num_episodes=100)
    other.load_state_dict(steered.state_dict())
    assert other == steered
