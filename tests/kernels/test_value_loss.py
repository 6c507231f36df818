import pytest
import torch
from torch import Tensor

from fastrlhf_kernels import merge, value_loss
from fastrlhf_kernels.value_loss import _value_loss, value_loss_reference
from tests.tolerance import assert_op_matches

ALL = torch.ones(4, dtype=torch.bool)


def hand_computed(impl: str, clip: float | None) -> tuple[Tensor, list[float], dict[str, float]]:
    """Returns (loss, gradient, metrics) for four rows with rollout value 0. The new values are: within the clip range;
    outside it, towards the return; outside it, away from the return; exactly at the clip.
    """
    value = torch.tensor([0.125, 1.0, -1.0, 0.25], requires_grad=True)
    returns = torch.tensor([1.0, 2.0, 0.5, 0.0])
    out = value_loss(value, torch.zeros(4), returns, ALL, num_tokens=4, clip=clip, impl=impl)
    out.loss.backward()
    return out.loss, value.grad.tolist(), {name: metric.value.item() for name, metric in out.metrics.items()}


def test_hand_computed_rows_with_clip(impl: str):
    # squares without clip: 0.765625, 1, 2.25, 0.0625; clipped to +-0.25: 0.765625, 3.0625, 0.5625, 0.0625
    loss, gradient, metrics = hand_computed(impl, 0.25)
    total = (0.765625 + 3.0625 + 2.25 + 0.0625) / 2
    assert loss.item() == total / 4
    assert gradient == [-0.875 / 4, 0.0, -1.5 / 4, 0.25 / 4]
    assert metrics == {"value_loss": total, "value_clip_fraction": 1.0, "rows": 4.0}


def test_hand_computed_rows_without_clip(impl: str):
    loss, gradient, metrics = hand_computed(impl, None)
    total = (0.765625 + 1 + 2.25 + 0.0625) / 2
    assert loss.item() == total / 4
    assert gradient == [-0.875 / 4, -1 / 4, -1.5 / 4, 0.25 / 4]
    assert metrics == {"value_loss": total, "value_clip_fraction": 0.0, "rows": 4.0}


def test_masked_rows_leak_neither_nan_nor_infinity(impl: str):
    value = torch.tensor([1.0, float("nan"), float("inf")], requires_grad=True)
    poison = torch.tensor([0.0, float("nan"), float("-inf")])
    out = value_loss(value, poison, poison, torch.tensor([True, False, False]), num_tokens=1, impl=impl)
    out.loss.backward()
    assert out.loss.item() == 0.5
    assert value.grad.tolist() == [1.0, 0.0, 0.0]
    assert out.metrics["rows"].value == 1
    assert all(metric.value.isfinite() for metric in out.metrics.values())


@pytest.mark.parametrize("clip", [0.2, None])
def test_a_nan_in_the_mask_shows_in_the_loss_and_in_its_gradient(clip: float | None, impl: str):
    value = torch.tensor([float("nan"), 1.0], requires_grad=True)
    out = value_loss(value, torch.zeros(2), torch.zeros(2), ALL[:2], num_tokens=1, clip=clip, impl=impl)
    out.loss.backward()
    assert out.loss.isnan()
    assert value.grad.isnan()[0]


@pytest.mark.parametrize("clip", [0.0, 0.25])
def test_beyond_the_clip_only_values_that_move_back_have_a_gradient(clip: float, impl: str):
    # Rollout value 0. Values: at the clip; beyond the clip, towards the return; beyond it, away from the return
    value = torch.tensor([clip, clip + 0.5, clip + 0.5, -clip - 0.5], requires_grad=True)
    returns = torch.tensor([2.0, 2.0, -2.0, 2.0])
    out = value_loss(value, torch.zeros(4), returns, ALL, num_tokens=1, clip=clip, impl=impl)
    out.loss.backward()
    assert value.grad.tolist() == [clip - 2, 0.0, clip + 2.5, -clip - 2.5]
    assert out.metrics["value_clip_fraction"].value == 1


def test_rounding_within_the_clip_never_counts_as_clipped(impl: str):
    # in float32, old + (value - old) may differ from value, so the clipped square may be larger by an ulp
    value = 0.01 * torch.rand(50, generator=torch.Generator().manual_seed(7))
    value.requires_grad_()
    out = value_loss(value, torch.full((50,), 0.15), torch.zeros(50), value < 1, num_tokens=1, clip=0.2, impl=impl)
    out.loss.backward()
    assert out.metrics["value_clip_fraction"].value == 0
    assert torch.equal(value.grad, value)


@pytest.mark.parametrize("rows", [0, 3])
def test_a_mask_without_a_row_gives_zero_loss_and_zero_gradient(rows: int, impl: str):
    value = torch.ones(rows, requires_grad=True)
    zeros, mask = torch.zeros(rows), torch.zeros(rows, dtype=torch.bool)
    out = value_loss(value, zeros, zeros, mask, num_tokens=0, impl=impl)
    out.loss.backward()
    assert out.loss.item() == 0
    assert value.grad.tolist() == [0.0] * rows
    assert all(metric.value.item() == 0 for metric in out.metrics.values())


