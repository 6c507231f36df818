"""Tests that episodes with a shared prefix (trunk) give the numbers and gradients of separate sequences."""

from dataclasses import fields, replace

import pytest
import torch

from fastrlhf.algorithms.experience import pack_episodes, score_episodes
from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.algorithms.prefixes import draw_prefixes
from fastrlhf.algorithms.roles import make_engine
from fastrlhf.algorithms.update import update
from fastrlhf.config import DRPOConfig
from fastrlhf.data.packing import unpack
from fastrlhf.models.loading import load_reward_model
from fastrlhf.types import Experience, TokenizedExample
from tests import tiny

GROUPS = 4


def config(group_size: int = 3, **settings) -> DRPOConfig:
    fields = {
        "response_length": 9,
        "max_length": 40,
        "per_device_train_batch_size": GROUPS * group_size,
        "num_generations": group_size,
        "micro_batch_tokens": 100,
        "num_ppo_epochs": 1,
        "progress": False,
    }
    return DRPOConfig(**fields | settings)


def rollouts(cfg: DRPOConfig, policy):
    prompts = [
        TokenizedExample(
            prompt=[3 + (5 * i + j) % 29 for j in range(4 + 3 * i)],
            reference=[*(3 + (3 * i + j) % 29 for j in range(8 - i)), tiny.EOS],
            row=i,
        )
        for i in range(GROUPS)
    ]
    return make_engine(cfg, policy, tiny.EOS).generate(draw_prefixes(cfg, prompts, 0))


@pytest.fixture(scope="module")
def critic(tmp_path_factory):
    return load_reward_model(tiny.save_reward_model(tmp_path_factory.mktemp("critic")), pad_token_id=0)


def numbers_and_gradients(cfg, policy, critic, drawn):
    packs = pack_episodes(cfg, drawn, [2, 0, 3, 1], policy.device)
    scores = torch.linspace(-1, 2, len(drawn))
    found, metrics = score_episodes(cfg, policy, tiny.policy(seed=5), critic, drawn, scores, packs, tiny.EOS)
    recorder = tiny.GradientRecorder({"": policy} | ({"value_": critic} if critic else {}))
    update(cfg, policy, critic, recorder, drawn, found, packs, seed=(0, 0))
    tokens = sum(item.batch.num_tokens for mini in packs for item in mini)
    return found, metrics, recorder.steps, tokens


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
@pytest.mark.parametrize("reset_group", ["point", "response"])
def test_trunks_change_no_number_and_no_gradient(name, reset_group, critic):
    """The two layouts sum float32 numbers in different orders. The tolerances are therefore a few units in the last
    place for log-probs of up to 10 nats, and 1.4e-6 of the largest entry for a gradient."""
    policy = tiny.policy(name)
    critic.zero_grad()
    cfg = config(reset_group=reset_group, reset_prob=0.8, num_mini_batches=2)
    drawn = rollouts(cfg, policy)
    assert len({r.prefix.num_reset for r in drawn}) > 2
    alone, metrics, plain, tokens = numbers_and_gradients(replace(cfg, share_trunks=False), policy, critic, drawn)
    shared, shared_metrics, steps, fewer = numbers_and_gradients(cfg, policy, critic, drawn)
    for field in fields(Experience):
        torch.testing.assert_close(getattr(shared, field.name), getattr(alone, field.name), rtol=1e-6, atol=1e-6)
    assert shared_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-5)
    assert len(steps) == len(plain) == 2
    for step, other in zip(steps, plain, strict=True):
        for ours, theirs in zip(step, other, strict=True):
            tiny.assert_close_gradients(ours, theirs, tolerance=3e-6)
    assert tokens == sum(len(r.prefix.token_ids) + len(r.completion) for r in drawn)
    trunks = sum(max(len(r.prefix.token_ids) for r in drawn[i : i + 3]) for i in range(0, len(drawn), 3))
    assert fewer == trunks + sum(len(r.completion) for r in drawn)


