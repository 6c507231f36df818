from itertools import product

import torch

from fastrlhf.algorithms.advantages import explained_variance, group_normalised, leave_one_out, whiten, whitening_scale

VALUES = torch.tensor([1.0, 3.0, 100.0, 5.0])
MASK = torch.tensor([True, True, False, True])


def test_whitening_uses_the_masked_rows_only():
    # the values in the mask have mean 3 and population variance ((-2)^2 + 0 + 2^2) / 3 = 8/3
    std = (8 / 3) ** 0.5
    torch.testing.assert_close(whiten(VALUES, MASK), torch.tensor([-2 / std, 0.0, 0.0, 2 / std]))


def test_whitening_may_keep_the_mean():
    std = (8 / 3) ** 0.5
    expected = torch.tensor([-2 / std + 3, 3.0, 0.0, 2 / std + 3])
    torch.testing.assert_close(whiten(VALUES, MASK, shift_mean=False), expected)


def test_the_scale_is_the_standard_deviation():
    torch.testing.assert_close(whitening_scale(VALUES, MASK), torch.tensor((3 / 8) ** 0.5))
    assert whitening_scale(torch.full((3,), 2.0), torch.ones(3, dtype=torch.bool)) == 0


def test_whitening_an_empty_mask_or_a_constant_is_finite():
    assert whiten(VALUES, torch.zeros(4, dtype=torch.bool)).tolist() == [0.0] * 4
    assert whiten(torch.full((3,), 2.0), torch.ones(3, dtype=torch.bool)).tolist() == [0.0] * 3


def test_whitening_does_not_amplify_rounding_errors_of_a_constant():
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


RETURNS = torch.tensor([1.0, 2.0, 6.0, 4.0, 4.0, 4.0])


def test_leave_one_out_subtracts_the_mean_of_the_others_of_the_group():
    # returns 1, 2, 6: 1 - (2 + 6) / 2 = -3, 2 - (1 + 6) / 2 = -1.5, 6 - (1 + 2) / 2 = 4.5
    assert leave_one_out(RETURNS, 3).tolist() == [-3.0, -1.5, 4.5, 0.0, 0.0, 0.0]
    assert leave_one_out(torch.tensor([1.0, 4.0]), 2).tolist() == [-3.0, 3.0]


def test_group_normalised_divides_by_the_deviation_of_the_group_and_survives_equal_returns():
    # returns 1, 2, 6: mean 3, sample variance (4 + 1 + 9) / 2 = 7
    std = 7**0.5 + 1e-4
    expected = torch.tensor([-2 / std, -1 / std, 3 / std, 0.0, 0.0, 0.0])
    torch.testing.assert_close(group_normalised(RETURNS, 3), expected)


def test_leave_one_out_gives_the_gradient_of_the_expected_reward_of_a_bandit():
    """Computes the expected gradient over all outcomes of two episodes in float64, which is exact up to rounding."""
    logits = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([1.0, -2.0, 5.0], dtype=torch.float64)
    [exact] = torch.autograd.grad(logits.softmax(0) @ reward, logits)
    logprob = logits.log_softmax(0)
    surrogate = sum(
        (logprob[a] + logprob[b]).exp().detach()
        * (leave_one_out(reward[[a, b]], 2) * logprob[[a, b]]).mean()  # the loss of one step on this group
        for a, b in product(range(3), repeat=2)
    )
    [found] = torch.autograd.grad(surrogate, logits)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
