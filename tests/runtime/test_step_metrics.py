import json

import torch

from fastrlhf.runtime.step_metrics import StepMetrics
from fastrlhf_kernels import Max, Sum


def test_sums_are_divided_by_the_count_and_maxima_are_kept():
    totals = StepMetrics()
    totals.add({"loss": Sum(torch.tensor(3.0)), "pairs": Sum(torch.tensor(1.0)), "top": Max(torch.tensor(0.5))})
    totals.add({"loss": Sum(torch.tensor(5.0)), "pairs": Sum(torch.tensor(3.0)), "top": Max(torch.tensor(0.25))})
    assert totals.means("pairs") == {"loss": 2.0, "pairs": 1.0, "top": 0.5}


def test_a_checkpoint_continues_the_sums_bit_for_bit_and_those_of_other_ranks_in_the_first():
    third, whole, cut = torch.tensor(1 / 3), StepMetrics(), StepMetrics()
    first, second = ({"loss": Sum(third * i), "pairs": Sum(torch.tensor(1.0)), "top": Max(third / i)} for i in (1, 7))
    for totals in (whole, cut):
        totals.add(first)
    saved = json.loads(json.dumps(cut.by_rank()))
    resumed = StepMetrics()
    resumed.load(saved, torch.device("cpu"))
    for totals in (whole, resumed):
        totals.add(second)
    assert resumed.means("pairs") == whole.means("pairs")
    of_two = StepMetrics()
    of_two.load([saved[0], {name: [kind, 2.0] for name, (kind, _) in saved[0].items()}], torch.device("cpu"))
    assert of_two.means("pairs") == {"loss": (third + 2).item() / 3, "pairs": 1.0, "top": 2.0}


def test_the_mean_of_this_rank_is_0_before_anything_was_added():
    totals = StepMetrics()
    assert totals.own_mean("clipped", "tokens") == 0.0
    totals.add({"clipped": Sum(torch.tensor(3.0)), "tokens": Sum(torch.tensor(12.0))})
    assert totals.own_mean("clipped", "tokens") == 0.25
