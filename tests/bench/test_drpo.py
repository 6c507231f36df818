"""Tests of `python -m bench train drpo`: its episodes, the padded reference against our implementation, and a full run
on a tiny model."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench.drpo import compare, contestants, padded
from bench.drpo.compare import run_drpo
from bench.drpo.problem import EOS, RESPONSE_LENGTH, Models, Problem, eos_probability, make_examples, make_models
from fastrlhf.algorithms.experience import pack_episodes, score_episodes
from fastrlhf.algorithms.prefixes import draw_prefixes
from fastrlhf.algorithms.roles import make_engine
from fastrlhf.algorithms.update import update
from fastrlhf.evaluation.judges import reward_model_judge
from fastrlhf.models.adapters import frozen_copy
from tests import tiny

PROBLEM = Problem(
    shape="tiny", episodes=8, device="cpu", micro_batch=8, micro_batch_tokens=8192, rollout_batch=8, epochs=1
)


def test_the_episodes_are_as_long_as_those_of_tldr():
    examples = make_examples(replace(PROBLEM, episodes=2000))
    prompts, references = (np.array([len(getattr(e, name)) for e in examples]) for name in ("prompt", "reference"))
    np.testing.assert_allclose(np.quantile(prompts, [0.1, 0.5, 0.9, 0.99]), [216, 350, 475, 510], atol=1)
    # The measured prompts have mean 347 and standard deviation 95; five quantiles reproduce these only roughly.
    assert prompts.mean() == pytest.approx(347, rel=0.01)
    assert prompts.std() == pytest.approx(95, rel=0.1)
    assert references.mean() == pytest.approx(33.9, abs=0.1)
    assert references.std() == pytest.approx(6.5, abs=0.1)
    assert references.min() >= 16
    assert references.max() <= 50
    assert all(e.reference[-1] == EOS and EOS not in [*e.prompt, *e.reference[:-1]] for e in examples)


def test_few_episodes_have_the_mean_length_of_many():
    few, many = make_examples(PROBLEM), make_examples(replace(PROBLEM, episodes=512))
    mean = [np.mean([len(e.prompt) + len(e.reference) for e in examples]) for examples in (few, many)]
    assert mean[0] == pytest.approx(mean[1], rel=0.01)


def test_sampled_responses_have_the_mean_length_of_the_references():
    problem = replace(PROBLEM, episodes=100, rollout_batch=100)
    config, examples = problem.config(), make_examples(problem)
    prefixes = draw_prefixes(config, examples, first_group=0)
    probability = eos_probability(examples, prefixes)
    rollouts = make_engine(config, make_models(problem, examples).policy, EOS).generate(prefixes)
    lengths = [rollout.prefix.num_reset + len(rollout.completion) for rollout in rollouts]
    # Lengths have a standard deviation of about 12 tokens, so the mean of 100 deviates by 1.2.
    assert np.mean(lengths) == pytest.approx(33.9, abs=4)
    # The denominator of the probability is a sum of 512 log-normal terms, which deviates by 3.4 %.
    probabilities = np.exp([rollout.sampler_logprob[-1] for rollout in rollouts if rollout.ended])
    assert probabilities.mean() == pytest.approx(probability, rel=0.03)
    np.testing.assert_allclose(probabilities, probability, rtol=0.15)


@pytest.fixture
def both():
    """Makes models and samples one set of episodes for both fastrlhf (compat "reference") and the padded reference."""
    config = replace(PROBLEM.config(), compat="reference", cliprange_value=0.01, vf_coef=0.5)
    examples = make_examples(PROBLEM)
    models = make_models(PROBLEM, examples)
    policy, critic = models.policy, models.critic
    reward_model = frozen_copy(critic)
    reference = make_models(replace(PROBLEM, seed=1), examples).policy
    rollouts = make_engine(config, policy, EOS).generate(draw_prefixes(config, examples, first_group=0))
    # One truncated episode gets an EOS in place of its last token
    late = next(i for i, rollout in enumerate(rollouts) if not rollout.ended)
    rollouts[late] = replace(rollouts[late], completion=[*rollouts[late].completion[:-1], EOS], ended=True)
    assert {rollout.ended for rollout in rollouts} == {True, False}
    return config, policy, critic, reward_model, reference, rollouts


def laid_out(rollouts) -> padded.Episodes:
    """Converts episodes from lists of ids to the padded layout."""
    width = max(len(r.prefix.token_ids) - r.prefix.num_reset for r in rollouts) + 3 + RESPONSE_LENGTH
    sequences = [[*r.prefix.token_ids, *r.completion] for r in rollouts]
    return padded.Episodes(
        tokens=torch.tensor([[0] * (width - len(s)) + s for s in sequences]),
        seen=torch.tensor([[False] * (width - len(s)) + [True] * len(s) for s in sequences]),
        given=torch.tensor([r.prefix.num_reset for r in rollouts]),
        response_length=RESPONSE_LENGTH,
    )


def test_the_padded_reference_and_ours_agree_on_the_same_episodes(both):
    config, policy, critic, reward_model, reference, rollouts = both
    judge = reward_model_judge(reward_model, eos_token_id=EOS, micro_batch_tokens=8192)
    packs = pack_episodes(config, rollouts, range(len(rollouts)), policy.device)
    ours, _ = score_episodes(config, policy, reference, critic, rollouts, judge(rollouts), packs, EOS)
    episodes = laid_out(rollouts)
    theirs = padded.score(config, policy, reference, critic, reward_model, episodes, EOS)
    assert torch.equal(ours.mask, episodes.sampled.flatten())
    # float32 sums over 500 tokens in different orders; log-probs are about -6, other values about 1.
    for name, other in (
        ("sampler_logprob", theirs.logprob),
        ("reference_logprob", theirs.reference_logprob),
        ("value", theirs.value),
        ("returns", theirs.returns),
        ("advantage", theirs.advantage),
    ):
        torch.testing.assert_close(getattr(ours, name), other.flatten(), rtol=2e-5, atol=2e-5, msg=name)

    # Sampler log-probs of another policy, so that ratios differ from 1 and some are clipped.
    ours = replace(ours, sampler_logprob=ours.reference_logprob, value=ours.value + 0.1)
    theirs = replace(theirs, logprob=theirs.reference_logprob, value=theirs.value + 0.1)
    recorders = [tiny.GradientRecorder({"": policy, "value_": critic}) for _ in range(2)]
    metrics = update(config, policy, critic, recorders[0], rollouts, ours, packs, seed=(0, 0))
    others = padded.update(config, policy, critic, recorders[1], episodes, theirs, micro_batch=len(rollouts))
    assert metrics["policy/clipfrac_avg"] > 0.1
    assert metrics["val/clipfrac_avg"] > 0.1
    assert metrics["loss/policy_avg"] == pytest.approx(others["policy_loss"], rel=1e-4)
    assert metrics["loss/value_avg"] == pytest.approx(others["value_loss"], rel=1e-4)
    for ours_of, theirs_of in zip(recorders[0].steps[0], recorders[1].steps[0], strict=True):
        tiny.assert_close_gradients(ours_of, theirs_of, tolerance=1e-4)


def test_the_padded_rollout_forces_the_reset_and_samples_the_rest_past_the_eos():
    problem = replace(PROBLEM, rollout_batch=3)
    config, examples = problem.config(), make_examples(problem)
    prefixes = draw_prefixes(config, examples, first_group=0)
    torch.manual_seed(0)
    episodes = padded.rollout(config, make_models(problem, examples).policy, prefixes)
    assert episodes.tokens.shape == (8, 512 + RESPONSE_LENGTH)
    for tokens, seen, given, prefix in zip(
        episodes.tokens, episodes.seen, episodes.given.tolist(), prefixes, strict=True
    ):
        alone = tokens[seen].tolist()
        assert alone[: len(prefix.token_ids)] == prefix.token_ids
        assert given == prefix.num_reset
        assert len(alone) == len(prefix.token_ids) + RESPONSE_LENGTH - given
    first = episodes.response.gather(1, episodes.given[:, None])
    assert len(first.unique()) > 1, "the tokens after the reset are not sampled"
    ends = [row.index(EOS) for row in episodes.response.tolist() if EOS in row[:-1]]
    assert ends, "no response ends early, so this test shows nothing"
    after = [token for row in episodes.response.tolist() if EOS in row for token in row[row.index(EOS) + 1 :]]
    assert any(token != EOS for token in after)


def test_both_layouts_count_the_same_training_operations(both):
    _, policy, critic, _, _, rollouts = both
    ends = [r.completion.index(EOS) + 1 if EOS in r.completion else len(r.completion) for r in rollouts]
    lengths = [(len(rollout.prefix.token_ids), end) for rollout, end in zip(rollouts, ends, strict=True)]
    assert contestants._lengths(laid_out(rollouts)) == lengths
    work = contestants.training_work(Models(policy=policy, critic=critic), lengths, epochs=2)
    assert work["training_tokens"] == 2 * sum(map(sum, lengths))
    matrices = 2 * sum(p.numel() for name, p in policy.named_parameters() if "layers" in name and p.ndim == 2)
    products = 3 * 2 * matrices * work["training_tokens"]
    # The operations besides the matrix products are mostly those of attention, because the model is narrow
    assert products < work["training_operations"] < 2 * products


def test_the_bytes_of_an_optimiser_are_gradients_and_moments():
    models = make_models(PROBLEM, make_examples(PROBLEM))
    optimizer = contestants._optimizer(PROBLEM, models)
    for model in (models.policy, models.critic):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    params = [p for model in (models.policy, models.critic) for p in model.parameters()]
    steps = 4 * len(params)  # AdamW stores a step counter per tensor
    assert contestants._state_bytes(models, optimizer) == 3 * sum(p.nbytes for p in params) + steps


def test_a_side_without_room_is_skipped_and_named(tmp_path, monkeypatch):
    row = {
        "provider": "ours", "seconds": 3.0, "rollout": 1.0, "scoring": 1.0, "training": 1.0, "extra_mb": 5.0,
        "sampled_tokens": 8, "sequence_tokens": 9, "training_tokens_per_second": 7.0, "training_mfu": 0.5,
    }  # fmt: skip

    def block(side, *_):
        if side == "padded":
            raise MemoryError
        return row

    monkeypatch.setattr(compare, "_block", block)
    table = run_drpo(PROBLEM, rounds=2, trl_path=tmp_path, folder=tmp_path / "results")
    assert "padded skipped: out of GPU memory" in table
    assert "| 50.0 (target 45) |" in table


def test_the_command_writes_a_row_per_side_and_reports_that_trl_is_missing(tmp_path):
    problem = replace(PROBLEM, micro_batch=4, episodes=4)
    (tmp_path / "trl").mkdir()
    (tmp_path / "trl" / "__init__.py").touch()
    table = run_drpo(problem, rounds=1, trl_path=tmp_path, folder=tmp_path / "results")
    (file,) = (tmp_path / "results").glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["provider"] for row in rows] == ["ours", "padded reference"]
    for row in rows:
        assert row["seconds"] == pytest.approx(row["rollout"] + row["scoring"] + row["training"])
        assert min(row["rollout"], row["scoring"], row["training"]) > 0
        assert row["training_mfu"] is None
        assert row["training_tokens_per_second"] * row["training"] == pytest.approx(row["training_tokens"])
    ours, reference = rows
    assert reference["sampled_tokens"] == 4 * RESPONSE_LENGTH
    assert reference["sequence_tokens"] == 4 * (512 + RESPONSE_LENGTH)
    prompts = sum(len(example.prompt) for example in make_examples(problem))
    assert 4 <= ours["sampled_tokens"] < ours["sequence_tokens"] - prompts <= 4 * RESPONSE_LENGTH
    ratio = reference["seconds"] / ours["seconds"]
    assert f"| padded reference | {ratio:.2f} (target 3) |" in table
    assert f"TRL skipped: {tmp_path} has no PPO trainer" in table


def test_episodes_that_micro_batches_do_not_divide_are_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="episodes: 8 must be a multiple of micro-batches of 3"):
        run_drpo(replace(PROBLEM, micro_batch=3), rounds=1, folder=tmp_path)
