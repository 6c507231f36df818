"""Tests of dynamic sampling: which groups are dropped and replaced, what is counted, and that a resumed run
makes the same choices."""

import pytest
import torch

from fastrlhf.algorithms.dynamic_sampling import REFILLED, refilled, with_spread
from fastrlhf.algorithms.judging import JudgedRollouts
from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.config import GRPOConfig, PPOConfig
from fastrlhf.types import Prefix, Rollout, TokenizedExample
from tests import tiny
from tests.algorithms.test_ppo import config

SIZE = 2


def dynamic_config(factor: float, groups: int = 3, **settings) -> GRPOConfig:
    fields = {"num_generations": SIZE, "per_device_train_batch_size": groups * SIZE, "response_length": 6}
    return GRPOConfig(dynamic_sampling_factor=factor, **fields | settings)


PROMPTS = [TokenizedExample(prompt=[10 + i], row=i) for i in range(8)]


class Sampler:
    """A stand-in for sampling and judging: makes two rollouts of `row + 1` tokens for each row. Their scores are 0 and
    1 for rows in `varied`, and both 0 for all other rows."""

    def __init__(self, varied):
        self.varied, self.calls = set(varied), []

    def __call__(self, rows, first_group):
        self.calls.append(([row.row for row in rows], first_group))
        rollouts, outcome = [], []
        for group, row in enumerate(rows, first_group):
            for i in range(SIZE):
                prefix = Prefix(token_ids=row.prompt, num_reset=0, row=row.row, episode=group * SIZE + i)
                tokens = [5] * (row.row + 1)
                rollouts.append(
                    Rollout(prefix=prefix, completion=tokens, sampler_logprob=[-1.0] * len(tokens), ended=False)
                )
                outcome.append(float(i * (row.row in self.varied)))
        outcome = torch.tensor(outcome, dtype=torch.float64)
        earned = {"given": list(outcome.float().unbind())}
        extra = {"row": [rollout.prefix.row for rollout in rollouts]}
        metrics = {"logged": float(len(self.calls))}
        return JudgedRollouts(
            rollouts=rollouts,
            scores=outcome.float(),
            earned=earned,
            outcome=outcome,
            succeeded=outcome > 0,
            extra=extra,
            metrics=metrics,
        )


def test_groups_without_spread_by_hand():
    assert with_spread(torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0]), 2) == [1]
    assert with_spread(torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0]), 3) == [0, 1]


def test_a_full_first_round_samples_no_more():
    sample = Sampler(range(8))
    batch, metrics = refilled(dynamic_config(3.0), PROMPTS, [4, 0, 2], 5, sample)
    assert sample.calls == [([4, 0, 2], 15)]
    assert [r.prefix.row for r in batch.rollouts] == [4, 4, 0, 0, 2, 2]
    assert metrics == {
        "dynamic_sampling/sampled_groups": 3,
        "dynamic_sampling/dropped_groups": 0,
        "dynamic_sampling/unfilled_groups": 0,
        "dynamic_sampling/dropped_tokens": 0,
    }


def test_dropped_groups_are_replaced_by_other_prompts_until_the_batch_is_full():
    sample = Sampler(varied=[0, 6, 7])
    batch, metrics = refilled(dynamic_config(8.0, groups=3), PROMPTS, [0, 1, 2], 0, sample)
    rounds = [rows for rows, _ in sample.calls]
    assert rounds[0] == [0, 1, 2]
    assert len(rounds[1]) == 2
    drawn = [row for rows in rounds for row in rows]
    assert len(drawn) == len(set(drawn))  # no prompt is used twice while unused ones are left
    assert {r.prefix.row for r in batch.rollouts} == {0, 6, 7}
    dropped = set(drawn) - {0, 6, 7}
    assert metrics["dynamic_sampling/sampled_groups"] == len(drawn)
    assert metrics["dynamic_sampling/dropped_groups"] == len(dropped)
    assert metrics["dynamic_sampling/dropped_tokens"] == sum(SIZE * (row + 1) for row in dropped)
    assert metrics["dynamic_sampling/unfilled_groups"] == 0
    episodes = [r.prefix.episode for r in batch.rollouts]
    assert episodes[:2] == [0, 1]
    assert all(episode >= REFILLED for episode in episodes[2:])
    assert len(set(episodes)) == 6
    # `extra` stays aligned with the rollouts when groups are dropped and replaced.
    assert batch.extra["row"] == [r.prefix.row for r in batch.rollouts]
    assert batch.earned["given"] == list(batch.scores.unbind()) == [0, 1, 0, 1, 0, 1]
    assert batch.metrics["logged"] == (len(rounds) + 1) / 2
    # A second call with equal seed and update draws equal groups.
    again = Sampler(varied=[0, 6, 7])
    refilled(dynamic_config(8.0, groups=3), PROMPTS, [0, 1, 2], 0, again)
    assert again.calls == sample.calls
    other = Sampler(varied=[0, 6, 7])
    refilled(dynamic_config(8.0, groups=3), PROMPTS, [0, 1, 2], 1, other)
    assert other.calls != sample.calls


