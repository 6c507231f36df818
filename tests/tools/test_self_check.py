from importlib import import_module

import pytest
import torch

import fastrlhf_kernels
from fastrlhf.tools.self_check import CHECKS, TOLERANCE, check_op

CPU = torch.device("cpu")


def test_every_op_of_the_kernels_is_checked():
    ops = {name for name in fastrlhf_kernels.__all__ if name.islower()} - {"merge"}
    assert {check.op for check in CHECKS} == ops


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.op)
def test_a_correct_op_is_far_below_the_tolerance(check):
    outcome = check_op(check, CPU)
    assert outcome.path == "torch"
    assert outcome.is_good
    assert max(outcome.error, outcome.gradient_error or 0) < TOLERANCE / 10


def test_products_with_tf32_precision_are_found(monkeypatch):
    """Simulates TF32 (10 bits of mantissa) by bfloat16 (7 bits), because a CPU has no TF32."""
    op = fastrlhf_kernels.linear_logprob

    def rounded(hidden, weight, targets):
        return op(hidden.bfloat16(), weight, targets)

    monkeypatch.setattr(import_module(op.__module__), "linear_logprob", rounded)
    assert not check_op(CHECKS[0], CPU).is_good


def test_a_number_that_is_not_finite_is_found(monkeypatch):
    check = next(check for check in CHECKS if check.op == "kl_estimate")
    module = import_module("fastrlhf_kernels.kl_estimate")
    monkeypatch.setattr(module, "kl_estimate", lambda a, b, kind: a * float("nan"))
    assert not check_op(check, CPU).is_good
