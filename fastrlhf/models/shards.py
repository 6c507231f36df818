"""Writes and reads the tensors of a checkpoint: in NAME.safetensors, or in NAME.shards/ with the parts of several
processes.

Each process writes the parts of sharded tensors that it holds, and reads the parts that it needs, through
torch.distributed.checkpoint. Tensors are therefore never gathered, and the number of processes may differ between
writing and reading. Every part is a safetensors file whose metadata give its place in the whole tensors. The pickled
metadata of torch's other formats are neither written nor read.

If any rank fails, every rank raises the error of the first one that failed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import empty as empty_dtensor

from fastrlhf.distributed.ranks import on_each, on_first, world_size

FILE = 2**28
"""Approximate size of a part, in bytes. To write it, a process needs twice this memory in addition to its tensors, and
copies of tensors on a GPU."""


def is_sharded(stem: Path) -> bool:
    return _folder(stem).is_dir()


def exists(stem: Path) -> bool:
    return is_sharded(stem) or _file(stem).exists()


def write_tensors(stem: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes the tensors: to `stem`.shards/ if any of them is sharded over the ranks, otherwise to `stem`.safetensors,
    by the first rank. Without tensors nothing is written. Every rank must call it, with the same names."""
    if any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        # A file ends after the tensor with which a rank's share of the file reaches FILE bytes.
        ends = accumulate(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        file_of = {name: 1 + end // (FILE * world_size()) for name, end in zip(tensors, ends, strict=True)}
        writer = HuggingFaceStorageWriter(str(_folder(stem)), file_of, save_distributed=True)
        with _first_error():
            save(dict(tensors), storage_writer=writer)
    elif tensors:
        whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        on_first(lambda: save_file(whole, _file(stem), metadata={"format": "pt"}))


def describe_tensors(stem: Path) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Returns dtype and shape of every whole tensor by name. Raises ValueError if a part of a tensor is missing."""
    described = {}
    for name, saved in _Reader(stem).read_metadata().state_dict_metadata.items():
        assert isinstance(saved, TensorStorageMetadata)
        if sum(math.prod(chunk.sizes) for chunk in saved.chunks) != math.prod(saved.size):
            raise ValueError(f"{str(_folder(stem))!r} lacks a part of {name}")
        described[name] = (saved.properties.dtype, saved.size)
    return described


def read_into(stem: Path, tensors: Mapping[str, Tensor]) -> None:
    """Reads values from a checkpoint into the tensors; of a sharded tensor, only into this rank's part. If any tensor
    is sharded, every rank must call it."""
    together = any(isinstance(tensor, DTensor) for tensor in tensors.values())
    with _first_error(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(dict(tensors), storage_reader=_Reader(stem), no_dist=not together)


def read_tensors(stem: Path, pattern: Tensor | None = None) -> dict[str, Tensor]:
    """Reads all tensors, whole and on the CPU. If `pattern` is sharded, all tensors except scalars are sharded like
    it."""
    together = isinstance(pattern, DTensor)  # with on_each, no rank waits for one that fails
    described = on_each(lambda: describe_tensors(stem))[0] if together else describe_tensors(stem)
    tensors = {name: _room(pattern, dtype, shape) for name, (dtype, shape) in described.items()}
    read_into(stem, tensors)
    return tensors


def _room(pattern: Tensor | None, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    if isinstance(pattern, DTensor) and shape:
        mesh, placements = pattern.device_mesh, pattern.placements
        return empty_dtensor(shape, dtype=dtype, device_mesh=mesh, placements=placements)
    return torch.empty(shape, dtype=dtype)


class _Reader(HuggingFaceStorageReader):
    """Reads a folder, or a single file (ignoring other files in its folder)."""

    def __init__(self, stem: Path) -> None:
        super().__init__(str(_folder(stem) if is_sharded(stem) else _file(stem)))
        self.fs = _OneFile()


class _OneFile(FileSystem):
    def ls(self, path: str | Path) -> list[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return [str(path)] if Path(path).is_file() else super().ls(path)


@contextmanager
def _first_error() -> Iterator[None]:
    try:
        yield
    except CheckpointException as error:
        failures = error.failures
        raise failures[min(failures)][0] from None


def _file(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.safetensors")


def _folder(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.shards")