def test_the_value_after_a_truncated_branch_is_read_at_its_last_token(critic):
    cfg = config(reset_group="response", truncation="bootstrap", missing_eos_score=None, reset_prob=0.8)
    drawn = rollouts(cfg, tiny.policy())
    assert {r.ended for r in drawn} == {True, False}
    alone, *_ = numbers_and_gradients(replace(cfg, share_trunks=False), tiny.policy(), critic, drawn)
    shared, *_ = numbers_and_gradients(cfg, tiny.policy(), critic, drawn)
    ending, *_ = numbers_and_gradients(replace(cfg, truncation="terminal"), tiny.policy(), critic, drawn)
    torch.testing.assert_close(shared.returns, alone.returns, rtol=1e-6, atol=1e-6)
    assert (shared.returns - ending.returns).abs().max() > 0.1


def test_a_group_stays_in_one_micro_batch_and_every_row_points_to_its_own_token():
    cfg = config(reset_group="response", micro_batch_tokens=55)
    drawn = rollouts(cfg, tiny.policy())
    [packs] = pack_episodes(cfg, drawn, [2, 0, 3, 1], torch.device("cpu"))
    assert len(packs) > 1
    flat = torch.full((sum(len(r.completion) for r in drawn),), -1)
    held = []
    for item in packs:
        flat[item.index] = item.batch.targets
        sequences = unpack(item.batch)
        assert len(sequences) % 3 == 0
        held += sequences
    assert flat.tolist() == [token for r in drawn for token in r.completion]
    assert sorted(held) == sorted([*r.prefix.token_ids, *r.completion] for r in drawn)


def test_in_compat_reference_branches_start_at_the_prompt_and_change_no_number(critic):
    # compat "reference" averages each micro-batch separately, so both layouts must use a single micro-batch here.
    cfg = config(compat="reference", reset_group="response", micro_batch_tokens=1000)
    drawn = rollouts(cfg, tiny.policy())
    alone, _, plain, _ = numbers_and_gradients(replace(cfg, share_trunks=False), tiny.policy(), critic, drawn)
    shared, _, steps, _ = numbers_and_gradients(cfg, tiny.policy(), critic, drawn)
    torch.testing.assert_close(shared.advantage, alone.advantage, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(steps[0], plain[0], strict=True):
        tiny.assert_close_gradients(ours, theirs)


@pytest.mark.parametrize(
    "settings", [{"advantage_estimator": "rloo"}, {"reset_group": "response"}, {"reset_source": "sample"}]
)
def test_a_run_on_trunks_is_the_run_on_separate_sequences(tmp_path, settings):
    cfg = config(
        model_name_or_path=tiny.save_policy(tmp_path / "sft"),
        reward_model_path=tiny.save_reward_model(tmp_path / "reward"),
        learning_rate=1e-4,
        num_ppo_epochs=2,
        num_mini_batches=2,
        max_steps=2,
        **settings,
    )
    shared = train_ppo(cfg, tiny.examples(20)).history
    alone = train_ppo(replace(cfg, share_trunks=False), tiny.examples(20)).history
    assert shared[0]["num_unique_tokens"] < 0.7 * alone[0]["num_unique_tokens"]
    assert shared[0]["num_tokens"] == alone[0]["num_tokens"]
    assert shared[0]["val/ratio"] == pytest.approx(alone[0]["val/ratio"], rel=1e-5)
    for ours, theirs in zip(shared, alone, strict=True):
        for name in ("objective/scores", "objective/kl", "loss/policy_avg", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


def test_a_group_too_large_for_a_micro_batch_is_refused_before_a_model_is_loaded(tmp_path):
    cfg = config(
        model_name_or_path=tiny.save_policy(tmp_path / "sft"),
        reward_model_path=tiny.save_reward_model(tmp_path / "reward"),
        micro_batch_tokens=25,
    )
    with pytest.raises(ValueError, match=r"micro_batch_tokens: must be at least 3\d, the tokens of row \d+"):
        train_ppo(cfg, tiny.examples(10))
