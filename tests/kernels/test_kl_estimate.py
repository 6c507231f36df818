import math

import pytest
import torch
from torch import Tensor

from fastrlhf_kernels import kl_estimate
from fastrlhf_kernels.kl_estimate import _kl_estimate, kl_estimate_reference
from tests.tolerance import assert_op_matches

ZERO = torch.zeros(1)


def value_and_slope(impl: str, delta: float, kind: str, sampler: Tensor | None = None) -> tuple[float, float]:
    logprob = torch.tensor([delta], requires_grad=True)
    value = kl_estimate(logprob, ZERO, kind=kind, sampler_logprob=sampler, impl=impl)
    value.backward()
    return value.item(), logprob.grad.item()


def test_hand_computed_values(impl: str):
    # delta = -1 + 1.5 = 0.5
    logprob, reference = torch.tensor([-1.0]), torch.tensor([-1.5])
    assert kl_estimate(logprob, reference, kind="k1", impl=impl).item() == 0.5
    assert kl_estimate(logprob, reference, kind="k2", impl=impl).item() == 0.125
    assert kl_estimate(logprob, reference, kind="k3", impl=impl).item() == pytest.approx(math.exp(-0.5) - 0.5, rel=1e-6)


def test_the_sampler_weighs_the_value_and_the_gradient(impl: str):
    # w = exp(0.5 - 0.3)
    weight, sampler = math.exp(0.2), torch.tensor([0.3])
    for kind, value in (("k2", 0.125), ("k3", math.exp(-0.5) - 0.5)):
        expected = (weight * value, weight * 0.5)
        assert value_and_slope(impl, 0.5, kind, sampler) == pytest.approx(expected, rel=1e-6)
    value = kl_estimate(torch.tensor([0.5]), ZERO, kind="k1", sampler_logprob=sampler, impl=impl)
    assert value.item() == pytest.approx(weight * 0.5, rel=1e-6)


def test_each_row_has_its_own_upstream_gradient(impl: str):
    logprob = torch.tensor([0.5, 1.0, -2.0], requires_grad=True)
    kl_estimate(logprob, torch.zeros(3), kind="k2", impl=impl).backward(torch.tensor([1.0, -3.0, 0.0]))
    assert logprob.grad.tolist() == [0.5, -3.0, 0.0]


def test_k1_has_no_gradient(impl: str):
    value = kl_estimate(torch.zeros(2, requires_grad=True), torch.ones(2), kind="k1", impl=impl)
    assert not value.requires_grad


def test_the_expected_gradient_is_that_of_kl_policy_to_reference(impl: str):
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
            estimate = kl_estimate(policy.float(), reference.float(), kind=kind, sampler_logprob=old, impl=impl)
            (gradient,) = torch.autograd.grad((chance * estimate).sum(), logits, retain_graph=True)
            torch.testing.assert_close(gradient, exact, rtol=1e-5, atol=1e-6)


def test_in_expectation_k1_and_k3_are_the_kl(impl: str):
    policy, reference = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.6, 0.3, 0.1])
    exact = (policy * (policy / reference).log()).sum()
    for kind in ("k1", "k3"):
        estimate = kl_estimate(policy.log(), reference.log(), kind=kind, impl=impl)
        torch.testing.assert_close((policy * estimate).sum(), exact)


DELTAS = [0.0, 1e-7, -1e-5, 1e-3, -0.05, 0.0999, -0.1, 0.11, 0.5, 0.999, -0.999, 1.0, -1.0, 1.001, -3.0, 19.0, -19.0]


@pytest.mark.parametrize("delta", DELTAS)
def test_k3_is_exact_for_small_differences(delta: float, impl: str):
    exact = math.expm1(-delta) + delta if abs(delta) > 1e-3 else delta**2 / 2 - delta**3 / 6 + delta**4 / 24
    value, slope = value_and_slope(impl, delta, "k3")
    assert value == pytest.approx(exact, rel=5e-7)  # at d = 1 exp(-d) - 1 + d loses two bits
    assert slope == pytest.approx(delta, rel=1e-6)


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_far_from_the_reference_value_and_gradient_stay_finite_and_non_zero(kind: str, impl: str):
    for delta in (-1e4, -100.0, 100.0):
        value, slope = value_and_slope(impl, delta, kind)
        assert math.isfinite(value)
        assert slope == math.copysign(20, delta)
    value, slope = value_and_slope(impl, 100.0, kind, sampler=torch.tensor([-100.0]))
    assert math.isfinite(value)
    assert slope == pytest.approx(20 * math.exp(20), rel=1e-5)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_a_nan_survives_the_clamp(kind: str, impl: str):
    nan = torch.tensor([float("nan"), 1.0])
    for arguments in ((nan, torch.zeros(2), None), (torch.zeros(2), nan, None), (torch.zeros(2), torch.ones(2), nan)):
        logprob = arguments[0].clone().requires_grad_()
        value = kl_estimate(logprob, arguments[1], kind=kind, sampler_logprob=arguments[2], impl=impl)
        assert value.isnan().tolist() == [True, False]
        if kind != "k1":
            value.sum().backward()
            assert logprob.grad.isnan().tolist() == [True, False]


