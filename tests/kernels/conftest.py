import pytest
import torch

from fastrlhf_kernels import _blocks as blocks
from fastrlhf_kernels import _head as head
from fastrlhf_kernels import _rows
from fastrlhf_kernels import _tiles as tiles


@pytest.fixture(params=["torch", "triton"])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The value of `impl`: "torch", and "triton" (Triton kernels in the interpreter) if there is no GPU.

    Makes Triton's blocks small, so that small tests cross block boundaries.
    """
    if request.param == "triton" and torch.cuda.is_available():
        pytest.skip("the interpreter is off if there is a GPU; see test_on_gpu.py")
    monkeypatch.setattr(_rows, "BLOCK", 16)
    return request.param


@pytest.fixture
def interpreted() -> None:
    """Skips tests that need Triton's interpreter if there is a GPU, because the interpreter is then off."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off if there is a GPU")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the blocks of the head ops small, so that small shapes have many blocks."""
    monkeypatch.setattr(blocks, "CPU_BLOCK", (8, 7))
    monkeypatch.setattr(tiles, "INTERPRETER", tiles.Tiles(16, 16, 16, 4, 1, descriptors=False))
    monkeypatch.setattr(head, "SHARE", 32)
    monkeypatch.setattr(head, "PART_BYTES", 0)
    monkeypatch.setattr(head, "SMALLEST_PART", 16)
    monkeypatch.setattr(head, "GROUP", 2)
