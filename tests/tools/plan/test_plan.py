"""Compares planned peaks with measured peaks of tiny runs (see tests/tools/measure.py), and tests the printed
advice."""

from dataclasses import replace

import pytest
import torch

from fastrlhf.cli import main
from fastrlhf.tools.plan.advice import advise
from fastrlhf.tools.plan.phases import readable
from fastrlhf.tools.plan.plan import format_plan, plan_run
from tests.tools import measure

WITHIN = 0.03
"""Allowed error relative to the measured peak. The largest observed error is 1.3 %."""


@pytest.mark.parametrize(
    "command",
    [pytest.param(name, marks=measure.needs_bitsandbytes if name == "qlora" else ()) for name in measure.TRAINERS],
)
def test_the_peak_is_that_of_real_runs(folder, command):
    """Activations are more than a quarter of the peak, so the test fails if the plan counts only parameters."""
    plan = plan_run(measure.config(folder, command, measure.SIZES))
    assert plan.peak == pytest.approx(measure.measure(folder, command), rel=WITHIN)
    training = next(phase for phase in plan.phases if phase.name.startswith("forward and backward"))
    assert list(training.parts.values())[-1] > plan.peak / 4


def test_a_run_that_fits_gets_no_advice(folder):
    plan = plan_run(measure.config(folder, "sft"), memory_gib=1)
    assert plan.fits
    assert plan.change == ""
    assert "MiB; 92% of a device of 1 GiB is 942 MiB: fits" in format_plan(plan)


def test_a_run_that_fits_is_offered_activation_checkpointing_with_its_memory(folder):
    plan = plan_run(measure.config(folder, "sft", measure.SIZES))
    recomputed = plan_run(measure.config(folder, "sft", measure.SIZES, activation_checkpointing=True))
    offer = f"--activation_checkpointing true: {readable(recomputed.peak)}, for about a third more time"
    assert recomputed.peak < plan.peak
    assert format_plan(plan).endswith(f": fits\n{offer}")
    assert recomputed.offer == ""


def test_auto_is_planned_in_float32_for_a_cpu_and_in_bfloat16_for_a_gpu(folder):
    config = measure.config(folder, "sft", dtype="auto")
    for planned, memory_gib, dtype in (
        (config, 0.0, "float32"),
        (replace(config, device="auto"), 80.0, "bfloat16"),
        (config, 80.0, "float32"),
    ):
        plan = plan_run(planned, memory_gib=memory_gib)
        same = plan_run(replace(planned, dtype=dtype), memory_gib=memory_gib)
        assert f"weights in {dtype}" in plan.facts
        assert plan == same


def test_offloading_activations_is_not_advised_on_a_cpu(folder, monkeypatch):
    """A plan for a CPU with activation_offloading is refused, unless `--memory_gib` gives the memory of a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = measure.config(folder, "sft", activation_checkpointing=True, device="auto")
    assert "--activation_offloading" not in advise(config)
    offloading = replace(config, activation_offloading=True)
    assert plan_run(offloading, memory_gib=1).fits
    with pytest.raises(ValueError, match=r"^activation_offloading: needs a CUDA GPU, and the run is on cpu"):
        plan_run(offloading)


def test_the_command_prints_the_plan_and_mistakes_are_one_line(folder, capsys):
    settings = measure.settings(folder, "sft", measure.SMALL, "reward")
    flags = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    assert main(["plan", "--command", "sft", *flags, "--memory_gib=4"]) == 0
    assert "<- the peak" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--command", "sft", *flags, "--memory_gib", "0.0001"])
    assert ended.value.code == 1
    out = capsys.readouterr().out
    assert "MiB; 92% of a device of 0.0001 GiB is 0 MiB: does not fit\nno change of settings" in out
    assert main(["plan", "--command", "sft", *flags, "--memory_gib", "much"]) == 2
    assert capsys.readouterr().err == "fastrlhf plan: --memory_gib: 'much' is not a number\n"
    assert main(["plan", *flags]) == 2
    assert "--command: no section names the trainer; choose one of sft" in capsys.readouterr().err
