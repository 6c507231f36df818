"""Rows of measurements: one JSON object per line, each with what it was measured on."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

RESULTS = Path(__file__).parent / "results"


def append_row(row: Mapping[str, Any], folder: Path = RESULTS) -> None:
    """Appends the row, with commit, date, versions and device, to the file of this device."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu-{platform.machine()}"
    folder.mkdir(parents=True, exist_ok=True)
    stamp = {
        "device": device,
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    name = device.lower().replace(" ", "_")
    with (folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({**row, **stamp}) + "\n")


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    return run.stdout.strip()
