"""Tests of the advice that is printed after a run has run out of memory."""

from fastrlhf.tools.plan import advice
from fastrlhf.tools.plan.advice import advise
from fastrlhf.tools.plan.plan import plan_run
from tests.tools import measure


def test_the_largest_parts_come_first_and_a_run_that_seemed_to_fit_gets_advice(folder):
    config = measure.config(folder, "sft")
    plan = plan_run(config)
    assert plan.fits
    told = advise(config)
    parts = sorted(plan.phases[0].parts.items(), key=lambda part: -part[1])
    places = [told.index(what) for what, _ in parts[:3]]
    assert places == sorted(places)
    assert parts[3][0] not in told
    changed = int(told.partition("--micro_batch_tokens ")[2].split(":")[0])
    assert plan_run(measure.config(folder, "sft", micro_batch_tokens=changed)).peak <= 0.8 * plan.peak


def test_with_several_processes_the_numbers_are_per_process(folder, monkeypatch):
    config = measure.config(folder, "sft")
    alone = advise(config)
    monkeypatch.setattr(advice, "world_size", lambda: 4)
    share = " for a single process (each of the 4 holds a share of weights, gradients and moments)"
    assert advise(config).replace(share, "") == alone != advise(config)
