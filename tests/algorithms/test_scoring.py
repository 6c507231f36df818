"""Tests of scoring responses: the scores are in the order of the responses and do not depend on the micro-batches."""

import pytest
import torch

from fastrlhf.algorithms.scoring import num_responses, per_response, sequence_logprobs
from fastrlhf.data.packing import group
from tests import tiny

RESPONSES = [[[4, 5, 1], [6, 1]], [[7, 1], [8, 9, 10, 1], [11, 12, 1]], [[13, 1]]]


def trees(share_prompt):
    return [
        group([3, 20 + i], responses, scored=True, share_prompt=share_prompt) for i, responses in enumerate(RESPONSES)
    ]


@pytest.mark.parametrize("share_prompt", [False, True])
@pytest.mark.parametrize("budget", [15, 1000])
def test_log_probs_are_those_of_plain_logits_one_sequence_at_a_time(share_prompt, budget):
    model = tiny.policy()
    values = per_response(model, trees(share_prompt), budget, sequence_logprobs, "model")
    for i, (responses, found) in enumerate(zip(RESPONSES, values, strict=True)):
        for response, value in zip(responses, found, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([[3, 20 + i, *response]])).logits[0, 1:-1].log_softmax(-1)
            expected = logits[range(len(response)), response].sum()
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share_prompt", [False, True])
def test_responses_are_counted_without_the_prompt(share_prompt):
    assert [num_responses(tree) for tree in trees(share_prompt)] == [2, 3, 1]


def test_a_number_that_is_not_finite_names_the_field_and_the_example():
    model = tiny.policy()
    broken = iter([torch.zeros(3), torch.tensor([0.0, float("nan"), 0.0])])
    two = [trees(True)[1]] * 2
    with pytest.raises(ValueError, match=r"^reward_model_path: its output for example 1 is not finite"):
        per_response(model, two, 12, lambda *_: next(broken), "reward_model_path")
