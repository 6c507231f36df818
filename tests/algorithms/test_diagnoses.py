"""Tests of the training diagnoses: each is reported once, when its condition is met, and never for healthy curves."""

from fastrlhf.algorithms.diagnoses import Diagnoses


def reported(curve, steps=40, losses=("sigmoid",)):
    diagnoses = Diagnoses(losses)
    names = ("logps/chosen", "logps/rejected", "rewards/margins", "rewards/accuracies")
    return [
        text for step in range(steps) for text in diagnoses.look(dict(zip(names, curve(step / steps), strict=True)))
    ]


def test_falling_log_probs_with_a_rising_margin_are_reported_once():
    [text] = reported(lambda t: (-100 - 20 * t, -100 - 60 * t, 4 * t, 0.8))
    assert "both fall (-1.5 and -4.5 nats)" in text  # mean of the last ten steps minus mean of the first ten
    assert "loss_type: [sigmoid, sft]" in text


def test_rising_chosen_log_probs_or_a_falling_margin_are_not_reported():
    assert reported(lambda t: (-100 + 5 * t, -100 - 60 * t, 4 * t, 0.8)) == []
    assert reported(lambda t: (-100 - 20 * t, -100 - 10 * t, -1 * t, 0.4)) == []
    assert reported(lambda t: (-100 - 0.5 * t, -100 - 60 * t, 4 * t, 0.8)) == []


def test_saturated_rewards_are_reported_once():
    [text] = reported(lambda t: (-100, -100 - 200 * t, 20 * t, 1.0))
    assert "accuracy 1.00, margin 1" in text
    assert reported(lambda t: (-100, -100 - 200 * t, 20 * t, 0.9)) == []


def test_too_few_steps_give_no_report():
    assert reported(lambda t: (-100 - 900 * t, -100 - 990 * t, 90 * t, 1.0), steps=10) == []


def test_ipo_at_its_target_is_not_saturated_and_sft_is_not_advised_twice():
    assert reported(lambda t: (-100, -100 - 200 * t, 20 * t, 1.0), losses=("ipo",)) == []
    assert reported(lambda t: (-100 - 20 * t, -100 - 60 * t, 4 * t, 0.8), losses=("sigmoid", "sft")) == []
