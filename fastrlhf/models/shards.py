"""The tensors of a checkpoint, by name: NAME.safetensors, or NAME.shards/ with the parts of several processes.

For weights that are spread over processes, each process writes the part that it holds and reads the part that it needs,
through torch.distributed.checkpoint, so that they are never gathered, and any number of processes reads what any other
has written. Every part is a safetensors file, whose metadata say where in the whole it belongs. The metadata of torch's
other formats, a pickle, are neither written nor read.

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
"""Approximate bytes of a part. To write, a process needs twice as much memory beside its tensors, plus copies from a
GPU."""


def is_sharded(stem: Path) -> bool:
    return _folder(stem).is_dir()


def exists(stem: Path) -> bool:
    return is_sharded(stem) or _file(stem).exists()


def write_tensors(stem: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes `stem`.shards/ where any of the tensors is spread over the ranks, else `stem`.safetensors, by the first;
    nothing if there are no tensors. Every rank must call it, with the same names."""
    if any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        # By running size, so that a rank has less than FILE in a file, and one tensor more.
        ends = accumulate(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        file_of = {name: 1 + end // (FILE * world_size()) for name, end in zip(tensors, ends, strict=True)}
        writer = HuggingFaceStorageWriter(str(_folder(stem)), file_of, save_distributed=True)
        with _first_error():
            save(dict(tensors), storage_writer=writer)
    elif tensors:
        whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        on_first(lambda: save_file(whole, _file(stem), metadata={"format": "pt"}))


def describe_tensors(stem: Path) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """dtype and shape of every whole tensor by name. Raises ValueError where a part of one is missing."""
    described = {}
    for name, saved in _Reader(stem).read_metadata().state_dict_metadata.items():
        assert isinstance(saved, TensorStorageMetadata)
        if sum(math.prod(chunk.sizes) for chunk in saved.chunks) != math.prod(saved.size):
            raise ValueError(f"{str(_folder(stem))!r} lacks a part of {name}")
        described[name] = (saved.properties.dtype, saved.size)
    return described


def read_into(stem: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills the tensors, or this rank's parts of sharded ones; every rank must call it for those."""
    together = any(isinstance(tensor, DTensor) for tensor in tensors.values())
    with _first_error(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(dict(tensors), storage_reader=_Reader(stem), no_dist=not together)


def read_tensors(stem: Path, pattern: Tensor | None = None) -> dict[str, Tensor]:
    """All tensors, whole and on the CPU; or, if `pattern` is sharded, all except scalars sharded like it."""
    together = isinstance(pattern, DTensor)  # a rank that cannot read the names must not leave the others waiting
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
    """A reader of one file (without the files beside it) or of a folder."""

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
