"""What a run leaves on disk. Nothing of the user's is ever overwritten; a folder that exists is complete."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.config_files import write_yaml
from fastrlhf.models.adapters import has_adapter, merge_adapter, save_adapter


def check_output_dir(path: str) -> None:
    """Raises ValueError where the folder already holds anything, or is no folder."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir: {path!r} is a file")
    for name, what in (("config.yaml", "run"), ("config.json", "model")):
        if (folder / name).exists():
            raise ValueError(f"output_dir: {path!r} already holds a {what}; choose another folder or move it away")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"output_dir: {path!r} is not empty; choose a new folder or an empty one")


def holds_model(path: str) -> bool:
    """Whether a run in this folder has finished: the model is what it leaves last."""
    return (Path(path) / "config.json").exists()


def create_output_dir(path: str, config: Any) -> Path:
    """Creates the folder of a run, if need be, and writes the resolved configuration to its config.yaml."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_yaml(config, folder / "config.yaml")
    return folder


def save_trained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path | None) -> None:
    """What a run leaves, in `folder` if there is one: the model with its adapter added to the weights, and the adapter
    alone in `adapter/`."""
    if folder and has_adapter(model):
        save_adapter(model, folder / "adapter")
    merge_adapter(model)
    if folder:
        save_model(model, tokenizer, folder)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes model and tokenizer in `save_pretrained` form into `folder`.

    They are written beside it first and moved in file by file, the weights before the config.json that makes a folder
    a model, so a crash never leaves a half-written model that loads.
    """
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, folder / file.name)
    partial.rmdir()
