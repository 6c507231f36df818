"""Tests of token rewards that are trained on outcomes (PRIME): the loss against values computed by hand, the converged
rewards, and whole runs."""

from dataclasses import replace

import pytest
import torch

from fastrlhf.algorithms.advantages import token_leave_one_out
from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.algorithms.prime import outcome_loss
from fastrlhf.config import GRPOConfig, PPOConfig, RTOConfig
from tests import tiny
from tests.algorithms.test_ppo import assert_same_history, config, paths  # noqa: F401 (a fixture)

# ruff: noqa: F811 (the fixture)

PRIME = {"dpo_refine": "outcome", "advantage_estimator": "prime", "success_threshold": 0.5}


def prime_config(kind=GRPOConfig, **settings) -> PPOConfig:
    return kind(**PRIME | {"num_generations": 4, "per_device_train_batch_size": 8} | settings)


def last_token(rollout) -> float:
    return float(rollout.completion[-1] % 3 == 0)


def learned(paths, kind=GRPOConfig, functions=None, examples=None, **settings):
    cfg = config(
        {"model_name_or_path": paths["model_name_or_path"]},
        kind,
        **{"num_generations": 4, "per_device_train_batch_size": 16, "missing_eos_penalty": None} | settings,
    )
    return train_ppo(cfg, examples or tiny.examples(12), reward_functions=functions or {"right": last_token})


def test_loss_and_gradient_by_hand():
    ratio = torch.tensor([1.0, -3.0, 0.5, 0.5, 0.0], requires_grad=True)
    cu_rows, label = torch.tensor([0, 2, 4, 5], dtype=torch.int32), torch.tensor([1.0, 1.0, 0.0])
    loss, metrics = outcome_loss(ratio, cu_rows, label, beta=0.5, num_responses=6)
    loss.backward()
    z = torch.tensor([-1.0, 0.5, 0.0])
    by_hand = -(z[0].sigmoid().log() + z[1].sigmoid().log() + (-z[2]).sigmoid().log())
    assert loss.item() == pytest.approx(by_hand.item() / 6)
    slope = 0.5 * (z.sigmoid() - label) / 6
    torch.testing.assert_close(ratio.grad, slope[torch.tensor([0, 0, 1, 1, 2])])
    found = {name: metric.value.item() for name, metric in metrics.items()}
    assert found == {"loss": pytest.approx(by_hand.item()), "responses": 3, "accuracy": 2, "success": 2}