def assert_matches_reference(impl: str, kind: str, with_sampler: bool, dtype: torch.dtype):
    logprob, reference, sampler = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)).to(dtype)

    def run(op, **options):
        def call(logprob: Tensor):
            old = sampler.to(logprob.dtype) if with_sampler else None
            return [op(logprob, reference.to(logprob.dtype), kind=kind, sampler_logprob=old, **options)]

        return call

    upstream = torch.randn(50, generator=torch.Generator().manual_seed(2))
    assert_op_matches(
        run(kl_estimate, impl=impl), run(kl_estimate_reference), {"logprob": logprob}, [upstream.to(dtype)]
    )


@pytest.mark.parametrize("kind", ["k2", "k3"])
@pytest.mark.parametrize("with_sampler", [True, False])
def test_it_equals_the_reference(kind: str, with_sampler: bool, impl: str):
    assert_matches_reference(impl, kind, with_sampler, torch.float32)


@pytest.mark.parametrize("kind", ["k2", "k3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_as_exact_in_half_precision(kind: str, dtype: torch.dtype):
    assert_matches_reference("torch", kind, True, dtype)


def test_the_gradients_of_the_reference_are_those_of_finite_differences():
    logprob, other, sampler = torch.randn(3, 5, generator=torch.Generator().manual_seed(2)).double()
    logprob.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: kl_estimate_reference(x, other, kind="k3", sampler_logprob=sampler), (logprob,)
    )


def test_reference_and_sampler_have_no_gradient(impl: str):
    reference, sampler = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    value = kl_estimate(torch.ones(2, requires_grad=True), reference, kind="k3", sampler_logprob=sampler, impl=impl)
    value.sum().backward()
    assert reference.grad is None
    assert sampler.grad is None
    assert not kl_estimate(torch.ones(2), reference, kind="k3", sampler_logprob=sampler, impl=impl).requires_grad


def test_an_empty_pack_works(impl: str):
    logprob = torch.zeros(0, requires_grad=True)
    kl_estimate(logprob, torch.zeros(0), kind="k3", impl=impl).sum().backward()
    assert logprob.grad.shape == (0,)


def test_inputs_need_not_be_contiguous(impl: str):
    rows = torch.randn(20, 3, generator=torch.Generator().manual_seed(3))
    plain = kl_estimate(*rows.T.contiguous()[:2], kind="k3", sampler_logprob=rows[:, 2].contiguous(), impl=impl)
    assert torch.equal(kl_estimate(rows[:, 0], rows[:, 1], kind="k3", sampler_logprob=rows[:, 2], impl=impl), plain)


def test_one_compiled_graph_serves_packs_of_every_length(impl: str):
    torch._dynamo.reset()
    compiled = torch.compile(kl_estimate, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 8, 37):
            logprob, reference, sampler = torch.randn(3, rows, generator=torch.Generator().manual_seed(rows))
            leaves = [logprob.clone().requires_grad_() for _ in range(2)]
            for op, leaf in zip((kl_estimate, compiled), leaves, strict=True):
                op(leaf, reference, kind="k3", sampler_logprob=sampler, impl=impl).sum().backward()
            assert torch.equal(leaves[0].grad, leaves[1].grad)


@pytest.mark.parametrize("sampler", [None, torch.zeros(5)])
def test_the_operator_is_registered_as_torch_asks(sampler: Tensor | None, impl: str):
    logprob = torch.ones(5, requires_grad=True)
    torch.library.opcheck(_kl_estimate, (logprob, torch.zeros(5), sampler, "k3", impl == "triton"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "k4"}, "kind must be one of k1, k2, k3"),
        ({"reference_logprob": torch.zeros(2)}, r"reference_logprob must have shape \(1,\)"),
        ({"sampler_logprob": torch.zeros(2)}, r"sampler_logprob must have shape \(1,\)"),
        ({"impl": "cuda"}, 'impl must be "auto", "triton" or "torch"'),
    ],
)
def test_bad_arguments_are_named(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        kl_estimate(**{"logprob": ZERO, "reference_logprob": ZERO, "kind": "k2", **changes})
