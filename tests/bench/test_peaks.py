"""Checks with `python -m bench peaks` that each of two processes needs at most 0.6 of the memory of a single
process."""

import pytest
import torch

from bench.peaks import Live, compare

KINDS = ("experts",)


@pytest.fixture(scope="module")
def peaks():
    return compare(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_of_two_needs_little_more_than_its_half(peaks, kind):
    one, *two = peaks[kind]
    for phase in ("load", "rollout", "judge", "step"):
        assert one[phase] > 20e6, "the weights of a single process are counted"
        assert all(0.4 < each[phase] / one[phase] <= 0.6 for each in two), (phase, one, two)


def test_live_storages_are_counted_until_they_are_freed():
    with Live() as live:
        kept = torch.zeros(10_000)
        torch.zeros(20_000)
        freed = torch.zeros(30_000)
        assert live.peak == 4 * 60_000 or live.peak == 4 * 40_000
        freed.untyped_storage().resize_(0)
        assert live.live() == kept.nbytes
        assert live.restart() >= 4 * 40_000
        assert live.peak == kept.nbytes
