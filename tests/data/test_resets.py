from collections import Counter

import numpy as np

from fastrlhf.data.resets import cut_prefix, reset_length, takes_first, uniforms


def draw(length: int, count: int, **settings) -> list[int]:
    return [reset_length(length, seed=3, key=i, **settings) for i in range(count)]


def test_k_is_uniform_on_one_to_length_minus_one():
    counts = Counter(draw(9, 16_000, prob=1.0))
    assert sorted(counts) == list(range(1, 9))
    expected = 16_000 / 8
    chi_squared = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_squared < 24.3  # the 99.9 % quantile of chi squared with 7 degrees of freedom


def test_the_draws_of_a_seed_do_not_change_between_versions():
    """Compares the draws with recorded ones, so that this version repeats the reset points of earlier versions."""
    assert draw(9, 16, prob=0.7) == [0, 5, 2, 1, 6, 0, 1, 0, 4, 8, 1, 1, 7, 4, 5, 4]


def test_the_shortest_resets_are_withheld_and_the_others_stay_uniform():
    counts = Counter(draw(9, 8_000, prob=1.0, withheld=0.5))
    assert sorted(counts) == [5, 6, 7, 8]
    assert max(abs(count - 2_000) for count in counts.values()) < 4 * (8_000 * 0.25 * 0.75) ** 0.5
    assert set(draw(9, 200, prob=1.0, withheld=1.0)) == {8}
    assert set(draw(9, 200, prob=1.0, minimum=0, withheld=1.0)) == {8}
    # 10 % of eight lengths is less than one, so no length is withheld
    assert draw(9, 200, prob=0.7, withheld=0.1) == draw(9, 200, prob=0.7)


def test_the_choice_of_a_response_is_fair_and_independent_of_the_coin_and_the_length():
    first = [i for i in range(10_000) if takes_first(seed=3, key=i)]
    assert abs(len(first) - 5_000) < 4 * 50
    resets = [k for i in first if (k := reset_length(9, seed=3, key=i, prob=0.5))]
    assert abs(len(resets) / len(first) - 0.5) < 4 * (0.25 / len(first)) ** 0.5
    assert abs(np.mean(resets) - 4.5) < 4 * (63 / 12 / len(resets)) ** 0.5


def test_minimum_zero_adds_the_prompt_itself():
    assert sorted(set(draw(4, 2_000, prob=1.0, minimum=0))) == [0, 1, 2, 3]


def test_the_share_of_resets_is_the_probability():
    share = np.mean([k > 0 for k in draw(9, 20_000, prob=0.3)])
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 20_000) ** 0.5


def test_probability_zero_never_resets_and_short_responses_never_are():
    assert set(draw(9, 1_000, prob=0.0)) == {0}
    assert set(draw(1, 1_000, prob=1.0)) == {0}  # the response is only the EOS, so there is nothing to reset into
    assert set(draw(2, 1_000, prob=1.0)) == {1}


def test_a_draw_depends_only_on_seed_and_episode():
    backwards = [reset_length(9, seed=3, key=i, prob=1.0) for i in reversed(range(50))][::-1]
    assert backwards == draw(9, 50, prob=1.0)
    assert backwards != [reset_length(9, seed=4, key=i, prob=1.0) for i in range(50)]


def test_streams_and_episodes_do_not_overlap():
    draws = {tuple(uniforms(0, stream, episode, 3)) for stream in (1, 2) for episode in (0, 1, 255, 256, 1 << 40)}
    assert len(draws) == 10


def test_the_prefix_is_the_prompt_and_the_first_k_tokens():
    prefix = cut_prefix([7, 8], [1, 0], 1, row=5, episode=9)
    assert prefix.token_ids == [7, 8, 1]
    assert (prefix.num_reset, prefix.reset_depth, prefix.row, prefix.episode) == (1, 0.5, 5, 9)
    assert cut_prefix([7, 8], [], 0, row=5, episode=9).reset_depth == 0.0
