import math

import pytest
import torch
from torch import Tensor

from fastrlhf_kernels import kl_estimate
from fastrlhf_kernels.kl_estimate import kl_estimate_reference
from tests.tolerance import assert_op_matches

ZERO = torch.zeros(1)


def value_and_slope(delta: float, kind: str, sampler: Tensor | None = None) -> tuple[float, float]:
    logprob = torch.tensor([delta], requires_grad=True)
    value = kl_estimate(logprob, ZERO, kind=kind, sampler_logprob=sampler)
    value.backward()
    return value.item(), logprob.grad.item()


def test_hand_computed_values():
    # delta = -1 + 1.5 = 0.5
    logprob, reference = torch.tensor([-1.0]), torch.tensor([-1.5])
    assert kl_estimate(logprob, reference, kind="k1").item() == 0.5
    assert kl_estimate(logprob, reference, kind="k2").item() == 0.125
    assert kl_estimate(logprob, reference, kind="k3").item() == pytest.approx(math.exp(-0.5) - 0.5, rel=1e-6)


def test_the_sampler_weighs_the_value_and_the_gradient():
    # w = exp(0.5 - 0.3)
    weight = math.exp(0.2)
    for kind, value in (("k2", 0.125), ("k3", math.exp(-0.5) - 0.5)):
        expected = (weight * value, weight * 0.5)
        assert value_and_slope(0.5, kind, torch.tensor([0.3])) == pytest.approx(expected, rel=1e-6)
    assert kl_estimate(
        torch.tensor([0.5]), ZERO, kind="k1", sampler_logprob=torch.tensor([0.3])
    ).item() == pytest.approx(weight * 0.5, rel=1e-6)


def test_k1_has_no_gradient_because_as_a_loss_it_would_be_noise():
    assert not kl_estimate(torch.zeros(2, requires_grad=True), torch.ones(2), kind="k1").requires_grad


def test_in_expectation_the_gradient_is_that_of_the_kl_and_not_of_its_mirror():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=generator).double().requires_grad_()
    reference = torch.randn(6, generator=generator).double().log_softmax(0)
    sampler = torch.randn(6, generator=generator).double().log_softmax(0)
    policy = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)
    for drawn in (None, sampler):
        chance = (policy if drawn is None else drawn).detach().exp()
        old = None if drawn is None else drawn.float()
        for kind in ("k2", "k3"):
            estimate = kl_estimate(policy.float(), reference.float(), kind=kind, sampler_logprob=old)
            (gradient,) = torch.autograd.grad((chance * estimate).sum(), logits, retain_graph=True)
            torch.testing.assert_close(gradient, exact, rtol=1e-5, atol=1e-6)


def test_in_expectation_k1_and_k3_are_the_kl():
    policy, reference = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.6, 0.3, 0.1])
    exact = (policy * (policy / reference).log()).sum()
    for kind in ("k1", "k3"):
        estimate = kl_estimate(policy.log(), reference.log(), kind=kind)
        torch.testing.assert_close((policy * estimate).sum(), exact)


@pytest.mark.parametrize("delta", [0.0, 1e-7, -1e-5, 1e-3, -0.05, 0.0999, -0.1, 0.11, 1.0, -3.0])
def test_k3_keeps_its_digits_however_small_the_difference(delta: float):
    exact = math.expm1(-delta) + delta if abs(delta) > 1e-3 else delta**2 / 2 - delta**3 / 6 + delta**4 / 24
    value, slope = value_and_slope(delta, "k3")
    assert value == pytest.approx(exact, rel=3e-6)
    assert slope == pytest.approx(delta, rel=1e-6)


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_far_from_the_reference_nothing_overflows_and_the_pull_back_stays(kind: str):
    for delta in (-1e4, -100.0, 100.0):
        value, slope = value_and_slope(delta, kind)
        assert math.isfinite(value)
        assert slope == math.copysign(20, delta)
    value, slope = value_and_slope(100.0, kind, sampler=torch.tensor([-100.0]))
    assert math.isfinite(value)
    assert slope == pytest.approx(20 * math.exp(20), rel=1e-5)


@pytest.mark.parametrize("kind", ["k2", "k3"])
@pytest.mark.parametrize("with_sampler", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_equals_the_reference(kind: str, with_sampler: bool, dtype: torch.dtype):
    logprob, reference, sampler = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)).to(dtype)

    def run(op):
        def call(logprob: Tensor):
            old = sampler.to(logprob.dtype) if with_sampler else None
            return [op(logprob, reference.to(logprob.dtype), kind=kind, sampler_logprob=old)]

        return call

    assert_op_matches(run(kl_estimate), run(kl_estimate_reference), {"logprob": logprob})


def test_the_gradients_of_the_reference_are_those_of_finite_differences():
    logprob, other, sampler = torch.randn(3, 5, generator=torch.Generator().manual_seed(2)).double()
    logprob.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: kl_estimate_reference(x, other, kind="k3", sampler_logprob=sampler), (logprob,)
    )


def test_no_gradient_flows_to_the_other_policies():
    reference, sampler = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    value = kl_estimate(torch.ones(2, requires_grad=True), reference, kind="k3", sampler_logprob=sampler)
    value.sum().backward()
    assert reference.grad is None
    assert sampler.grad is None


def test_no_rows_are_no_problem():
    logprob = torch.zeros(0, requires_grad=True)
    kl_estimate(logprob, torch.zeros(0), kind="k3").sum().backward()
    assert logprob.grad.shape == (0,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "k4"}, "kind must be one of k1, k2, k3"),
        ({"reference_logprob": torch.zeros(2)}, r"reference_logprob must have shape \(1,\)"),
        ({"sampler_logprob": torch.zeros(2)}, r"sampler_logprob must have shape \(1,\)"),
        ({"impl": "triton"}, "this version has no Triton kernel"),
    ],
)
def test_bad_arguments_are_named(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        kl_estimate(**{"logprob": ZERO, "reference_logprob": ZERO, "kind": "k2", **changes})