@pytest.mark.parametrize(
    ("factor", "varied", "kept", "dropped", "unfilled", "tokens"),
    [
        # Rows 0 and 2 are dropped; each has two responses of row + 1 tokens: 2 * 1 + 2 * 3 tokens.
        (2.0, [1, 3, 4], [1, 3, 4], 2, 0, 8),
        # The budget is int(1.7 * 3) = 5 groups. Rows 3 and 4 have equal scores and are dropped: 2 * 4 + 2 * 5 tokens.
        (1.7, [1], [0, 1, 2], 2, 2, 18),
    ],
)
def test_refills_are_counted_by_hand(factor, varied, kept, dropped, unfilled, tokens):
    """The first round draws three of five prompts. The scores of only one prompt vary, so the second round samples the
    two remaining prompts."""
    sample = Sampler(varied)
    batch, metrics = refilled(dynamic_config(factor), PROMPTS[:5], [0, 1, 2], 0, sample)
    assert [sorted(rows) for rows, _ in sample.calls] == [[0, 1, 2], [3, 4]]
    assert sorted({r.prefix.row for r in batch.rollouts}) == kept
    assert metrics == {
        "dynamic_sampling/sampled_groups": 5,
        "dynamic_sampling/dropped_groups": dropped,
        "dynamic_sampling/unfilled_groups": unfilled,
        "dynamic_sampling/dropped_tokens": tokens,
    }


def test_a_spent_budget_leaves_dropped_groups_in_the_batch():
    sample = Sampler(varied=[])
    batch, metrics = refilled(dynamic_config(1.5, groups=4), PROMPTS, [3, 1, 2, 0], 0, sample)
    assert [len(rows) for rows, _ in sample.calls] == [4, 2]
    assert [r.prefix.row for r in batch.rollouts] == [3, 3, 1, 1, 2, 2, 0, 0]
    assert metrics["dynamic_sampling/unfilled_groups"] == 4
    assert metrics["dynamic_sampling/dropped_groups"] == 2


def test_more_groups_than_prompts_repeat_prompts():
    sample = Sampler(varied=[])
    refilled(dynamic_config(3.0, groups=4), PROMPTS[:5], [3, 1, 2, 0], 0, sample)
    assert [len(rows) for rows, _ in sample.calls] == [4, 4, 4]
    assert 4 in sample.calls[1][0]


@pytest.fixture(scope="module")
def policy_path(tmp_path_factory):
    return {"model_name_or_path": tiny.save_policy(tmp_path_factory.mktemp("sft"))}


def starts_low(completions, **_):
    """A reward function: 1 if the first word is among the first six of the vocabulary, otherwise 0."""
    return [float(text.split()[:1] in [[word] for word in tiny.WORDS[:6]]) for text in completions]


def test_a_run_drops_refills_and_counts(policy_path):
    calls = []

    def counted(completions, **_):
        calls.append(len(completions))
        return starts_low(completions)

    cfg = config(
        policy_path,
        GRPOConfig,
        num_generations=2,
        per_device_train_batch_size=8,
        missing_eos_penalty=None,
        dynamic_sampling_factor=3.0,
        max_steps=3,
    )
    result = train_ppo(cfg, tiny.examples(20), reward_functions={"counted": counted})
    sampled = [row["dynamic_sampling/sampled_groups"] for row in result.history]
    assert max(sampled) > 4
    assert sum(calls[1:]) == 2 * sum(sampled)  # each response is judged once; the first call is a trial
    for row in result.history:
        kept = row["completions/mean_length"] * 8
        assert row["num_tokens"] == pytest.approx(kept + row["dynamic_sampling/dropped_tokens"])
        if row["dynamic_sampling/unfilled_groups"] == 0:
            assert row["rewards/counted/mean"] == 0.5  # one of two responses in every group earns 1


def test_with_spread_everywhere_the_numbers_are_those_of_a_run_without_it(policy_path):
    def place(completion_ids, **_):
        return [float(i) for i in range(len(completion_ids))]

    kept, plain = (
        train_ppo(
            config(policy_path, GRPOConfig, num_generations=4, dynamic_sampling_factor=factor),
            tiny.examples(9),
            reward_functions={"place": place},
        )
        for factor in (2.0, 1.0)
    )
    for a, b in zip(kept.history, plain.history, strict=True):
        assert all(a[name] == b[name] for name in b if not name.startswith("timing/"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dynamic_sampling_factor": 0.5}, "dynamic_sampling_factor: must be at least 1; got 0.5"),
        ({"dynamic_sampling_factor": 2.0}, "num_generations: must be at least 2 with dynamic_sampling_factor above 1"),
        (
            {"dynamic_sampling_factor": 2.0, "num_generations": 4, "reset_prob": 0.5, "reset_source": "rollout"},
            "reset_source: must be another source with dynamic_sampling_factor above 1",
        ),
    ],
)
def test_incompatible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(per_device_train_batch_size=8, **settings)


def test_a_factor_that_leaves_no_room_for_a_refill_changes_nothing():
    sample = Sampler(varied=[])
    refilled(dynamic_config(1.2), PROMPTS, [0, 1, 2], 0, sample)
    assert len(sample.calls) == 1


def test_refills_are_drawn_by_the_weights_of_the_datasets():
    first = []
    for step in range(500):
        sampler = Sampler(varied=())
        refilled(dynamic_config(2.0, groups=1), PROMPTS, [7], step, sampler, [(2, 9.0), (6, 1.0)])
        [_, ([row], _)] = sampler.calls
        assert row != 7
        first.append(row < 2)
    # 2 rows of weight 9 and 5 unused rows of weight 1
    assert sum(first) / 500 == pytest.approx(18 / 23, abs=3 * (18 / 23 * 5 / 23 / 500) ** 0.5)
