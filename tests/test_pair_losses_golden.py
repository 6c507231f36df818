"""Compares CPO, SimPO and ORPO with values of TRL 1.16 recorded by tests/golden/record_pair_losses.py."""

import json

import pytest
import torch

from fastrlhf_kernels import pair_loss
from tests.golden import record_pair_losses as recorded

GOLDEN = json.loads(recorded.FILE.read_text(encoding="utf-8"))
OURS = {
    "cpo": {},
    "cpo_smoothed": {"label_smoothing": 0.2},
    "simpo": {"beta": 2.0, "margin": torch.full((3,), 0.5), "length_norm": "mean"},
    "orpo": {"kind": "orpo", "beta": 0.25, "length_norm": "mean"},
}


@pytest.mark.parametrize("case", recorded.CASES)
def test_loss_and_gradient_equal_those_of_trl(case: str):
    logprob = recorded.logprobs().float().requires_grad_()
    cu_seqlens = torch.tensor([0, *recorded.LENGTHS]).cumsum(0)
    mask = torch.ones(len(logprob), dtype=torch.bool)
    loss = pair_loss(logprob, None, cu_seqlens, mask, num_pairs=3, **OURS[case]).loss
    [gradient] = torch.autograd.grad(loss, logprob)
    assert loss.item() == pytest.approx(GOLDEN[case]["loss"], rel=1e-6)
    assert gradient.tolist() == pytest.approx(GOLDEN[case]["gradient"], rel=2e-6)
