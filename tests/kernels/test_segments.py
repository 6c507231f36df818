import torch

from fastrlhf_kernels._segments import segment_of_row, segment_sum


def test_rows_find_their_segment_across_empty_ones():
    cu_seqlens = torch.tensor([0, 0, 2, 2, 3, 3], dtype=torch.int32)
    assert segment_of_row(cu_seqlens, 3).tolist() == [1, 1, 3]


def test_segments_are_summed_across_empty_ones():
    cu_seqlens = torch.tensor([0, 0, 2, 3, 3], dtype=torch.int32)
    assert segment_sum(torch.tensor([1.0, 2.0, 5.0]), cu_seqlens).tolist() == [0.0, 3.0, 5.0, 0.0]


def test_a_pack_without_rows_sums_to_zeros():
    assert segment_sum(torch.zeros(0), torch.tensor([0, 0, 0])).tolist() == [0.0, 0.0]


def test_a_sum_has_the_same_bits_in_every_pack():
    rows = torch.randn(40, generator=torch.Generator().manual_seed(0))
    packed = torch.cat([torch.ones(3), rows, torch.ones(7)])
    alone, inside = segment_sum(rows, torch.tensor([0, 40])), segment_sum(packed, torch.tensor([0, 3, 43, 50]))
    assert torch.equal(alone[0], inside[1])
