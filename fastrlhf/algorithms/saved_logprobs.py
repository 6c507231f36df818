"""Keeps log-probs of a reference on disk while they are computed, so that a run that was killed continues the pass.

    FOLDER/NAME/
        trees.npy           [n] int64, indices of trees
        counts.npy          [n] int64, the number of responses of each of these trees
        logprobs.npy        float32, the log-probs of all their responses, in nats
        manifest.json       size and hash of each file

Each process writes a chunk of this form from time to time. At the end, one chunk named `all` replaces them. The name of
the folder is a hash of everything that the log-probs depend on (`reference.open_reference`).
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastrlhf.distributed.ranks import from_all, on_first
from fastrlhf.runtime.atomic import check_own_folder, write_own_folder

log = logging.getLogger(__name__)

SAVE_EVERY = 30.0
"""Seconds between two chunks of a process, that is, the time that a killed run loses."""
ALL = "all"
"""Name of the chunk of a complete pass."""


class SavedLogprobs:
    """The log-probs [K] float32 of the responses of each tree, by the index of the tree."""

    def __init__(self, folder: Path, key: str) -> None:
        """`key` of the configuration determines the folder, and is named in warnings."""
        self.folder, self._key = folder, key
        self._new: dict[int, Tensor] = {}
        self._saved = time.monotonic()
        self._fails = False

    def read(self) -> dict[int, Tensor]:
        """Returns everything that any rank finds on its disk. A damaged chunk is deleted, with a warning, and its
        log-probs are missing from the result. Every rank must call it."""
        own: dict[int, Tensor] = {}
        names = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        for chunk in (path for path in names if not path.name.startswith(".")):
            try:
                check_own_folder(chunk)
                trees, counts, values = (np.load(chunk / f"{name}.npy") for name in ("trees", "counts", "logprobs"))
                parts = torch.from_numpy(values).split(counts.tolist())
                own |= zip(trees.tolist(), parts, strict=True)
            except (OSError, ValueError, RuntimeError) as error:
                log.warning("%s: %s is damaged, so its log-probs are computed again: %s", self._key, chunk, error)
                shutil.rmtree(chunk, ignore_errors=True)
        return {i: values for found in from_all(own) for i, values in found.items()}

    def add(self, values: Mapping[int, Tensor]) -> None:
        """Adds log-probs that this rank has computed, and writes a chunk if the last one is old. Trees with a log-prob
        that is not finite are left out, because the run ends with an error."""
        self._new |= {i: each for i, each in values.items() if bool(each.isfinite().all())}
        if self._new and time.monotonic() - self._saved >= SAVE_EVERY:
            self._write(str(min(self._new)), self._new)
            self._new = {}
            self._saved = time.monotonic()

    def complete(self, values: Sequence[Tensor]) -> None:
        """Replaces all chunks by one with the log-probs of all trees, in order. Every rank must call it."""
        on_first(lambda: self._complete(values))

    def _complete(self, values: Sequence[Tensor]) -> None:
        if self._write(ALL, dict(enumerate(values))):
            for path in self.folder.iterdir():
                if path.name != ALL:
                    shutil.rmtree(path, ignore_errors=True)
            log.info("reference: log-probs of %d responses kept in %s", sum(map(len, values)), self.folder)

    def _write(self, name: str, values: Mapping[int, Tensor]) -> bool:
        """Writes a chunk; returns whether it is on the disk. If a chunk cannot be written, for example to a full disk,
        a warning is logged once and the run continues without it."""
        try:
            write_own_folder(self.folder / name, lambda place: _fill(place, values))
        except OSError as error:
            if not self._fails:
                log.warning("%s: %s cannot be written, the run continues without it: %s", self._key, self.folder, error)
            self._fails = True
            return False
        return True


def _fill(place: Path, values: Mapping[int, Tensor]) -> None:
    np.save(place / "trees.npy", np.array(list(values), np.int64))
    np.save(place / "counts.npy", np.array([len(each) for each in values.values()], np.int64))
    np.save(place / "logprobs.npy", torch.cat(list(values.values())).numpy())
