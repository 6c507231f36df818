import math

import pytest
import torch

from fastrlhf_kernels import _blocks as blocks
from fastrlhf_kernels._blocks import Logits, Selection


@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (5, 7), (6, 8), (100, 100)])
def test_blocks_of_any_size_tile_the_logits(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(blocks, "CPU_BLOCK", shape)
    hidden, weight, bias = torch.randn(5, 3), torch.randn(7, 3), torch.randn(7)
    temperature = torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0])
    logits = Logits.of(hidden, weight, bias, temperature, 1.0, scale=0.5, softcap=2.0)
    rows = [torch.cat([logits.block(block, part) for part in logits.parts()], 1) for block in logits.row_blocks()]
    expected = 2 * torch.tanh(0.5 * (hidden @ weight.T + bias) / 2) / temperature[:, None]
    torch.testing.assert_close(torch.cat(rows), expected)


def test_the_slope_is_the_derivative_of_the_soft_cap():
    # Soft cap 3 and temperature 2: z = 3 tanh(x / 3) / 2. At x = 1.5, dz/dx = (1 - tanh(0.5)^2) / 2
    logits = Logits.of(torch.tensor([[1.5]]), torch.tensor([[1.0]]), None, None, 2.0, 1.0, softcap=3.0)
    (part,) = logits.parts()
    z = logits.block(slice(0, 1), part)
    assert z.item() == pytest.approx(1.5 * math.tanh(0.5), rel=1e-6)
    assert logits.slope(slice(0, 1), z).item() == pytest.approx(1 - math.tanh(0.5) ** 2, rel=1e-6)


def test_half_precision_is_multiplied_in_float32():
    hidden, weight = torch.randn(3, 300).bfloat16(), torch.randn(4, 300).bfloat16()
    logits = Logits.of(hidden, weight, None, None, 1.0, 1.0, None)
    (part,) = logits.parts()
    assert torch.equal(logits.block(slice(0, 3), part), hidden.float() @ weight.float().T)


def test_exp_through_exp2_is_as_exact_as_float32_allows():
    z = -torch.arange(0, 20, 0.01)
    exact = z.double().exp()
    assert ((blocks.exp_(z.clone()) - exact).abs() <= 1.2e-7 * torch.maximum(exact, exact * -z)).all()
    assert blocks.exp_(torch.tensor([0.0, float("-inf"), -1e4])).tolist() == [1.0, 0.0, 0.0]


def test_a_selection_takes_live_rows_and_puts_them_back_among_zeros():
    chosen = Selection.of(torch.tensor([True, False, True]), wait=False)
    assert chosen.take(torch.tensor([1, 2, 3])).tolist() == [1, 3]
    assert chosen.put_back(torch.tensor([5.0, 7.0])).tolist() == [5.0, 0.0, 7.0]
    assert chosen.put_back(torch.ones(2, 2)).tolist() == [[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]
    assert chosen.dead is None


def test_if_rows_cannot_be_counted_all_are_taken_and_dead_rows_are_masked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(blocks, "can_select", lambda device, wait: False)
    chosen = Selection.of(torch.tensor([True, False]), wait=True)
    assert chosen.take(torch.tensor([1, 2])).tolist() == [1, 2]
    assert chosen.put_back(torch.tensor([5.0, float("nan")])).tolist() == [5.0, 0.0]
    assert chosen.put_back(torch.full((2, 1), float("nan")))[1].tolist() == [0.0]
    assert chosen.dead.tolist() == [[False], [True]]
