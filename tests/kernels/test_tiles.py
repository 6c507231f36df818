import pytest
import torch

from fastrlhf_kernels import _tiles as tiles


@pytest.mark.parametrize(
    ("capability", "dtype", "heavy", "expected"),
    [
        ((8, 0), torch.bfloat16, False, tiles.AMPERE),
        ((8, 6), torch.bfloat16, False, tiles.AMPERE),
        ((9, 0), torch.bfloat16, False, tiles.FORWARD[9].light),
        ((9, 0), torch.bfloat16, True, tiles.FORWARD[9].heavy),
        ((9, 0), torch.float32, False, tiles.FLOAT32),
        ((10, 0), torch.bfloat16, False, tiles.SQUARE),
        ((9, 0), torch.float16, False, tiles.AMPERE),
        ((12, 0), torch.bfloat16, False, tiles.AMPERE),
    ],
)
def test_the_tiles_follow_the_device_and_the_dtype(
    capability: tuple[int, int], dtype: torch.dtype, heavy: bool, expected: tiles.Tiles, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert tiles.choose_tiles(tiles.FORWARD, FakeMatrix(64, dtype), FakeMatrix(64, dtype), heavy) == expected


@pytest.mark.parametrize(
    ("size", "dtype", "other"), [(60, torch.bfloat16, torch.bfloat16), (64, torch.bfloat16, torch.float16)]
)
def test_rows_that_tma_cannot_load_go_through_pointers(
    size: int, dtype: torch.dtype, other: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    chosen = tiles.choose_tiles(tiles.FORWARD, FakeMatrix(size, dtype), FakeMatrix(size, other), False)
    assert chosen == tiles.AMPERE
    assert not chosen.descriptors


def test_on_a_cpu_the_tiles_are_those_of_the_interpreter():
    matrix = torch.zeros(4, 8)
    assert tiles.choose_tiles(tiles.FORWARD, matrix, matrix, False) == tiles.INTERPRETER


class FakeMatrix:
    """A stand-in for a matrix [4, size] on a CUDA device, for machines without a GPU."""

    device = torch.device("cuda")

    def __init__(self, size: int, dtype: torch.dtype):
        self.real = torch.zeros(4, size, dtype=dtype)
        self.dtype, self.shape = dtype, self.real.shape
        self.element_size, self.stride = self.real.element_size, self.real.stride

    def data_ptr(self) -> int:
        return 1 << 12
