import math

import pytest
import torch
from torch import Tensor

from fastrlhf_kernels import Max, merge, policy_loss
from fastrlhf_kernels.policy_loss import policy_loss_reference
from tests.tolerance import assert_op_matches


def run(log_ratio: list[float], advantage: list[float], mask: list[bool] | None = None, **options):
    """Loss over 1 token, gradient per row and metrics, for a sampler whose log-probs are all 0."""
    logprob = torch.tensor(log_ratio, requires_grad=True)
    keep = torch.tensor(mask or [True] * len(log_ratio))
    out = policy_loss(logprob, torch.zeros(len(log_ratio)), torch.tensor(advantage), keep, num_tokens=1, **options)
    out.loss.backward()
    return out.loss.item(), logprob.grad.tolist(), {name: metric.value.item() for name, metric in out.metrics.items()}


def test_hand_computed_tokens():
    # ratios 2, 2, 1/2, 1/2 with clip 0.2: -min(2, 1.2), -min(-2, -1.2), -min(0.5, 0.8), -min(-0.5, -0.8)
    two = math.log(2)
    loss, gradient, metrics = run([two, two, -two, -two], [1.0, -1.0, 1.0, -1.0])
    assert loss == pytest.approx(-1.2 + 2 - 0.5 + 0.8, rel=1e-6)
    assert gradient == pytest.approx([0.0, 2.0, -0.5, 0.0], rel=1e-6)
    assert metrics["ratio"] == pytest.approx(5)
    assert metrics["ratio_max"] == pytest.approx(2)
    assert metrics["clip_fraction"] == 2
    assert metrics["tokens"] == 4
    # exp(x) - 1 - x at x = ln 2 and at -ln 2, twice each
    assert metrics["approx_kl"] == pytest.approx(2 * (1 - two) + 2 * (-0.5 + two), rel=1e-6)
    assert metrics["policy_loss"] == loss


def test_the_first_step_is_reinforce():
    loss, gradient, metrics = run([0.0, 0.0, 0.0], [0.5, -2.0, 0.0])
    assert loss == 1.5
    assert gradient == [-0.5, 2.0, 0.0]
    assert metrics["ratio"] == 3
    assert metrics["clip_fraction"] == 0
    assert metrics["approx_kl"] == 0


def test_a_ratio_exactly_at_the_clip_still_learns():
    # 0 and 0.5 are exact: exp(0) = 1 is the upper edge at clip_high 0 and the lower edge at clip_low 0
    _, gradient, metrics = run([0.0, 0.0], [1.0, -1.0], clip_low=0.0, clip_high=0.0)
    assert gradient == [-1.0, 1.0]
    assert metrics["clip_fraction"] == 0


def test_just_past_the_clip_nothing_is_learned_and_on_the_way_back_it_is():
    _, gradient, metrics = run([1e-6, -1e-6, 1e-6, -1e-6], [1.0, -1.0, -1.0, 1.0], clip_low=0.0, clip_high=0.0)
    assert gradient[:2] == [0.0, 0.0]
    assert gradient[2:] == pytest.approx([1.0, -1.0], rel=1e-5)
    assert metrics["clip_fraction"] == 2


def test_the_clip_may_be_asymmetric():
    # ratios 1.25, 0.75 within (0.7, 1.28) but outside (0.8, 1.2)
    logs = [math.log(1.25), math.log(0.75)]
    assert run(logs, [1.0, -1.0], clip_low=0.3, clip_high=0.28)[1] == pytest.approx([-1.25, 0.75], rel=1e-6)
    assert run(logs, [1.0, -1.0])[1] == [0.0, 0.0]


def test_the_dual_clip_bounds_the_loss_where_the_advantage_is_negative():
    loss, gradient, metrics = run([math.log(5), math.log(2), math.log(5)], [-1.0, -1.0, 1.0], dual_clip=3.0)
    assert loss == pytest.approx(3 + 2 - 1.2, rel=1e-6)
    assert gradient == pytest.approx([0.0, 2.0, 0.0], rel=1e-6)
    assert metrics["clip_fraction"] == 2
    # exactly at the bound: 2^1 is within, and learns
    assert run([math.log(2)], [-1.0], dual_clip=math.exp(math.log(2)))[1] == pytest.approx([2.0], rel=1e-6)