def test_token_rewards_become_the_changes_of_the_log_odds_of_success():
    """Enumerates all responses of two tokens from a vocabulary of two.

    The success probability of a response is sigmoid(beta log(phi / ref)) for a known distribution phi. Training on
    the expected outcomes must therefore recover phi and the reward of each token.
    """
    beta, ref = 0.7, torch.full((2, 2), 0.25)
    phi = torch.tensor([[0.4, 0.3], [0.1, 0.2]])
    chance = (beta * (phi / ref).log()).sigmoid()
    first, then = torch.zeros(2, requires_grad=True), torch.zeros(2, 2, requires_grad=True)
    optimizer = torch.optim.LBFGS([first, then], max_iter=300, tolerance_grad=1e-10, line_search_fn="strong_wolfe")
    cu_rows = torch.arange(0, 17, 2, dtype=torch.int32)  # every response occurs twice: as a success and as a failure
    label = torch.tensor([1.0, 0.0]).repeat(4)

    def token_rewards():
        one, two = first.log_softmax(0) - torch.tensor(0.5).log(), then.log_softmax(1) - torch.tensor(0.5).log()
        return torch.stack([one[:, None].expand(2, 2), two], -1)

    def closure():
        optimizer.zero_grad()
        ratio = token_rewards().view(4, 1, 2).expand(4, 2, 2)
        weight = torch.stack([chance.flatten(), 1 - chance.flatten()], 1).flatten()
        losses = [
            outcome_loss(ratio.reshape(8, 2)[i], torch.tensor([0, 2]), label[i : i + 1], beta=beta, num_responses=8)[0]
            for i in range(8)
        ]
        loss = (torch.stack(losses) * weight).sum()
        loss.backward()
        return loss

    assert len(cu_rows) == len(label) + 1
    optimizer.step(closure)
    reward = beta * token_rewards().detach()
    torch.testing.assert_close(reward.sum(-1), chance.logit(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(reward[:, 0, 0], beta * (phi.sum(1) / 0.5).log(), rtol=1e-3, atol=1e-3)


def test_the_baseline_of_token_rewards_is_the_mean_token_of_the_others():
    reward = torch.tensor([1.0, 3.0, 4.0, -1.0, 0.0, 1.0])  # mean per token of the four responses: 2, 4, -1, 0.5
    cu_rows = torch.tensor([0, 2, 3, 4, 6], dtype=torch.int32)
    assert token_leave_one_out(reward, cu_rows, 2).tolist() == [-3, -1, 2, -1.5, 1, 2]


def test_the_advantage_is_rewards_to_go_and_the_outcome_each_against_the_others(paths, monkeypatch):
    from fastrlhf.algorithms import ppo

    kept, score = [], ppo.score_episodes

    def spied(*arguments, **keywords):
        kept.append(score(*arguments, **keywords))
        return kept[-1]

    monkeypatch.setattr(ppo, "score_episodes", spied)
    learned(paths, **PRIME, max_steps=1, dpo_refine_learning_rate=0.05, dpo_reward_scale=2.0)
    experience, _ = kept[0]
    token, outcome, bounds = experience.rewards["dpo"], experience.rewards["right"], experience.cu_rows.tolist()
    assert token.abs().max() > 0.01
    for group in range(0, 16, 4):
        rows = [range(bounds[i], bounds[i + 1]) for i in range(group, group + 4)]
        for i, own in enumerate(rows):
            others = [other for j, other in enumerate(rows) if j != i]
            process = sum(token[list(other)].mean().item() for other in others) / 3
            verified = outcome[list(own)].sum() - sum(outcome[list(other)].sum() for other in others) / 3
            for t in own:
                expected = sum(token[s].item() - process for s in range(t, own[-1] + 1)) + verified.item()
                assert experience.advantage[t].item() == pytest.approx(expected, abs=1e-5)


def test_with_scale_0_the_policy_is_that_of_the_plain_run_bit_for_bit(paths):
    kind, size = PPOConfig, {"num_generations": 1, "per_device_train_batch_size": 12}
    plain = learned(paths, kind, **size)
    refined = learned(paths, kind, **size, dpo_refine="outcome", success_threshold=0.5, dpo_reward_scale=0.0)
    assert all(row["prime/grad_norm"] > 0 for row in refined.history)
    for row in refined.history:
        for name in [name for name in row if name.startswith("prime/")]:
            del row[name]
    assert_same_history(plain, refined)
    for name, weight in plain.model.state_dict().items():
        assert torch.equal(weight, refined.model.state_dict()[name]), name


def test_with_learning_rate_0_it_is_rto_bit_for_bit(paths, tmp_path):
    dpo = {"dpo_model_path": tiny.save_policy(tmp_path / "dpo", seed=3), "dpo_reward_scale": 0.3}
    rto = learned(paths, RTOConfig, **dpo)
    refine = {"dpo_refine": "outcome", "dpo_refine_learning_rate": 0.0, "success_threshold": 0.5}
    refined = learned(paths, RTOConfig, **dpo, **refine)
    for name, weight in rto.model.state_dict().items():
        assert torch.equal(weight, refined.model.state_dict()[name]), name
    assert [row["reward/dpo"] for row in rto.history] == [row["reward/dpo"] for row in refined.history]
    assert refined.history[0]["prime/loss"] > 0


def test_the_first_rewards_are_those_after_the_first_step_and_the_model_learns_the_outcome(paths):
    settings = {"max_steps": 15, "dpo_refine_learning_rate": 1e-2, "dpo_refine_beta": 0.5, "learning_rate": 1e-9}
    settings |= {"response_length": 2, "lr_scheduler_type": "constant", "per_device_train_batch_size": 32}
    functions = {"odd": lambda rollout: float(rollout.completion[0] % 2)}
    result = learned(paths, functions=functions, **PRIME, **settings)
    history = result.history
    # At first the model equals the reference, so all token rewards are 0 and the loss is log 2
    assert history[0]["prime/loss"] == pytest.approx(0.693147, abs=1e-4)
    assert history[0]["rto/abs_sum"] > 0
    assert sum(row["prime/loss"] for row in history[-5:]) / 5 < 0.6
    assert sum(row["prime/accuracy"] for row in history[-5:]) / 5 > 0.7
    assert result.dpo_model is not None
    moved = dict(result.dpo_model.named_parameters())
    assert any(not torch.equal(weight, moved[name]) for name, weight in result.model.named_parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {"reset_prob": 1.0, "reset_source": "rollout"},
        {"reset_prob": 0.5},
        {"dpo_reward_norm": "batch", "dpo_reward_scale": 5.0},
        {"advantage_estimator": "rloo", "num_mini_batches": 2},
        {"update": "pair", "advantage_estimator": "rloo"},
        {"use_peft": True, "lora_r": 2},
    ],
)
def test_prime_works_with_resets_norms_pairs_and_adapters(paths, settings):
    for row in learned(paths, **PRIME | settings, max_steps=2, dpo_refine_learning_rate=1e-2).history:
        assert all(value == value for value in row.values())
        assert row["prime/grad_norm"] > 0


@pytest.mark.parametrize("value", [1.0, 0.0])
def test_a_batch_without_a_failure_or_a_success_still_trains(paths, value):
    row, _ = learned(paths, functions={"always": lambda _: value}, **PRIME).history
    assert row["prime/success"] == value
    assert row["prime/loss"] == pytest.approx(0.693147, abs=1e-4)


def test_the_batch_norm_bounds_the_sums_to_the_end(paths):
    row, _ = learned(
        paths, **PRIME, dpo_reward_norm="batch", dpo_reward_scale=5.0, dpo_refine_learning_rate=0.1
    ).history
    assert abs(row["reward/dpo"]) <= 5


def test_adapters_share_the_weights_and_all_models_are_saved(paths, tmp_path):
    from fastrlhf.models.loading import load_policy

    folder = tmp_path / "run"
    settings = {"use_peft": True, "lora_r": 2, "output_dir": str(folder), "dpo_refine_learning_rate": 1e-2}
    result = learned(paths, **PRIME, **settings)
    assert {"adapter", "dpo_model"} < {path.name for path in folder.iterdir()}
    assert (folder / "dpo_model" / "adapter").is_dir()
    saved = load_policy(str(folder / "dpo_model"))
    for name, weight in result.dpo_model.state_dict().items():
        assert torch.equal(weight, saved.state_dict()[name]), name
    start = load_policy(paths["model_name_or_path"]).state_dict()
    assert any(not torch.equal(weight, saved.state_dict()[name]) for name, weight in start.items())


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"dpo_refine": "none"}, "success_threshold: must be None|advantage_estimator: must be another estimator"),
        ({"dpo_refine": "none", "success_threshold": None}, "advantage_estimator: must be another estimator without "),
        ({"whiten_rewards": True}, "whiten_rewards: must be false with advantage_estimator prime"),
        ({"reward_shaping": "none"}, "reward_shaping: must be another value with dpo_refine outcome"),
        ({"success_threshold": None}, "success_threshold: must be a number with dpo_refine outcome: the mean of a gro"),
        ({"dpo_refine_beta": 0.0}, "dpo_refine_beta: must be above 0"),
        ({"dpo_refine_learning_rate": -1.0}, "dpo_refine_learning_rate: must be at least 0"),
        ({"update": "pair"}, "advantage_estimator: must be rloo, grpo or opo with update pair"),
        ({"advantage_estimator": "gae", "compat": "reference"}, "compat: must be fixed with dpo_refine outcome"),
        (
            {"advantage_estimator": "gae", "num_generations": 1, "success_threshold": None},
            "success_threshold: must be a",
        ),
    ],
)
def test_incompatible_settings_are_refused(settings, told):
    with pytest.raises(ValueError, match=f"^{told}"):
        replace(prime_config(PPOConfig), **settings)


def test_unread_keys_and_runs_without_outcomes_are_refused(paths):
    with pytest.raises(ValueError, match=r"^dpo_refine_beta: must be 0.05 without dpo_refine, since it would have no "):
        GRPOConfig(dpo_refine_beta=0.1)
    settings = {"missing_eos_penalty": None, "per_device_train_batch_size": 16}
    cfg = config({"model_name_or_path": paths["model_name_or_path"]}, GRPOConfig, **PRIME, **settings)
    with pytest.raises(ValueError, match=r"^reward_model_path: nothing rewards a response; give a reward model, or "):
        train_ppo(cfg, tiny.examples(12))
