"""Writes the files of a run and resumes from them. The user's files are never overwritten; a folder that fastrlhf
writes is either complete or absent.

    checkpoint-N/                 after N steps; loads as a model like any other, unless it trains an adapter
        model.safetensors, config.json, the tokenizer's files; for an adapter only the trained weights
        value_model/              of an on-policy run with a critic
        dpo_model/                of an on-policy run that trains its token rewards (dpo_refine)
        optimizer.safetensors     moments, float32 copies of bfloat16 weights; other parts: NAME.safetensors
        state.json                all that is not a tensor: step, position of the schedule, fingerprint of the data
        manifest.json             size and SHA-256 of each file

If several processes train, each writes its part of weights and moments, into model.shards/ and optimizer.shards/
(models/shards.py); only fastrlhf can load this form as a model. No pickle is written or read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.config import TrainConfig
from fastrlhf.config.compare import SAME_MODEL, differences
from fastrlhf.config.files import as_yaml
from fastrlhf.config.paths import places_of
from fastrlhf.distributed.ranks import on_each, on_first
from fastrlhf.models.adapters import has_adapter
from fastrlhf.models.quiet import quiet
from fastrlhf.models.sharding import beginnings, whole_weights
from fastrlhf.models.shards import describe_tensors, exists, read_into, read_tensors, write_tensors
from fastrlhf.models.vocabulary import save_configs
from fastrlhf.runtime.atomic import (
    check_folder,
    check_writable,
    discard_folder,
    flush,
    flush_tree,
    write_file,
    write_folder,
)
from fastrlhf.runtime.rng_state import GlobalRandomness

log = logging.getLogger(__name__)


class Stateful(Protocol):
    """A part of a run that has a state: an optimiser, a normaliser, a controller. The state is a flat mapping of names
    to tensors and JSON values. With `resume_weights_only` its tensors are not loaded, and the part starts anew at the
    saved position. An empty state is not saved; the part of a resumed run then keeps its initial state.
    """

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


def _is_optimizer(name: str) -> bool:
    """Returns whether the part `name` is an optimiser, which has tensors as large as the weights and changes the
    weights."""
    return name.endswith("optimizer")


def check_output_dir(path: str) -> None:
    """Raises ValueError if the path is a file or a folder that is not empty. Hidden files and files without content are
    ignored, because a run that is killed while it starts leaves nothing else.
    """
    folder = Path(path)
    if folder.is_file():
        raise ValueError(f"output_dir: {path!r} is a file")
    check_writable(path, "output_dir")
    for name, what in (("config.yaml", "run"), ("config.json", "model")):
        if (folder / name).exists():
            raise ValueError(f"output_dir: {path!r} already holds a {what}; choose another folder or move it away")
    if folder.exists() and any(_counts(file) for file in folder.iterdir()):
        raise ValueError(f"output_dir: {path!r} is not empty; choose a new folder or an empty one")


def check_run_dir(config: TrainConfig) -> None:
    """Raises ValueError if a run can neither start nor resume in its folder. It can resume if the folder holds an
    unfinished run of the same configuration; if the configuration differs, the message names the differences. A run
    that failed before its first checkpoint cannot resume: its only weights are in `interrupted/`, and starting again
    might replace them.
    """
    folder = Path(config.output_dir)
    if is_unfinished(config.output_dir):
        check_writable(config.output_dir, "output_dir")
    if config.resume_from_checkpoint == "never" or not is_unfinished(config.output_dir):
        check_output_dir(config.output_dir)
        return
    try:
        changed = differences(config, folder / "config.yaml", SAME_MODEL)
    except ValueError:  # not a config.yaml written by fastrlhf, so there is nothing to resume
        check_output_dir(config.output_dir)
        return
    if changed:
        shown = "; ".join(changed[:5]) + (f"; and {len(changed) - 5} more" if len(changed) > 5 else "")
        raise ValueError(
            f"output_dir: {config.output_dir!r} already holds an unfinished run of another configuration ({shown}); "
            "use the old configuration, choose another folder or move this folder away"
        )
    if (folder / "interrupted").exists() and not checkpoints(folder):
        raise ValueError(
            f"output_dir: {config.output_dir!r} already holds a run that failed before its first checkpoint; start "
            "a run in another folder from its last weights (in interrupted/), or move this folder away"
        )


def holds_model(path: str) -> bool:
    """Returns whether a run in this folder has finished, because a run writes the model last."""
    return (Path(path) / "config.json").exists()


def is_unfinished(path: str) -> bool:
    return (Path(path) / "config.yaml").exists() and not holds_model(path)


def create_output_dir(path: str, config: Any) -> Path:
    """Creates the folder of a run, if need be, and writes the resolved configuration to its config.yaml."""
    folder = Path(path)
    write_file(folder / "config.yaml", as_yaml(config) + places_of(config))
    return folder


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes model and tokenizer in `save_pretrained` form into `folder`.

    The files are first written to a hidden sub-folder and then moved one by one, config.json last. A folder without
    config.json does not load as a model, so a crash never leaves a half-written model that loads.
    """
    save_weights(model, whole_weights(model), tokenizer, folder)


