"""Compares both forms of linear_nll (one pass, or separate forward and backward) with the reference."""

import pytest
import torch
from torch import Tensor

from fastrlhf_kernels import _form as module
from fastrlhf_kernels import _tiles as tiles
from fastrlhf_kernels import linear_nll
from fastrlhf_kernels.linear_nll import linear_nll_reference


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPU_ROWS", 16)
    monkeypatch.setattr(module, "CPU_BYTES", 0)
    monkeypatch.setattr(module, "MULTIPLE", 16)
    monkeypatch.setattr(tiles, "INTERPRETER", tiles.Tiles(16, 16, 16, 4, 1, descriptors=False))


def inputs(rows: int = 37, size: int = 24, vocab: int = 70, dtype: torch.dtype = torch.float32) -> dict:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    targets[::5] = -100
    return {
        "hidden": torch.randn(rows, size, generator=generator).to(dtype).requires_grad_(),
        "weight": (torch.randn(vocab, size, generator=generator) / 3).to(dtype).requires_grad_(),
        "targets": targets,
        "bias": torch.randn(vocab, generator=generator).to(dtype).requires_grad_(),
        "token_weight": torch.rand(rows, generator=generator),
    }


def gradients(given: dict, form: str) -> tuple[Tensor, ...]:
    return torch.autograd.grad(linear_nll(**given, num_tokens=9, form=form).loss, leaves_of(given))


def leaves_of(given: dict) -> list[Tensor]:
    return [x for x in given.values() if x is not None and x.requires_grad]


OPTIONS = (
    {},
    {"temperature": torch.linspace(0.5, 2, 37), "logit_scale": 1.5},
    {"softcap": 3.0, "temperature": 0.7},
)


@pytest.mark.parametrize("form", ["one_shot", "two_steps", "auto"])
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "temperatures", "softcap"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_loss_and_gradients_are_those_of_the_definition(impl: str, options: dict, form: str):
    given = inputs()
    exact = {name: x.detach().double() if x.is_floating_point() else x for name, x in given.items()}
    for name in ("hidden", "weight", "bias"):
        exact[name].requires_grad_()
    truth = linear_nll_reference(**exact, **options, num_tokens=9)
    out = linear_nll(**given, **options, num_tokens=9, form=form, impl=impl)
    assert out.loss.item() == pytest.approx(truth.item(), rel=1e-6)
    found = torch.autograd.grad(out.loss, leaves_of(given))
    for a, b in zip(found, torch.autograd.grad(truth, leaves_of(exact)), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_the_metrics_are_the_sum_without_weights_and_the_number_of_tokens():
    given = inputs()
    for form in ("one_shot", "two_steps"):
        metrics = linear_nll(**given, num_tokens=9, form=form).metrics
        plain = linear_nll(**{**given, "token_weight": None}, num_tokens=1, form=form).loss
        assert metrics["tokens"].value == 29
        torch.testing.assert_close(metrics["nll"].value, plain.detach())


def test_ignored_rows_and_their_weights_may_hold_nan():
    given, dirty = inputs(), inputs()
    ignored = given["targets"] == -100
    with torch.no_grad():
        dirty["hidden"][ignored] = float("nan")
        dirty["token_weight"][ignored] = float("nan")
    for form in ("one_shot", "two_steps"):
        results = [linear_nll(**each, num_tokens=9, form=form).loss for each in (given, dirty)]
        assert torch.equal(*results)
        pairs = zip(
            *(torch.autograd.grad(x, leaves_of(y)) for x, y in zip(results, (given, dirty), strict=True)), strict=True
        )
        for a, b in pairs:
            assert torch.equal(a, b)


def test_a_frozen_head_gets_no_gradient_and_a_tied_weight_the_sum():
    given = inputs()
    frozen = {**given, "weight": given["weight"].detach(), "bias": None}
    (alone,) = torch.autograd.grad(linear_nll(**frozen, num_tokens=9, form="one_shot").loss, [given["hidden"]])
    both = {**given, "bias": None}
    with_weight = torch.autograd.grad(linear_nll(**both, num_tokens=9, form="one_shot").loss, leaves_of(both))
    torch.testing.assert_close(alone, with_weight[0])
    table, found = inputs()["weight"], []
    for form in ("one_shot", "two_steps"):
        loss = linear_nll(2 * table[:37], table, given["targets"], num_tokens=9, form=form).loss
        found += torch.autograd.grad(loss, table)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_a_bias_that_forbids_a_whole_part_of_the_vocabulary(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fastrlhf_kernels._blocks.CPU_BLOCK", (16, 16))
    given = inputs()
    with torch.no_grad():
        given["bias"][16:32] = -torch.inf
    given["targets"] = given["targets"].where((given["targets"] < 16) | (given["targets"] >= 32), 40)
    one, two = (
        torch.autograd.grad(linear_nll(**given, num_tokens=9, form=form).loss, leaves_of(given))
        for form in ("one_shot", "two_steps")
    )
    for a, b in zip(one, two, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("upstream", [1.0, 3.0])
def test_the_graph_may_be_kept_and_the_upstream_gradient_counts(upstream: float):
    given = inputs()
    leaves, loss = leaves_of(given), linear_nll(**given, num_tokens=9, form="one_shot").loss
    first, second = (
        [x.clone() for x in torch.autograd.grad(upstream * loss, leaves, retain_graph=True)] for _ in range(2)
    )
    once = torch.autograd.grad(loss, leaves)
    for a, b, c in zip(first, second, once, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, upstream * c)


def test_half_precision_and_empty_packs():
    for dtype in (torch.bfloat16, torch.float16):
        given = inputs(dtype=dtype)
        one, two = (
            torch.autograd.grad(linear_nll(**given, num_tokens=9, form=form).loss, leaves_of(given))
            for form in ("one_shot", "two_steps")
        )
        for a, b in zip(one, two, strict=True):
            assert a.dtype == dtype
            assert (a - b).float().norm() < 1e-2 * b.float().norm()
    for given in (inputs(rows=0), {**inputs(), "targets": torch.full((37,), -100)}):
        out = linear_nll(**given, num_tokens=0, form="one_shot")
        assert out.loss.item() == 0
        assert all(not grad.any() for grad in torch.autograd.grad(out.loss, leaves_of(given)))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"^form must be one of auto, one_shot, two_steps, got 'fast'$"):
        linear_nll(**inputs(), num_tokens=9, form="fast")
    with pytest.raises(ValueError, match=r"^token_weight must have shape \(37,\), got \(3,\)$"):
        linear_nll(**{**inputs(), "token_weight": torch.ones(3)}, num_tokens=9)


def test_the_operator_is_registered_as_torch_wants_it():
    given = inputs(rows=9)
    fixed = (given["targets"], given["token_weight"].where(given["targets"] != -100, 0), torch.tensor(9.0))
    head = (given["hidden"], given["weight"], None)
    options = (None, 1.0, 1.0, None, -100, True, True, False, False)
    torch.library.opcheck(torch.ops.fastrlhf.linear_nll.default, (*head, *fixed, *options))
