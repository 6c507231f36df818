import torch

from fastrlhf_kernels._segments import segment_of_row, segment_sum


def test_rows_find_their_segment_across_empty_ones():
    cu_seqlens = torch.tensor([0, 0, 2, 2, 3, 3], dtype=torch.int32)
    assert segment_of_row(cu_seqlens, 3).tolist() == [1, 1, 3]


def test_segments_are_summed_and_the_gradient_is_handed_to_their_rows():
    cu_seqlens = torch.tensor([0, 0, 2, 3], dtype=torch.int32)
    rows = torch.tensor([1.0, 2.0, 5.0], requires_grad=True)
    sums = segment_sum(rows, cu_seqlens, segment_of_row(cu_seqlens, 3))
    assert sums.tolist() == [0.0, 3.0, 5.0]
    (sums * torch.tensor([7.0, 11.0, 13.0])).sum().backward()
    assert rows.grad.tolist() == [11.0, 11.0, 13.0]


def test_a_pack_without_rows_sums_to_zeros():
    cu_seqlens = torch.tensor([0, 0, 0])
    assert segment_sum(torch.zeros(0), cu_seqlens, segment_of_row(cu_seqlens, 0)).tolist() == [0.0, 0.0]


def test_a_sum_has_the_same_bits_whatever_pack_it_lies_in():
    rows = torch.randn(40, generator=torch.Generator().manual_seed(0))
    alone, inside = torch.tensor([0, 40]), torch.tensor([0, 3, 43, 50])
    packed = torch.cat([torch.ones(3), rows, torch.ones(7)])
    assert torch.equal(
        segment_sum(rows, alone, segment_of_row(alone, 40))[0],
        segment_sum(packed, inside, segment_of_row(inside, 50))[1],
    )
