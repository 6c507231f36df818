import pytest
import torch

from fastrlhf_kernels import Max, Sum, merge


def test_sums_add_up_and_maxima_keep_the_largest():
    first = {"tokens": Sum(torch.tensor(3.0)), "ratio_max": Max(torch.tensor(1.5))}
    second = {"tokens": Sum(torch.tensor(4.0)), "ratio_max": Max(torch.tensor(1.25)), "entropy": Sum(torch.tensor(2.0))}
    merged = merge(first, second)
    assert {name: metric.value.item() for name, metric in merged.items()} == {
        "tokens": 7.0,
        "ratio_max": 1.5,
        "entropy": 2.0,
    }
    assert isinstance(merged["ratio_max"], Max)
    assert first["tokens"].value == 3
    assert merge() == {}


def test_merging_a_sum_with_a_max_is_refused():
    with pytest.raises(ValueError, match="metric 'kl' is both a Sum and a Max"):
        merge({"kl": Sum(torch.zeros(()))}, {"kl": Max(torch.zeros(()))})
    with pytest.raises(TypeError):
        Sum(torch.zeros(())) + Max(torch.zeros(()))
