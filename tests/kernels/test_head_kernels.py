"""The values of these kernels are tested in test_linear_logprob.py; here, what the compiler makes of them."""

import os
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_kernel_compiles_without_spills_and_with_the_units_it_is_for(arch: int):
    """In a process of its own: this one interprets the kernels, and a compiler that crashes takes its process along."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/kernels"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "bench", "aot", "--arch", str(arch), "--check"]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    rows = [line for line in run.stdout.splitlines() if f"| {arch} |" in line]
    assert len(rows) >= 19
    assert sum("| yes |" in line for line in rows) >= 9
