"""Tests of resets: the response that an episode is reset into, the episodes that share a reset point, and the seeds of
the draws."""

from collections import Counter

import pytest

from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.algorithms.prefixes import draw_prefixes, make_roll_in, reset_fields
from fastrlhf.algorithms.roles import make_engine
from fastrlhf.config import DRPOConfig
from fastrlhf.types import TokenizedExample
from tests import tiny


def config(**settings) -> DRPOConfig:
    return DRPOConfig(**{"response_length": 7, "max_length": 32, "per_device_train_batch_size": 12} | settings)


def prompts(count: int) -> list[TokenizedExample]:
    """Makes prompts whose references have the tokens 10 .. 15 and whose chosen responses have the tokens 20 .. 25."""
    return [
        TokenizedExample(
            prompt=[3 + i % 5, 4],
            reference=[*range(10, 16), tiny.EOS],
            chosen=[*range(20, 26), tiny.EOS],
            row=i,
        )
        for i in range(count)
    ]


def test_a_group_shares_a_start_and_its_episodes_are_numbered_consecutively():
    cfg = config(num_generations=4)
    prefixes = draw_prefixes(cfg, prompts(3), first_group=5)
    assert [p.episode for p in prefixes] == list(range(20, 32))
    assert [p.row for p in prefixes] == [row for row in range(3) for _ in range(4)]
    for group in range(3):
        assert len({tuple(p.token_ids) for p in prefixes[4 * group : 4 * group + 4]}) == 1
    alone = draw_prefixes(config(), prompts(3), first_group=5)
    assert [p.token_ids for p in prefixes[::4]] == [p.token_ids for p in alone]


def test_the_episodes_of_a_group_are_sampled_independently():
    cfg = config(num_generations=4, reset_prob=0.0, temperature=2.0)
    rollouts = make_engine(cfg, tiny.policy(), tiny.EOS).generate(draw_prefixes(cfg, prompts(12), 0))
    for group in range(12):
        assert len({tuple(r.completion) for r in rollouts[4 * group : 4 * group + 4]}) > 1


def test_episodes_of_a_group_may_start_at_different_points_of_one_response():
    cfg = config(num_generations=4, reset_group="response", reset_source="both", reset_prob=0.8)
    prefixes = draw_prefixes(cfg, prompts(300), 0)
    for group in range(300):
        members = prefixes[4 * group : 4 * group + 4]
        longest = max((p.token_ids for p in members), key=len)
        assert all(p.token_ids == longest[: len(p.token_ids)] for p in members)
    lengths = Counter(p.num_reset for p in prefixes)
    assert abs(lengths[0] / 1200 - 0.2) < 4 * (0.16 / 1200) ** 0.5
    assert all(abs(lengths[k] / 1200 - 0.8 / 6) < 4 * (0.12 / 1200) ** 0.5 for k in range(1, 7))
    assert sum(len({p.num_reset for p in prefixes[4 * g : 4 * g + 4]}) > 2 for g in range(300)) > 150


def test_both_resets_to_either_response_with_equal_probability():
    prefixes = draw_prefixes(config(reset_source="both"), prompts(2_000), 0)
    first = Counter(p.token_ids[2] for p in prefixes)
    assert set(first) == {10, 20}
    assert abs(first[10] - 1_000) < 4 * (2_000 * 0.25) ** 0.5


@pytest.mark.parametrize(
    ("source", "fields"),
    [("reference", ["reference"]), ("chosen", ["chosen"]), ("both", ["reference", "chosen"]), ("sample", [])],
)
def test_a_row_needs_the_responses_that_may_be_reset_to(source, fields):
    assert reset_fields(config(reset_source=source)) == fields
    assert reset_fields(config(reset_prob=0.0)) == []


def test_the_curriculum_moves_from_the_end_of_the_response_to_the_published_distribution():
    cfg = config(reset_curriculum=0.5)

    def lengths(progress: float) -> set[int]:
        return {p.num_reset for p in draw_prefixes(cfg, prompts(300), 0, progress=progress)}

    assert lengths(0.0) == {6}
    assert lengths(0.25) == {4, 5, 6}
    assert lengths(0.5) == lengths(0.9) == {1, 2, 3, 4, 5, 6}
    assert draw_prefixes(cfg, prompts(50), 0, progress=0.5) == draw_prefixes(config(), prompts(50), 0)


def test_a_sampled_prefix_is_cut_from_a_response_of_the_reference_policy():
    cfg = config(reset_source="sample", reset_prob=0.7, temperature=2.0)
    reference = tiny.policy(seed=5)
    roll_in = make_roll_in(cfg, reference, tiny.EOS)
    prefixes = draw_prefixes(cfg, prompts(60), 0, roll_in=roll_in)
    starts = draw_prefixes(config(reset_prob=0.0), prompts(60), 0)
    written = [rollout.completion for rollout in roll_in.generate(starts)]
    by_policy = [r.completion for r in make_engine(cfg, reference, tiny.EOS).generate(starts)]
    reset = [i for i, p in enumerate(prefixes) if p.num_reset]
    assert 20 < len(reset) < 55
    for i in reset:
        assert prefixes[i].token_ids == [*starts[i].token_ids, *written[i][: prefixes[i].num_reset]]
        assert prefixes[i].num_reset < len(written[i])
        assert tiny.EOS not in prefixes[i].token_ids[2:]
    assert sum(written[i] == by_policy[i] for i in reset) < len(reset) / 2


def test_a_run_from_sampled_prefixes_needs_no_response_in_its_data(tmp_path):
    cfg = config(
        model_name_or_path=tiny.save_policy(tmp_path / "sft"),
        reward_model_path=tiny.save_reward_model(tmp_path / "reward"),
        reset_source="sample",
        num_generations=3,
        max_steps=2,
        micro_batch_tokens=64,
        progress=False,
    )
    bare = [type(e)(prompt=e.prompt, row=e.row) for e in tiny.examples(10)]
    result = train_ppo(cfg, bare)
    assert result.history[0]["drpo/reset_fraction"] > 0.5
    assert [row["episode"] for row in result.history] == [12, 24]
