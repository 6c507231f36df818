"""Tests of the guards that stop an on-policy run; each test violates the condition that a guard checks."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastrlhf.algorithms.experience import pack_episodes, score_episodes
from fastrlhf.algorithms.guards import check_kl, check_sampler, raise_not_finite
from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.algorithms.roles import make_engine
from fastrlhf.config import PPOConfig
from fastrlhf.models.loading import load_reward_model
from fastrlhf.runtime.metrics import read_metrics
from fastrlhf.types import Prefix, Rollout
from tests import tiny


def config(folder, **settings):
    fields = {
        "model_name_or_path": tiny.save_policy(folder / "sft"),
        "reward_model_path": tiny.save_reward_model(folder / "reward"),
        "per_device_train_batch_size": 8,
        "max_steps": 30,
        "response_length": 6,
        "max_length": 32,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "kl_coef": 0.0,
        "progress": False,
    }
    return PPOConfig(**fields | settings)


def test_a_policy_too_far_from_its_reference_stops_before_it_is_trained_further(tmp_path):
    """The run saves the policy whose KL it has measured. This policy is bit-identical to the result of a run that ends
    one update earlier."""
    with pytest.raises(ValueError, match=r"^max_kl: the policy that sampled for update \d+ is .* more than 0\.5;"):
        train_ppo(config(tmp_path, max_kl=0.5, output_dir=str(tmp_path / "run")), tiny.examples(20))
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert 1 <= len(rows) < 30
    assert all(row["objective/kl"] <= 0.5 for row in rows)
    shorter = train_ppo(config(tmp_path, max_steps=len(rows)), tiny.examples(20))
    left = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / f"checkpoint-{len(rows)}")
    for ours, theirs in zip(left.parameters(), shorter.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_limit_that_is_not_reached_changes_nothing(tmp_path):
    free, limited = (
        train_ppo(config(tmp_path, max_steps=2, max_kl=limit), tiny.examples(20)) for limit in (None, 100.0)
    )
    for ours, theirs in zip(free.model.parameters(), limited.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_limit_is_the_largest_kl_allowed():
    check_kl(PPOConfig(max_kl=2.0), 3, 2.0)
    check_kl(PPOConfig(), 3, 1e9)
    with pytest.raises(ValueError, match=r"update 3 is 2\.001 nats per response"):
        check_kl(PPOConfig(max_kl=2.0), 3, 2.001)


POISON = 31
ROLLOUTS = [
    Rollout(
        prefix=Prefix(token_ids=prompt, num_reset=0, row=row, episode=row),
        completion=[9, tiny.EOS],
        sampler_logprob=[-1.0, -1.0],
        ended=True,
    )
    for row, prompt in ((10, [4, 5, 6]), (11, [7, POISON, 8]), (12, [4, 6]))
]


@pytest.mark.parametrize(
    ("broken", "name"),
    [
        ("policy", "log-prob of the policy"),
        ("reference", "log-prob of the reference"),
        ("critic", "value of the critic"),
    ],
)
@pytest.mark.parametrize("whiten", [False, True])
def test_a_broken_model_is_named_with_the_row_that_it_fails_on(tmp_path, broken, name, whiten):
    """Sets the embedding of one token to NaN. Only the prompt of row 11 contains this token, but whitening spreads the
    NaN to every row."""
    cfg = config(tmp_path, whiten_rewards=whiten)
    critic = load_reward_model(cfg.reward_model_path, pad_token_id=0, must_be_trained=True)
    models = {"policy": tiny.policy(), "reference": tiny.policy(seed=5), "critic": critic}
    with torch.no_grad():
        models[broken].base_model.get_input_embeddings().weight[POISON] = float("nan")
    packs = pack_episodes(cfg, ROLLOUTS, [2, 0, 1], torch.device("cpu"))
    with pytest.raises(ValueError, match=f"^{name}: nan for a token of the response to row 11; nothing is trained"):
        score_episodes(cfg, **models, rollouts=ROLLOUTS, scores=torch.ones(3), packs=packs, eos_token_id=tiny.EOS)


def test_the_first_number_that_is_not_finite_is_named_and_empty_episodes_are_skipped():
    good, bad = torch.zeros(5), torch.tensor([0.0, 0.0, 0.0, float("-inf"), float("nan")])
    cu_rows = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    raise_not_finite({"a": good}, cu_rows, ROLLOUTS)
    with pytest.raises(ValueError, match=r"^b: -inf for a token of the response to row 12;"):
        raise_not_finite({"a": good, "b": bad, "c": bad}, cu_rows, ROLLOUTS)


def policy(dtype):
    return SimpleNamespace(dtype=dtype)


@pytest.mark.parametrize(
    ("settings", "dtype", "own", "limit"),
    [
        ({}, torch.float32, False, 0.1 / 0.7),
        ({"temperature": 1.5}, torch.float32, False, 0.1),
        ({"temperature": 1.0}, torch.bfloat16, False, 0.3),
        ({"temperature": 1.0}, torch.float32, True, 0.3),
        ({"temperature": 1.0, "engine": "vllm", "model_name_or_path": "x"}, torch.float32, False, 0.3),
        ({"max_sampling_logp_difference": 0.02}, torch.bfloat16, False, 0.02),
    ],
)
def test_log_probs_beyond_rounding_errors_reveal_another_model(settings, dtype, own, limit):
    cfg = PPOConfig(**settings)
    check_sampler(cfg, 1, limit * 0.999, policy(dtype), own=own)
    with pytest.raises(ValueError, match=r"^max_sampling_logp_difference: .* for update 1 its"):
        check_sampler(cfg, 1, limit * 1.001, policy(dtype), own=own)
    check_sampler(replace(cfg, max_sampling_logp_difference=0), 1, 9.0, policy(dtype), own=own)


def test_a_run_whose_engine_samples_from_other_weights_stops_at_its_first_update(tmp_path):
    def stale(cfg, model, eos):
        return make_engine(cfg, tiny.policy(seed=5), eos)

    cfg = config(tmp_path, output_dir=str(tmp_path / "run"))
    with pytest.raises(
        ValueError,
        match=r"^max_sampling_logp_difference: your own engine samples from another model than the trainer's: for "
        r"update 1 its log-probs differ by 0\.755 nats per token from those of LlamaForCausalLM \(.*\), more than "
        r"0\.429; nothing is trained on these samples\. Likely cause: it samples from other weights",
    ):
        train_ppo(cfg, tiny.examples(20), engine=stale)
    assert not read_metrics(tmp_path / "run" / "metrics.jsonl")


def test_the_guards_hold_for_groups_that_a_function_rewards(tmp_path):
    """Runs GRPO with a reward function. The run has no reward model and no critic; advantages are relative to the
    group."""

    def low(completion_ids, **_):
        return [float(ids[0] % 2) for ids in completion_ids]

    def stale(cfg, model, eos):
        return make_engine(cfg, tiny.policy(seed=5), eos)

    groups = {"reward_model_path": "", "advantage_estimator": "grpo", "num_generations": 4}
    cfg = config(tmp_path, max_kl=0.5, output_dir=str(tmp_path / "run"), **groups)
    with pytest.raises(ValueError, match=r"^max_kl: the policy that sampled for update \d+ is .* more than 0\.5;"):
        train_ppo(cfg, tiny.examples(20), reward_functions={"low": low})
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert 1 <= len(rows) < 30
    assert all(row["objective/kl"] <= 0.5 for row in rows)
    shorter = train_ppo(
        config(tmp_path, max_steps=len(rows), **groups), tiny.examples(20), reward_functions={"low": low}
    )
    left = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / f"checkpoint-{len(rows)}")
    for ours, theirs in zip(left.parameters(), shorter.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match=r"^max_sampling_logp_difference: your own engine samples from another model"):
        train_ppo(config(tmp_path, **groups), tiny.examples(20), reward_functions={"low": low}, engine=stale)
