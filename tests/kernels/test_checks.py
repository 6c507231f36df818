from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import fastrlhf_kernels as kernels
from fastrlhf_kernels import _checks as checks

CPU = torch.device("cpu")


def test_a_count_in_float64_leaves_the_loss_in_float32():
    assert (
        torch.ones(()) / checks.divisor("num_tokens", torch.tensor(3.0, dtype=torch.float64))
    ).dtype == torch.float32
    assert checks.divisor("num_tokens", torch.tensor(0)).item() == 1


@pytest.fixture
def split_weight() -> Iterator[DTensor]:
    """A head [9, 4] that is sharded like FSDP's weights: a DTensor in a process group with only this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield distribute_tensor(torch.zeros(9, 4), init_device_mesh("cpu", (1,)), [Shard(0)])
    finally:
        dist.destroy_process_group()


def test_a_dtensor_is_refused_and_the_message_names_full_tensor(split_weight: DTensor):
    hidden, targets, rows = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), torch.zeros(3)
    mask, cu_seqlens = torch.ones(3, dtype=torch.bool), torch.tensor([0, 2, 3])
    calls = (
        lambda weight: kernels.linear_logprob(hidden, weight, targets),
        lambda weight: kernels.linear_kl(hidden, weight, hidden, torch.zeros(9, 4)),
        lambda weight: kernels.linear_policy_loss(hidden, weight, targets, rows, rows, mask, num_tokens=3),
        lambda weight: kernels.linear_pair_loss(hidden, weight, targets, rows, cu_seqlens, mask, num_pairs=1),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"weight is a DTensor.*pass weight.full_tensor\(\)"):
            call(split_weight)
        call(split_weight.full_tensor())
    with pytest.raises(ValueError, match="logits is a DTensor"):
        kernels.logprob_from_logits(split_weight, torch.zeros(9, dtype=torch.int64))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ([1.0, 2.0], r"weight must be a tensor of shape \(2,\), got list"),
        (torch.zeros(3), r"weight must have shape \(2,\), got \(3,\)"),
        (torch.zeros(2).double(), "weight must be .*float32.*got torch.float64"),
        (torch.zeros(2, device="meta"), "weight must be on cpu like the first argument, got meta"),
    ],
)
def test_a_wrong_tensor_is_named_with_the_reason(tensor: object, message: str):
    with pytest.raises(ValueError, match=message):
        checks.check_tensor("weight", tensor, (2,), CPU)


@pytest.mark.parametrize("bounds", [[], [0, 2], [1, 3], [0, 2, 1, 3], [0, 4]])
def test_cu_seqlens_must_rise_from_zero_to_the_number_of_rows(bounds: list[int]):
    with pytest.raises(ValueError, match="cu_seqlens"):
        checks.check_cu_seqlens(torch.tensor(bounds, dtype=torch.int32), 3, CPU)


def test_cu_seqlens_may_hold_empty_segments_or_none_at_all():
    checks.check_cu_seqlens(torch.tensor([0, 0, 3, 3]), 3, CPU)
    checks.check_cu_seqlens(torch.tensor([0]), 0, CPU)


def test_a_count_of_zero_divides_by_one():
    assert checks.divisor("num_tokens", 0) == 1
    assert checks.divisor("num_tokens", torch.tensor(0)) == 1
    assert checks.divisor("num_tokens", 0.25) == 0.25
    assert checks.divisor("num_tokens", torch.tensor(0.25)) == 0.25


@pytest.mark.parametrize("count", [-1, float("nan"), torch.ones(1)])
def test_an_invalid_count_is_refused(count: object):
    with pytest.raises(ValueError, match="num_tokens"):
        checks.divisor("num_tokens", count)


def test_an_open_range_excludes_its_ends():
    """An infinite soft cap is refused, because infinity times tanh(0) is NaN."""
    checks.check_range("clip", 0, 0, 1)
    for value in (0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"softcap must be in \(0, inf\), got"):
            checks.check_range("softcap", value, 0, float("inf"), open_ends=True)
