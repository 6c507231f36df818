import pickle
from dataclasses import FrozenInstanceError, fields, replace
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from fastrlhf.config import (
    DemoConfig,
    DPOConfig,
    DRPOConfig,
    EvalConfig,
    PPOConfig,
    RewardConfig,
    RTOConfig,
    SFTConfig,
    TrainConfig,
)

TRAINING = (SFTConfig, RewardConfig, DPOConfig, PPOConfig, DRPOConfig, RTOConfig, EvalConfig)
ALL = (*TRAINING, DemoConfig)


def numeric_fields(kind: type, *types: type) -> list[str]:
    return [
        name
        for name, hint in get_type_hints(kind).items()
        if hint in types or (set(get_args(hint)) & set(types) and get_origin(hint) is not tuple)
    ]


@pytest.mark.parametrize("kind", ALL)
def test_defaults_are_valid_and_survive_pickle_and_replace(kind):
    config = kind()
    assert pickle.loads(pickle.dumps(config)) == config
    changed = replace(config, seed=7)
    assert (changed.seed, replace(changed, seed=config.seed)) == (7, config)
    with pytest.raises(FrozenInstanceError):
        config.seed = 1


@pytest.mark.parametrize("kind", ALL)
def test_replace_checks_again(kind):
    with pytest.raises(ValueError, match=r"^seed: must be "):
        replace(kind(), seed=-1)


@pytest.mark.parametrize(
    ("kind", "field", "value", "rule"),
    [
        (SFTConfig, "per_device_train_batch_size", 0, "at least 1"),
        (SFTConfig, "gradient_accumulation_steps", 0, "at least 1"),
        (SFTConfig, "micro_batch_tokens", 0, "at least 1"),
        (SFTConfig, "max_length", 1, "at least 2"),
        (SFTConfig, "max_steps", 0, "at least 1, or -1 for epochs"),
        (SFTConfig, "max_steps", -2, "at least 1, or -1 for epochs"),
        (SFTConfig, "num_train_epochs", 0.0, "above 0"),
        (SFTConfig, "learning_rate", 0.0, "above 0"),
        (SFTConfig, "adam_beta1", 1.0, "at least 0 and below 1"),
        (SFTConfig, "adam_beta2", 1.0, "at least 0 and below 1"),
        (SFTConfig, "adam_epsilon", 0.0, "above 0"),
        (SFTConfig, "max_bad_fraction", 1.1, r"in 0\.\.1"),
        (SFTConfig, "seed", 2**63, r"in 0\.\.2\^63 - 1"),
        (SFTConfig, "num_train_epochs", float("inf"), "finite"),
        (SFTConfig, "max_grad_norm", float("inf"), "finite"),
        (DPOConfig, "beta", 0.0, "above 0"),
        (DPOConfig, "label_smoothing", 0.5, r"at least 0 and below 0\.5"),
        (PPOConfig, "temperature", 0.0, "above 0"),
        (PPOConfig, "value_learning_rate", 0.0, "above 0"),
        (PPOConfig, "cliprange", 0.0, "above 0"),
        (PPOConfig, "max_kl", 0.0, "above 0"),
        (PPOConfig, "vllm_gpu_memory_utilization", 1.0, "above 0 and below 1"),
        (PPOConfig, "gamma", 1.01, r"in 0\.\.1"),
        (PPOConfig, "lam", 1.01, r"in 0\.\.1"),
        (PPOConfig, "reset_prob", 1.01, r"in 0\.\.1"),
        (PPOConfig, "reset_min", 2, "0 or 1"),
        (PPOConfig, "reset_curriculum", 1.01, r"in 0\.\.1"),
        (PPOConfig, "reset_group_size", 0, "at least 1"),
        (PPOConfig, "reset_group_size", 3, "a divisor of the batch of 64 episodes"),
        (PPOConfig, "num_mini_batches", 5, "a divisor of the batch of 64 episodes"),
        (PPOConfig, "response_length", 1024, "below max_length"),
        (EvalConfig, "response_length", 1024, "below max_length"),
        (EvalConfig, "rollout_batch_size", 0, "at least 1"),
        (DemoConfig, "num_eval", 0, "at least 1"),
    ],
)
def test_a_number_out_of_range_is_refused_by_its_name(kind, field, value, rule):
    with pytest.raises(ValueError, match=f"^{field}: must be {rule}; got {value}$"):
        kind(**{field: value})


@pytest.mark.parametrize(("kind", "field"), [(kind, name) for kind in ALL for name in numeric_fields(kind, int, float)])
def test_no_number_may_be_far_below_zero_except_rewards(kind, field):
    if field in ("missing_eos_score", "dpo_reward_scale"):
        assert getattr(kind(**{field: -9.0}), field) == -9
    else:
        with pytest.raises(ValueError, match=f"^{field}: "):
            kind(**{field: -9})


@pytest.mark.parametrize(("kind", "field"), [(kind, name) for kind in TRAINING for name in numeric_fields(kind, float)])
def test_no_number_may_be_nan(kind, field):
    with pytest.raises(ValueError, match=f"^{field}: must be finite; got nan"):
        kind(**{field: float("nan")})


CHOICES = [
    (kind, name, get_args(hint))
    for kind in TRAINING
    for name, hint in get_type_hints(kind).items()
    if get_origin(hint) is Literal
]


BESIDE = {
    "groupwise": {"loss_type": "ipo"},
    "reward_model": {"reward_model_path": "judge"},
    **{name: {"reset_group_size": 2} for name in ("rloo", "grpo")},
}
"""What some choices need beside them."""


@pytest.mark.parametrize(("kind", "field", "choices"), CHOICES)
def test_a_word_that_is_no_choice_is_refused_with_the_choices(kind, field, choices):
    for choice in choices:
        assert getattr(kind(**{field: choice} | BESIDE.get(choice, {})), field) == choice
    for wrong in ("Sum", "", None, ["sum"]):
        with pytest.raises(ValueError, match=rf"^{field}: must be one of {', '.join(choices)}; got "):
            kind(**{field: wrong})


def test_the_fields_with_choices_are_found():
    names = {name for _, name, _ in CHOICES}
    assert names >= {"dtype", "truncation_mode", "lr_scheduler_type", "label_source", "length_norm", "reset_source"}


def test_every_command_shares_the_keys_of_the_trainers():
    shared = {f.name for f in fields(TrainConfig)}
    assert all({f.name for f in fields(kind)} >= shared for kind in TRAINING)
