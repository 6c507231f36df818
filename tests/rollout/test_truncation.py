"""Tests of truncated sampling (top_k, top_p, min_p): which tokens are kept, and that log-probs of sampler and trainer
are those of the truncated distribution."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastrlhf.algorithms.experience import pack_episodes, score_episodes
from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.algorithms.update import update
from fastrlhf.config import EvalConfig, GRPOConfig, PPOConfig
from fastrlhf.rollout.engine import TransformersEngine, checked_rollouts
from fastrlhf.rollout.stop import Stops
from fastrlhf.rollout.truncation import Truncation, kept_tokens
from fastrlhf.types import Prefix, Rollout
from tests import tiny
from tests.algorithms.test_ppo import GradientRecorder, config, tokenized

LOGITS = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()


@pytest.mark.parametrize(
    ("truncation", "kept"),
    [
        (Truncation(top_k=1), [1]),
        (Truncation(top_k=3), [0, 1, 3]),
        (Truncation(top_p=0.6), [1, 3]),
        (Truncation(top_p=0.4), [1]),
        (Truncation(min_p=0.25), [0, 1, 3]),
        (Truncation(min_p=0.5), [1, 3]),
        (Truncation(top_k=2, top_p=0.6), [1]),  # after top_k the first token has probability 0.625
        (Truncation(top_k=3, top_p=0.9, min_p=0.31), [1, 3]),  # 0.53, 0.32 and 0.16 remain, and 0.16 < 0.31 * 0.53
        (Truncation(), [0, 1, 2, 3]),
    ],
)
def test_the_kept_tokens_by_hand(truncation, kept):
    found = truncation(LOGITS)
    assert (found[0] > -math.inf).nonzero()[:, 0].tolist() == kept
    assert bool(truncation) == (len(kept) < 4)


def episodes(count: int) -> list[Prefix]:
    return [
        Prefix(token_ids=[3 + (i * j) % 20 for j in range(1, 5 + i % 4)], num_reset=i % 4, row=i, episode=i)
        for i in range(count)
    ]


def sample(model, count: int, heat: float = 0.7, **truncation) -> list[Rollout]:
    engine = TransformersEngine(
        model=model,
        eos_token_id=tiny.EOS,
        response_length=9,
        temperature=heat,
        seed=3,
        truncation=Truncation(**truncation),
        batch_size=8,
    )
    starts = episodes(count)
    rollouts = engine.generate(starts)
    checked_rollouts(rollouts, starts, eos_token_id=tiny.EOS, stops_at_eos=True, truncated=bool(truncation))
    return rollouts


def test_samples_and_log_probs_are_those_of_the_truncated_distribution_over_the_whole_text():
    model = tiny.policy()
    rollouts = sample(model, 12, top_p=0.8, top_k=12)
    sizes = set()
    for rollout in rollouts:
        tokens = [*rollout.prefix.token_ids, *rollout.completion]
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, len(rollout.prefix.token_ids) - 1 : -1].double() / 0.7
        for t, token in enumerate(rollout.completion):
            probs = logits[t].softmax(-1)
            first = probs.argsort(descending=True)[:12]
            before = (probs[first] / probs[first].sum()).cumsum(0) - probs[first] / probs[first].sum()
            kept = first[before < 0.8]
            assert sorted(kept.tolist()) == rollout.kept[t].tolist()
            expected = (probs[token] / probs[kept].sum()).log().item()
            assert rollout.sampler_logprob[t] == pytest.approx(expected, abs=1e-5)
            sizes.add(len(kept))
    assert len(sizes) > 2


def test_a_sample_does_not_depend_on_the_rest_of_the_batch():
    model = tiny.policy()
    (alone,) = sample(model, 1, min_p=0.2)
    together = sample(model, 12, min_p=0.2)
    assert together[0].completion == alone.completion
    assert all(map(np.array_equal, together[0].kept, alone.kept))
    (greedy,) = sample(model, 1, top_k=1)
    assert greedy.sampler_logprob == [0.0] * len(greedy.completion)
    (at_0,) = TransformersEngine(
        model=model,
        eos_token_id=tiny.EOS,
        response_length=9,
        temperature=0.0,
        seed=3,
        truncation=Truncation(top_k=2),
    ).generate(episodes(1))
    assert (at_0.completion, at_0.kept) == (greedy.completion, None)


def run_config(**settings) -> GRPOConfig:
    fields = {"response_length": 9, "max_length": 32, "num_generations": 2, "per_device_train_batch_size": 6}
    return GRPOConfig(**fields | {"micro_batch_tokens": 64, "temperature": 0.7, "kl_coef": 0.1} | settings)


def test_trainer_and_reference_score_the_tokens_that_the_sampler_kept():
    """Compares log-probs and the gradient of the first step with full logits that are -inf for the tokens that are not
    kept."""
    cfg = run_config(top_p=0.8)
    policy, reference = tiny.policy(), tiny.policy(seed=5)
    rollouts = [replace(r, prefix=replace(r.prefix, num_reset=0)) for r in sample(policy, 6, top_p=0.8)]
    for i in (0, 2, 4):  # all episodes of a group start in one state
        prefix = replace(rollouts[i].prefix, episode=i + 1)
        rollouts[i + 1] = replace(rollouts[i], prefix=prefix)
    scores = torch.tensor([1.0, 2.0, 0.0, 5.0, 3.0, 3.0])
    packs = pack_episodes(cfg, rollouts, [2, 0, 1], policy.device)
    found, metrics = score_episodes(cfg, policy, reference, None, rollouts, scores, packs, tiny.EOS)
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-5

    def dense(model):
        rows = []
        for rollout in rollouts:
            tokens = [*rollout.prefix.token_ids, *rollout.completion]
            logits = model(torch.tensor([tokens])).logits[0, len(rollout.prefix.token_ids) - 1 : -1] / 0.7
            for token, kept, row in zip(rollout.completion, rollout.kept, logits, strict=True):
                ids = torch.from_numpy(kept).long()
                rows.append(row[token] - row[ids].logsumexp(0))
        return torch.stack(rows)

    torch.testing.assert_close(found.sampler_logprob, dense(policy).detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.reference_logprob, dense(reference).detach(), atol=1e-5, rtol=1e-5)
    recorder = GradientRecorder(policy)
    update(cfg, policy, None, recorder, rollouts, found, packs, (0, 0))
    objective = (dense(policy) * found.advantage).sum() / len(found.advantage)
    expected = torch.autograd.grad(-objective, list(policy.parameters()), allow_unused=True)
    for ours, theirs in zip(recorder.steps[0][0], expected, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs, atol=1e-5, rtol=1e-4)


@pytest.fixture
def policy_path(tmp_path):
    return {"model_name_or_path": tiny.save_policy(tmp_path / "sft")}


def num_distinct(completions, **_):
    return [float(len(set(text.split()))) for text in completions]


@pytest.mark.parametrize("settings", [{"top_p": 0.8}, {"top_k": 5, "update": "pair"}])
def test_a_run_trains_and_evaluates_on_the_truncated_distribution(policy_path, settings):
    cfg = config(policy_path, GRPOConfig, num_generations=4, kl_coef=0.1, stop=["w3"], **settings)
    functions = {"distinct": num_distinct}
    result = train_ppo(cfg, tiny.examples(9), tiny.examples(3, seed=1), reward_functions=functions)
    for row in result.history:
        assert row["sampling/sampling_logp_difference/max"] < 1e-4
    assert result.history[0]["objective/kl"] == 0  # policy and reference are restricted to the same set
    assert result.history[1]["objective/kl"] != 0
    assert result.history[1]["policy/entropy_avg"] < math.log(5) or "top_p" in settings
    assert math.isfinite(result.final["eval_objective/kl"])


def test_each_episode_of_a_group_has_its_temperature(policy_path):
    heats = (0.5, 1.5)
    cfg = config(policy_path, GRPOConfig, num_generations=4, temperatures=heats, kl_coef=0.1)
    result = train_ppo(cfg, tiny.examples(9), reward_functions={"distinct": num_distinct})
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-4 for row in result.history)
    model = tiny.policy()
    starts = [replace(prefix, temperature=heats[i % 2]) for i, prefix in enumerate(episodes(6))]
    engine = TransformersEngine(model=model, eos_token_id=tiny.EOS, response_length=9, temperature=0.7, seed=3)
    for i, rollout in enumerate(engine.generate(starts)):
        own = replace(engine, temperature=heats[i % 2]).generate([episodes(6)[i]])[0]
        assert rollout.completion == own.completion
        assert rollout.sampler_logprob == pytest.approx(own.sampler_logprob, abs=1e-5)


def test_prefixes_of_a_group_take_the_temperatures_in_turn():
    from fastrlhf.algorithms.prefixes import draw_prefixes

    cfg = run_config(num_generations=4, per_device_train_batch_size=8, temperatures=[0.5, 1.5])
    assert [p.temperature for p in draw_prefixes(cfg, tokenized(2), 3)] == [0.5, 1.5] * 4
    assert {p.temperature for p in draw_prefixes(run_config(), tokenized(2), 3)} == {None}


def test_a_response_cut_at_a_stop_string_keeps_the_sets_of_its_tokens():
    sets = [np.array([i, 7], np.int32) for i in tiny.ids("w1 w7 w2")]
    prefix = Prefix(token_ids=[5], num_reset=0, row=3, episode=0)
    whole = Rollout(prefix=prefix, completion=tiny.ids("w1 w7 w2"), sampler_logprob=[-1.0] * 3, ended=False, kept=sets)
    cut = Stops(strings=("w7",), tokenizer=tiny.tokenizer()).cut(whole)
    assert len(cut.kept) == 2
    found = kept_tokens([cut, whole], torch.device("cpu"))
    assert found is not None
    assert found.cu_rows.tolist() == [0, 2, 4, 6, 8, 10]
    assert found.ids.tolist() == [i for one in [*sets[:2], *sets] for i in one]


def test_an_engine_that_reports_no_sets_or_wrong_ones_is_refused():
    (rollout,) = sample(tiny.policy(), 1, top_k=3)
    keywords = {"eos_token_id": tiny.EOS, "stops_at_eos": True}
    with pytest.raises(ValueError, match="row 0 lacks `kept`, the tokens that top_k, top_p and min_p left"):
        checked_rollouts([replace(rollout, kept=None)], [rollout.prefix], **keywords, truncated=True)
    with pytest.raises(ValueError, match="row 0 has `kept`: it was drawn from a truncated distribution"):
        checked_rollouts([rollout], [rollout.prefix], **keywords)
    wrong = replace(rollout, kept=[np.array([31], np.int32)] * len(rollout.completion))
    with pytest.raises(ValueError, match="row 0 has a token that is not among those that could be drawn"):
        checked_rollouts([wrong], [rollout.prefix], **keywords, truncated=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_p": 0.0}, "top_p: must be above 0 and at most 1; got 0.0"),
        ({"top_k": -1}, "top_k: must be at least 0; got -1"),
        ({"min_p": 1.5}, "min_p: must be null, or in 0..1; got 1.5"),
        ({"temperatures": [0.5, 0.0]}, "temperatures: must be above 0"),
        ({"temperatures": [0.5, 1.0], "num_generations": 3}, "temperatures: must be such that the 3 episodes of a"),
        ({"temperatures": [1.0, 0.005], "num_generations": 2, "engine": "vllm"}, "temperatures: must be at least 0.01"),
        ({"top_p": 0.9, "engine": "vllm"}, "engine: must be transformers with top_p: the loss needs the tokens"),
        ({"min_p": 0.1, "decode": "cuda_graph"}, "decode: must be eager with min_p"),
        ({"top_k": 5, "kl_estimator": "exact"}, "kl_estimator: must be k1, k2 or k3 with top_k"),
        ({"top_k": 5, "compat": "reference"}, "compat: must be fixed with top_k, top_p or min_p, because"),
    ],
)
def test_settings_that_cannot_be_exact_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**{"per_device_train_batch_size": 6, **settings})


def test_eval_refuses_to_record_graphs_of_truncated_steps():
    with pytest.raises(ValueError, match="decode: must be eager with top_k, top_p or min_p; got 'cuda_graph'"):
        EvalConfig(top_p=0.9, decode="cuda_graph")
