"""Tests of updates that compute the gradients of the head in the forward pass, and of the inputs to the choice of this
form."""

from functools import partial

import pytest
import torch

from fastrlhf.algorithms import update as update_module
from fastrlhf.models.forward import state_policy_loss
from fastrlhf.runtime.step_metrics import StepMetrics
from fastrlhf.types import Experience
from fastrlhf_kernels import Sum
from tests import tiny
from tests.algorithms.test_update import config, gradients, moved, scored


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 0.5 * 0.75),  # half of the rows have an advantage, and a quarter was clipped before
        ({"loss_type": "cispo"}, 0.5),
        ({"entropy_coef": 0.1}, 0.75),
        ({"kl_placement": "loss", "kl_estimator": "k2"}, 0.75),
    ],
)
def test_the_share_of_rows_with_a_gradient_is_known_before_the_pass(settings, expected):
    ones, finished = torch.ones(8), StepMetrics()
    experience = Experience(
        cu_rows=torch.tensor([0, 8]),
        mask=ones.bool(),
        trained=torch.tensor([True] * 6 + [False] * 2),
        sampler_logprob=ones,
        reference_logprob=ones,
        advantage=torch.tensor([0.0, 0, 1, 1, -1, 1, 1, 1]),
        kl_coef=0.0,
    )
    finished.add({"clip_fraction": Sum(torch.tensor(3.0)), "tokens": Sum(torch.tensor(12.0))})
    assert update_module._live_share(config(**settings), experience, finished) == expected


def test_a_clipped_batch_gives_the_same_gradients_in_either_form(monkeypatch):
    cfg, policy, reference = config(), tiny.policy(), tiny.policy(seed=1)
    experience, found = moved(scored(cfg, policy, reference)), []
    for form in ("one_shot", "two_steps"):
        patch = partial(state_policy_loss, form=form)
        monkeypatch.setattr(update_module, "state_policy_loss", patch)
        found.append(gradients(cfg, policy, experience))
    for one, two in zip(*found, strict=True):
        assert (one - two).norm() <= 1e-6 * two.norm()
