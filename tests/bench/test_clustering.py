import json

import pytest

from bench import clustering
from bench.clustering import Counted, draw_answers, one_at_a_time, run_clustering
from fastrlhf.evaluation.equivalence import Relation, exact_match


def test_all_methods_get_the_same_answers_and_batched_ones_ask_less(tmp_path):
    table = run_clustering([8], num_prompts=4, rounds=1, out=tmp_path)
    [file] = tmp_path.iterdir()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["way"] for row in rows] == ["one at a time", "waves", "waves, early reject"]
    loop, waves, early = (row["questions"] for row in rows)
    assert early <= waves < loop
    assert min(row["seconds"] for row in rows) > 0
    assert len(table.splitlines()) == 5


def test_the_loop_asks_both_directions_of_every_pair_of_different_texts():
    judge = Counted(exact_match)
    # Comparisons: b with a; c with a and b; B with a, then with b (equal). The second "a" is an exact duplicate: none.
    assert one_at_a_time("", ["a", "b", "c", "a", "B"], judge) == [0, 1, 2, 0, 1]
    assert judge.questions == 2 + 4 + 0 + 4
    assert one_at_a_time("", ["a", "b"], lambda asked: [Relation(2 * (asked[0].premise == "a"))]) == [0, 1]


def test_groups_that_depend_on_the_batching_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(clustering, "group_answers", lambda prompts, *_: [[9] * 10 for _ in prompts])
    with pytest.raises(RuntimeError, match="the groups of 4 prompts depend on the batching"):
        run_clustering([8], num_prompts=4, rounds=1, out=tmp_path)


def test_a_post_has_ten_answers_of_at_most_six_texts():
    prompts, answers = draw_answers(5)
    assert len(prompts) == len(answers) == 5
    assert all(len(texts) == 10 and 2 <= len(set(texts)) <= 6 for texts in answers)
