"""Tests of the built-in dataset of sums: every answer is a single token and correct, and the reward function rewards
only the correct answer."""

from fastrlhf.data.arithmetic import VOCABULARY, examples, model_config, right_sum, tokenizer


def test_every_sum_has_its_answer_and_both_are_known_tokens():
    words = tokenizer()
    rows = examples()
    assert [row.row for row in rows] == list(range(100))
    assert len({row.prompt for row in rows}) == 100
    for row in rows:
        a, _, b, _ = str(row.prompt).split()
        assert row.columns["answer"] == str(int(a) + int(b))
        ids = words.encode(f"{row.prompt} {row.columns['answer']}")
        assert len(ids) == 5
        assert words.unk_token_id not in ids
    assert len(words) == len(VOCABULARY) == model_config().vocab_size == 24


def test_only_the_right_sum_and_nothing_else_is_rewarded():
    given = ["11", "1 1", "11 2", "12", "", " 11 "]
    assert right_sum(completions=given, answer=["11"] * 6, prompts=["3 + 8 ="] * 6) == [1, 0, 0, 0, 0, 1]
