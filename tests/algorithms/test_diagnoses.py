"""Findings are told where they hold, once, and not on healthy curves."""

from fastrlhf.algorithms.diagnoses import Diagnoses


def told(curve, steps=40, losses=("sigmoid",)):
    diagnoses = Diagnoses(losses)
    names = ("logps/chosen", "logps/rejected", "rewards/margins", "rewards/accuracies")
    return [
        text for step in range(steps) for text in diagnoses.look(dict(zip(names, curve(step / steps), strict=True)))
    ]


def test_both_log_probs_falling_under_a_rising_margin_is_told_once():
    [text] = told(lambda t: (-100 - 20 * t, -100 - 60 * t, 4 * t, 0.8))
    assert "both fall (-1.5 and -4.5 nats)" in text  # means of the last ten steps against those of the first
    assert "loss_type: [sigmoid, sft]" in text


def test_a_chosen_response_that_grows_likelier_or_a_margin_that_falls_is_no_finding():
    assert told(lambda t: (-100 + 5 * t, -100 - 60 * t, 4 * t, 0.8)) == []
    assert told(lambda t: (-100 - 20 * t, -100 - 10 * t, -1 * t, 0.4)) == []
    assert told(lambda t: (-100 - 0.5 * t, -100 - 60 * t, 4 * t, 0.8)) == []


def test_saturated_rewards_are_told_once():
    [text] = told(lambda t: (-100, -100 - 200 * t, 20 * t, 1.0))
    assert "accuracy 1.00, margin 1" in text
    assert told(lambda t: (-100, -100 - 200 * t, 20 * t, 0.9)) == []


def test_too_few_steps_say_nothing():
    assert told(lambda t: (-100 - 900 * t, -100 - 990 * t, 90 * t, 1.0), steps=10) == []


def test_ipo_at_its_target_is_not_saturated_and_sft_is_not_advised_twice():
    assert told(lambda t: (-100, -100 - 200 * t, 20 * t, 1.0), losses=("ipo",)) == []
    assert told(lambda t: (-100 - 20 * t, -100 - 60 * t, 4 * t, 0.8), losses=("sigmoid", "sft")) == []
