"""`python -m bench optim`: measures memory per trained bfloat16 weight and time of an update, for each optimiser. Each
optimiser runs in a separate process and updates square matrices twice with given gradients; its moments exist after the
first update. The reported memory is the peak of the process minus its memory before the weights exist. It includes
weights, gradients, moments, copies, and the temporary tensors of an update.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch.nn import Linear, Sequential

from bench.results import RESULTS, append_row, device_name
from fastrlhf.config import SFTConfig
from fastrlhf.runtime.optim import Optimizer

WIDTH = 1024
M_MMAP_THRESHOLD = -3
SETTINGS = [
    ("torch", ""),
    ("adamw_torch_fused", "float32"),
    ("adamw_torch_fused", "stochastic_rounding"),
    ("adamw_8bit", "float32"),
    ("adamw_8bit", "stochastic_rounding"),
]
"""Measured values of (`optim`, `master_weights`). "torch": torch's AdamW on float32 weights, as used with autocast."""


def run_optim(matrices: int, device: str, folder: Path = RESULTS) -> str:
    """Measures each optimiser setting, appends a row for it, and returns the table in Markdown.

    8-bit optimisers need bitsandbytes and are skipped without it.
    """
    settings = [pair for pair in SETTINGS if "8bit" not in pair[0] or find_spec("bitsandbytes")]
    lines = ["| optim | master_weights | bytes per parameter | seconds per update |", "|---|---|---|---|"]
    for optim, masters in settings:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            measured = pool.submit(partial(measure, optim, masters, matrices, device)).result()
        row = {"bench": "optim", "optim": optim, "master_weights": masters, "parameters": matrices * WIDTH**2}
        append_row({**row, **measured, "device": device_name(device)}, folder)
        lines.append(f"| {optim} | {masters} | {measured['bytes']:.2f} | {measured['seconds']:.2f} |")
    return "\n".join(lines)


def measure(optim: str, masters: str, matrices: int, device: str) -> dict[str, float]:
    """Runs two updates in this process; returns peak bytes per parameter and the seconds of the second update."""
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)  # returns the memory of freed tensors to the system
    _updates(optim, masters, 1, device)  # loads libraries now, so that their memory does not count
    before = _start_of_peak(device)
    seconds = _updates(optim, masters, matrices, device)
    return {"bytes": (_peak(device) - before) / (matrices * WIDTH**2), "seconds": seconds}


def _updates(optim: str, masters: str, matrices: int, device: str) -> float:
    dtype = torch.float32 if optim == "torch" else torch.bfloat16
    layers = [Linear(WIDTH, WIDTH, bias=False, device=device, dtype=dtype) for _ in range(matrices)]
    model = Sequential(*layers)
    if optim == "torch":
        step: Any = torch.optim.AdamW(model.parameters(), fused=True).step
    else:
        config = SFTConfig(dtype="bfloat16", optim=optim, master_weights=masters)  # pyright: ignore[reportArgumentType]
        step = Optimizer({"": model}, config, num_steps=2).step
    seconds = 0.0
    for _ in range(2):
        for weight in model.parameters():
            weight.grad = torch.full_like(weight, 0.01)
        start = perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = perf_counter() - start
    return seconds


def _start_of_peak(device: str) -> int:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
