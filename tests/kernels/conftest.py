import pytest
import torch

from fastrlhf_kernels import _rows


@pytest.fixture(params=["torch", "triton"])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both paths of an op on the CPU; Triton's kernels interpreted, with blocks that small tests cross."""
    if request.param == "triton" and torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU; see test_on_gpu.py")
    monkeypatch.setattr(_rows, "BLOCK", 16)
    return request.param
