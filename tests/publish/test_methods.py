"""Tests of the descriptions of methods in model cards. Evaluates the printed equations of the pair losses and compares
the values with the losses of the trainer."""

import re
from math import exp, log

import pytest
import torch

from fastrlhf.algorithms.pair_losses import Pairs, loss_of_pairs
from fastrlhf.config import DPOConfig, DRPOConfig, GRPOConfig, KTOConfig, PPOConfig, RewardConfig, RTOConfig, SFTConfig
from fastrlhf.publish.methods import RLP, methods_of, part_of
from fastrlhf.types import Segment

CHOSEN, REJECTED = (-0.9, -0.4), (-1.3, -0.2, -0.6)
REFERENCE = (-1.1, -1.8)
MARGIN, PROBABILITY = 0.3, 0.8


def sigmoid(x):
    return 1 / (1 + exp(-x))


def computed(config: DPOConfig, equation: str) -> float:
    """Returns the value of an equation such as "loss = -log(sigmoid(z)); z = beta * D; D = ...; u(y) = ..."."""
    loss, *definitions = equation.removeprefix("loss = ").replace("^", "**").split("; ")
    loss, *more = re.split(r", (?=\w+(?:\(y\))? = )", loss)
    text = dict(part.split(" = ", 1) for part in [*definitions, *more])
    free, mean = "log pi_ref" not in text["u(y)"], text["u(y)"].startswith("mean")
    sums = {"chosen": sum(CHOSEN), "rejected": sum(REJECTED)}
    if not free:
        sums = {name: value - base for (name, value), base in zip(sums.items(), REFERENCE, strict=True)}
    lengths = {"chosen": len(CHOSEN), "rejected": len(REJECTED)}
    values = {name: value / lengths[name] if mean else value for name, value in sums.items()}
    if "mean length of the pair" in text["u(y)"]:
        values = {name: value / (sum(lengths.values()) / 2) for name, value in sums.items()}
    names = {
        **{"beta": config.beta, "simpo_gamma": config.simpo_gamma, "margin_scale": config.margin_scale},
        **{"margin": MARGIN, "e": config.label_smoothing, "p": PROBABILITY, "chosen": "chosen", "rejected": "rejected"},
        **{"sigmoid": sigmoid, "log": log, "exp": exp, "max": max, "u": values.__getitem__},
    }
    if "o(y)" in text:
        names["o"] = lambda y: eval(text["o(y)"], names | {"y": y})
    for name in ("D", "z"):
        if name in text:
            names[name] = eval(text[name], names)
    return eval(loss, names)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"label_smoothing": 0.1},
        {"label_source": "label_prob"},
        {"margin_scale": 2.0},
        {"reference_free": True},
        {"length_norm": "mean"},
        {"length_norm": "pair_mean"},
        {"loss_type": "ipo"},
        {"loss_type": "ipo", "label_smoothing": 0.2},
        {"loss_type": "ipo", "label_source": "label_prob"},
        {"loss_type": "hinge", "beta": 0.5},
        {"loss_type": "robust", "label_smoothing": 0.1},
        {"loss_type": "apo_zero"},
        {"loss_type": "apo_down"},
        {"loss_type": "simpo", "beta": 2.0},
        {"loss_type": "simpo", "beta": 2.0, "label_smoothing": 0.1, "margin_scale": 1.0},
        {"loss_type": "cpo"},
        {"loss_type": "orpo"},
    ],
    ids=str,
)
def test_the_equation_of_a_loss_on_pairs_is_that_of_the_trainer(keys):
    config = DPOConfig(**keys)
    [method, *_] = methods_of(config)
    segments = [Segment(token_ids=[0] * (1 + len(x)), num_scored=len(x)) for x in (CHOSEN, REJECTED)]
    scaled = config.margin_scale * MARGIN
    pairs = Pairs(
        trees=[segments],
        label_prob=torch.tensor([PROBABILITY]) if config.label_source == "label_prob" else None,
        target=None,
        margin=torch.tensor([scaled]) if config.margin_scale else None,
    )
    rows = torch.tensor([0, len(CHOSEN), len(CHOSEN) + len(REJECTED)], dtype=torch.int32)
    given = (torch.tensor([*CHOSEN, *REJECTED]), torch.tensor(REFERENCE), rows, pairs, 1)
    expected = loss_of_pairs(config, config.losses[0], *given).loss.item()
    assert computed(config, method.equation) == pytest.approx(expected, rel=1e-5), method.equation


def tags(config) -> list[str]:
    return [method.tag for method in methods_of(config)]


def test_each_part_of_a_configuration_is_named():
    judged = {"reward_model_path": "judge"}
    assert tags(SFTConfig()) == ["sft"]
    assert tags(SFTConfig(use_peft=True)) == ["sft", "lora"]
    quantised = {"use_peft": True, "use_rslora": True, "use_dora": True, "load_in_4bit": True}
    assert tags(SFTConfig(**quantised)) == ["sft", "rslora", "dora", "qlora"]
    assert tags(RewardConfig()) == ["reward-model"]
    assert tags(KTOConfig()) == ["kto"]
    assert tags(DPOConfig(label_smoothing=0.1)) == ["cdpo"]
    assert tags(DPOConfig(loss_type="orpo")) == ["orpo", "sft"]
    assert tags(DPOConfig(loss_type="ipo", psi="logit")) == ["psipo"]
    assert tags(DPOConfig(loss_type="losses.py:mine")) == ["preference-loss"]
    assert tags(PPOConfig(**judged)) == ["ppo", "gae"]
    assert tags(PPOConfig(**judged, psi="identity", psi_opponents="chosen")) == ["ppo", "gae", "psipo"]
    assert tags(GRPOConfig(**judged)) == ["dapo", "grpo"]
    assert tags(GRPOConfig(**judged, scale_rewards="none", loss_type="dr_grpo")) == ["dr-grpo", "dr-grpo"]
    assert tags(GRPOConfig(**judged, dynamic_sampling_factor=2.0)) == ["dapo", "grpo", "dapo"]
    assert tags(DRPOConfig(**judged)) == ["ppo", "gae", "dr-po"]
    assert tags(DRPOConfig(**judged, reset_source="sample")) == ["ppo", "gae", "ppo++"]
    assert tags(RTOConfig(**judged, dpo_model_path="dpo")) == ["ppo", "gae", "rto"]
    pairs = {"update": "pair", "advantage_estimator": "rloo", "num_generations": 2}
    assert tags(PPOConfig(**judged, **pairs)) == ["rebel", "rloo"]
    assert tags(PPOConfig(**judged, **pairs, reset_prob=0.5)) == ["refuel", "rloo", "dr-po"]
    assert tags(PPOConfig(**judged, **pairs, pair_loss="dpo")) == ["online-dpo", "rloo"]


def test_the_margin_of_a_reward_model_is_in_its_equation():
    [plain], [scaled] = methods_of(RewardConfig()), methods_of(RewardConfig(margin_scale=2.0))
    assert plain.equation == "loss = -log(sigmoid(r(x, chosen) - r(x, rejected)))"
    assert scaled.equation == "loss = -log(sigmoid(r(x, chosen) - r(x, rejected) - margin_scale * margin))"


def test_runs_of_a_chain_name_it_only_within_it():
    with part_of(RLP):
        assert tags(SFTConfig()) == ["rlp", "sft"]
    assert tags(SFTConfig()) == ["sft"]
