"""Measures one update of one implementation: `python -m bench.drpo.block SIDE PROBLEM`, with PROBLEM as JSON.

The measurement runs in a separate process, which has its own memory peak and, for TRL, its own import path. The last
line that the process prints is the result row.
"""

from __future__ import annotations

import gc
import json
import resource
import sys
from time import perf_counter
from typing import Any

import torch

from bench.drpo.contestants import CONTESTANTS, PHASES
from bench.drpo.problem import Problem, make_examples, make_models
from bench.mfu import utilisation
from bench.results import device_name


def run_block(side: str, problem: Problem) -> dict[str, Any]:
    """Runs one update of the implementation `side` and returns its result row.

    The row holds seconds (by `Clock`, and wall-clock), tokens, speed and MFU of the training phase, and the peak memory
    in MB beyond weights, gradients and optimiser state. On a GPU one micro-batch runs first as a warm-up, which loads
    and compiles kernels. On a CPU one thread is used.
    """
    cuda = problem.device == "cuda"
    if not cuda:
        torch.set_num_threads(1)  # CPU time of several threads would be summed
    examples = make_examples(problem)
    contestant = CONTESTANTS[side](problem, make_models(problem, examples))
    weights = torch.cuda.memory_allocated() if cuda else _most_bytes(cuda)
    if cuda:
        contestant.update(examples[: problem.micro_batch], epochs=1)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(problem.seed)
    start = perf_counter()
    row = contestant.update(examples, problem.epochs)
    operations_per_second = row["training_operations"] / row["training"]
    return {
        "provider": contestant.name,
        "seconds": sum(row[phase] for phase in PHASES),
        **row,
        "training_tokens_per_second": row["training_tokens"] / row["training"],
        "training_tflops": operations_per_second / 1e12,
        "training_mfu": utilisation(operations_per_second, device_name(problem.device)),
        "wall_seconds": perf_counter() - start,
        "extra_mb": (_most_bytes(cuda) - weights - contestant.state_bytes) / 1e6,
        "threads": torch.get_num_threads(),
    }


def _most_bytes(cuda: bool) -> int:
    """Returns the peak memory so far in bytes: allocated memory on a GPU, resident memory of this process on a CPU."""
    return torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    print(json.dumps(run_block(sys.argv[1], Problem(**json.loads(sys.argv[2])))))
