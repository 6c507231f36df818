"""Times the ops of another checkout of this project, in a process that runs the code of that checkout, for `python -m
bench kernels`. Both builds run alternately in every round, so that clock speed and other jobs on the machine affect
both equally.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from bench.problems import Case

PROGRAM = """
import json, sys
import torch
from bench.measure import Timer, peak_extra_bytes, run
from bench.problems import Case, make_problem
from bench.providers import PROVIDERS
case, task, name, dtype, device, threads = json.loads(sys.argv[1])
torch.set_num_threads(threads)
device, timer = torch.device(device), Timer(torch.device(device))
found = [p for p in PROVIDERS if (p.task, p.name) == (task, name)]
if not found:
    sys.exit(print(json.dumps(None)))
(provider,) = found
step = provider.asked.step(provider.function, make_problem(Case(*case), getattr(torch, dtype), device))
run(step)
print(json.dumps(peak_extra_bytes(step, device)[0]), flush=True)
for line in sys.stdin:
    print(json.dumps(timer(step)), flush=True)
"""


class Beside:
    """A step of another checkout, in its own process; a call runs the step and returns milliseconds of (forward,
    backward)."""

    def __init__(self, folder: Path, case: Case, task: str, name: str, dtype: str, device: str, threads: int) -> None:
        path = os.pathsep.join(map(str, (folder, folder / "kernels")))
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps([case, task, name, dtype, device, threads])],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.extra_bytes: int | None = self._read()
        """Peak memory of a step beyond inputs and returned gradients; None if the build lacks this implementation."""

    def __call__(self) -> tuple[float, float]:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        forward, backward = self._read()
        return forward, backward

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self):
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the other build ended with code {self._process.wait()}; its error is printed above")
        return json.loads(line)


def commit_of(folder: Path) -> str:
    """Returns the commit of a checkout."""
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