@pytest.mark.parametrize("log_ratio", [25.0, -25.0, 1e30, float("-inf")])
def test_a_log_ratio_beyond_20_is_clamped_without_gradient(log_ratio: float):
    for advantage in (1.0, -1.0):
        loss, gradient, _ = run([log_ratio], [advantage])
        assert math.isfinite(loss)
        assert gradient == [0.0]


def test_at_20_the_gradient_is_still_there():
    _, gradient, _ = run([20.0], [-1.0])
    assert gradient == pytest.approx([math.exp(20)], rel=1e-5)


def test_masked_rows_leak_neither_nan_nor_infinity():
    bad = torch.tensor([0.0, float("nan"), float("inf"), float("-inf")])
    leaves = [bad.clone().requires_grad_() for _ in range(2)]
    mask = torch.tensor([True, False, False, False])
    options = {
        "reference_logprob": bad - 1,
        "kl_coef": 1.0,
        "weight": bad + 1,
        "entropy": leaves[1],
        "entropy_coef": 1.0,
    }
    out = policy_loss(leaves[0], bad, bad + 1, mask, num_tokens=1, dual_clip=3.0, **options)
    out.loss.backward()
    # -r A + k2 - H = -1 + 0.5 - 0, with gradient -r A + delta = -1 + 1
    assert out.loss.item() == -0.5
    assert leaves[0].grad.tolist() == [0.0] * 4
    assert leaves[1].grad.tolist() == [-1.0, 0.0, 0.0, 0.0]
    assert all(metric.value.isfinite() for metric in out.metrics.values())


@pytest.mark.parametrize("rows", [0, 3])
def test_a_mask_without_a_row_gives_zero_loss_and_zero_gradient(rows: int):
    logprob = torch.ones(rows, requires_grad=True)
    zeros, mask = torch.zeros(rows), torch.zeros(rows, dtype=torch.bool)
    out = policy_loss(logprob, zeros, zeros, mask, num_tokens=mask.sum(), reference_logprob=zeros, kl_coef=0.1)
    out.loss.backward()
    assert out.loss.item() == 0
    assert logprob.grad.tolist() == [0.0] * rows
    assert all(metric.value.item() == 0 for metric in out.metrics.values())


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_the_pull_to_the_reference_is_importance_weighted(kind: str):
    # ratio 1.1, delta = ln 1.1 + 0.5
    ratio, delta = 1.1, math.log(1.1) + 0.5
    value = delta**2 / 2 if kind == "k2" else math.exp(-delta) - 1 + delta
    options = {"reference_logprob": torch.tensor([-0.5]), "kl_coef": 0.3, "kl_kind": kind}
    loss, gradient, metrics = run([math.log(1.1)], [2.0], **options)
    assert loss == pytest.approx(-2 * ratio + 0.3 * ratio * value, rel=1e-5)
    assert gradient == pytest.approx([-2 * ratio + 0.3 * ratio * delta], rel=1e-5)
    assert metrics["kl"] == pytest.approx(ratio * value, rel=1e-5)


def test_weights_multiply_all_of_a_token_and_entropy_is_rewarded():
    logprob, entropy = torch.zeros(2, requires_grad=True), torch.tensor([3.0, 5.0], requires_grad=True)
    weight, mask = torch.tensor([0.5, 2.0]), torch.ones(2, dtype=torch.bool)
    out = policy_loss(
        logprob, torch.zeros(2), torch.ones(2), mask, num_tokens=10, weight=weight, entropy=entropy, entropy_coef=0.1
    )
    out.loss.backward()
    # (0.5 * (-1 - 0.3) + 2 * (-1 - 0.5)) / 10
    assert out.loss.item() == pytest.approx(-0.365, rel=1e-6)
    assert logprob.grad.tolist() == pytest.approx([-0.05, -0.2], rel=1e-6)
    assert entropy.grad.tolist() == pytest.approx([-0.005, -0.02], rel=1e-6)
    assert out.metrics["entropy"].value.item() == 8
    assert out.metrics["policy_loss"].value.item() == -2.5


