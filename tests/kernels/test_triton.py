import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastrlhf_kernels import _triton

CPU = torch.device("cpu")
KERNELS = Path(__file__).parents[2] / "kernels"


def test_auto_is_triton_on_cuda_and_torch_elsewhere():
    assert _triton.use_triton("auto", torch.device("cuda"))
    assert not _triton.use_triton("auto", CPU)
    assert not _triton.use_triton("torch", torch.device("cuda"))


@pytest.mark.parametrize(("major", "expected"), [(7, False), (8, True), (12, True)])
def test_a_gpu_below_8_0_takes_the_torch_path(major: int, expected: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(major=major))
    assert _triton.use_triton("auto", torch.device("cuda", 0)) == expected


def test_an_impl_that_cannot_run_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"impl must be .* got 'cuda'"):
        _triton.use_triton("cuda", CPU)
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    with pytest.raises(ValueError, match="on cpu needs TRITON_INTERPRET=1"):
        _triton.use_triton("triton", CPU)
    monkeypatch.setattr(_triton, "triton", None)
    with pytest.raises(ValueError, match="triton is not installed"):
        _triton.use_triton("triton", torch.device("cuda"))
    assert not _triton.use_triton("auto", torch.device("cuda"))


@pytest.mark.parametrize("absent", [["triton", "triton.language"], ["transformers", "datasets", "numpy"]])
def test_the_package_runs_without_optional_dependencies(absent: list[str]):
    program = f"""
import sys; sys.modules.update(dict.fromkeys({absent}))
import torch, fastrlhf_kernels as k
hidden, weight, targets = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4), torch.arange(5)
out = k.linear_logprob(hidden, weight, targets, entropy=True)
k.policy_loss(out.logprob, out.logprob.detach(), torch.ones(5), torch.ones(5).bool(), num_tokens=5).loss.backward()
assert hidden.grad.isfinite().all() and not hidden.grad.eq(0).all()
"""
    environment = {**os.environ, "PYTHONPATH": str(KERNELS)}
    environment.pop("TRITON_INTERPRET", None)  # Triton's interpreter needs numpy
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=120)


@pytest.mark.skipif(_triton.triton is None, reason="Triton is not installed")
def test_all_variants_of_a_kernel_are_compiled_in_the_first_of_50_ragged_packs():
    program = Path(__file__).with_name("compiled_keys.py")
    run = subprocess.run(
        [sys.executable, str(program)],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(run.stdout)
    assert len(found) == 12
    assert {name: pack for name, (_, pack) in found.items() if pack} == {}
    assert sum(count for count, _ in found.values()) == 14  # the head's forward with and without stored logits
