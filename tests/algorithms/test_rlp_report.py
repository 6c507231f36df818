"""Tests of the report on a reward model that RLP has refitted, with values computed by hand."""

import pytest
import torch

from fastrlhf.algorithms.completions import Answers
from fastrlhf.algorithms.rlp_report import agreement, compare_scores, view_activity


def sets(*responses):
    """Makes one prompt per list of tokens; each token of the list is an answer to the prompt."""
    return [
        Answers(row=i, prompt=[9], responses=[[token] for token in tokens], logprob=[0.0] * len(tokens))
        for i, tokens in enumerate(responses)
    ]


def test_scores_before_and_after_by_hand():
    answers = sets([1, 2], [3, 4], [5, 5])
    before = [torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0]), torch.tensor([4.0, 4.0])]
    after = [torch.tensor([0.0, 1.0]), torch.tensor([0.0, 3.0]), torch.tensor([7.0, 7.0])]
    worth = [[0.0, 1.0], [0.0, 1.0], [1.0, 1.0]]
    assert compare_scores(0, answers, before, after, worth) == pytest.approx(
        {
            "rlp/rm_drift": (18 - 11) / 6,
            "rlp/rm_order_agreement": 0.5,  # the order of the second prompt is reversed; the third has equal scores
            "rlp/rm_variance_before": (2 + 0.5) / 2,
            "rlp/rm_variance_after": (0.5 + 4.5) / 2,
            "rlp/rm_variance_ratio": 2.0,
            "rlp/rm_accuracy_policy_before": 0.5,
            "rlp/rm_accuracy_policy_after": 1.0,
        }
    )
    assert "rlp/rm_accuracy_policy_after" not in compare_scores(0, answers, before, after)


def test_agreement_counts_own_ties_as_one_half_and_skips_ties_of_the_reference():
    ours, theirs = torch.tensor([1.0, 0.0, -1.0, 5.0]), torch.tensor([2.0, 1.0, 1.0, 0.0])
    assert agreement(ours, theirs) == pytest.approx(1.5 / 3)
    assert agreement(torch.empty(0), torch.empty(0)) == 0.0


def test_views_that_do_not_distinguish_prompts_are_reported_as_inactive(caplog):
    rows = [{"views/jsd": -0.5}] * 18 + [{"views/jsd": -1.38}] * 2
    assert view_activity(rows) == {"rlp/views_jsd": pytest.approx(-1.38), "rlp/views_active": 0.0}
    assert "uml: inactive" in caplog.text
    assert "Try beta_end 0.1" in caplog.text
    caplog.clear()
    assert view_activity(rows[::-1]) == {"rlp/views_jsd": -0.5, "rlp/views_active": 1.0}
    assert view_activity([{"loss": 1.0}]) == {}
    assert not caplog.text
