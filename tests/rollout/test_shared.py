"""Tests how episodes are dealt to ranks; tests/distributed/test_ranks.py samples with two processes."""

from collections import Counter

import numpy as np
import pytest

from fastrlhf.distributed.ranks import share
from fastrlhf.rollout import shared
from fastrlhf.rollout.engine import TransformersEngine
from fastrlhf.rollout.shared import SharedEngine, deal
from fastrlhf.types import Prefix
from tests import tiny


def prefixes(lengths, size=1, resets=()) -> list[Prefix]:
    """Makes groups of `size` episodes. The text of group g has lengths[g] tokens, and all texts have different
    beginnings."""
    return [
        Prefix(
            token_ids=[g, *range(3, 2 + length)],
            num_reset=resets[g] if resets else 0,
            row=g,
            episode=g * size + i,
        )
        for g, length in enumerate(lengths)
        for i in range(size)
    ]


def imbalance(given, parts, response_length) -> float:
    """Returns the largest number of expected tokens of a rank, divided by the mean over ranks. A text counts once per
    rank."""
    loads = []
    for part in parts:
        texts = {tuple(given[i].token_ids) for i in part}
        loads.append(sum(map(len, texts)) + sum(response_length - given[i].num_reset for i in part))
    return max(loads) / np.mean(loads)


def contiguous(monkeypatch, num, ranks) -> list[list[int]]:
    """The parts of `ranks.share`."""
    parts = []
    for rank in range(ranks):
        monkeypatch.setattr("fastrlhf.distributed.ranks.world_size", lambda: ranks)
        monkeypatch.setattr("fastrlhf.distributed.ranks.rank", lambda rank=rank: rank)
        parts.append(list(share(range(num))))
    monkeypatch.undo()
    return parts


@pytest.mark.parametrize(("size", "contiguous_parts", "dealt_parts"), [(1, 1.825, 1.026), (4, 1.744, 1.333)])
def test_the_ranks_have_similar_numbers_of_expected_tokens_for_prompts_of_skewed_lengths(
    monkeypatch, size, contiguous_parts, dealt_parts
):
    """The lengths of prompts are log-normal with a median of 400 tokens. With groups of 4 episodes each rank has two
    groups. The longest group and the shortest group together have 1.333 times the mean of a rank, so no other division
    is better."""
    lengths = np.random.default_rng(0).lognormal(6, 1.2, 64 // size).astype(int).clip(4, 8000).tolist()
    given = prefixes(lengths, size)
    parts = deal(given, 256, 8)
    assert imbalance(given, contiguous(monkeypatch, 64, 8), 256) == pytest.approx(contiguous_parts, abs=1e-3)
    assert imbalance(given, parts, 256) == pytest.approx(dealt_parts, abs=1e-3)
    assert Counter(map(len, parts)) == {8: 8}


def test_groups_stay_together_and_are_divided_only_where_a_rank_is_full():
    given = prefixes([10, 50, 20, 30], size=4)
    assert deal(given, 8, 2) == [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]]
    assert deal(given[:12], 8, 2) == [[2, 3, 4, 5, 6, 7], [0, 1, 8, 9, 10, 11]]
    assert deal(given[:12], 8, 1) == [list(range(12))]


def test_every_episode_is_dealt_once_by_the_arguments_alone():
    draw = np.random.default_rng(1)
    for num, ranks in ((0, 2), (1, 4), (3, 2), (13, 4), (40, 7)):
        given = prefixes(draw.integers(2, 90, num).tolist(), resets=draw.integers(0, 5, num).tolist())
        parts = deal(given, 8, ranks)
        assert sorted(i for part in parts for i in part) == list(range(num))
        assert sorted(map(len, parts))[-1] - min(map(len, parts)) <= 1
        assert parts == deal(given, 8, ranks)
        assert all(part == sorted(part) for part in parts)


@pytest.mark.parametrize("num", [1, 7])
def test_rollouts_are_those_of_one_rank_in_the_order_of_the_prefixes(monkeypatch, num):
    """Simulates the ranks one after the other. Each rank collects the rollouts that the other ranks have sampled."""
    model, given = tiny.policy(), prefixes([4, 9, 3, 7, 5, 12, 6][:num])
    engine = TransformersEngine(model=model, eos_token_id=tiny.EOS, response_length=6, temperature=1.0, seed=3)
    expected = engine.generate(given)
    own = [engine.generate([given[i] for i in part]) for part in deal(given, 6, 3)]
    monkeypatch.setattr(shared, "world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(shared, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(shared, "from_all", lambda rollouts: own)
        found = SharedEngine(engine=engine, model=model, response_length=6).generate(given)
        assert [rollout.prefix for rollout in found] == given
        assert [rollout.completion for rollout in found] == [rollout.completion for rollout in expected]
