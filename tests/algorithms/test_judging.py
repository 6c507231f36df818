"""Tests of judging: a response that was judged before keeps its results, and only new groups are judged."""

import pytest
import torch

from fastrlhf.algorithms.judging import JudgedRollouts, judged_once
from fastrlhf.types import Prefix, Rollout

SIZE = 2


def rollout(number: int) -> Rollout:
    prefix = Prefix(token_ids=[3], num_reset=0, row=0, episode=number)
    return Rollout(prefix=prefix, completion=[number], sampler_logprob=[-1.0], ended=True)


def judged(rollouts) -> JudgedRollouts:
    """Stands in for judging: derives the results of a rollout from its only token. The metric is the number of
    rollouts."""
    tokens = torch.tensor([float(x.completion[0]) for x in rollouts])
    return JudgedRollouts(
        rollouts=list(rollouts),
        scores=tokens,
        earned={"token": [None if x == 4 else x for x in tokens]},
        outcome=tokens.double(),
        succeeded=tokens > 9,
        extra={"text": [str(x.completion[0]) for x in rollouts]},
        metrics={"num": float(len(rollouts))},
    )


def test_only_changed_groups_are_judged_and_every_result_stays_with_its_rollout():
    first = [rollout(i) for i in range(8)]
    episodes = [*first[:2], rollout(12), rollout(13), *first[4:6], first[6], rollout(17)]
    calls = []

    def judge(rollouts):
        calls.append([x.completion[0] for x in rollouts])
        return judged(rollouts)

    found = judged_once(judged(first), episodes, SIZE, judge)
    assert calls == [[12, 13, 6, 17]]
    tokens = [0, 1, 12, 13, 4, 5, 6, 17]
    assert all(a is b for a, b in zip(found.rollouts, episodes, strict=True))
    assert found.scores.tolist() == found.outcome.tolist() == tokens
    assert found.earned == {"token": [None if x == 4 else x for x in tokens]}
    assert found.succeeded.tolist() == [x > 9 for x in tokens]
    assert found.extra == {"text": [str(x) for x in tokens]}
    assert found.metrics == {"num": 6.0}  # the mean of 8 and 4


def test_nothing_is_judged_if_all_rollouts_are_known_and_all_if_none_is():
    first = [rollout(i) for i in range(4)]
    known = judged(first)
    assert judged_once(known, list(first), SIZE, judge=pytest.fail) is known
    assert judged_once(None, first, SIZE, judged).scores.tolist() == [0, 1, 2, 3]