def rows(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    logprob, sampler = -torch.rand(2, count, generator=generator).to(dtype)
    advantage = torch.randn(count, generator=generator).to(dtype)
    return logprob, sampler, advantage, torch.rand(count, generator=generator) > 0.3


@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_equals_the_reference(dual_clip: float | None, dtype: torch.dtype):
    logprob, sampler, advantage, mask = rows(200, dtype)
    extra = {} if dual_clip is None else {"dual_clip": dual_clip}

    def call(op):
        def inner(logprob: Tensor):
            cast = (x.to(logprob.dtype) for x in (sampler, advantage))
            out = op(logprob, *cast, mask, num_tokens=9, clip_high=0.3, **extra)
            return [out if isinstance(out, Tensor) else out.loss]

        return inner

    assert_op_matches(call(policy_loss), call(policy_loss_reference), {"logprob": logprob})


def test_the_reference_passes_gradcheck():
    logprob, sampler, advantage, mask = (x.double() if x.is_floating_point() else x for x in rows(30))
    assert torch.autograd.gradcheck(
        lambda x: policy_loss_reference(x, sampler, advantage, mask, num_tokens=9, dual_clip=1.5),
        (logprob.requires_grad_(),),
    )


def test_micro_batches_with_an_outside_count_add_up_to_the_whole():
    logprob, sampler, advantage, mask = rows(40)
    logprob.requires_grad_()

    def loss(part: slice):
        tensors = (x[part] for x in (logprob, sampler, advantage, mask))
        return policy_loss(*tensors, num_tokens=mask.sum(), reference_logprob=sampler[part] - 1, kl_coef=0.1)

    whole, parts = loss(slice(0, 40)), [loss(slice(i, i + 8)) for i in range(0, 40, 8)]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    (expected,) = torch.autograd.grad(whole.loss, logprob)
    (gradient,) = torch.autograd.grad(sum(part.loss for part in parts), logprob)
    assert torch.equal(gradient, expected)
    for name, metric in merge(*(part.metrics for part in parts)).items():
        torch.testing.assert_close(metric.value, whole.metrics[name].value)


def test_metrics_are_detached_scalars_and_only_the_largest_ratio_is_a_maximum():
    logprob, sampler, advantage, mask = rows(10)
    entropy = torch.ones(10, requires_grad=True)
    out = policy_loss(
        logprob.requires_grad_(), sampler, advantage, mask, num_tokens=9, entropy=entropy, reference_logprob=sampler
    )
    for metric in out.metrics.values():
        assert metric.value.shape == ()
        assert metric.value.dtype == torch.float32
        assert not metric.value.requires_grad
    assert {name for name, metric in out.metrics.items() if isinstance(metric, Max)} == {"ratio_max"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": torch.ones(2)}, "mask must be torch.bool"),
        ({"sampler_logprob": torch.zeros(3)}, r"sampler_logprob must have shape \(2,\)"),
        ({"advantage": torch.zeros(2, 1)}, r"advantage must have shape \(2,\)"),
        ({"clip_low": -0.1}, "clip_low must be in"),
        ({"dual_clip": 1.0}, r"dual_clip must be in \(1"),
        ({"kl_coef": 0.1}, "kl_coef needs reference_logprob"),
        ({"kl_kind": "k1"}, "kl_kind must be one of k2, k3"),
        ({"entropy_coef": 0.1}, "entropy_coef needs entropy"),
        ({"weight": torch.ones(2, dtype=torch.int64)}, "weight must be torch.float32"),
        ({"num_tokens": torch.ones(1)}, "num_tokens must be a number or a 0-dim tensor"),
        ({"impl": "triton"}, "this version has no Triton kernel"),
    ],
)
def test_bad_arguments_are_named(changes: dict, message: str):
    zeros = torch.zeros(2)
    good = {"logprob": zeros, "sampler_logprob": zeros, "advantage": zeros, "mask": zeros == 0, "num_tokens": 2}
    with pytest.raises(ValueError, match=message):
        policy_loss(**{**good, **changes})
