from collections import Counter

import numpy as np

from fastrlhf.data.resets import cut_prefix, reset_length, uniforms


def draw(length: int, count: int, **settings) -> list[int]:
    return [reset_length(length, seed=3, episode=i, **settings) for i in range(count)]


def test_k_is_uniform_on_one_to_length_minus_one():
    counts = Counter(draw(9, 16_000, prob=1.0))
    assert sorted(counts) == list(range(1, 9))
    expected = 16_000 / 8
    chi_squared = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_squared < 24.3  # the 99.9 % quantile at 7 degrees of freedom


def test_minimum_zero_adds_the_prompt_itself():
    assert sorted(set(draw(4, 2_000, prob=1.0, minimum=0))) == [0, 1, 2, 3]


def test_the_share_of_resets_is_the_probability():
    share = np.mean([k > 0 for k in draw(9, 20_000, prob=0.3)])
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 20_000) ** 0.5


def test_probability_zero_never_resets_and_short_responses_never_are():
    assert set(draw(9, 1_000, prob=0.0)) == {0}
    assert set(draw(1, 1_000, prob=1.0)) == {0}  # only the EOS: nothing may be given away
    assert set(draw(2, 1_000, prob=1.0)) == {1}


def test_a_draw_depends_on_seed_and_episode_alone():
    backwards = [reset_length(9, seed=3, episode=i, prob=1.0) for i in reversed(range(50))][::-1]
    assert backwards == draw(9, 50, prob=1.0)
    assert backwards != [reset_length(9, seed=4, episode=i, prob=1.0) for i in range(50)]


def test_streams_and_episodes_do_not_overlap():
    draws = {tuple(uniforms(0, stream, episode, 3)) for stream in (1, 2) for episode in (0, 1, 255, 256, 1 << 40)}
    assert len(draws) == 10


def test_the_prefix_is_the_prompt_and_the_first_k_tokens():
    prefix = cut_prefix([7, 8], [1, 0], row=5, seed=0, episode=9, prob=1.0)
    assert prefix.token_ids == [7, 8, 1]
    assert (prefix.num_reset, prefix.row, prefix.episode) == (1, 5, 9)
