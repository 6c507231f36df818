"""Tests of SimPO, APO and ORPO against values by hand. APO and ORPO depend on each log-ratio, not only on the
difference."""

import math

import pytest
import torch

from fastrlhf_kernels import pair_loss
from fastrlhf_kernels._pair_kernels import BOUND
from tests.kernels.test_pair_loss import run, sigmoid


def test_hand_computed_apo_and_orpo(impl: str):
    # u_chosen = 3, u_rejected = 1, D = 2
    loss, gradient, _ = run(impl, [1.0, 2.0, 1.0], kind="apo_zero", beta=0.5)
    slopes = [0.5 * sigmoid(x) * sigmoid(-x) for x in (1.5, 0.5, 1.0)]
    assert loss == pytest.approx(1 - sigmoid(1.5) + sigmoid(0.5), rel=1e-6)
    assert gradient == pytest.approx([-slopes[0], -slopes[0], slopes[1]], rel=1e-6)
    loss, gradient, _ = run(impl, [1.0, 2.0, 1.0], kind="apo_down", beta=0.5)
    assert loss == pytest.approx(sigmoid(1.5) + 1 - sigmoid(1.0), rel=1e-6)
    assert gradient == pytest.approx([slopes[0] - slopes[2]] * 2 + [slopes[2]], rel=1e-6)
    # mean probabilities 1/2 and 1/4: odds 1 and 1/3, so that z = ln 3 and sigmoid(-z) = 1/4
    loss, gradient, _ = run(impl, [math.log(0.5)] * 2 + [math.log(0.25)], kind="orpo", beta=0.5, length_norm="mean")
    assert loss == pytest.approx(0.5 * math.log(4 / 3), rel=1e-6)
    assert gradient == pytest.approx([-0.125, -0.125, 1 / 6], rel=1e-6)


def test_simpo_is_dpo_of_mean_logprobs_with_a_margin_and_without_a_reference(impl: str):
    cu_seqlens, mask = torch.tensor([0, 2, 3]), torch.ones(3, dtype=torch.bool)
    logprob, options = torch.tensor([-1.0, -2.0, -3.0]), {"num_pairs": 1, "length_norm": "mean", "impl": impl}
    out = pair_loss(logprob, None, cu_seqlens, mask, beta=2.0, margin=torch.tensor([0.5]), **options)
    assert out.loss.item() == pytest.approx(math.log1p(math.exp(-(2 * 1.5 - 0.5))), rel=1e-6)


@pytest.mark.parametrize("size", [1e-7, 1e-3, 0.1, 0.49, 0.51, 2.0, 50.0])
def test_odds_are_exact_near_certainty_and_far_from_it(size: float, impl: str):
    loss, gradient, _ = run(impl, [-size, -size, -1.0], kind="orpo", beta=1.0, length_norm="mean")
    chosen, rejected = min(-size, BOUND), -1.0
    z = chosen - math.log(-math.expm1(chosen)) - rejected + math.log(-math.expm1(rejected))
    slope = sigmoid(-z)
    assert loss == pytest.approx(math.log1p(math.exp(-z)) if z > 0 else math.log1p(math.exp(z)) - z, rel=3e-6)
    assert gradient[0] == pytest.approx(slope / math.expm1(chosen) / 2, rel=3e-6)
    assert gradient[2] == pytest.approx(-slope / math.expm1(rejected), rel=3e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "apo_zero", "margin": torch.ones(1)}, "margin is not for kind='apo_zero'"),
        ({"kind": "apo_down", "label_smoothing": 0.1}, "label_smoothing is not for kind='apo_down'"),
        ({"kind": "apo_zero", "label_prob": torch.ones(1)}, 'label_prob is for kind="dpo" and "ipo"'),
        ({"kind": "orpo"}, 'reference_logprob must be None, length_norm "mean"'),
    ],
)
def test_options_that_a_kind_lacks_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        pair_loss(
            torch.zeros(3), None, torch.tensor([0, 2, 3]), torch.ones(3, dtype=torch.bool), num_pairs=1, **options
        )
