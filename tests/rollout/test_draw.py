"""Tests of drawing tokens against the cumulative distribution in float64."""

import math

import pytest
import torch

from fastrlhf.rollout.draw import BLOCK, draw_tokens

LAST = 1 - 2**-24
"""The largest number below 1 in float32."""


def logits_of(rows: int, columns: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns)) * scale


@pytest.mark.parametrize("columns", [1, 40, BLOCK, BLOCK + 1, 5003])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5, None])
def test_tokens_invert_the_cumulative_distribution(columns, temperature):
    rows = 400
    logits, generator = logits_of(rows, columns), torch.Generator().manual_seed(1)
    uniform = torch.rand(rows, generator=generator)
    if temperature is None:  # one per row
        temperature = torch.rand(rows, 1, generator=generator) + 0.2
    before = logits.clone()
    token, logprob = draw_tokens(logits, temperature, uniform)
    assert torch.equal(logits, before)
    expected = (logits.double() / temperature).log_softmax(-1)
    upper = expected.exp().cumsum(-1).gather(1, token[:, None])[:, 0]
    lower = upper - expected.exp().gather(1, token[:, None])[:, 0]
    assert ((lower - 1e-6 <= uniform) & (uniform <= upper + 1e-6)).all()
    torch.testing.assert_close(logprob.double(), expected.gather(1, token[:, None])[:, 0], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("columns", [40, 3 * BLOCK])
@pytest.mark.parametrize("uniform", [0.0, 0.5, LAST])
def test_a_token_of_probability_0_is_never_drawn(columns, uniform):
    logits = torch.full((columns, columns), -math.inf)
    logits.fill_diagonal_(0.0)
    token, logprob = draw_tokens(logits, 1.0, torch.full((columns,), uniform))
    assert token.tolist() == list(range(columns))
    assert not logprob.any()


def test_temperature_0_takes_the_largest_logit_with_its_log_prob_at_temperature_1():
    logits = logits_of(9, 700)
    token, logprob = draw_tokens(logits, 0.0, torch.rand(9))
    assert torch.equal(token, logits.argmax(-1))
    torch.testing.assert_close(logprob, logits.log_softmax(-1).amax(-1), rtol=1e-6, atol=1e-6)


def test_columns_stand_for_the_given_tokens():
    logits = logits_of(50, 30)
    uniform = torch.rand(50)
    ids = torch.arange(30) * 7 + 2
    column, logprob = draw_tokens(logits, 1.0, uniform)
    token, same = draw_tokens(logits, 1.0, uniform, ids)
    assert torch.equal(token, ids[column])
    assert torch.equal(logprob, same)


def test_a_row_draws_the_same_whatever_rows_stand_beside_it():
    logits, uniform = logits_of(12, 5003), torch.rand(12)
    token, logprob = draw_tokens(logits, 0.7, uniform)
    for i in range(12):
        alone = draw_tokens(logits[i : i + 1], 0.7, uniform[i : i + 1])
        assert (alone[0].item(), alone[1].item()) == (token[i].item(), logprob[i].item())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_log_prob_of_a_row_that_is_not_finite_is_nan(bad):
    logits = logits_of(2, 300)
    logits[1, 7] = bad
    token, logprob = draw_tokens(logits, 1.0, torch.tensor([0.5, 0.5]))
    assert logprob.isnan().tolist() == [False, True]
    assert 0 <= token[1] < 300
