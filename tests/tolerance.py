"""Checks that an op is as accurate as plain torch in the same dtype, relative to float64, so that tests need no
tolerances. With truth = reference in float64 and baseline = reference in the dtype under test, the bound is

    error(op) <= FACTOR * error(baseline) + EPSILONS * eps * largest |truth|
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FACTOR = 2.0
EPSILONS = 4.0

Op = Callable[..., Sequence[Tensor]]


def assert_as_exact(name: str, actual: Tensor, baseline: Tensor, truth: Tensor) -> None:
    """Asserts the bound in the module docstring, with eps of the baseline's dtype. `actual` must be finite wherever the
    truth is finite."""
    assert actual.shape == truth.shape, name
    error = _largest(actual.double() - truth)
    allowed = FACTOR * _largest(baseline.double() - truth)
    allowed += EPSILONS * torch.finfo(baseline.dtype).eps * _largest(truth)
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def assert_op_matches(op: Op, reference: Op, leaves: dict[str, Tensor], upstream: Sequence[Tensor] = ()) -> None:
    """Compares the outputs of `op`, and the gradients of every leaf, with those of `reference`. Both functions take the
    leaves by name and return corresponding outputs. `upstream` holds the upstream gradients of the first outputs;
    further outputs are not differentiated. If `upstream` is empty, every upstream gradient is 1.
    """
    truth = _run(reference, {name: leaf.double() for name, leaf in leaves.items()}, upstream)
    baseline = _run(reference, leaves, upstream)
    for name, actual in _run(op, leaves, upstream).items():
        assert_as_exact(name, actual, baseline[name], truth[name])


def _run(op: Op, leaves: dict[str, Tensor], upstream: Sequence[Tensor]) -> dict[str, Tensor]:
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    outputs = op(**leaves)
    weights = upstream or [torch.ones_like(output) for output in outputs]
    total = sum((o * w.to(o.dtype)).sum() for o, w in zip(outputs[: len(weights)], weights, strict=True))
    assert isinstance(total, Tensor)
    gradients = torch.autograd.grad(total, list(leaves.values()))
    named = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    return named | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}


def _largest(x: Tensor) -> float:
    return x.detach().abs().max().item() if x.numel() else 0.0
