"""Compares every op of fastrlhf_kernels, as it runs on this machine (Triton or torch), with its definition in float64
on small inputs.

The tests check tighter bounds on many more inputs. This check finds faults of a machine: a broken driver, a Triton
installation that cannot compile, or matrix products in TF32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fastrlhf_kernels._triton import use_triton

T, V, D, KEPT = 96, 301, 64, 5

TOLERANCE = 1e-4
"""Largest accepted error. Float32 gives about 1e-6 here; products in TF32, which has a mantissa of 10 bits, give about
1e-3."""

HEAD = ("hidden", "weight")
PAIRS = ("reference_logprob", "cu_seqlens", "mask")
EPISODES = ("sampler_logprob", "advantage", "mask")


@dataclass(frozen=True, kw_only=True)
class Check:
    op: str
    arguments: tuple[str, ...]
    """Positional arguments, by their names in `_inputs`; the gradient is taken with respect to the first one."""
    options: dict[str, Any]
    read: Callable[[Any], Tensor]
    """Extracts the numbers to compare from the result of the op or of its reference."""


def _loss(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.loss


def _logprob(output: Any) -> Tensor:
    return output.logprob


CHECKS = (
    Check(op="linear_logprob", arguments=(*HEAD, "targets"), options={}, read=_logprob),
    Check(op="linear_kept_logprob", arguments=(*HEAD, "targets", "kept", "cu_kept"), options={}, read=_logprob),
    Check(op="logprob_from_logits", arguments=("logits", "targets"), options={}, read=_logprob),
    Check(
        op="linear_kl",
        arguments=(*HEAD, "reference_hidden", "reference_weight"),
        options={},
        read=lambda output: output.kl,
    ),
    Check(
        op="kl_estimate",
        arguments=("logprob", "reference_logprob"),
        options={"kind": "k3"},
        read=lambda output: output,
    ),
    Check(op="policy_loss", arguments=("logprob", *EPISODES), options={"num_tokens": float(T)}, read=_loss),
    Check(
        op="value_loss",
        arguments=("logprob", "sampler_logprob", "advantage", "mask"),
        options={"num_tokens": float(T)},
        read=_loss,
    ),
    Check(op="pair_loss", arguments=("logprob", *PAIRS), options={"num_pairs": 3.0}, read=_loss),
    Check(op="gae", arguments=("advantage", "logprob", "cu_seqlens"), options={}, read=lambda output: output[0]),
    Check(op="linear_nll", arguments=(*HEAD, "targets"), options={"num_tokens": float(T)}, read=_loss),
    Check(
        op="linear_policy_loss",
        arguments=(*HEAD, "targets", *EPISODES),
        options={"num_tokens": float(T)},
        read=_loss,
    ),
    Check(op="linear_pair_loss", arguments=(*HEAD, "targets", *PAIRS), options={"num_pairs": 3.0}, read=_loss),
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    op: str
    path: str
    """The implementation that ran: triton or torch."""
    error: float
    """Largest absolute error of the result (a value per row, or the loss), in nats"""
    gradient_error: float | None
    """Largest error of the gradient, relative to its largest element; None if the op has no gradient"""

    @property
    def is_good(self) -> bool:
        # The comparisons are False for NaN.
        return self.error <= TOLERANCE and (self.gradient_error is None or self.gradient_error <= TOLERANCE)


def check_op(check: Check, device: torch.device) -> Outcome:
    """Runs one op and its reference, and compares them. If the op cannot run here, its error is raised unchanged."""
    module = import_module(f"fastrlhf_kernels.{check.op}")
    op, reference = getattr(module, check.op), getattr(module, f"{check.op}_reference")
    result, gradient = _run(op, check, device, torch.float32)
    truth, true_gradient = _run(reference, check, torch.device("cpu"), torch.float64)
    gradient_error = None
    if gradient is not None and true_gradient is not None:
        gradient_error = _error(gradient, true_gradient) / _largest(true_gradient)
    return Outcome(
        op=check.op,
        path="triton" if use_triton("auto", device) else "torch",
        error=_error(result, truth),
        gradient_error=gradient_error,
    )


def _run(
    function: Callable[..., Any], check: Check, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Returns the result and, if the op has a gradient, the gradient of the result's sum with respect to the first
    argument."""
    known = _inputs()
    inputs = [known[name].to(device, dtype if known[name].is_floating_point() else None) for name in check.arguments]
    leaf = inputs[0].requires_grad_(check.op != "gae")
    result = check.read(function(*inputs, **check.options))
    gradient = torch.autograd.grad(result.sum(), leaf)[0] if result.requires_grad else None
    return result.detach(), gradient


def _inputs() -> dict[str, Tensor]:
    """Draws float32 inputs: a head [V, D], three pairs of sequences in T rows, and KEPT tokens for each row. They are
    drawn on the CPU, so that they are equal on all machines."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    logprob = -normal(T).abs() - 0.1
    inputs = {
        "hidden": normal(T, D),
        "weight": normal(V, D) * 0.3,
        "reference_hidden": normal(T, D),
        "reference_weight": normal(V, D) * 0.3,
        "logits": normal(T, V) * 3,
        "targets": torch.randint(V, (T,), generator=generator),
        "logprob": logprob,
        "sampler_logprob": logprob + 0.1 * normal(T),
        "reference_logprob": logprob + 0.3 * normal(T),
        "advantage": normal(T),
        "mask": torch.rand(T, generator=generator) < 0.9,
        "cu_seqlens": torch.tensor([0, 10, 30, 31, 50, 80, T]),
        "cu_kept": torch.arange(T + 1) * KEPT,
    }
    return inputs | {"kept": ((inputs["targets"][:, None] + torch.arange(KEPT)) % V).flatten()}


def _error(result: Tensor, truth: Tensor) -> float:
    return _largest(result.cpu().double() - truth)


def _largest(values: Tensor) -> float:
    return values.abs().max().item()
