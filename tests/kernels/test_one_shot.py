"""Tests of the pass over chunks of rows; test_linear_nll.py and test_linear_policy_loss.py test the ops that use it."""

import pytest
import torch

from fastrlhf_kernels import _form as form
from fastrlhf_kernels._blocks import Selection
from fastrlhf_kernels._one_shot import Head, one_shot
from fastrlhf_kernels.linear_logprob import linear_logprob_reference


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, False), (False,) * 3])
def test_any_derivatives_of_logprob_and_entropy_give_the_gradients_that_are_needed(monkeypatch, needs):
    monkeypatch.setattr(form, "MULTIPLE", 8)
    monkeypatch.setattr(form, "CPU_BYTES", 0)
    draw = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=draw) for shape in ((21, 6), (30, 6), (30,)))
    targets, of_logprob, of_entropy = (
        torch.randint(0, 30, (21,), generator=draw),
        torch.randn(21, generator=draw),
        torch.randn(21, generator=draw),
    )
    seen = []

    def derivatives(block, logprob, entropy):
        seen.append(block)
        return of_logprob[block], of_entropy[block]

    with torch.no_grad():
        chosen = Selection.of(targets != -100, wait=False)
        logprob, entropy, found = one_shot(
            Head(hidden, weight, bias, None, 1.0, 1.0, None), targets, chosen, derivatives,
            ignore=-100, entropy=True, needs=needs, triton=False,
        )  # fmt: skip
    exact = [leaf.double().requires_grad_() for leaf in (hidden, weight, bias)]
    truth = linear_logprob_reference(exact[0], exact[1], targets, bias=exact[2])
    assert entropy is not None
    assert truth.entropy is not None
    torch.testing.assert_close(logprob.double(), truth.logprob.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy.double(), truth.entropy.detach(), rtol=1e-6, atol=1e-6)
    (of_logprob @ truth.logprob.float() + of_entropy @ truth.entropy.float()).backward()
    for need, grad, leaf in zip(needs, found, exact, strict=True):
        if need:
            assert leaf.grad is not None
            torch.testing.assert_close(grad.double(), leaf.grad, rtol=2e-6, atol=2e-6)
        else:
            assert grad.shape == (0,)
    assert seen == ([slice(0, 8), slice(8, 16), slice(16, 21)] if any(needs) else [])
