import pickle
from dataclasses import FrozenInstanceError, asdict, fields, replace
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
    parse_columns,
    parse_model_config,
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "dpo"}, r"^loss_type: must be of sigmoid, ipo, hinge, robust, sft; got 'dpo'"),
        ({"loss_type": ("sigmoid", "dpo")}, r"^loss_type: must be of .*; got \('sigmoid', 'dpo'\)"),
        ({"loss_type": ()}, "^loss_type: must be at least one loss on pairs"),
        ({"loss_type": "sft"}, "^loss_type: must be at least one loss on pairs"),
        ({"loss_type": ("ipo", "ipo")}, "^loss_type: must be without repeats"),
        ({"loss_weights": (1.0, 2.0)}, r"^loss_weights: must be 1 numbers, one per loss_type; got \(1.0, 2.0\)"),
        ({"loss_type": ("sigmoid", "sft"), "loss_weights": (1.0, 0.0)}, "^loss_weights: must be above 0"),
        ({"loss_type": ("sigmoid", "sft"), "loss_weights": (1.0, float("nan"))}, "^loss_weights: must be above 0"),
        (
            {"loss_type": "hinge", "label_smoothing": 0.1},
            "^label_smoothing: must be 0 where loss_type is hinge; got 0.1",
        ),
        ({"loss_type": "robust", "label_source": "label_prob"}, "^label_source: must be data for hinge and robust"),
        (
            {"label_source": "label_prob", "label_smoothing": 0.1},
            "^label_smoothing: must be 0 where label_source is not data",
        ),
        ({"label_source": "reward_model"}, "^reward_model_path: must be given where label_source is reward_model"),
        (
            {"reward_model_path": "somewhere"},
            r"^reward_model_path: must be given where .* only there; got 'somewh",
        ),
        ({"psi": "logit"}, "^loss_type: must be ipo where psi is not identity"),
        ({"psi_backend": "groupwise"}, "^loss_type: must be ipo where psi_backend is groupwise"),
        (
            {"loss_type": "ipo", "psi": "logit", "length_norm": "mean"},
            "^length_norm: must be auto or sum where psi is not",
        ),
        ({"loss_type": "ipo", "psi": "logit", "label_smoothing": 0.1}, "^label_smoothing: must be 0 where psi is not"),
        (
            {"loss_type": "ipo", "psi_backend": "groupwise", "label_source": "counts"},
            "^label_source: must be data or reward_model where psi_backend is groupwise",
        ),
        ({"loss_type": ("sigmoid", "ipo"), "margin_scale": 1.0}, "^margin_scale: must be 0 where loss_type is ipo"),
        ({"ref_cache_dir": "x", "precompute_ref_log_probs": False}, "^ref_cache_dir: must be empty where nothing is"),
    ],
)
def test_losses_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DPOConfig(**settings)


def test_only_one_rule_for_a_missing_eos():
    with pytest.raises(ValueError, match=r"^missing_eos_penalty: must be null where missing_eos_score is given"):
        DRPOConfig(missing_eos_penalty=1.0)
    assert DRPOConfig(missing_eos_penalty=1.0, missing_eos_score=None).missing_eos_penalty == 1


def test_the_batch_is_the_device_batch_times_accumulation():
    assert SFTConfig(per_device_train_batch_size=6, gradient_accumulation_steps=4).batch_size == 24


def test_drpo_is_ppo_with_the_settings_of_its_paper():
    paper = {"reset_prob": 1.0, "missing_eos_score": -1.0, "whiten_rewards": True, "adam_epsilon": 1e-5}
    assert asdict(DRPOConfig()) == asdict(PPOConfig()) | paper


def test_rto_is_ppo_with_the_settings_of_its_paper():
    assert asdict(RTOConfig()) == asdict(PPOConfig()) | {"kl_coef": 0.01, "temperature": 1.0}
    assert (RTOConfig().dpo_reward_scale, RTOConfig().score_coef, RTOConfig().dpo_reward_clip) == (0.05, 1.0, 0.0)


def test_a_reference_of_no_dpo_model_is_refused():
    with pytest.raises(ValueError, match=r"^dpo_ref_model_path: must be empty where there is no dpo_model_path"):
        RTOConfig(dpo_ref_model_path="sft")


@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
def test_an_advantage_of_the_group_wants_a_group_whole_episodes_and_no_critic(estimator):
    config = PPOConfig(advantage_estimator=estimator, reset_group_size=2)
    refused = (("reset_group_size", 1), ("reset_group", "response"), ("gamma", 0.9), ("compat", "reference"))
    for field, value in refused:
        with pytest.raises(ValueError, match=rf"^{field}: must be .* with advantage_estimator {estimator}"):
            replace(config, **{field: value})


def test_mini_batches_hold_whole_groups():
    with pytest.raises(ValueError, match=r"^num_mini_batches: must be a divisor of the batch of 8 groups of episodes"):
        PPOConfig(reset_group_size=8, num_mini_batches=16)


def test_every_command_shares_the_keys_of_the_trainers():
    shared = {f.name for f in fields(TrainConfig)}
    assert all({f.name for f in fields(kind)} >= shared for kind in TRAINING)


def test_columns_are_pairs_of_a_known_name_and_a_column():
    assert parse_columns("") == {}
    assert parse_columns("prompt=question,chosen=a=b") == {"prompt": "question", "chosen": "a=b"}
    for wrong in ("prompt", "prompt=", "question=prompt", "prompt:question"):
        with pytest.raises(ValueError, match=r"^columns: .* must look like prompt=question"):
            parse_columns(wrong)


def test_a_model_config_is_a_json_mapping_with_a_model_type():
    assert parse_model_config('{"model_type": "llama", "hidden_size": 8}') == {"model_type": "llama", "hidden_size": 8}
    with pytest.raises(ValueError, match=r"^model_config: no valid JSON"):
        parse_model_config("{model_type: llama}")
    for wrong in ("[]", '{"hidden_size": 8}'):
        with pytest.raises(ValueError, match=r"^model_config: must be a mapping with a model_type"):
            parse_model_config(wrong)