def save_weights(
    model: PreTrainedModel, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Saves like `save_model`, but with weights given by name. Only rank 0 needs the weights; `model` itself may have
    none. Every rank must call it."""
    on_first(lambda: _save_model(model, weights, tokenizer, folder))


def _save_model(
    model: PreTrainedModel, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with quiet():
            model.save_pretrained(partial, state_dict=weights)
        tokenizer.save_pretrained(partial)
        flush_tree(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # half a model must not take up room on a full disk
        raise
    for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, folder / file.name)
    partial.rmdir()
    flush(folder)


class Checkpointer:
    """Writes and reads the checkpoints of one run. The number of ranks may differ between writing and reading."""

    def __init__(
        self,
        folder: Path,
        models: Mapping[str, PreTrainedModel],
        tokenizer: PreTrainedTokenizerBase,
        parts: Mapping[str, Stateful],
        data: Mapping[str, str],
        functions: Mapping[str, str] | None = None,
    ) -> None:
        """`models`: folder in a checkpoint ("" for the policy) -> model to train, before training. `parts`: name ->
        other object with a state. `data`: fingerprint of the data of the run (`Data.fingerprint`)."""
        self.folder = folder
        self._models, self._tokenizer, self._data = models, tokenizer, data
        self._parts = {**parts, "random": GlobalRandomness()}
        self._functions = dict(functions or {})
        self._start = _start(models)
        self.checkpoint_bytes = sum(map(_checkpoint_bytes, models.values()))
        """Estimated bytes of one checkpoint, known before the first step: weights, both moments, float32 copies."""
        self.model_bytes = sum(map(_model_bytes, models.values()))
        """Estimated bytes of the files that the run writes at its end."""
        self._marked: dict[str, dict[str, Any]] = {}
        self._marked_position: list[int | None] | None = None

    def path(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    def save(self, step: int, limit: int = 0) -> Path:
        """Writes `checkpoint-STEP` and keeps only the newest `limit` checkpoints (0: all). Every rank must call it and
        writes its own part. If one rank cannot write, all ranks raise OSError and older checkpoints are not deleted.
        """
        write_folder(self.path(step), lambda partial: self._fill(partial, step))
        if limit:
            on_first(lambda: self._discard(step, limit))
        return self.path(step)

    def mark(self) -> None:
        """Records the state of the parts at the end of a step; for optimisers, only the number of steps done."""
        self._marked = {name: part.state_dict() for name, part in self._parts.items() if not _is_optimizer(name)}
        self._marked_position = self._position()

    @property
    def is_at_mark(self) -> bool:
        """Whether no weight has changed since the last `mark`; True before the first one."""
        return self._marked_position in (None, self._position())

    def back_to_mark(self) -> bool:
        """Restores the parts to their state at the last `mark`, so that the step before it can still be saved. Returns
        False, without restoring, if weights have changed since."""
        if not self.is_at_mark:
            return False
        for name, state in self._marked.items():
            self._parts[name].load_state_dict(state)
        return True

    def _position(self) -> list[int | None]:
        return [getattr(part, "num_done", None) for name, part in self._parts.items() if _is_optimizer(name)]

    def load(self, weights_only: bool = False, changed_functions: bool = False) -> int:
        """Loads the newest undamaged checkpoint and returns its step; returns 0 if there is no checkpoint. With
        `weights_only` it loads only the weights, and all other parts start anew at that step. Raises ValueError as
        `find_checkpoint` does, and if the checkpoint belongs to other models or to a run that started from other
        weights.
        """
        path = find_checkpoint(self.folder, weights_only)
        if path is None:
            if is_unfinished(str(self.folder)):
                log.warning("%s: the run before was stopped without a checkpoint; this one starts again", self.folder)
            return 0
        state = json.loads((path / "state.json").read_bytes())
        if state["start"] != self._start:
            raise ValueError(
                f"output_dir: the run of {str(path)!r} started from other weights than those of the models in the "
                "configuration; use the old models or choose another folder"
            )
        known = self._functions
        for name, digest in state.get("functions", {}).items():  # names are paths relative to any working directory
            same = known[name] == digest if name in known else not known or digest in known.values()
            if not same and not changed_functions:
                raise ValueError(
                    f"output_dir: the file of {name!r} has changed since {str(path)!r} was saved; restore the old "
                    "file, choose another folder, or set resume_changed_functions"
                )
        for name, model in self._models.items():
            load_trained_weights(model, path / name / "model")
        for name, part in self._parts.items():
            if name not in state["parts"]:
                if not part.state_dict():
                    continue
                raise ValueError(f"{str(path)!r} has no state of {name!r}: another version of fastrlhf wrote it")
            # Moments have the size and the sharding of the weights.
            pattern = next(self._models[""].parameters()) if _is_optimizer(name) else None
            tensors = read_tensors(path / name, pattern) if exists(path / name) and not weights_only else {}
            part.load_state_dict({**state["parts"][name], **tensors})
        log.info("resuming from %s%s", path, ", weights only" if weights_only else "")
        return state["step"]

    def _fill(self, folder: Path, step: int) -> None:
        parts, tensors = {}, {}
        for name, part in self._parts.items():
            if not (state := part.state_dict()):
                continue
            tensors[name] = {key: value for key, value in state.items() if isinstance(value, Tensor)}
            parts[name] = {key: value for key, value in state.items() if key not in tensors[name]}
        origin = {"data": dict(self._data), "start": self._start, "functions": self._functions}
        on_first(lambda: self._write_rest(folder, {"step": step, **origin, "parts": parts}))
        for name, model in self._models.items():
            write_tensors(folder / name / "model", trained_weights(model))
        for name in tensors:
            write_tensors(folder / name, tensors[name])

    def _write_rest(self, folder: Path, state: dict[str, Any]) -> None:
        for name, model in self._models.items():
            save_configs(model, folder / name)
            self._tokenizer.save_pretrained(folder / name)
        (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")

    def drop_oldest(self, limit: int) -> bool:
        """Makes room on a full disk: deletes the oldest checkpoint if `save_total_limit` would delete it after the next
        save, but never the only checkpoint. Returns whether it deleted one."""
        found = checkpoints(self.folder)
        if not limit or len(found) <= max(limit - 1, 1):
            return False
        log.warning("%s is deleted to make room (save_total_limit %d)", found[0], limit)
        discard_folder(found[0])
        return True

    def _discard(self, step: int, limit: int) -> None:
        for old in [old for old in checkpoints(self.folder) if _step(old) <= step][:-limit]:
            discard_folder(old)


def checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints of a folder by step, the oldest first."""
    return sorted((path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()), key=_step)


def find_checkpoint(folder: Path, weights_only: bool = False) -> Path | None:
    """Returns the newest undamaged checkpoint, or None if there are no checkpoints. Damaged ones are skipped with a
    warning; with `weights_only` only the weights and the step must be undamaged. Raises ValueError, with a description
    of the damage, if all checkpoints are damaged. Every rank must call it.
    """
    damages = []
    for path in reversed(on_first(lambda: checkpoints(folder))):
        try:
            check_folder(path, lambda name: not weights_only or _is_needed(name))
        except ValueError as damage:
            log.warning("%s is skipped: %s", path, damage)
            damages.append(f"{path.name}: {damage}")
        else:
            return path
    if damages:
        raise ValueError(
            f"output_dir: no checkpoint in {str(folder)!r} is whole ({'; '.join(damages)}); restore the file, move the "
            "folder away to start again, or set resume_weights_only if the weights are intact"
        )
    return None


def check_same_data(path: str, data: Mapping[str, str]) -> None:
    """Raises ValueError, naming the split, if the newest checkpoint in the folder was trained on other data. Every
    rank must call it."""
    for checkpoint in reversed(on_first(lambda: checkpoints(Path(path)))):
        try:
            check_folder(checkpoint, lambda name: name == "state.json")
        except ValueError:
            continue  # `load` will skip it with a warning
        before = json.loads((checkpoint / "state.json").read_bytes())["data"]
        for split, content in data.items():
            if before.get(split) != content:
                raise ValueError(
                    f"output_dir: {str(checkpoint)!r} was trained on another dataset: {split} was {before.get(split)} "
                    f"and is {content}; use the old dataset or choose another folder"
                )
        return


def _is_needed(name: str) -> bool:
    """Returns whether a file of a checkpoint is needed if only the weights are read."""
    return name == "state.json" or "model.shards" in Path(name).parts or Path(name).name == "model.safetensors"


def _counts(file: Path) -> bool:
    return not file.name.startswith(".") and (file.is_dir() or file.stat().st_size > 0)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def trained_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Returns trained weights and persistent buffers by name, tied weights once. Frozen weights are not saved, because
    the model that the run starts from has them."""
    kept = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    kept |= {name for name, _ in model.named_buffers()}
    return {name: tensor for name, tensor in model.state_dict().items() if name in kept}


def _checkpoint_bytes(model: PreTrainedModel) -> int:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    updated = sum(parameter.numel() * (8 if parameter.dtype == torch.float32 else 12) for parameter in trained)
    return updated + sum(tensor.numel() * tensor.element_size() for tensor in trained_weights(model).values())


def _model_bytes(model: PreTrainedModel) -> int:
    least = 4 if has_adapter(model) else 0  # the merged model is float32
    return sum(parameter.numel() * max(parameter.element_size(), least) for parameter in model.parameters())


def _start(models: Mapping[str, PreTrainedModel]) -> str:
    """Returns a fingerprint of the weights before training: a hash of the first entries of every tensor. Trained
    weights have another fingerprint, because training changes most of these entries."""
    tensors = beginnings((tensor for model in models.values() for tensor in model.parameters()), 64)
    return hashlib.sha256(torch.cat(tensors).numpy().tobytes()).hexdigest() if tensors else ""


@torch.no_grad()
def load_trained_weights(model: PreTrainedModel, stem: Path) -> None:
    """Loads weights into the existing tensors, to which the optimiser refers."""
    own, described = trained_weights(model), on_each(lambda: describe_tensors(stem))[0]
    for name in sorted(own.keys() ^ described.keys()):
        raise ValueError(f"{str(stem)!r} is of another model: {name} is missing in the checkpoint or in the model")
    for name, tensor in own.items():
        dtype, shape = described[name]
        if shape != tensor.shape or dtype != tensor.dtype:
            raise ValueError(
                f"{str(stem)!r} is of another model: {name} is {dtype} {list(shape)} in the checkpoint "
                f"and {tensor.dtype} {list(tensor.shape)} in the model"
            )
    read_into(stem, own)
