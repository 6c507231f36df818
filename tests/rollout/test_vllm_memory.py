import os

import pytest
import torch

from fastrlhf.rollout.vllm_memory import ALIGNMENT, SharedMemory, groups

CPU = torch.device("cpu")


def test_another_process_reads_what_was_written_in_any_shape_and_dtype():
    memory = SharedMemory.create()
    other = SharedMemory(os.dup(memory.descriptor))
    weights = [
        ("a", torch.arange(6.0).view(2, 3)),
        ("b", torch.tensor(3, dtype=torch.int64)),
        ("c", torch.arange(5).bfloat16()),
        ("d", torch.arange(12.0).view(3, 4).T),
    ]
    entries = memory.write(weights)
    assert [start % ALIGNMENT for *_, start in entries] == [0] * 4
    read = other.read(entries, CPU)
    assert [(name, weight.dtype) for name, weight in read] == [(name, weight.dtype) for name, weight in weights]
    assert all(torch.equal(mine, theirs) for (_, mine), (_, theirs) in zip(weights, read, strict=True))


def test_what_was_read_is_a_copy_and_the_memory_grows():
    memory = SharedMemory.create()
    other = SharedMemory(os.dup(memory.descriptor))
    [(_, first)] = other.read(memory.write([("a", torch.ones(10))]), CPU)
    [(_, second)] = other.read(memory.write([("b", torch.full((100_000,), 2.0))]), CPU)
    assert os.fstat(memory.descriptor).st_size == 400_000
    assert torch.equal(first, torch.ones(10))
    assert torch.equal(second, torch.full((100_000,), 2.0))
    memory.write([("c", torch.zeros(10))])
    assert os.fstat(memory.descriptor).st_size == 400_000
    assert second[0] == 2


def test_memory_that_is_dropped_is_given_back():
    memory = SharedMemory.create()
    descriptor = memory.descriptor
    os.fstat(descriptor)
    del memory
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


@pytest.mark.parametrize(
    ("size", "expected"), [(64, [1, 1, 1, 1]), (128, [2, 1, 1]), (320, [2, 2]), (10_000, [4])], ids=str
)
def test_groups_keep_the_order_and_have_a_limited_size(size, expected):
    """With padding the four weights have 64, 64, 256 and 64 bytes. A weight larger than `size` is a separate group."""
    weights = [(name, torch.zeros(length)) for name, length in {"a": 1, "b": 16, "c": 50, "d": 2}.items()]
    found = list(groups(weights, size))
    assert [len(group) for group in found] == expected
    assert [name for group in found for name, _ in group] == ["a", "b", "c", "d"]
