"""Tests the rows of a single process; tests/distributed/test_ranks.py tests the exchange between two."""

import torch

from fastrlhf.distributed.rows import SpreadRows


def test_a_single_process_finds_every_row_without_a_copy_of_the_tensor():
    values, index = torch.arange(8.0).view(4, 2), torch.tensor([2, 0, 3, 1])
    rows = SpreadRows(values, index).rows(torch.tensor([1]))
    assert rows.values.data_ptr() == values.data_ptr()
    for i in range(4):
        assert torch.equal(rows.at(torch.tensor([index[i], index[0]])), values[[i, 0]])
