"""Tests of resets into the policy's own failed responses: the start points of episodes, the policy to which training
converges, and the numbers that resets must not change."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastrlhf.algorithms.advantages import leave_one_out
from fastrlhf.algorithms.own_resets import RESAMPLED, restart_failures
from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.config import GRPOConfig, PPOConfig
from fastrlhf.rewards.functions import DRY_ROWS
from fastrlhf.types import Prefix, Rollout
from tests import tiny
from tests.algorithms.test_ppo import assert_same_history, config, paths  # noqa: F401 (a fixture)

# ruff: noqa: F811 (the fixture)

SIZE = 4
OWN = {"reset_prob": 1.0, "reset_source": "rollout"}


def resets_config(kind=GRPOConfig, **settings) -> PPOConfig:
    fields = OWN | {"num_generations": SIZE, "per_device_train_batch_size": 2 * SIZE, "response_length": 6}
    return kind(**fields | settings)


def first(group: int, member: int, completion: list[int], ended: bool = True) -> Rollout:
    prefix = Prefix(token_ids=[20 + group], num_reset=0, row=group, episode=group * SIZE + member)
    return Rollout(prefix=prefix, completion=completion, sampler_logprob=[-1.0] * len(completion), ended=ended)


def suffixes(prefixes):
    return [Rollout(prefix=x, completion=[9, 1], sampler_logprob=[-1.0, -1.0], ended=True) for x in prefixes]


def restarted(cfg, rollouts, success, **others):
    succeeded = torch.tensor(success).bool()
    keys = {"first_group": 0, "progress": 1.0, "sample": suffixes}
    return restart_failures(cfg, rollouts, succeeded.double(), succeeded, **keys | others)


def test_a_group_restarts_from_one_cut_of_one_failed_response():
    rollouts = [first(0, i, [3 + i, 7, 8, 1]) for i in range(SIZE)] + [first(1, i, [4, 1]) for i in range(SIZE)]
    episodes, metrics = restarted(resets_config(), rollouts, [1, 0, 1, 0, 1, 1, 1, 1])
    assert episodes[SIZE:] == rollouts[SIZE:]  # all responses of the second group succeeded
    starts = {tuple(episode.prefix.token_ids) for episode in episodes[:SIZE]}
    (start,) = starts
    k = len(start) - 1
    assert start in {(20, 4, 7, 8)[: k + 1], (20, 6, 7, 8)[: k + 1]}
    assert 1 <= k <= 3
    for i, episode in enumerate(episodes[:SIZE]):
        prefix = episode.prefix
        assert (prefix.num_reset, prefix.reset_depth, prefix.row) == (k, k / 4, 0)
        assert prefix.episode == i + RESAMPLED
    assert metrics == {
        "drpo/first_outcome": 0.75,
        "drpo/first_success": 0.75,
        "drpo/groups_restarted": 0.5,
        "drpo/dropped_tokens": 16,
    }


@pytest.mark.parametrize(
    ("settings", "completion", "success"),
    [
        ({}, [5, 1], [1, 1, 1, 1]),  # no response failed
        ({}, [1], [0, 0, 0, 0]),  # a response of one token cannot be cut
        ({"reset_band": (0.3, 1.0)}, [5, 6, 1], [0, 1, 0, 0]),
        ({"reset_band": (0.0, 0.0)}, [5, 6, 1], [0, 1, 0, 0]),
        ({"reset_cut": "sentence"}, [5, 6, 1], [0, 0, 0, 1]),  # no sentence ends before the EOS
        ({"reset_prob": 1e-12}, [5, 6, 1], [0, 0, 0, 0]),
    ],
)
def test_other_groups_keep_their_first_responses(settings, completion, success):
    rollouts = [first(0, i, completion) for i in range(SIZE)]
    cfg = resets_config(per_device_train_batch_size=SIZE, **settings)
    episodes, metrics = restarted(cfg, rollouts, success, sample=None, sentence_ends={1})
    assert episodes == rollouts
    assert metrics["drpo/groups_restarted"] == metrics["drpo/dropped_tokens"] == 0


def test_the_band_includes_both_its_ends():
    rollouts = [first(0, i, [5, 6, 1]) for i in range(SIZE)]
    for band, success in (((0.25, 0.25), [0, 1, 0, 0]), ((0.0, 0.0), [0] * 4), ((0.75, 0.75), [1, 1, 0, 1])):
        cfg = resets_config(per_device_train_batch_size=SIZE, reset_band=band)
        assert restarted(cfg, rollouts, success)[1]["drpo/groups_restarted"] == 1


def test_sentences_are_cut_at_their_ends():
    rollouts = [first(group, i, [5, 2, 6, 7, 2, 8, 2]) for group in range(60) for i in range(SIZE)]
    cfg = resets_config(reset_cut="sentence", per_device_train_batch_size=60 * SIZE, response_length=9)
    episodes, _ = restarted(cfg, rollouts, [0] * 60 * SIZE, sentence_ends={2})
    # The sentence that ends at 7 tokens ends the response, so no reset cuts there
    assert {episode.prefix.num_reset for episode in episodes} == {2, 5}


def test_episodes_of_a_group_may_have_separate_cuts_in_one_failed_response():
    rollouts = [first(0, i, [4 + i, 7, 8, 7, 1]) for i in range(SIZE)]
    cfg = resets_config(PPOConfig, reset_group="response", per_device_train_batch_size=SIZE, seed=3)
    episodes, _ = restarted(cfg, rollouts, [0, 0, 1, 1])
    longest = max((episode.prefix.token_ids for episode in episodes), key=len)
    assert longest[1] in (4, 5)
    assert all(x.prefix.token_ids == longest[: len(x.prefix.token_ids)] for x in episodes)
    assert len({x.prefix.num_reset for x in episodes}) > 1


HORIZON = 3
CODE = (1, 0, 1)
"""The only successful response of a combination lock with three binary tokens."""


class Table:
    """A tabular policy with one logit per state. A state is the sequence of the tokens so far."""

    def __init__(self, seed: int):
        self.logit: dict[tuple[int, ...], float] = {}
        self.draw = np.random.default_rng(seed)

    def sample(self, prefixes) -> list[Rollout]:
        rollouts = []
        for prefix in prefixes:
            written = list(prefix.token_ids[1:])
            while len(written) < HORIZON:
                p = 1 / (1 + np.exp(-self.logit.get(tuple(written), 0.0)))
                written.append(int(self.draw.random() < p))
            completion = written[prefix.num_reset :]
            rollouts.append(Rollout(prefix=prefix, completion=completion, sampler_logprob=[], ended=True))
        return rollouts

    def prompts(self, num: int, step: int) -> list[Prefix]:
        return [Prefix(token_ids=[9], num_reset=0, row=0, episode=step * num + i) for i in range(num)]


def reward(rollouts) -> torch.Tensor:
    written = [(*x.prefix.token_ids[1:], *x.completion) for x in rollouts]
    return torch.tensor([float(response == CODE) for response in written], dtype=torch.float64)


def test_the_starts_are_uniform_cuts_of_the_failures_of_the_policy():
    """Compares how often episodes start at each prefix with an enumeration of all responses. The probability that an
    episode starts after given k tokens is P(a failed response begins with these tokens | its group has a failure) times
    1 / (L - 1), for responses of L tokens."""
    table, num = Table(0), 6_000
    cfg = resets_config(num_generations=2, per_device_train_batch_size=2 * num, reset_cut="uniform")
    rollouts = table.sample(table.prompts(2 * num, 0))
    outcome = reward(rollouts)
    episodes, metrics = restart_failures(
        cfg, rollouts, outcome, outcome > 0, first_group=0, sample=table.sample, progress=1.0
    )
    found = Counter(tuple(x.prefix.token_ids[1:]) for x in episodes[::2] if x.prefix.num_reset)
    assert metrics["drpo/groups_restarted"] == pytest.approx(1 - 1 / 64, abs=4 * (1 / 64 / num) ** 0.5)
    total = sum(found.values())
    for k in (1, 2):
        for start in np.ndindex(*[2] * k):
            share = (2.0 ** (HORIZON - k) - (start == CODE[:k])) / 7 / 2
            assert found[start] / total == pytest.approx(share, abs=4 * (share / total) ** 0.5)


@pytest.mark.parametrize("band", [(0.0, 1.0), (0.0, 0.0)])
def test_it_converges_to_the_best_policy_from_the_prompt_and_from_reachable_states(band):
    """Half of the groups start at the prompt and half at a reset.

    After a reset only the sampled suffix is trained, so the groups that start at the prompt train the first token.
    """
    table = Table(1)
    cfg = resets_config(reset_prob=0.5, per_device_train_batch_size=16, reset_band=band, success_threshold=1.0)
    for step in range(150):
        rollouts = table.sample(table.prompts(16, step))
        outcome = reward(rollouts)
        episodes, _ = restart_failures(
            cfg, rollouts, outcome, outcome > 0, first_group=4 * step, sample=table.sample, progress=1.0
        )
        gradient: Counter = Counter()
        for episode, advantage in zip(episodes, leave_one_out(reward(episodes), SIZE).tolist(), strict=True):
            written = list(episode.prefix.token_ids[1:])
            for token in episode.completion:
                p = 1 / (1 + np.exp(-table.logit.get(tuple(written), 0.0)))
                gradient[tuple(written)] += advantage * (token - p)
                written.append(token)
        for state, slope in gradient.items():
            table.logit[state] = table.logit.get(state, 0.0) + slope
    assert reward(table.sample(table.prompts(500, 0))).mean() > 0.97
    assert table.logit[(1, 0)] > 2


def last_token(rollout: Rollout) -> float:
    return float(rollout.completion[-1] % 3 == 0)


def learned(paths, kind=GRPOConfig, functions=None, **settings):
    cfg = config(
        {"model_name_or_path": paths["model_name_or_path"]},
        kind,
        **{"num_generations": SIZE, "per_device_train_batch_size": 16, "missing_eos_penalty": None} | settings,
    )
    return train_ppo(cfg, tiny.examples(12), reward_functions=functions or {"right": last_token})


def test_with_an_empty_band_a_run_is_the_plain_run_bit_for_bit(paths):
    plain = learned(paths)
    never = learned(paths, **OWN, reset_band=(1.0, 1.0))
    assert_same_history(plain, never)
    assert all(row["drpo/groups_restarted"] == row["drpo/reset_fraction"] == 0 for row in never.history)
    for name, weight in plain.model.state_dict().items():
        assert torch.equal(weight, never.model.state_dict()[name]), name


def test_a_run_judges_every_response_once_and_counts_all_sampled_tokens(paths):
    seen: list[Rollout] = []

    def right(rollout: Rollout) -> float:
        seen.append(rollout)
        return last_token(rollout)

    result = learned(paths, functions={"right": right}, **OWN, success_threshold=1.0, max_steps=2)
    calls = seen[DRY_ROWS:]
    for row in result.history:
        drawn, calls = calls[:16], calls[16:]
        num_again = round(row["drpo/groups_restarted"] * 16)
        again, calls = calls[:num_again], calls[num_again:]
        assert num_again > 0
        assert row["num_tokens"] == sum(len(x.completion) for x in [*drawn, *again])
        trained = list(drawn)
        for episode in again:
            index = (episode.prefix.episode - RESAMPLED) % 16
            trained[index] = episode
            group = drawn[index // SIZE * SIZE : (index // SIZE + 1) * SIZE]
            responses = [[*x.prefix.token_ids, *x.completion] for x in group if not last_token(x)]
            start = episode.prefix.token_ids
            assert episode.prefix.num_reset
            assert start in [response[: len(start)] for response in responses]
        assert row["drpo/first_success"] == np.mean([last_token(x) for x in drawn])
        assert row["objective/scores"] == pytest.approx(np.mean([last_token(x) for x in trained]), abs=1e-7)
    assert not calls


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (GRPOConfig, {"update": "pair"}),
        (PPOConfig, {"reset_group": "response"}),
        (PPOConfig, {"num_generations": 1, "success_threshold": 0.5, "reset_min": 0, "reset_curriculum": 1.0}),
    ],
)
def test_own_resets_work_with_pair_losses_critics_and_single_episodes(paths, kind, settings):
    history = learned(paths, kind, **OWN, **settings, max_steps=2).history
    assert all(np.isfinite(list(row.values())).all() for row in history)
    assert history[0]["drpo/reset_fraction"] > 0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"reset_prob": 0.0}, "reset_source: must be .reference. when reset_prob is 0, since it would have no effect"),
        ({"reset_source": "reference", "reset_band": (0.0, 0.5)}, "reset_band: must be"),
        ({"reset_source": "reference", "success_threshold": 0.5}, "success_threshold: must be"),
        (
            {"reset_band": (0.5, 0.2)},
            r"reset_band: must be two numbers, the lower one first, in 0..1; got \[0.5, 0.2\]",
        ),
        ({"reset_band": (0.5,)}, "reset_band: must be two numbers"),
        ({"reset_band": (0.0, 1.5)}, "reset_band: must be two numbers"),
    ],
)
def test_unread_keys_and_wrong_values_are_refused(settings, told):
    with pytest.raises(ValueError, match=f"^{told}"):
        replace(resets_config(), **settings)


def test_one_episode_per_prompt_needs_a_threshold_and_compat_reference_is_refused():
    with pytest.raises(ValueError, match=r"^success_threshold: must be a number with reset_source rollout and"):
        resets_config(PPOConfig, num_generations=1)
    with pytest.raises(ValueError, match=r"^compat: must be fixed with reset_source rollout"):
        resets_config(PPOConfig, compat="reference")


def test_a_run_without_outcomes_is_refused_before_models_load(paths, tmp_path):
    dpo = tiny.save_policy(tmp_path / "dpo", seed=3)
    cfg = config(
        {"model_name_or_path": paths["model_name_or_path"], "dpo_model_path": dpo},
        GRPOConfig,
        **OWN | {"num_generations": SIZE, "missing_eos_penalty": None},
    )
    with pytest.raises(ValueError, match=r"^reset_source: must be another source without a reward model or reward fu"):
        train_ppo(cfg, tiny.examples(12))


def test_a_vocabulary_without_sentence_ends_is_refused(paths):
    with pytest.raises(ValueError, match=r"^reset_cut: no token of this vocabulary ends a sentence; use uniform"):
        learned(paths, **OWN, reset_cut="sentence")
