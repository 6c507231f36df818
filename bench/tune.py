"""Finds the fastest tile sizes on a GPU: times the fused forward and gradient kernels of the head for each candidate.

Enter the fastest sizes by hand in `_tiles.py`, then check with `python -m bench aot` that they fit on all
architectures.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import chain

import torch

from bench.kernels import SHAPES
from bench.measure import Tensors, interleave, relative_error, run
from bench.problems import TASKS, Case, Problem, make_problem
from bench.providers import ours
from fastrlhf_kernels._tiles import FORWARD, GRADIENT, Pinned, Tiles

CANDIDATES = (
    Tiles(128, 256, 64, 8, 3, descriptors=True),
    Tiles(128, 256, 64, 8, 4, descriptors=True),
    Tiles(256, 128, 64, 8, 3, descriptors=True),
    Tiles(128, 128, 64, 8, 4, descriptors=True),
    Tiles(128, 128, 64, 4, 4, descriptors=True),
    Tiles(128, 128, 128, 8, 3, descriptors=True),
    Tiles(128, 128, 64, 8, 3, descriptors=False),
)
AGREE = 1e-2  # allowed relative error; two correct gradients differ by 3e-3, because they are rounded to bfloat16


def run_tune(runs: int) -> None:
    """Prints the candidates for each kernel and shape, fastest first; * marks the tiles that are in use now."""
    major = torch.cuda.get_device_capability()[0]
    for shape in SHAPES:
        problem = make_problem(Case(*shape), torch.bfloat16, torch.device("cuda"))
        for name, table in (("forward", FORWARD), ("gradient", GRADIENT)):
            lines = compare(name, table, major, problem, runs)
            print(f"\n### {name}, T = {shape[0]}, D = {shape[1]}, V = {shape[2]}\n", *lines, sep="\n", flush=True)


def compare(name: str, table: dict[int, Pinned], major: int, problem: Problem, runs: int) -> list[str]:
    """Times each candidate in the "forward" or the "gradient" kernel; returns lines of text, fastest first.

    The results of a candidate are first compared with the torch path. The head is frozen, so that the backward consists
    of the gradient kernel and one product.
    """
    pinned = table[major]
    task = TASKS["frozen head"]
    expected = chain(*run(task.step(partial(ours, impl="torch"), problem)))
    expected = [tensor.detach().double() for tensor in expected]

    def with_tiles(p: Problem, tiles: Tiles) -> Tensors:
        table[major] = Pinned(tiles, tiles)
        return ours(p)

    steps, refused = {}, []
    for tiles in CANDIDATES:
        step = task.step(partial(with_tiles, tiles=tiles), problem)
        try:
            error = max(map(relative_error, chain(*run(step)), expected))
        except Exception as exception:
            refused.append(f"refused     {tuple(tiles)}: {str(exception).splitlines()[0][:100]}")
            continue
        if error < AGREE:
            steps[tiles] = step
        else:
            refused.append(f"refused     {tuple(tiles)}: wrong by {error:.2g}")
    times = interleave(steps, problem.hidden.device, runs, seconds=math.inf)
    table[major] = pinned
    column = "forward_ms" if name == "forward" else "backward_ms"
    found = sorted((t[column], tiles) for tiles, t in times.items() if isinstance(t, dict))
    return [f"{ms:8.3f} ms {'*' if tiles == pinned.light else ' '}{tuple(tiles)}" for ms, tiles in found] + refused
