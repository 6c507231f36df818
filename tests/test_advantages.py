import torch

from fastrlhf.advantages import explained_variance, whiten

VALUES = torch.tensor([1.0, 3.0, 100.0, 5.0])
MASK = torch.tensor([True, True, False, True])


def test_whitening_uses_the_masked_rows_only():
    # mean 3, population variance ((-2)^2 + 0 + 2^2) / 3 = 8/3
    std = (8 / 3) ** 0.5
    torch.testing.assert_close(whiten(VALUES, MASK), torch.tensor([-2 / std, 0.0, 0.0, 2 / std]))


def test_whitening_may_keep_the_mean():
    std = (8 / 3) ** 0.5
    expected = torch.tensor([-2 / std + 3, 3.0, 0.0, 2 / std + 3])
    torch.testing.assert_close(whiten(VALUES, MASK, shift_mean=False), expected)


def test_whitening_nothing_or_a_constant_is_finite():
    assert whiten(VALUES, torch.zeros(4, dtype=torch.bool)).tolist() == [0.0] * 4
    assert whiten(torch.full((3,), 2.0), torch.ones(3, dtype=torch.bool)).tolist() == [0.0] * 3


def test_rounding_errors_of_a_constant_are_not_blown_up():
    constant, everywhere = torch.full((1000,), 0.1), torch.ones(1000, dtype=torch.bool)
    assert whiten(constant, everywhere).abs().max() == 0
    torch.testing.assert_close(whiten(constant, everywhere, shift_mean=False), constant)


def test_a_nan_outside_the_mask_does_not_leak():
    poisoned = torch.tensor([1.0, 3.0, float("nan"), 5.0])
    torch.testing.assert_close(whiten(poisoned, MASK), whiten(VALUES, MASK))


def test_explained_variance_of_perfect_constant_and_opposite_critics():
    returns = torch.tensor([1.0, 3.0, 7.0, 5.0])
    assert explained_variance(returns, returns, MASK).item() == 1.0
    assert explained_variance(torch.zeros(4), returns, MASK).item() == 0.0
    assert explained_variance(-returns, returns, MASK).item() == -3.0
    assert explained_variance(returns, torch.ones(4), MASK).item() == 0.0
