"""Tests of the evaluations during on-policy training, against hand-computed numbers and against the models' own
`generate`."""

import math
from contextlib import contextmanager

import pytest
import torch

from fastrlhf.config import PPOConfig
from fastrlhf.evaluation import held_out
from fastrlhf.evaluation.completions import respond, response_kl
from fastrlhf.evaluation.held_out import describe, evaluate, mean_and_error, repetition
from fastrlhf.types import Prefix, Rollout, TokenizedExample
from tests import tiny

CONFIG = PPOConfig(response_length=7, temperature=0.8, seed=3, max_length=32, micro_batch_tokens=64)
EXAMPLES = [TokenizedExample(prompt=[3 + (5 * i + j) % 29 for j in range(2 + i % 3)], row=10 + i) for i in range(9)]


def rollout(prompt: int, *completion: int) -> Rollout:
    prefix = Prefix(token_ids=[prompt], num_reset=0, row=prompt, episode=prompt)
    logprobs = [0.0] * len(completion)
    return Rollout(prefix=prefix, completion=[*completion], sampler_logprob=logprobs, ended=completion[-1] == tiny.EOS)


def by_length(rollouts):
    return [float(len(r.completion)) for r in rollouts]


def by_first_token(rollouts):
    return torch.tensor([float(r.completion[0]) for r in rollouts])


def answers(policy, temperature):
    settings = {"eos_token_id": tiny.EOS, "response_length": 7, "seed": 3, "batch_size": 64}
    return respond(policy, EXAMPLES, temperature=temperature, **settings)


def test_sampled_and_greedy_responses_have_separate_metrics():
    policy, reference = tiny.policy(), tiny.policy(seed=5)
    metrics = evaluate(CONFIG, policy, reference, by_length, EXAMPLES, tiny.EOS, by_first_token)
    sampled, greedy = answers(policy, 0.8), answers(policy, 0.0)
    assert [r.completion for r in sampled] != [r.completion for r in greedy]
    for name, rollouts in (("eval_completions", sampled), ("eval_greedy", greedy)):
        assert {f"{name}/{key}": value for key, value in describe(rollouts).items()}.items() <= metrics.items()
    judged = (
        ("eval_objective", by_length(sampled)),
        ("eval_greedy", by_length(greedy)),
        ("eval_held_out", by_first_token(sampled).tolist()),
    )
    for name, scores in judged:
        mean = sum(scores) / 9
        variance = sum((score - mean) ** 2 for score in scores) / 8
        assert metrics[f"{name}/scores"] == pytest.approx(mean)
        assert metrics[f"{name}/scores_stderr"] == pytest.approx(math.sqrt(variance / 9))
    kl = response_kl(policy, reference, sampled, temperature=0.8, micro_batch_tokens=64)
    assert metrics["eval_objective/kl"] == kl > 0.1


def test_reference_and_judges_are_on_the_device_only_while_they_score(monkeypatch):
    log = []

    def logged(name, function):
        return lambda *arguments, **keywords: (log.append(name), function(*arguments, **keywords))[1]

    @contextmanager
    def present():
        log.append("present")
        yield
        log.append("gone")

    for name, function in (("sample", respond), ("kl", response_kl)):
        monkeypatch.setattr(held_out, function.__name__, logged(name, function))
    policy, judge = tiny.policy(), logged("judge", by_length)
    evaluate(CONFIG, policy, policy, judge, EXAMPLES, tiny.EOS, judge, present)
    assert log == ["sample", "sample", "present", "judge", "kl", "judge", "judge", "gone"]


def test_without_a_second_judge_there_is_no_second_score():
    policy = tiny.policy()
    metrics = evaluate(CONFIG, policy, policy, by_length, EXAMPLES, tiny.EOS)
    assert not [name for name in metrics if name.startswith("eval_held_out")]


def test_a_score_of_the_second_judge_that_is_not_finite_names_its_row():
    def broken(rollouts):
        return torch.tensor([0.0] * 4 + [float("nan")] + [0.0] * 4)

    policy = tiny.policy()
    with pytest.raises(ValueError, match="the score of a response to row 14 is nan"):
        evaluate(CONFIG, policy, policy, by_length, EXAMPLES, tiny.EOS, broken)


def test_the_standard_error_of_the_mean_is_nan_for_a_single_score():
    """Scores 1, 2, 6: mean 3, sum of squares 4 + 1 + 9 = 14, s^2 = 7, standard error sqrt(7 / 3)."""
    assert mean_and_error("s", torch.tensor([1.0, 2.0, 6.0])) == pytest.approx({"s": 3, "s_stderr": math.sqrt(7 / 3)})
    assert math.isnan(mean_and_error("s", torch.tensor([1.0]))["s_stderr"])


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 1, 2, 1, 2, 1], 1 - 2 / 4),
        ([5] * 8, 1 - 1 / 5),
        ([1, 2, 3, 4, 5, 6, 7, 8], 0),
        ([1, 2, 3, 9, 1, 2, 3, 9], 1 - 4 / 5),
        ([5, 5, 5], 0),  # too short for a 4-gram
    ],
)
def test_repetition_is_the_share_of_4_grams_that_have_occurred_before(tokens, expected):
    assert repetition(tokens) == pytest.approx(expected)


def test_loops_and_responses_that_two_prompts_share_are_counted():
    """Equal answers to equal prompts are not duplicates, because greedy answers to equal prompts are always equal."""
    rollouts = [
        rollout(3, *[7, 8] * 5),
        rollout(4, 9, 10, tiny.EOS),
        rollout(5, 9, 10, tiny.EOS),
        rollout(6, 11, tiny.EOS),
        rollout(6, 11, tiny.EOS),
    ]
    assert describe(rollouts) == {
        "mean_length": pytest.approx((10 + 3 + 3 + 2 + 2) / 5),
        "ended": 4 / 5,
        "looping": 1 / 5,
        "duplicates": 2 / 5,
    }
