"""Tests of grouping answers by meaning and of the pairs made from the groups, with values computed by hand."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from fastrlhf.algorithms.completions import Answers
from fastrlhf.algorithms.rlp_spg import (
    RULES,
    calibrate,
    choose,
    choose_by,
    greedy,
    group_answers,
    no_contradiction,
    num_needed,
    synthetic_pairs,
)
from fastrlhf.config import RLPConfig
from fastrlhf.evaluation.equivalence import Comparison, Relation, exact_match, function_judge

# Entry [i, j]: relation of answer i to answer j (2 entailment, 1 neutral, 0 contradiction)
MATRIX = [[2, 2, 1, 0], [2, 2, 2, 1], [1, 2, 2, 1], [0, 1, 1, 2]]
CONFIG = RLPConfig(num_answers=4, num_calibration_prompts=0, equivalence="exact")


def judge_of(matrix):
    """A judge of the answers "0", "1", ... that looks up relations in a matrix and records its questions."""
    asked = []

    def judge(comparisons):
        asked.extend(comparisons)
        return [Relation(matrix[int(c.premise)][int(c.hypothesis)]) for c in comparisons]

    judge.asked = asked
    return judge


def groups_of(matrix, rule, needed=0):
    [groups] = group_answers(["p"], [list(map(str, range(len(matrix))))], judge_of(matrix), rule, needed)
    return groups


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("strict", [0, 0, 1, 2]),
        ("lax", [0, 0, 1, 2]),
        ("no_contra_2023", [0, 0, 0, 0]),
        ("lax_2024", [0, 0, 1, 2]),
        ("strict_2024", [0, 0, 1, 2]),
    ],
)
def test_the_worked_matrix_under_every_rule(rule, expected):
    assert groups_of(MATRIX, rule) == expected


def test_the_worked_matrix_under_greedy_no_contradiction(monkeypatch):
    monkeypatch.setitem(RULES, "greedy", lambda num, needed: greedy(no_contradiction, num, needed))
    assert groups_of(MATRIX, "greedy") == [0, 0, 0, 1]


def test_greedy_takes_the_first_group_that_matches_and_scanning_the_last():
    # Answer 2 is equivalent to 0 and to 1, which are not equivalent to each other.
    matrix = [[2, 0, 2], [0, 2, 2], [2, 2, 2]]
    assert groups_of(matrix, "strict") == [0, 1, 0]
    assert groups_of(matrix, "strict_2024") == [0, 1, 1]


def test_lax_needs_one_entailment_and_no_contradiction():
    pairs = {(2, 2): True, (2, 1): True, (1, 2): True, (1, 1): False, (0, 2): False, (2, 0): False}
    for (forward, backward), same in pairs.items():
        assert (groups_of([[2, forward], [backward, 2]], "lax") == [0, 0]) == same
        assert (groups_of([[2, forward], [backward, 2]], "strict") == [0, 0]) == ((forward, backward) == (2, 2))


def test_the_second_direction_is_asked_only_if_the_first_does_not_decide():
    judge = judge_of([[2, 1, 2], [2, 2, 2], [2, 2, 2]])
    group_answers(["p"], [["0", "1", "2"]], judge, "strict")
    assert [(c.premise, c.hypothesis) for c in judge.asked] == [("0", "1"), ("0", "2"), ("2", "0")]


def test_equal_texts_are_never_asked_about_and_no_question_is_asked_twice():
    judge = judge_of(MATRIX)
    assert group_answers(["p"], [["0", "2", "0", "2", "2"]], judge, "strict") == [[0, 1, 0, 1, 1]]
    assert judge.asked == [Comparison("p", "0", "2")]


def random_matrices(count, num, seed=0):
    draw = random.Random(seed)
    return [
        [[2 if i == j else draw.choice((0, 1, 2, 2, 2)) for j in range(num)] for i in range(num)] for _ in range(count)
    ]


@pytest.mark.parametrize("rule", RULES)
def test_batching_over_prompts_gives_the_groups_of_each_prompt_alone(rule):
    matrices = random_matrices(30, 6)

    def judge(comparisons):
        assert len({c.prompt for c in comparisons}) == len(comparisons)  # at most one question per prompt in each call
        return [Relation(matrices[int(c.prompt)][int(c.premise)][int(c.hypothesis)]) for c in comparisons]

    texts = [list(map(str, range(6)))] * 30
    assert group_answers(list(map(str, range(30))), texts, judge, rule) == [groups_of(m, rule) for m in matrices]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("needed", [3, 5])
def test_early_rejection_changes_no_group_that_is_accepted(rule, needed):
    accepted, rejected = 0, 0
    for matrix in random_matrices(60, 8):
        whole, early = groups_of(matrix, rule), groups_of(matrix, rule, needed)
        assert whole is not None
        if max(Counter(whole).values()) >= needed:
            assert early == whole
            accepted += 1
        else:
            assert early is None or early == whole
            rejected += early is None
    assert accepted > 0
    assert rejected > 0 or rule not in ("strict", "lax") or needed == 3


def test_ten_answers_that_all_differ_are_given_up_after_the_seventh():
    judge = judge_of([[2 * (i == j) for j in range(10)] for i in range(10)])
    assert group_answers(["p"], [list(map(str, range(10)))], judge, "strict", num_needed(0.5, 10)) == [None]
    assert len(judge.asked) == 21  # 1 + 2 + ... + 6 of 45 possible questions


def answers(num, row=0, same=()):
    """Makes answers of one token each. All answers in `same` have an equal token."""
    responses = [[99 if i in same else i, 1] for i in range(num)]
    return Answers(row=row, prompt=[50], responses=responses, logprob=[-float(i) for i in range(num)])


def draw(seed=0):
    return np.random.default_rng(seed)


def test_a_largest_group_of_five_of_ten_is_confident_and_four_is_not():
    needed = num_needed(0.5, 10)
    assert needed == 5
    # Depending on the order of operations, 0.3 * 10 is 3.0000000000000004 in floating point
    assert num_needed(0.3, 10) == 3
    assert (num_needed(0.55, 10), num_needed(0.0, 10), num_needed(1.0, 10)) == (6, 0, 10)
    five, four = [0] * 5 + [1, 2, 3, 4, 5], [0] * 4 + [1, 2, 3, 4, 5, 6]
    assert choose(answers(10), five, [0.0] * 10, needed, draw()).reason == "accepted"
    assert choose(answers(10), four, [0.0] * 10, needed, draw()).reason == "unsure"
    assert choose(answers(10), None, [0.0] * 10, needed, draw()).reason == "unsure"


def test_chosen_is_the_best_of_the_largest_group_and_rejected_any_outside_it():
    groups, scores = [1, 0, 1, 0, 0, 2], [9.0, 1.0, 8.0, 3.0, 2.0, 7.0]
    choices = [choose(answers(6), groups, scores, 3, draw(seed)) for seed in range(60)]
    assert {(c.chosen, c.size) for c in choices} == {(3, 3)}
    assert {c.rejected for c in choices} == {0, 2, 5}


def test_of_two_largest_groups_the_better_or_else_the_earlier_is_chosen():
    groups = [0, 1, 0, 1, 2]
    assert choose(answers(5), groups, [1.0, 2.0, 0.0, 1.0, 9.0], 2, draw()).chosen == 1
    assert choose(answers(5), groups, [1.0, 2.0, 2.0, 2.0, 9.0], 2, draw()).chosen == 2  # the group that begins first


def test_unanimous_answers_give_no_pair():
    assert choose(answers(4), [0] * 4, [0.0] * 4, 2, draw()).reason == "unanimous"
    assert choose_by(answers(3, same=(0, 1, 2)), [1.0, 2.0, 3.0], draw()).reason == "unanimous"


def test_the_ablations_prefer_the_higher_of_two_random_answers():
    found = {choose_by(answers(3), [1.0, 3.0, 2.0], draw(seed)) for seed in range(60)}
    assert {(c.chosen, c.rejected) for c in found} == {(1, 0), (1, 2), (2, 0)}
    assert choose_by(answers(2), [1.0, 1.0], draw()).reason == "tied"


def rows(count):
    return [answers(4, row=i) for i in range(count)]


def pairs_of(config, texts, judge=exact_match, scores=(0.0, 1.0, 2.0, 3.0)):
    some = rows(len(texts))
    return synthetic_pairs(config, some, [f"p{i}" for i in range(len(texts))], texts, [scores] * len(texts), judge)


def test_the_report_counts_what_became_of_every_prompt_and_duplicates_count_as_answers():
    texts = [["a", "a", "a", "b"], ["a", "a", "b", "b"], ["a", "b", "c", "d"], ["a"] * 4]
    found = pairs_of(CONFIG, texts)
    first, second = found.pairs
    assert (first.row, first.chosen, first.rejected) == (0, [2, 1], [3, 1])
    assert (second.row, second.chosen) == (1, [3, 1])  # two groups of two: the one with the best answer
    assert {name: found.report[name] for name in ("prompts", "accepted", "unsure", "unanimous", "pairs")} == {
        "prompts": 4,
        "accepted": 2,
        "unsure": 1,
        "unanimous": 1,
        "pairs": 2,
    }
    # Early rejection stops before the size of the largest group is known; the prompt then counts as size 0
    assert found.report["sizes"] == [1, 0, 1, 1, 1]
    assert pairs_of(replace(CONFIG, early_reject=False), texts).report["sizes"] == [0, 1, 1, 1, 1]
    assert found.report["acceptance_rate"] == 0.5
    assert (found.report["chosen_length"], found.report["rejected_length"]) == (2.0, 2.0)


def test_select_all_takes_a_pair_of_every_prompt_that_is_not_unanimous():
    texts = [["a", "b", "c", "d"], ["a"] * 4]
    assert pairs_of(replace(CONFIG, min_confidence=0.0), texts).report["accepted"] == 1


def test_reward_and_rlaif_ask_no_judge_and_order_by_score_and_by_log_prob():
    texts = [["a", "b", "c", "d"]] * 20
    for pairing, ascending in (("reward", True), ("rlaif", False)):
        found = pairs_of(replace(CONFIG, pairing=pairing), texts, judge=None)
        assert len(found.pairs) == 20
        order = [(pair.chosen or [0])[0] - (pair.rejected or [0])[0] for pair in found.pairs]
        assert all(difference > 0 if ascending else difference < 0 for difference in order)


def test_the_pair_of_a_row_does_not_depend_on_what_else_is_there_and_a_subset_is_of_the_whole():
    texts = [["a", "a", "b", "c"]] * 30
    whole = pairs_of(CONFIG, texts).pairs
    assert pairs_of(CONFIG, texts[:7]).pairs == whole[:7]
    assert {(pair.rejected or [0])[0] for pair in whole} == {2, 3}
    some = pairs_of(replace(CONFIG, max_synthetic_pairs=11), texts).pairs
    assert len(some) == 11
    assert [pair for pair in whole if pair in some] == some
    assert pairs_of(replace(CONFIG, seed=1), texts).pairs != whole


def test_calibration_reports_every_rule_in_full_and_warns_of_one_that_accepts_nothing(caplog):
    texts = [["0", "1", "2", "3"]] * 3
    judge = judge_of([[2, 1, 1, 0], [2, 2, 1, 0], [1, 1, 2, 0], [0, 0, 0, 2]])
    sizes = calibrate(CONFIG, ["p"] * 3, texts, judge)
    assert sizes == {"strict": [0, 3, 0, 0, 0], "lax": [0, 0, 3, 0, 0]}
    assert "clustering strict gives hardly any pair (strict 0.0 %, lax 100.0 %)" in caplog.text
    caplog.clear()
    calibrate(replace(CONFIG, clustering="lax"), ["p"] * 3, texts, judge)
    assert "hardly" not in caplog.text


def test_a_function_is_a_judge_of_groups():
    same = function_judge(lambda prompt, a, b: a[0] == b[0])
    assert group_answers(["p"], [["ab", "b", "ac", "bd"]], same, "strict") == [[0, 1, 0, 1]]
