import pytest
import torch
from torch import Tensor

from fastrlhf_kernels import _rows as rows_
from fastrlhf_kernels._rows import contiguous, differentiate_by_slopes, masked, num_programs


@torch.library.custom_op("fastrlhf_test::product", mutates_args=())
def product(x: Tensor, scale: float, y: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A custom op that returns (scale * x . y, number of rows, gradient for x, gradient for y)."""
    other = torch.ones_like(x) if y is None else y
    slope = x.new_empty(0) if y is None else scale * x.float()
    return scale * (x * other).float().sum(), (x * other).float(), scale * other.float(), slope


differentiate_by_slopes("fastrlhf_test::product", leaves=(0, 2))


def test_an_upstream_gradient_is_multiplied_with_the_slopes_in_the_dtype_of_their_leaves():
    x, y = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0, 5.0]).bfloat16().requires_grad_()
    loss, rows, slope, _ = product(x, 2.0, y)
    assert not rows.requires_grad
    assert not slope.requires_grad
    (0.5 * loss).backward()
    assert x.grad.tolist() == [3.0, 5.0]
    assert y.grad.tolist() == [1.0, 2.0]
    assert y.grad.dtype == torch.bfloat16


def test_absent_inputs_and_inputs_without_gradient_get_none():
    x, y = torch.ones(2, requires_grad=True), torch.ones(2)
    for other in (y, None):
        (gradient,) = torch.autograd.grad(product(x, 2.0, other)[0], x)
        assert gradient.tolist() == [2.0, 2.0]
    assert y.grad is None


def test_a_second_derivative_which_slopes_do_not_have_is_refused():
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="product has no second derivative"):
        torch.autograd.grad(product(x, 2.0, None)[0], x, create_graph=True)


def test_masking_replaces_what_must_not_be_multiplied_by_zero():
    rows, mask = torch.tensor([1.0, float("nan"), float("inf")]).half(), torch.tensor([True, False, False])
    assert masked(rows, mask).tolist() == [1.0, 0.0, 0.0]
    assert masked(rows, mask).dtype == torch.float32


def test_contiguous_keeps_none_and_makes_the_others_contiguous():
    column, none = contiguous(torch.arange(6).view(2, 3)[:, 1], None)
    assert none is None
    assert column.is_contiguous()
    assert column.tolist() == [1, 4]


@pytest.mark.parametrize(("rows", "programs"), [(0, 1), (1, 1), (16, 1), (17, 2)])
def test_there_is_a_program_per_started_block_and_at_least_one(
    rows: int, programs: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(rows_, "BLOCK", 16)
    assert num_programs(rows) == programs