def assert_matches_reference(impl: str, clip: float | None, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(3)
    value, old, returns = torch.randn(3, 60, generator=generator).to(dtype)
    mask = torch.rand(60, generator=generator) > 0.3

    def run(op, **options):
        def call(value: Tensor):
            out = op(value, old.to(value.dtype), returns.to(value.dtype), mask, num_tokens=7, clip=clip, **options)
            return [out if isinstance(out, Tensor) else out.loss]

        return call

    assert_op_matches(run(value_loss, impl=impl), run(value_loss_reference), {"value": value})


@pytest.mark.parametrize("clip", [0.2, None])
def test_it_equals_the_reference(clip: float | None, impl: str):
    assert_matches_reference(impl, clip, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_as_exact_in_half_precision(dtype: torch.dtype):
    assert_matches_reference("torch", 0.2, dtype)


def test_the_reference_passes_gradcheck():
    value, old, returns = torch.randn(3, 9, generator=torch.Generator().manual_seed(4)).double()
    mask = torch.arange(9) % 3 > 0
    assert torch.autograd.gradcheck(
        lambda v: value_loss_reference(v, old, returns, mask, num_tokens=2.0), (value.requires_grad_(),)
    )


def test_losses_of_micro_batches_add_up_to_the_whole_batch(impl: str):
    value, old, returns = torch.randn(3, 38, generator=torch.Generator().manual_seed(5))
    mask, count = torch.arange(38) % 3 > 0, torch.tensor(25.0)
    value.requires_grad_()

    def loss(s: slice):
        return value_loss(value[s], old[s], returns[s], mask[s], num_tokens=count, impl=impl)

    whole, parts = loss(slice(0, 38)), [loss(slice(0, 3)), loss(slice(3, 38))]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    (expected,) = torch.autograd.grad(whole.loss, value)
    (gradient,) = torch.autograd.grad(sum(part.loss for part in parts), value)
    assert torch.equal(gradient, expected)
    for name, metric in merge(*(part.metrics for part in parts)).items():
        torch.testing.assert_close(metric.value, whole.metrics[name].value)


def test_inputs_need_not_be_contiguous(impl: str):
    rows = torch.randn(20, 3, generator=torch.Generator().manual_seed(6))
    mask = torch.ones(20, 2, dtype=torch.bool)[:, 0]
    plain = value_loss(*rows.T.contiguous(), mask.contiguous(), num_tokens=2, impl=impl)
    assert torch.equal(value_loss(*rows.T, mask, num_tokens=2, impl=impl).loss, plain.loss)


def test_one_compiled_graph_serves_packs_of_every_length(impl: str):
    torch._dynamo.reset()
    compiled = torch.compile(value_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 8, 37):
            value, old, returns = torch.randn(3, rows, generator=torch.Generator().manual_seed(rows))
            mask, outs = torch.arange(rows) % 3 > 0, []
            leaves = [value.clone().requires_grad_() for _ in range(2)]
            for op, leaf in zip((value_loss, compiled), leaves, strict=True):
                outs.append(op(leaf, old, returns, mask, num_tokens=mask.sum(), impl=impl))
                outs[-1].loss.backward()
            assert torch.equal(leaves[0].grad, leaves[1].grad)
            assert outs[0].metrics == outs[1].metrics


@pytest.mark.parametrize("clip", [0.2, None])
def test_the_operator_is_registered_as_torch_asks(clip: float | None, impl: str):
    value = torch.ones(4, requires_grad=True)
    torch.library.opcheck(
        _value_loss, (value, torch.zeros(4), torch.zeros(4), ALL, torch.ones(4), clip, impl == "triton")
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": torch.ones(4)}, "mask must be torch.bool"),
        ({"returns": torch.zeros(3)}, r"returns must have shape \(4,\)"),
        ({"rollout_value": torch.zeros(4).double()}, "rollout_value must be"),
        ({"clip": -0.1}, "clip must be in"),
        ({"num_tokens": -1}, "num_tokens must not be negative"),
        ({"impl": "cuda"}, 'impl must be "auto", "triton" or "torch"'),
    ],
)
def test_bad_arguments_are_named(changes: dict, message: str):
    zeros = torch.zeros(4)
    good = {"value": zeros, "rollout_value": zeros, "returns": zeros, "mask": ALL, "num_tokens": 4}
    with pytest.raises(ValueError, match=message):
        value_loss(**{**good, **changes})


def test_a_weight_multiplies_loss_and_gradient_of_its_row(impl: str):
    value, returns = torch.tensor([1.0, 2.0, 9.0], requires_grad=True), torch.tensor([0.0, 0.5, 0.0])
    mask, weight = torch.tensor([True, True, False]), torch.tensor([0.5, 2.0, float("nan")])
    out = value_loss(value, value.detach(), returns, mask, num_tokens=4, weight=weight, impl=impl)
    out.loss.backward()
    assert out.loss.item() == (0.5 * 1 + 2 * 2.25) / 2 / 4
    assert value.grad.tolist() == [0.5 / 4, 3.0 / 4, 0.0]
    assert out.metrics["value_loss"].value.item() == (0.5 * 1 + 2 * 2.25) / 2
    assert out.metrics["rows"].value.item() == 2
    truth = value_loss_reference(value[:2], value[:2], returns[:2], mask[:2], num_tokens=4, weight=weight[:2])
    assert out.loss.item() == truth.item()
