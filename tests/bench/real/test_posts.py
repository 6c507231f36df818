"""Tests of the made-up posts and of the rule that judges their summaries."""

import pytest

from bench.real.posts import ACTION, WHAT, WHO, gold_score, judge, make_rows


def test_a_reference_has_every_fact_and_a_rejected_summary_less():
    rows = make_rows(300, seed=0)
    assert {gold_score(row["facts"], row["reference"]) for row in rows} == {3.0}
    assert {gold_score(row["facts"], row["rejected"]) for row in rows} == {0.0, 1.5}
    assert all(row["chosen"] == row["reference"] for row in rows)
    for row in rows:
        who, what, action = row["facts"]
        assert who in row["prompt"]
        assert WHAT[what][0] in row["prompt"]
        assert ACTION[action] in row["prompt"]
    assert {row["facts"][0] for row in rows} == {*WHO}


def test_the_rows_depend_on_the_seed():
    assert make_rows(20, 1) == make_rows(20, 1) != make_rows(20, 2)


@pytest.mark.parametrize(
    ("summary", "score"),
    [
        ("My boss broke my bike.", 2.0),
        ("The bicycle of my bosses", 0.0),
        ("my BOSS, my bike: a letter?", 3.0),
        ("My boss and my sister broke my bike and my car.", 1.0),
        ("my boss broke my bike and I " + "really " * 12 + "do", 1.8),  # 20 words
        ("", 0.0),
    ],
)
def test_the_rule_counts_facts_inventions_and_excess_words(summary, score):
    assert gold_score(["boss", "bike", "letter"], summary) == pytest.approx(score)
    assert judge([summary], [["boss", "bike", "letter"]], prompts=["post"]) == [pytest.approx(score)]
