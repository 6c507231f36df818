"""Compares policy and value losses on packs with recorded values of TRL 1.16, verl 0.9.1 and RTO's released code.
Losses, gradients and advantages must agree with those that tests/golden/record_group_losses.py recorded to 1e-6.
"""

import json
import re

import pytest
import torch

from fastrlhf.algorithms.advantages import group_normalised, leave_one_out, length_weighted
from fastrlhf.algorithms.update import _episode_shares, _with_mean_1
from fastrlhf.config import PPOConfig
from fastrlhf_kernels import gae, kl_estimate, policy_loss, value_loss
from tests.golden import record_group_losses as recorded

GOLDEN = json.loads(recorded.FILE.read_text(encoding="utf-8"))
CASES = [
    (library, case)
    for library in ("trl", "verl")
    for case in GOLDEN[library]
    if not re.match("advantage|value|overlong|gae|kl", case)
]


@pytest.mark.parametrize(("library", "case"), CASES)
def test_loss_and_gradient_equal_the_recorded_ones(library: str, case: str):
    given = recorded.tensors()
    inside = given["mask"].bool()
    cu_seqlens = torch.tensor([0, *torch.tensor(recorded.LENGTHS).cumsum(0)], dtype=torch.int32)
    logprob = given["logprob"][inside].float().requires_grad_()
    advantage = given["advantage"][:, None].expand_as(inside)[inside].float()
    trained, num_tokens = torch.ones_like(advantage, dtype=torch.bool), torch.tensor(len(advantage))
    name = {"token_mean": "dapo", "dual_clip": "dapo"}.get(case, case)
    average = PPOConfig(loss_type=name).aggregation
    weight = None
    if average == "sequence":
        rows = torch.arange(len(advantage))
        weight = _with_mean_1(_episode_shares(cu_seqlens, trained), rows, rows, num_tokens)
    elif average == "constant":
        weight = (num_tokens / (len(recorded.LENGTHS) * recorded.MAX_LENGTH)).expand(len(advantage))
    high = recorded.CISPO_HIGH if case == "cispo" else recorded.CLIP_HIGH
    # verl has a lower bound for CISPO's factor; TRL and the paper have none.
    low = 1.0 if (library, case) == ("trl", "cispo") else recorded.CLIP_LOW
    loss = policy_loss(
        logprob,
        given["sampler"][inside].float(),
        advantage,
        trained,
        num_tokens=num_tokens,
        loss_type=name if name in ("gspo", "cispo") else "ppo",
        cu_seqlens=cu_seqlens if name == "gspo" else None,
        clip_low=low,
        clip_high=high,
        dual_clip=1.3 if case == "dual_clip" else None,
        weight=weight,
    ).loss
    loss.backward()
    expected = GOLDEN[library][case]
    assert any(expected["gradient"])
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-6, abs=1e-7)
    assert logprob.grad.tolist() == pytest.approx(expected["gradient"], rel=2e-6, abs=1e-7)


def weight_of(average: str) -> torch.Tensor | None:
    """Returns the weight [R] of each row in the trainer's losses, for fully trained episodes of LENGTHS tokens."""
    cu_seqlens = torch.tensor([0, *torch.tensor(recorded.LENGTHS).cumsum(0)], dtype=torch.int32)
    rows = torch.arange(sum(recorded.LENGTHS))
    shares = _episode_shares(cu_seqlens, torch.ones_like(rows, dtype=torch.bool))
    return _with_mean_1(shares, rows, rows, len(rows)) if average == "sequence" else None


@pytest.mark.parametrize(
    ("library", "case", "average"),
    [("rto", "value", "sequence"), ("verl", "value_sequence", "sequence"), ("verl", "value_token", "token")],
)
def test_the_value_loss_equals_the_recorded_one(library: str, case: str, average: str):
    given = recorded.tensors()
    inside = given["mask"].bool()
    value, rollout_value, returns = (given[name][inside].float() for name in ("value", "rollout_value", "returns"))
    value.requires_grad_()
    ones = torch.ones_like(value, dtype=torch.bool)
    loss = value_loss(
        value, rollout_value, returns, ones, num_tokens=len(value), clip=recorded.CLIP_LOW, weight=weight_of(average)
    ).loss
    loss.backward()
    expected = GOLDEN[library][case]
    assert 0.0 in expected["gradient"]  # at least one value is clipped
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-6)
    assert value.grad.tolist() == pytest.approx(expected["gradient"], rel=2e-6, abs=1e-7)


def test_the_policy_loss_averaged_by_sequence_equals_that_of_rto():
    given = recorded.tensors()
    inside = given["mask"].bool()
    logprob = given["logprob"][inside].float().requires_grad_()
    advantage = given["advantage"][:, None].expand_as(inside)[inside].float()
    ones = torch.ones_like(advantage, dtype=torch.bool)
    sampler = given["sampler"][inside].float()
    loss = policy_loss(logprob, sampler, advantage, ones, num_tokens=len(advantage), weight=weight_of("sequence")).loss
    loss.backward()
    expected = GOLDEN["rto"]["policy"]
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-6)
    assert logprob.grad.tolist() == pytest.approx(expected["gradient"], rel=2e-6, abs=1e-7)


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_advantages_of_grpo_equal_those_of_trl(scale: str):
    ours = group_normalised(torch.tensor(recorded.REWARDS), recorded.GROUP, scale)
    assert ours.tolist() == pytest.approx(GOLDEN["trl"][f"advantage_{scale}"], rel=1e-6)


def test_advantages_of_rloo_equal_those_of_verl():
    ours = leave_one_out(torch.tensor(recorded.REWARDS), recorded.GROUP)
    assert ours.tolist() == pytest.approx(GOLDEN["verl"]["advantage_rloo"], rel=1e-6, abs=1e-7)


def test_gae_equals_that_of_verl():
    given = recorded.tensors()
    reward, value = (given[name][given["mask"].bool()].float() for name in ("returns", "value"))
    cu_seqlens = torch.tensor([0, *torch.tensor(recorded.LENGTHS).cumsum(0)], dtype=torch.int32)
    ours = gae(reward, value, cu_seqlens, gamma=recorded.GAMMA, lam=recorded.LAM)
    for found, name in zip(ours, ("advantage", "returns"), strict=True):
        assert found.tolist() == pytest.approx(GOLDEN["verl"]["gae"][name], rel=2e-6, abs=1e-6)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_estimates_of_the_kl_equal_those_of_verl(kind: str):
    given = recorded.tensors()
    logprob, reference = (given[name][given["mask"].bool()].float() for name in ("logprob", "reference"))
    ours = kl_estimate(logprob, reference, kind=kind)
    assert ours.tolist() == pytest.approx(GOLDEN["verl"]["kl"][kind], rel=1e-5, abs=1e-7)


def test_advantages_of_opo_equal_those_of_verl():
    lengths = torch.tensor(recorded.RETURN_LENGTHS)
    ours = length_weighted(torch.tensor(recorded.REWARDS), lengths, recorded.GROUP)
    assert ours.tolist() == pytest.approx(GOLDEN["verl"]["advantage_opo"], rel=1e-6)
