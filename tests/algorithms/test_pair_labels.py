"""Tests of the label probabilities of pairs, which are read from a column or computed from counts or scores."""

import math
from dataclasses import replace

import pytest
import torch

from fastrlhf.algorithms.pair_labels import group_preferences, pair_margins, pair_probabilities
from fastrlhf.config import DPOConfig
from fastrlhf.types import TokenizedExample
from tests import tiny


def example(**labels):
    return TokenizedExample(prompt=[3], chosen=[4, 1], rejected=[5, 1], row=7, **labels)


def probabilities(source, *examples, **keys):
    return pair_probabilities(DPOConfig(label_source=source, **keys), examples, [], tiny.tokenizer())


def test_hard_labels_have_no_probability():
    assert probabilities("data", example(label_prob=0.3)) is None


def test_a_column_gives_the_probability_and_counts_are_smoothed():
    assert probabilities("label_prob", example(label_prob=0.3), example(label_prob=1)).tolist() == [0.3, 1.0]
    found = probabilities("counts", example(wins=3, num_labels=4), example(wins=0, num_labels=0), label_prior=1.0)
    assert found.tolist() == [4 / 6, 0.5]


@pytest.mark.parametrize(
    ("source", "labels", "message"),
    [
        ("label_prob", {"label_prob": 1.5}, "row 7: bad_label_prob: label_prob is 1.5, not in 0..1"),
        ("label_prob", {}, "row 7: bad_label_prob: label_prob is None"),
        ("counts", {"wins": 5, "num_labels": 4}, "row 7: wrong_counts: 5 wins of 4 labels"),
    ],
)
def test_labels_from_python_are_checked_like_those_of_a_file(source, labels, message):
    with pytest.raises(ValueError, match=message):
        probabilities(source, example(**labels))


def test_a_pair_without_labels_takes_a_prior():
    labelled, bare = example(wins=1, num_labels=1), replace(example(wins=0, num_labels=0), row=9)
    assert probabilities("counts", labelled, label_prior=0.0).tolist() == [1.0]
    with pytest.raises(ValueError, match=r"^row 9 has num_labels 0; set a label_prior above 0 or remove the row"):
        probabilities("counts", labelled, bare, label_prior=0.0)


def test_margins_are_read_and_checked():
    assert pair_margins([example(margin=0.5), example(margin=-1)]).tolist() == [0.5, -1.0]
    with pytest.raises(ValueError, match="row 7: bad_margin: margin is inf, not finite"):
        pair_margins([example(margin=math.inf)])


def test_scores_of_a_group_are_compared_at_their_scale():
    group = TokenizedExample(prompt=[3], responses=[[4, 1], [5, 1]], scores=[1.0, 3.0], row=0)
    config = DPOConfig(loss_type="ipo", psi_backend="groupwise", score_scale=0.5)
    [found] = group_preferences(config, [group], [], tiny.tokenizer())
    better = 1 / (1 + math.exp(-1.0))
    torch.testing.assert_close(found, torch.tensor([[0.5, 1 - better], [better, 0.5]], dtype=torch.float64))
