"""Counts the instructions that a kernel executes for a tile of logits, outside the loop of the matrix product.

    instructions of a tile = the shortest path through the control flow that multiplies and exponentiates
                             - the shortest cycle that multiplies (one step of the matrix product)

The path runs around the loop over tiles, or from start to end in a kernel with one tile per program. The shortest
path leaves out the branches for rare tiles: the last columns of the vocabulary, and a tile that contains a target.
"""

from __future__ import annotations

import heapq
import re
from typing import NamedTuple

LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)([^;]*);")
MATRIX_UNITS = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA|UTCMMA)\b")
ASYNC_LOADS = re.compile(r"\b(UTMALDG|LDGSTS)\b")
TMA_LOAD = re.compile(r"\bUTMALDG\b")
MULTIPLIES, EXPONENTIATES = 1, 2
ENDS = {"EXIT", "RET", "BRX", "JMX", "KILL"}


class Block(NamedTuple):
    """A run of instructions that is entered only at its start and left only at its end."""

    size: int
    """Number of instructions."""
    work: int
    """Kinds of work in the block: MULTIPLIES, EXPONENTIATES, both, or 0."""
    next: tuple[int, ...]
    """Indices of the blocks that may follow."""


def blocks(sass: str) -> list[Block]:
    """Splits the listing of one kernel (`cuobjdump -sass`) into blocks; the kernel starts with block 0."""
    code = [(int(m[1], 16), bool(m[2]), m[3].split(".")[0], m[3] + m[4]) for m in LINE.finditer(sass)]
    places = {address: i for i, (address, *_) in enumerate(code)}
    targets: dict[int, int] = {}
    starts = {0}
    for i, (_, _, name, text) in enumerate(code):
        if name == "BRA":
            targets[i] = places[int(re.findall(r"0x([0-9a-f]+)", text)[-1], 16)]
            starts |= {targets[i], i + 1}
        elif name in ENDS:
            starts.add(i + 1)
    edges = sorted(start for start in starts if start < len(code))
    index = {start: b for b, start in enumerate(edges)}
    found = []
    for b, start in enumerate(edges):
        stop = edges[b + 1] if b + 1 < len(edges) else len(code)
        _, conditional, name, _ = code[stop - 1]
        following = [index[targets[stop - 1]]] if stop - 1 in targets else []
        if (conditional or (name not in ENDS and name != "BRA")) and stop in index:
            following.append(index[stop])
        text = "\n".join(text for *_, text in code[start:stop])
        work = MULTIPLIES * bool(MATRIX_UNITS.search(text)) + EXPONENTIATES * ("MUFU.EX2" in text)
        found.append(Block(stop - start, work, tuple(following)))
    return found


def shortest(graph: list[Block], start: int, goal: int | None, work: int) -> int | None:
    """Returns the fewest instructions on a path that does all of `work`, from the start of block `start` to the start
    of block `goal`, or to the end of the kernel if `goal` is None. A path has at least one edge. Returns None if no
    path does all of `work`."""
    best: dict[tuple[int, int], int] = {}
    queue = [(0, start, 0)]
    while queue:
        length, b, done = heapq.heappop(queue)
        if b == goal and length and done & work == work:
            return length
        if best.get((b, done), length + 1) <= length and length:
            continue
        if length:
            best[b, done] = length
        length, done = length + graph[b].size, done | graph[b].work
        if goal is None and not graph[b].next and done & work == work:
            return length
        for following in graph[b].next:
            if length < best.get((following, done), length + 1):
                heapq.heappush(queue, (length, following, done))
    return None


def instructions_per_tile(sass: str) -> int | None:
    """Returns the number of instructions that each thread executes for a tile, outside the loop of the matrix product;
    None if the kernel does not both multiply and exponentiate."""
    graph = blocks(sass)
    multiplying = [b for b, block in enumerate(graph) if block.work & MULTIPLIES]
    exponential = [b for b, block in enumerate(graph) if block.work & EXPONENTIATES]
    steps = [length for b in multiplying if (length := shortest(graph, b, b, MULTIPLIES))]
    both = MULTIPLIES | EXPONENTIATES
    tiles = [length for b in exponential if (length := shortest(graph, b, b, both))]
    if not steps or not exponential:
        return None
    tile = min(tiles) if tiles else shortest(graph, 0, None, both)
    return None if tile is None else tile - min(steps)
