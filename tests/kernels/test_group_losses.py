"""Compares GSPO and CISPO in `policy_loss` with values computed by hand and with their definitions."""

import math

import pytest
import torch

from fastrlhf_kernels import policy_loss
from fastrlhf_kernels.policy_loss import policy_loss_reference
from tests.kernels.test_policy_loss import rows, run


def test_cispo_by_hand(impl: str):
    # ratios 2 and 1/2, bounds 0 .. 1.5: the factor of A logprob is 1.5 and 1/2, and every token has a gradient
    two, cispo = math.log(2), {"loss_type": "cispo", "clip_low": 1, "clip_high": 0.5}
    loss, gradient, metrics = run(impl, [two, -two, two], [1.0, 1.0, -2.0], **cispo)
    assert loss == pytest.approx(-1.5 * two + 0.5 * two + 3 * two, rel=1e-6)
    assert gradient == pytest.approx([-1.5, -0.5, 3.0], rel=1e-6)
    assert metrics["clip_fraction"] == 2
    assert run(impl, [-two], [1.0], loss_type="cispo", clip_low=0.25)[1] == pytest.approx([-0.75], rel=1e-6)


def test_gspo_by_hand(impl: str):
    # sequence 0: mean log-ratio (ln 4 + 0) / 2 = ln 2, ratio 2; sequence 1: empty; sequence 2: -ln 2, ratio 1/2
    four, bounds = math.log(4), torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    rows, advantage = [four, 0.0, -four / 2], [-1.0, -1.0, 1.0]
    loss, gradient, metrics = run(impl, rows, advantage, loss_type="gspo", cu_seqlens=bounds)
    assert loss == pytest.approx(2 + 2 - 0.5, rel=1e-6)
    assert gradient == pytest.approx([2.0, 2.0, -0.5], rel=1e-6)
    assert metrics["ratio"] == pytest.approx(2 + 2 + 0.5)
    assert metrics["ratio_max"] == pytest.approx(2)
    # The sequence ratio 2 exceeds 1.2, so both tokens of the sequence are clipped, although the second has ratio 1.
    assert run(impl, rows, [1.0, 1.0, 1.0], loss_type="gspo", cu_seqlens=bounds)[1] == pytest.approx([0, 0, -0.5])


def test_gspo_ignores_tokens_outside_the_mask(impl: str):
    logprob = torch.tensor([math.log(2), 7.0, float("nan")], requires_grad=True)
    mask, bounds = torch.tensor([True, False, False]), torch.tensor([0, 3], dtype=torch.int32)
    given = (torch.zeros(3), -torch.ones(3), mask)
    policy_loss(logprob, *given, num_tokens=1, loss_type="gspo", cu_seqlens=bounds, impl=impl).loss.backward()
    assert logprob.grad.tolist() == pytest.approx([2.0, 0.0, 0.0])


def test_one_token_sequences_make_gspo_ppo(impl: str):
    logprob, sampler, advantage, mask = rows(64)
    both = []
    for given in ({}, {"loss_type": "gspo", "cu_seqlens": torch.arange(65, dtype=torch.int32)}):
        leaf = logprob.clone().requires_grad_()
        out = policy_loss(leaf, sampler, advantage, mask, num_tokens=9, impl=impl, dual_clip=3.0, **given)
        out.loss.backward()
        both.append((out.loss, leaf.grad))
    torch.testing.assert_close(both[0], both[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("loss_type", ["gspo", "cispo"])
def test_the_group_losses_equal_their_definitions_with_the_kl_of_single_tokens(loss_type: str, impl: str):
    logprob, sampler, _, mask = rows(40)
    cu_seqlens = torch.tensor([0, 11, 12, 30, 40], dtype=torch.int32)
    mask[[0, 11, 12, 30]] = True  # at least one row of every sequence
    advantage = torch.tensor([1.0, -0.5, 2.0, -2.0]).repeat_interleave(cu_seqlens.diff().long())
    weight = torch.tensor([0.5, 1.0, 0.25, 2.0]).repeat_interleave(cu_seqlens.diff().long())
    own = {"loss_type": loss_type} | ({"cu_seqlens": cu_seqlens} if loss_type == "gspo" else {})
    leaf = logprob.clone().requires_grad_()
    kl = {"reference_logprob": sampler - 0.3, "kl_coef": 0.2}
    ours = policy_loss(leaf, sampler, advantage, mask, num_tokens=7, weight=weight, impl=impl, **kl, **own).loss
    exact = logprob.double().requires_grad_()
    given = (sampler.double(), weight.double() * advantage.double(), mask)
    truth = policy_loss_reference(exact, *given, num_tokens=7, **own)
    ratio = (exact - sampler.double()).exp().detach()
    k2 = ratio * (exact - sampler.double() + 0.3) ** 2 / 2
    truth = truth + 0.2 * (weight.double() * k2)[mask].sum() / 7
    torch.testing.assert_close(ours.double(), truth, rtol=2e-6, atol=1e-7)
    ours.backward()
    truth.backward()
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)
