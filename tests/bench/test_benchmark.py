"""Times the implementations of `python -m bench kernels` with pytest-benchmark:

    BENCH_SHAPE="8192 4096 128256" pytest tests/bench/test_benchmark.py --benchmark-only

Without --benchmark-only each runs once, on a tiny shape, and nothing is timed.
"""

import os

import pytest
import torch

from bench.measure import run
from bench.problems import Case, Problem, make_problem
from bench.providers import Provider, select

pytest.importorskip("pytest_benchmark")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = [int(number) for number in os.environ.get("BENCH_SHAPE", "64 64 500").split()]


@pytest.fixture(scope="module")
def problem() -> Problem:
    return make_problem(Case(*SHAPE), torch.bfloat16 if DEVICE.type == "cuda" else torch.float32, DEVICE)


@pytest.mark.parametrize("provider", select(DEVICE), ids=lambda provider: f"{provider.task}-{provider.name}")
def test_speed(provider: Provider, problem: Problem, benchmark, request: pytest.FixtureRequest):
    if provider.missing:
        pytest.skip(f"{provider.name} is not installed")
    benchmark.group = provider.task
    benchmark.disabled = not request.config.getoption("benchmark_only")
    step = provider.asked.step(provider.function, problem)

    def timed():
        run(step)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(timed, rounds=5, warmup_rounds=1)
