"""Tests of the score that is reported for a response, and which rewards it includes."""

import torch

from fastrlhf.algorithms.episode_metrics import score_names, sum_of_rewards
from fastrlhf.rewards.terms import Term


def test_the_score_is_that_of_the_judge_or_else_of_functions_and_dpo_model():
    terms = {
        name: Term(reward=torch.tensor(values))
        for name, values in {
            "score": [0.0, 5.0, 7.0],
            "missing_eos": [0.0, -1.0, 0.0],
            "kl": [0.5, 0.5, 0.5],
            "dpo": [0.25, 0.25, 1.0],
            "length": [-1.0, -1.0, -1.0],
            "right": [0.0, 2.0, 3.0],
        }.items()
    }
    cu_rows = torch.tensor([0, 2, 3], dtype=torch.int32)
    assert sum_of_rewards(terms, cu_rows).tolist() == [5, 7]
    del terms["score"]
    assert score_names(terms) == ["dpo", "right"]
    assert sum_of_rewards(terms, cu_rows).tolist() == [2.5, 4]
