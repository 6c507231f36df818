import pytest
import torch
from torch import Tensor

from fastrlhf_kernels import merge, value_loss
from fastrlhf_kernels.value_loss import value_loss_reference
from tests.tolerance import assert_op_matches

ALL = torch.ones(4, dtype=torch.bool)


def hand_computed(clip: float | None) -> tuple[Tensor, list[float], dict[str, float]]:
    """Four rows, all with rollout value 0: inside, clipped towards, clipped past, and exactly at the clip."""
    value = torch.tensor([0.125, 1.0, -1.0, 0.25], requires_grad=True)
    returns = torch.tensor([1.0, 2.0, 0.5, 0.0])
    out = value_loss(value, torch.zeros(4), returns, ALL, num_tokens=4, clip=clip)
    out.loss.backward()
    return out.loss, value.grad.tolist(), {name: metric.value.item() for name, metric in out.metrics.items()}


def test_hand_computed_rows_with_clip():
    # squares, free: 0.765625, 1, 2.25, 0.0625; clipped to +-0.25: 0.765625, 3.0625, 0.5625, 0.0625
    loss, gradient, metrics = hand_computed(0.25)
    total = (0.765625 + 3.0625 + 2.25 + 0.0625) / 2
    assert loss.item() == total / 4
    assert gradient == [-0.875 / 4, 0.0, -1.5 / 4, 0.25 / 4]
    assert metrics == {"value_loss": total, "value_clip_fraction": 1.0, "rows": 4.0}


def test_hand_computed_rows_without_clip():
    loss, gradient, metrics = hand_computed(None)
    total = (0.765625 + 1 + 2.25 + 0.0625) / 2
    assert loss.item() == total / 4
    assert gradient == [-0.875 / 4, -1 / 4, -1.5 / 4, 0.25 / 4]
    assert metrics == {"value_loss": total, "value_clip_fraction": 0.0, "rows": 4.0}


def test_masked_rows_leak_neither_nan_nor_infinity():
    value = torch.tensor([1.0, float("nan"), float("inf")], requires_grad=True)
    poison = torch.tensor([0.0, float("nan"), float("-inf")])
    out = value_loss(value, poison, poison, torch.tensor([True, False, False]), num_tokens=1, clip=0.2)
    out.loss.backward()
    assert out.loss.item() == 0.5
    assert value.grad.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("rows", [0, 3])
def test_a_mask_without_a_row_gives_zero_loss_and_zero_gradient(rows: int):
    value = torch.ones(rows, requires_grad=True)
    out = value_loss(value, torch.zeros(rows), torch.zeros(rows), torch.zeros(rows, dtype=torch.bool), num_tokens=0)
    out.loss.backward()
    assert out.loss.item() == 0
    assert value.grad.tolist() == [0.0] * rows


@pytest.mark.parametrize("clip", [0.2, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_equals_the_reference(clip: float | None, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(3)
    value, old, returns = torch.randn(3, 60, generator=generator).to(dtype)
    mask = torch.rand(60, generator=generator) > 0.3

    def run(op):
        def call(value: Tensor):
            out = op(value, old.to(value.dtype), returns.to(value.dtype), mask, num_tokens=7, clip=clip)
            return [out if isinstance(out, Tensor) else out.loss]

        return call

    assert_op_matches(run(value_loss), run(value_loss_reference), {"value": value})


def test_the_reference_passes_gradcheck():
    value, old, returns = torch.randn(3, 9, generator=torch.Generator().manual_seed(4)).double()
    mask = torch.arange(9) % 3 > 0
    assert torch.autograd.gradcheck(
        lambda v: value_loss_reference(v, old, returns, mask, num_tokens=2.0), (value.requires_grad_(),)
    )


def test_micro_batches_with_an_outside_count_add_up_to_the_whole():
    value, old, returns = torch.randn(3, 8, generator=torch.Generator().manual_seed(5))
    mask, count = torch.arange(8) % 3 > 0, torch.tensor(5.0)
    value.requires_grad_()
    whole = value_loss(value, old, returns, mask, num_tokens=count)
    parts = [value_loss(value[s], old[s], returns[s], mask[s], num_tokens=count) for s in (slice(0, 3), slice(3, 8))]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    (expected,) = torch.autograd.grad(whole.loss, value)
    (gradient,) = torch.autograd.grad(sum(part.loss for part in parts), value)
    assert torch.equal(gradient, expected)
    for name, metric in merge(*(part.metrics for part in parts)).items():
        torch.testing.assert_close(metric.value, whole.metrics[name].value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": torch.ones(4)}, "mask must be torch.bool"),
        ({"returns": torch.zeros(3)}, r"returns must have shape \(4,\)"),
        ({"rollout_value": torch.zeros(4).double()}, "rollout_value must be"),
        ({"clip": -0.1}, "clip must be in"),
        ({"num_tokens": -1}, "num_tokens must not be negative"),
        ({"impl": "triton"}, "this version has no Triton kernel"),
    ],
)
def test_bad_arguments_are_named(changes: dict, message: str):
    zeros = torch.zeros(4)
    good = {"value": zeros, "rollout_value": zeros, "returns": zeros, "mask": ALL, "num_tokens": 4}
    with pytest.raises(ValueError, match=message):
        value_loss(**{**good, **changes})
