import pytest
import torch

from fastrlhf_kernels import _blocks as blocks
from fastrlhf_kernels import _head as head
from fastrlhf_kernels import _rows
from fastrlhf_kernels import _tiles as tiles


@pytest.fixture(params=["torch", "triton"])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The two paths of an op on a CPU: torch, and interpreted Triton kernels.

    Triton's blocks are small, so that small tests cross block boundaries.
    """
    if request.param == "triton" and torch.cuda.is_available():
        pytest.skip("the interpreter is off if there is a GPU; see test_on_gpu.py")
    monkeypatch.setattr(_rows, "BLOCK", 16)
    return request.param


@pytest.fixture
def interpreted() -> None:
    """Skips tests of the Triton path on the CPU if there is a GPU, where the interpreter is off."""
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
