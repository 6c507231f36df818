"""Tests of sampling answers to prompts from a policy, and that sampling is reproducible."""

import numpy as np
import pytest

from fastrlhf.algorithms.completions import ANSWER_STREAM, Answers, sample_answers, two_that_differ, write_rows
from fastrlhf.rollout.engine import TransformersEngine
from fastrlhf.runtime.metrics import read_rows
from fastrlhf.types import TokenizedExample
from tests import tiny


def answers(responses):
    return Answers(row=0, prompt=[3, 4], responses=responses, logprob=[0.0] * len(responses))


def engine(**settings):
    fields = {"eos_token_id": tiny.EOS, "response_length": 6, "temperature": 1.0, "seed": 3, "stream": ANSWER_STREAM}
    return TransformersEngine(model=tiny.policy(), **fields | settings)


def test_answers_depend_on_prompt_and_round_but_not_on_the_batch():
    prompts = [TokenizedExample(prompt=[3 + i, 4, 5], row=10 + i) for i in range(3)]
    drawn = sample_answers(engine(), prompts, 4, round_=1)
    assert [(a.row, a.prompt, len(a.responses)) for a in drawn] == [(10 + i, [3 + i, 4, 5], 4) for i in range(3)]
    again = sample_answers(engine(batch_size=2), prompts, 4, round_=1)
    assert [a.responses for a in again] == [a.responses for a in drawn]
    assert drawn[0].differ
    assert [a.responses for a in sample_answers(engine(), prompts, 4, round_=2)] != [a.responses for a in drawn]


def test_the_log_prob_is_the_mean_over_the_sampled_tokens():
    [drawn] = sample_answers(engine(), [TokenizedExample(prompt=[3, 4, 5], row=0)], 2, round_=1)
    [again] = sample_answers(engine(response_length=1), [TokenizedExample(prompt=[3, 4, 5], row=0)], 2, round_=1)
    assert [r[:1] for r in drawn.responses] == again.responses
    assert all(logprob < 0 for logprob in drawn.logprob)
    assert again.logprob != pytest.approx(drawn.logprob)


def test_a_drawn_pair_always_has_different_tokens_and_every_such_pair_occurs():
    a, b = [5, 1], [6, 1]
    drawn = {two_that_differ(answers([a, a, b]), np.random.default_rng(i)) for i in range(100)}
    assert drawn == {(0, 2), (1, 2), (2, 0), (2, 1)}
    assert not answers([a, a]).differ


def test_rows_are_read_back_unchanged(tmp_path):
    rows = [{"row": 1, "ids": [1, 2]}, {"row": 2, "text": "a\nb"}]
    write_rows(tmp_path / "new" / "rows.jsonl", iter(rows))
    assert read_rows(tmp_path / "new" / "rows.jsonl") == rows
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["rows.jsonl"]
