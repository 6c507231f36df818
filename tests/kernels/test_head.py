"""Tests which tiles `_head.py` chooses, and how evenly the programs of the forward are distributed over a GPU.
test_linear_logprob.py and test_linear_policy_loss.py test the numbers that `_head.py` computes.
"""

import heapq

import pytest
import torch

from fastrlhf_kernels import _head as head
from fastrlhf_kernels import _tiles as tiles


def test_bias_soft_cap_or_row_temperature_need_narrower_tiles():
    assert not head.is_heavy(None, None, None)
    assert head.is_heavy(torch.zeros(3), None, None)
    assert head.is_heavy(None, torch.ones(3), None)
    assert head.is_heavy(None, None, 30.0)


@pytest.mark.parametrize(("rows", "vocab"), [(8192, 128_256), (16_384, 151_936), (2048, 50_257), (512, 151_936)])
def test_the_programs_of_the_forward_keep_132_multiprocessors_busy(rows: int, vocab: int):
    """Simulates an H100: programs start in order, one per multiprocessor, as soon as a multiprocessor is free."""
    chosen, multiprocessors = tiles.FORWARD[9].light, 132
    row_tiles = tiles.cdiv(rows, chosen.rows)
    lengths = [
        tiles.cdiv(min(head.SHARE, vocab - start), chosen.vocab)
        for first in range(0, row_tiles, head.GROUP)
        for start in range(0, vocab, head.SHARE)
        for _ in range(min(head.GROUP, row_tiles - first))
    ]
    busy_until = [0] * multiprocessors
    for length in lengths:
        heapq.heapreplace(busy_until, busy_until[0] + length)
    assert sum(lengths) / (multiprocessors * max(busy_until)) >= 0.97
