"""Tests of linear_kept_logprob against its definition in float64 and against values by hand, and of refused
arguments."""

import importlib
import math

import pytest
import torch

from fastrlhf_kernels import linear_kept_logprob, linear_logprob
from fastrlhf_kernels.linear_kept_logprob import linear_kept_logprob_reference

# Not a plain import, because the package exports a function with the name of this module
op = importlib.import_module("fastrlhf_kernels.linear_kept_logprob")

ROWS, VOCAB, SIZE = 10, 50, 8
SIZES = (1, 3, VOCAB, 0, 7, 20, 2, 5, 0, 9)


def problem(seed: int = 0):
    """Returns (hidden, weight, bias), targets, kept, cu_kept, temperatures."""
    generator = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(*shape, generator=generator) for shape in ((ROWS, SIZE), (VOCAB, SIZE), (VOCAB,))]
    sets = [torch.randperm(VOCAB, generator=generator)[:size] for size in SIZES]
    targets = torch.tensor([int(one[-1]) if len(one) else 0 for one in sets])
    cu_kept = torch.tensor([0, *SIZES]).cumsum(0)
    return leaves, targets, torch.cat(sets), cu_kept, torch.rand(ROWS, generator=generator) + 0.5


def values_and_gradients(function, dtype, **options):
    leaves, targets, kept, cu_kept, heat = problem()
    leaves = [leaf.to(dtype, copy=True).requires_grad_() for leaf in leaves]
    out = function(
        *leaves[:2],
        targets,
        kept,
        cu_kept,
        bias=leaves[2],
        temperature=heat.to(dtype),
        logit_scale=0.7,
        softcap=3.0,
        **options,
    )
    upstream = torch.arange(1, ROWS + 1)
    sum((value * upstream * (i + 1)).sum() for i, value in enumerate(out[:3])).backward()
    return [value.detach() for value in out[:3]], [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("rows_of_a_chunk", [3, ROWS])
def test_values_and_gradients_are_those_of_the_definition(monkeypatch, rows_of_a_chunk):
    monkeypatch.setattr(op, "CPU_CHUNK", 4 * VOCAB * rows_of_a_chunk)
    values, gradients = values_and_gradients(linear_kept_logprob, torch.float32, entropy=True)
    expected, expected_gradients = values_and_gradients(linear_kept_logprob_reference, torch.float64)
    for value, right in zip([*values, *gradients], [*expected, *expected_gradients], strict=True):
        torch.testing.assert_close(value, right.float(), atol=5e-6, rtol=1e-5)
    assert values[0][0] == values[2][0] == 0  # a set of one token
    assert values[0][3] == values[1][3] == values[2][3] == 0  # an empty set
    assert not gradients[0][3].any()
    assert (values[0] <= 0).all()


def test_sets_of_the_whole_vocabulary_give_the_numbers_of_linear_logprob():
    (hidden, weight, _), targets, *_ = problem()
    kept, cu_kept = torch.arange(VOCAB).repeat(ROWS), torch.arange(ROWS + 1) * VOCAB
    ours = linear_kept_logprob(hidden, weight, targets, kept, cu_kept, temperature=0.6, entropy=True)
    full = linear_logprob(hidden, weight, targets, temperature=0.6, entropy=True)
    for one, other in zip(ours[:3], full[:3], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_two_tokens_by_hand():
    """Of the logits 1, 2 and 5 only 1 and 2 are kept, so the log-prob is -log(1 + e), whatever the third logit."""
    hidden, weight = torch.ones(1, 1), torch.tensor([[1.0], [2.0], [5.0]])
    out = linear_kept_logprob(hidden, weight, torch.tensor([0]), torch.tensor([1, 0]), torch.tensor([0, 2]))
    assert out.logprob.item() == pytest.approx(-math.log(1 + math.e), rel=1e-6)
    assert out.logsumexp.item() == pytest.approx(math.log(math.e + math.e**2), rel=1e-6)
    assert out.entropy is None


def test_no_rows_and_frozen_weights():
    hidden = torch.zeros(0, SIZE, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    out = linear_kept_logprob(hidden, torch.zeros(VOCAB, SIZE), none, none, torch.zeros(1, dtype=torch.int64))
    out.logprob.sum().backward()
    assert out.logprob.shape == (0,)
    assert hidden.grad is not None
    (hidden, weight, _), targets, kept, cu_kept, _ = problem()
    hidden.requires_grad_()
    linear_kept_logprob(hidden, weight, targets, kept, cu_kept).logprob.sum().backward()
    assert weight.grad is None
    assert hidden.grad.any()


def test_it_compiles():
    (hidden, weight, _), targets, kept, cu_kept, _ = problem()

    def total(hidden):
        return linear_kept_logprob(hidden, weight, targets, kept, cu_kept).logprob.sum()

    compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
    assert compiled(hidden).item() == pytest.approx(total(hidden).item(), rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.tensor([1])}, "kept must hold the target of every row; the set of row 0 lacks token 1"),
        ({"kept": torch.tensor([0, 3])}, r"kept must be in \[0, 2\], got 3"),
        ({"cu_kept": torch.tensor([0, 1, 2])}, r"cu_kept must have shape \(2,\), got \(3,\)"),
        ({"kept": torch.tensor([0.0, 2.0])}, "kept must be torch.int64, got torch.float32"),
    ],
)
def test_invalid_arguments_are_refused(change, message):
    arguments = {"targets": torch.tensor([0]), "kept": torch.tensor([0, 2]), "cu_kept": torch.tensor([0, 2])}
    with pytest.raises(ValueError, match=message):
        linear_kept_logprob(torch.ones(1, 1), torch.ones(3, 1), **arguments | change)
