"""Records TRL's reference-free pair losses (CPO, SimPO, ORPO) for tests/test_pair_losses_golden.py.

Runs TRL 1.16.0 on one set of log-probs and writes losses and gradients to pair_losses.json.

TRL is only needed to run this script:

    PYTHONPATH=.:kernels python tests/golden/record_pair_losses.py
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

FILE = Path(__file__).with_name("pair_losses.json")

LENGTHS = (3, 5, 1, 4, 7, 2)  # lengths of chosen and rejected responses of three pairs

CASES: dict[str, dict[str, Any]] = {  # case -> attributes of TRL's trainer
    "cpo": {"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.0},
    "cpo_smoothed": {"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.2},
    "simpo": {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "label_smoothing": 0.0},
    "orpo": {"beta": 0.25},
}
MEAN = ("simpo", "orpo")
"""Losses that use the mean log-prob of a response; the others use the sum."""


def logprobs() -> Tensor:
    """Returns log-probs [T] float64 between -2.9 and -0.1, computed from their index."""
    return -1.5 + 1.4 * torch.sin(torch.arange(sum(LENGTHS), dtype=torch.float64) * 1.7 + 0.3)


def record(case: str) -> dict[str, Any]:
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    logprob = logprobs().requires_grad_()
    parts = logprob.split(LENGTHS)
    sums = torch.stack([part.mean() if case in MEAN else part.sum() for part in parts])
    trainer = SimpleNamespace(alpha=0.0, accelerator=SimpleNamespace(device="cpu"), **CASES[case])
    if case == "orpo":  # TRL subtracts the result of odds_ratio_loss
        loss = -ORPOTrainer.odds_ratio_loss(trainer, sums[0::2], sums[1::2])[0]
    else:
        loss = CPOTrainer.cpo_loss(trainer, sums[0::2], sums[1::2])[0]
    [gradient] = torch.autograd.grad(loss.mean(), logprob)
    return {"loss": loss.mean().item(), "gradient": gradient.tolist()}


if __name__ == "__main__":
    FILE.write_text(json.dumps({case: record(case) for case in CASES}, indent=1) + "\n", encoding="utf-8")
