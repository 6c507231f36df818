"""Tests of transformations of the input that must not change the log-probs of `linear_logprob`, on both paths."""

import math

import pytest
import torch

from fastrlhf_kernels import _blocks as blocks
from fastrlhf_kernels import _head as head
from fastrlhf_kernels import linear_logprob
from tests.kernels.test_linear_logprob import inputs


@pytest.mark.usefixtures("small_blocks")
def test_the_order_of_the_vocabulary_does_not_matter(impl: str):
    hidden, weight, targets = inputs(9, 4, 40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    leaves = [hidden.clone().requires_grad_() for _ in range(2)]
    out = linear_logprob(leaves[0], weight, targets, entropy=True, impl=impl)
    permuted = linear_logprob(leaves[1], weight[order], order.argsort()[targets], entropy=True, impl=impl)
    for x in (out, permuted):
        (x.logprob.sum() + x.entropy.sum()).backward()
    for a, b in ((out.logprob, permuted.logprob), (out.entropy, permuted.entropy), (leaves[0].grad, leaves[1].grad)):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.usefixtures("small_blocks")
def test_a_temperature_is_the_inverse_of_a_scale(impl: str):
    hidden, weight, targets = inputs(9, 4, 40)
    cold = linear_logprob(hidden, weight, targets, temperature=0.5, entropy=True, impl=impl)
    by_row = linear_logprob(hidden, weight, targets, temperature=torch.full((9,), 0.5), entropy=True, impl=impl)
    scaled = linear_logprob(hidden, weight, targets, logit_scale=2.0, entropy=True, impl=impl)
    for other in (by_row, scaled):  # the factors are powers of two, so results are bit-identical
        assert torch.equal(cold.logprob, other.logprob)
        assert torch.equal(cold.entropy, other.entropy)


@pytest.mark.usefixtures("interpreted", "small_blocks")
def test_the_split_of_the_vocabulary_changes_only_the_last_digits(monkeypatch: pytest.MonkeyPatch):
    hidden, weight, targets = inputs(20, 4, 130)
    results = []
    for share in (16, 48, 256):
        monkeypatch.setattr(head, "SHARE", share)
        results.append(linear_logprob(hidden, weight, targets, entropy=True, stats=True, impl="triton"))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("interpreted", "small_blocks")
def test_a_row_has_the_same_bits_in_every_pack():
    hidden, weight, targets = inputs(40, 5, 70)
    whole = linear_logprob(hidden, weight, targets, entropy=True, impl="triton")
    part = linear_logprob(hidden[17:23], weight, targets[17:23], entropy=True, impl="triton")
    assert torch.equal(whole.logprob[17:23], part.logprob)
    assert torch.equal(whole.entropy[17:23], part.entropy)


@pytest.mark.usefixtures("small_blocks")
def test_a_constant_added_to_every_logit_changes_nothing(impl: str):
    hidden, weight, targets = inputs(9, 4, 16)
    hidden, weight = hidden.round(), weight.round()  # integers, so that shifted logits are exact
    outputs = []
    for shift in (0.0, 50.0, -4096.0):
        leaf = hidden.clone().requires_grad_()
        out = linear_logprob(leaf, weight, targets, bias=torch.full((16,), shift), entropy=True, impl=impl)
        (out.logprob.sum() + out.entropy.sum()).backward()
        outputs.append((out.logprob, out.entropy, leaf.grad))
    for shifted in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], shifted, strict=True))


@pytest.mark.usefixtures("small_blocks")
def test_equal_logits_are_the_uniform_distribution(impl: str):
    hidden, weight, targets = torch.ones(3, 2, requires_grad=True), torch.ones(16, 2), torch.arange(3)
    out = linear_logprob(hidden, weight, targets, entropy=True, stats=True, impl=impl)
    assert out.logprob.tolist() == pytest.approx([-math.log(16)] * 3, rel=1e-6)
    assert out.entropy.tolist() == pytest.approx([math.log(16)] * 3, rel=1e-6)
    assert out.mean_logit.tolist() == [2.0] * 3
    (gradient,) = torch.autograd.grad(out.entropy.sum(), hidden)
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf])
def test_a_logit_scale_that_is_not_positive_is_refused(scale: float):
    hidden, weight, targets = inputs(3, 2, 4)
    with pytest.raises(ValueError, match=r"logit_scale must be in \(0, inf\), got"):
        linear_logprob(hidden, weight, targets, logit_scale=scale)


@pytest.mark.usefixtures("interpreted", "small_blocks")
@pytest.mark.parametrize("temperature", [1e-20, 1e20])
def test_an_extreme_temperature_leaves_the_columns_after_the_last_one_out(temperature: float):
    hidden, weight, targets = inputs(9, 4, 37)
    out = linear_logprob(hidden, weight, targets, temperature=temperature, entropy=True, impl="triton")
    exact = linear_logprob(hidden, weight, targets, temperature=temperature, entropy=True, impl="torch")
    torch.testing.assert_close(out.entropy, exact.entropy, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.logprob, exact.logprob, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("skip_rows", [True, False])
def test_without_skip_rows_the_backward_does_not_count_rows(skip_rows, monkeypatch):
    """On a GPU counting makes the host wait; `can_select` behaves here like on a GPU."""
    counted, real = [], torch.Tensor.nonzero
    monkeypatch.setattr(blocks, "can_select", lambda device, wait: wait)
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda *a, **k: counted.append(1) or real(*a, **k))
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=draw).requires_grad_() for n in (20, 30))
    targets, upstream = torch.randint(0, 30, (20,), generator=draw), torch.randn(20, generator=draw)
    upstream[::3] = 0
    logprob = linear_logprob(hidden, weight, targets, skip_rows=skip_rows, impl="torch").logprob
    found = torch.autograd.grad(logprob, [hidden, weight], upstream)
    assert bool(counted) == skip_rows
    plain = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    for a, b in zip(found, torch.autograd.grad(plain, [hidden, weight], upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
