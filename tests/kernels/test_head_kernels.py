"""Compiles all Triton kernels without a GPU. test_linear_logprob.py tests the numbers that the kernels compute."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OLDEST_TRITON = os.environ.get("FASTRLHF_TRITON_36", "")  # a folder with triton 3.6.0; `make test` installs it


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("version", ["installed", "3.6.0"])
def test_every_kernel_compiles_without_spills_and_with_the_units_it_is_for(version: str, arch: int):
    """Compiles in a child process, because kernels are interpreted in this process and a crash of the compiler would
    end it."""
    if version != "installed" and not OLDEST_TRITON:
        pytest.skip("FASTRLHF_TRITON_36 names no folder with triton 3.6.0")
    path = [str(ROOT), str(ROOT / "kernels")]
    path = path if version == "installed" else [OLDEST_TRITON, *path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "bench", "aot", "--arch", str(arch), "--check"]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    heading, _, *rows = [line for line in run.stdout.splitlines() if line.startswith("|")]
    assert version in ("installed", heading.split()[2])
    assert len(rows) >= 25
    assert sum("matrix" in row for row in rows) >= 9
    assert sum("TMA" in row for row in rows) >= (9 if arch >= 90 else 0)
