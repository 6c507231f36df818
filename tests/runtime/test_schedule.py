import json

import pytest
import torch
from transformers import get_scheduler

from fastrlhf.config import SFTConfig
from fastrlhf.runtime.optim import Optimizer
from fastrlhf.runtime.schedule import schedule

STEPS, PEAK = 20, 2e-3
KINDS = {
    "linear": {},
    "cosine": {},
    "constant_with_warmup": {},
    "cosine_with_restarts": {"num_cycles": 3},
    "polynomial": {"lr_end": 1e-4, "power": 2.0},
    "inverse_sqrt": {},
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2},
    "warmup_stable_decay": {"num_decay_steps": 6, "decay_type": "1-sqrt", "min_lr_ratio": 0.05},
}


def config(kind: str, kwargs: dict, **settings) -> SFTConfig:
    return SFTConfig(lr_scheduler_type=kind, lr_scheduler_kwargs=json.dumps(kwargs) if kwargs else "", **settings)


def of_transformers(kind: str, kwargs: dict, warmup: int) -> list[float]:
    """Steps a learning-rate scheduler like the trainer of transformers; returns the rates divided by the peak rate."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=PEAK)
    scheduler, seen = get_scheduler(kind, optimizer, warmup, STEPS, kwargs), []
    for _ in range(STEPS):
        seen.append(scheduler.get_last_lr()[0] / PEAK)
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_warmup_every_step_is_that_of_transformers(kind):
    share = schedule(config(kind, KINDS[kind]), STEPS, PEAK)
    assert [share(step) for step in range(STEPS)] == pytest.approx(of_transformers(kind, KINDS[kind], 0), abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_warmup_every_step_is_that_of_transformers_and_the_first_is_not_wasted(kind):
    share = schedule(config(kind, KINDS[kind], warmup_steps=4), STEPS, PEAK)
    ours, theirs = [share(step) for step in range(STEPS)], of_transformers(kind, KINDS[kind], 4)
    assert ours[4:] == pytest.approx(theirs[4:], abs=1e-12)
    if kind == "cosine_warmup_with_min_lr":
        assert ours == pytest.approx(theirs, abs=1e-12)
        assert ours[0] > 0
    else:
        least = KINDS[kind].get("min_lr_ratio", 0.0)  # where transformers' warm-up of this schedule starts
        assert ours[:4] == pytest.approx([least + (1 - least) * share for share in (0.2, 0.4, 0.6, 0.8)])
        assert theirs[:4] == pytest.approx([least + (1 - least) * share for share in (0.0, 0.25, 0.5, 0.75)])


def test_a_minimum_in_absolute_terms_is_a_share_of_each_peak():
    cfg = config("cosine_with_min_lr", {"min_lr": 1e-4})
    assert schedule(cfg, STEPS, 1e-3)(STEPS) == pytest.approx(0.1)
    assert schedule(cfg, STEPS, 2e-4)(STEPS) == pytest.approx(0.5)


def test_a_warmup_may_be_a_share_of_the_run():
    keys = ({"warmup_ratio": 0.1}, {"warmup_steps": 4})
    by_ratio, by_steps = (schedule(SFTConfig(**settings), 33, PEAK) for settings in keys)
    assert [by_ratio(step) for step in range(33)] == [by_steps(step) for step in range(33)]


def test_parameters_that_transformers_refuses_or_that_exceed_the_run_are_refused():
    with pytest.raises(ValueError, match=r"^lr_scheduler_kwargs: .* is refused by polynomial: lr_end \(0.1\)"):
        schedule(config("polynomial", {"lr_end": 0.1}), STEPS, PEAK)
    told = r"^lr_scheduler_kwargs: num_decay_steps: must be at most the 20 steps of the run minus 5 of warm-up; got 16$"
    with pytest.raises(ValueError, match=told):
        schedule(config("warmup_stable_decay", {"num_decay_steps": 16}, warmup_steps=5), STEPS, PEAK)


def test_a_score_head_may_have_its_own_rate_with_one_norm_for_the_whole_model():
    """If the gradient of a weight is constant, Adam moves the weight by the learning rate in every step."""
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 1, bias=False) for name in ("trunk", "score")})
    cfg = config("cosine_with_min_lr", {"min_lr": 0.05}, learning_rate=0.1, max_grad_norm=0.0)
    optimizer = Optimizer({"": model}, cfg, num_steps=2, head_rates={"": 0.5})
    norms, rates, moves = [], [], []
    for _ in range(2):
        before = [part.weight.detach().clone() for part in model.values()]
        for part in model.values():
            part.weight.grad = torch.tensor([[3.0, 4.0]])
        metrics = optimizer.step()
        norms.append(metrics["grad_norm"])
        rates.append(metrics["learning_rate"])
        moves.append([(old - part.weight).mean().item() for old, part in zip(before, model.values(), strict=True)])
    assert norms == pytest.approx([50**0.5] * 2)
    assert rates == pytest.approx([0.1, 0.075])  # the second is halfway between the peak and the minimum
    assert moves == [pytest.approx([0.1, 0.5], rel=1e-5), pytest.approx([0.075, 0.275], rel=1e-5)]
