"""Tests the torch terms of `policy_loss` in float64; the Triton kernel is tested in test_policy_loss.py."""

import pytest
import torch

from fastrlhf_kernels._policy_kernels import torch_policy_terms


@pytest.mark.parametrize("loss_type", ["ppo", "cispo"])
def test_the_slope_is_the_derivative_of_the_loss(loss_type: str):
    generator = torch.Generator().manual_seed(0)
    logprob, sampler, reference = (torch.randn(200, generator=generator, dtype=torch.float64) for _ in range(3))
    advantage = torch.randn(200, generator=generator, dtype=torch.float64)
    entropy, weight = torch.rand(200, generator=generator), torch.rand(200, generator=generator)

    def terms(shift: float):
        given = (logprob + shift, sampler, advantage, weight.double(), reference, entropy.double(), None)
        return torch_policy_terms(*given, 0.8, 1.2, 3.0, 0.0, 0.2, "k3", loss_type)

    step = 1e-6
    slope = (terms(step).loss - terms(-step).loss) / (2 * step)
    at = terms(0.0)
    if loss_type == "cispo":  # CISPO's factor is a constant for the gradient
        factor = (logprob - sampler).exp().clamp(0.8, 1.2)
        torch.testing.assert_close(at.d_logprob, -weight.double() * factor * advantage, rtol=1e-12, atol=0)
    else:
        torch.testing.assert_close(at.d_logprob, slope, rtol=1e-6, atol=1e-8)
    assert torch.equal(at.d_entropy, -0.2 * weight.double())
