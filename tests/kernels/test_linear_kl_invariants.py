"""Tests of properties that `linear_kl` must have on both paths and for all distributions."""

import pytest
import torch

from fastrlhf_kernels import linear_kl, linear_logprob
from tests.kernels.test_linear_kl import everything, inputs, targets_of


@pytest.mark.usefixtures("small_blocks")
def test_kl_of_a_policy_to_itself_and_its_gradient_are_exactly_0(impl: str):
    hidden, weight, *_ = inputs(40, 6, 6, 65)
    leaves, options = everything(40, 65)
    hidden.requires_grad_(), weight.requires_grad_(), leaves["bias"].requires_grad_()
    options["reference_bias"] = leaves["bias"]
    out = linear_kl(hidden, weight, hidden, weight, **leaves, **options, impl=impl)
    assert out.kl.tolist() == [0.0] * 40
    assert torch.equal(out.logprob, out.reference_logprob)
    out.kl.sum().backward()
    for leaf in (hidden, weight, leaves["bias"]):
        assert leaf.grad.eq(0).all()


@pytest.mark.usefixtures("small_blocks")
def test_kl_is_never_negative_and_has_a_gradient_when_rounded_to_0(impl: str):
    hidden, weight, *_ = inputs(40, 8, 8, 65)
    moved = hidden + 1e-5 * torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    kl = linear_kl(hidden.requires_grad_(), weight, moved, weight, impl=impl).kl
    assert kl.min() == 0  # the exact value is about 1e-10
    kl.sum().backward()
    assert hidden.grad[kl == 0].ne(0).any(1).all()


@pytest.mark.usefixtures("small_blocks")
def test_the_order_of_the_vocabulary_does_not_matter(impl: str):
    hidden, weight, reference_hidden, reference_weight = inputs(9, 5, 6, 65)
    order, targets = torch.randperm(65, generator=torch.Generator().manual_seed(0)), targets_of(9, 65)
    weight.requires_grad_()
    shuffled = weight.detach()[order].requires_grad_()
    plain = linear_kl(hidden, weight, reference_hidden, reference_weight, targets=targets, impl=impl)
    other = linear_kl(
        hidden, shuffled, reference_hidden, reference_weight[order], targets=order.argsort()[targets], impl=impl
    )
    for out in (plain, other):
        (out.kl.sum() + out.logprob.sum()).backward()
    # the tolerance is for sums of 65 float32 terms in a different order
    torch.testing.assert_close(other.kl, plain.kl, rtol=2e-6, atol=0)
    torch.testing.assert_close(other.reference_logprob, plain.reference_logprob, rtol=2e-6, atol=0)
    torch.testing.assert_close(shuffled.grad, weight.grad[order], rtol=1e-5, atol=2e-6)


@pytest.mark.usefixtures("small_blocks")
def test_a_constant_added_to_every_logit_of_either_side_changes_nothing(impl: str):
    tensors = [x.round() for x in inputs(9, 4, 5, 40)]  # integers, so that shifted logits are exact
    outputs = []
    for shift, reference_shift in ((0.0, 0.0), (50.0, 0.0), (0.0, -4096.0), (-4096.0, 50.0)):
        leaf = tensors[0].clone().requires_grad_()
        options = {"bias": torch.full((40,), shift), "reference_bias": torch.full((40,), reference_shift)}
        out = linear_kl(leaf, *tensors[1:], **options, targets=targets_of(9, 40), entropy=True, impl=impl)
        (out.kl.sum() + out.logprob.sum() + out.entropy.sum()).backward()
        outputs.append((*out, leaf.grad))
    for shifted in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], shifted, strict=True))


@pytest.mark.usefixtures("small_blocks")
def test_a_token_that_both_models_forbid_does_not_count(impl: str):
    hidden, weight, reference_hidden, reference_weight = inputs(6, 4, 3, 70)
    # Some whole blocks of 7, whole tiles of 16 and the whole share 32..63 are forbidden
    keep = torch.tensor([0, 3, 15, 19, 69])
    index = targets_of(6, 5)
    bias = torch.full((70,), float("-inf"))
    bias[keep] = 0.5
    leaves = [hidden.clone().requires_grad_() for _ in range(2)]
    options = {"targets": keep[index], "bias": bias, "reference_bias": bias, "entropy": True, "impl": impl}
    out = linear_kl(leaves[0], weight, reference_hidden, reference_weight, **options)
    small = linear_kl(
        leaves[1], weight[keep], reference_hidden, reference_weight[keep], targets=index, entropy=True, impl=impl
    )
    for x in (out, small):
        (x.kl.sum() + x.logprob.sum() + x.entropy.sum()).backward()
    for a, b in zip((*out, leaves[0].grad), (*small, leaves[1].grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.usefixtures("small_blocks")
def test_a_token_that_only_one_model_forbids(impl: str):
    tensors, bias = inputs(6, 4, 3, 40), torch.zeros(40)
    bias[11] = float("-inf")
    forbidden_by_policy = linear_kl(*tensors, bias=bias, impl=impl).kl
    lowered = linear_kl(*tensors, bias=bias.clamp(min=-1e3), impl=impl).kl  # exp(-1e3) is 0 too
    torch.testing.assert_close(forbidden_by_policy, lowered, rtol=1e-6, atol=0)
    assert linear_kl(*tensors, reference_bias=bias, impl=impl).kl.min() > 1e20


@pytest.mark.usefixtures("small_blocks")
def test_logprob_and_entropy_equal_those_of_linear_logprob(impl: str):
    tensors, targets = inputs(9, 5, 6, 65), targets_of(9, 65)
    out = linear_kl(*tensors, targets=targets, entropy=True, impl=impl)
    expected = linear_logprob(*tensors[:2], targets, entropy=True, impl=impl)
    # the tolerance is for sums of 3 vocabulary shares in a different order
    torch.testing.assert_close(out.logprob, expected.logprob, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.entropy, expected.entropy, rtol=1e-6, atol=0)
    assert (linear_kl(*tensors, impl=impl).logprob, linear_kl(*tensors, impl=impl).entropy) == (None, None)
