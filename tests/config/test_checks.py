import pickle
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest

from fastrlhf import evaluate_models, train_dpo, train_ppo, train_reward_model, train_rlp, train_sft
from fastrlhf.config import (
    DemoConfig,
    DPOConfig,
    DRPOConfig,
    EvalConfig,
    GRPOConfig,
    PPOConfig,
    RewardConfig,
    RLPConfig,
    RTOConfig,
    SFTConfig,
    TrainConfig,
)
from fastrlhf.config.commands import EVAL_READS
from fastrlhf.config.schedule import SCHEDULES
from fastrlhf.config.train import OPTIM_NAMES

TRAINING = (SFTConfig, RewardConfig, DPOConfig, PPOConfig, DRPOConfig, RTOConfig, EvalConfig)
ON_POLICY = (PPOConfig, DRPOConfig, RTOConfig)
ALL = (*TRAINING, GRPOConfig, DemoConfig)


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
        (PPOConfig, "num_generations", 0, "at least 1"),
        (PPOConfig, "num_generations", 3, "a divisor of the batch of 64 episodes"),
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
def test_only_rewards_may_be_far_below_zero(kind, field):
    if field in ("missing_eos_score", "dpo_reward_scale"):
        beside = {"dpo_model_path": "dpo"} if field == "dpo_reward_scale" else {}
        assert getattr(kind(**{field: -9.0} | beside), field) == -9
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
    if get_origin(hint) is Literal and (kind is not EvalConfig or name in EVAL_READS)
]


PAIR = {"update": "pair", "advantage_estimator": "rloo", "num_generations": 2, "whiten_rewards": False}
BESIDE = {
    **dict.fromkeys(("pair", "pair_loss", "pair_select"), PAIR),
    "reward_shaping": {"dpo_model_path": "dpo"},
    **{key: {"reset_prob": 0.5} for key in ("reset_source", "reset_cut")},
    "rollout": {"num_generations": 2},
    "outcome": {"success_threshold": 0.5},
    "prime": {"num_generations": 2, "dpo_model_path": "dpo", "whiten_rewards": False},
    "reset_group": {"reset_prob": 0.5, "num_generations": 2},
    "dpo_reward_norm": {"dpo_model_path": "dpo"},
    "psi_opponents": {"psi": "identity", "num_generations": 2},
    "master_weights": {"dtype": "bfloat16"},
    "merged_dtype": {"use_peft": True},
    "groupwise": {"loss_type": "ipo"},
    "reward_model": {"reward_model_path": "judge"},
    **{name: {"num_generations": 2} for name in ("rloo", "grpo", "opo")},
    "scale_rewards": {"advantage_estimator": "grpo", "num_generations": 2},
    **{name: {"kl_placement": "loss"} for name in ("k2", "k3")},
    "loss": {"kl_estimator": "k2"},
    "bootstrap": {"missing_eos_score": None},
    **{name: {"lr_scheduler_kwargs": '{"min_lr": 0.0}'} for name in SCHEDULES if "with_min_lr" in name},
    "warmup_stable_decay": {"lr_scheduler_kwargs": '{"num_decay_steps": 2}'},
}
"""Name of a field or choice -> other keys without which the field or choice is refused."""


@pytest.mark.parametrize(("kind", "field", "choices"), CHOICES)
def test_an_invalid_choice_is_refused_and_the_choices_are_listed(kind, field, choices):
    for choice in choices:
        beside = BESIDE.get(field, {}) | BESIDE.get(choice, {})
        assert getattr(kind(**{field: choice} | beside), field) == OPTIM_NAMES.get(choice, choice)
    for wrong in ("Sum", "", None, ["sum"]):
        with pytest.raises(ValueError, match=rf"^{field}: must be one of {', '.join(choices)}; got "):
            kind(**{field: wrong})


UNREAD = [
    *((kind, key, {}) for kind in TRAINING for key in ("lora_r", "lora_alpha", "use_rslora", "use_dora")),
    *((kind, "lora_target_modules", {}) for kind in TRAINING),
    *((kind, "master_weights", {"dtype": "float32"}) for kind in TRAINING),
    *((kind, "logging_steps", {"progress": False}) for kind in TRAINING if kind is not EvalConfig),
    *((DPOConfig, key, {}) for key in ("label_prior", "score_scale", "psi_clip")),
    (DPOConfig, "psi_clip", {"psi": "logit", "loss_type": "ipo"}),
    *((EvalConfig, key, {}) for key in ("learning_rate", "per_device_train_batch_size", "save_steps", "report_to")),
    *((kind, key, {}) for kind in ON_POLICY for key in ("dpo_reward_scale", "dpo_reward_clip", "reward_shaping")),
    *((kind, "dpo_reward_norm", {}) for kind in ON_POLICY),
    *((kind, key, {"reset_prob": 0.0}) for kind in ON_POLICY for key in ("reset_curriculum", "reset_source")),
    *((kind, "reset_min", {"reset_prob": 0.0}) for kind in ON_POLICY),
    *((kind, "reset_group", {"reset_prob": 0.0, "num_generations": 2}) for kind in ON_POLICY),
    *((kind, key, {"reset_prob": 0.5}) for kind in ON_POLICY for key in ("reset_group", "share_trunks")),
    *((kind, "target_kl", {"num_ppo_epochs": 1}) for kind in ON_POLICY),
    *((kind, key, {}) for kind in ON_POLICY for key in ("vllm_gpu_memory_utilization", "kl_horizon")),
    *((kind, key, {}) for kind in ON_POLICY for key in ("vllm_devices", "vllm_enable_sleep_mode")),
    *((kind, key, {}) for kind in ON_POLICY for key in ("psi_opponents", "psi_clip")),
    (PPOConfig, "psi_clip", {"psi": "logit"}),
    *(
        (kind, key, {"advantage_estimator": estimator, "num_generations": 2})
        for kind in ON_POLICY
        for estimator in ("rloo", "grpo", "opo")
        for key in ("vf_coef", "cliprange_value", "value_learning_rate", "lam", "truncation")
    ),
]
OTHER = {"lora_target_modules": ("q_proj",), "reward_shaping": "rs", "reset_source": "chosen"}
OTHER |= {"psi_opponents": "chosen", "use_rslora": True, "use_dora": True, "lora_r": 4, "lora_alpha": 4}
OTHER |= {"report_to": ("wandb",), "per_device_train_batch_size": 4, "save_steps": 4}
OTHER |= {
    "dpo_reward_norm": "running",
    "kl_horizon": 6400,
    "reset_min": 0,
    "reset_group": "response",
    "share_trunks": False,
    "truncation": "bootstrap",
}
OTHER |= {"master_weights": "stochastic_rounding", "logging_steps": 1}
OTHER |= {"vllm_devices": (1,), "vllm_enable_sleep_mode": True}


@pytest.mark.parametrize(("kind", "field", "without"), UNREAD)
def test_an_unread_key_is_refused_unless_it_has_its_default(kind, field, without):
    default = getattr(kind(), field)
    assert getattr(kind(**without), field) == default
    with pytest.raises(
        ValueError, match=rf"^{field}: must be .* (when|without|with) .*, since it would have no effect; got"
    ):
        kind(**{field: OTHER.get(field, 0.25)} | without)


READ = [
    (SFTConfig, {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ("q_proj",), "use_dora": True}),
    (DPOConfig, {"label_source": "counts", "label_prior": 1.0}),
    (DPOConfig, {"label_source": "reward_model", "reward_model_path": "judge", "score_scale": 0.5}),
    (DPOConfig, {"loss_type": "ipo", "psi_backend": "groupwise", "score_scale": 0.5}),
    (DPOConfig, {"loss_type": "ipo", "psi": "clipped_logit", "psi_clip": 1.0}),
    (RTOConfig, {"dpo_model_path": "dpo", "dpo_reward_scale": 0.1, "dpo_reward_clip": 0.1, "reward_shaping": "rs"}),
    (PPOConfig, {"reset_prob": 0.1, "reset_min": 0, "reset_curriculum": 0.5, "reset_source": "chosen"}),
    (PPOConfig, {"engine": "vllm", "vllm_gpu_memory_utilization": 0.5, "vllm_devices": (1, 0)}),
    (PPOConfig, {"engine": "vllm", "vllm_enable_sleep_mode": True}),
    (PPOConfig, {"kl_target": 6.0, "kl_horizon": 6400}),
    (PPOConfig, {"psi": "clipped_logit", "psi_clip": 1.0, "psi_opponents": "chosen"}),
    (PPOConfig, {"vf_coef": 0.5, "cliprange_value": 0.5, "value_learning_rate": 1e-5, "lam": 0.5}),
]


@pytest.mark.parametrize(("kind", "settings"), READ)
def test_keys_are_accepted_if_something_reads_them(kind, settings):
    assert {name: getattr(kind(**settings), name) for name in settings} == settings


@pytest.mark.parametrize("kind", [PPOConfig, EvalConfig])
def test_a_cuda_graph_is_refused_on_a_cpu(kind):
    assert kind(decode="cuda_graph").decode == "cuda_graph"
    with pytest.raises(ValueError, match=r"^decode: must be eager when device is cpu; got 'cuda_graph'"):
        kind(decode="cuda_graph", device="cpu")


def test_the_fields_with_choices_are_found():
    names = {name for _, name, _ in CHOICES}
    assert names >= {"dtype", "truncation_mode", "lr_scheduler_type", "label_source", "length_norm", "reset_source"}


def test_every_command_shares_the_keys_of_the_trainers():
    shared = {f.name for f in fields(TrainConfig)}
    assert all({f.name for f in fields(kind)} >= shared for kind in TRAINING)


@pytest.mark.parametrize(
    ("kind", "field", "value", "rule"),
    [
        (SFTConfig, "use_peft", "false", "true or false"),
        (SFTConfig, "use_peft", 1, "true or false"),
        (SFTConfig, "learning_rate", "1e-6", "a number"),
        (SFTConfig, "learning_rate", None, "a number"),
        (SFTConfig, "max_steps", 3.0, "a whole number"),
        (SFTConfig, "max_steps", True, "a whole number"),
        (SFTConfig, "output_dir", None, "text"),
        (SFTConfig, "seed", "7", "a whole number"),
        (SFTConfig, "report_to", 3, "a list of texts"),
        (SFTConfig, "lora_target_modules", ("q_proj", 1), "a list of texts"),
        (DPOConfig, "loss_weights", ("1",), "a list of numbers"),
        (DPOConfig, "loss_weights", (float("inf"),), "finite"),
        (DPOConfig, "loss_type", 1, "text or a list of texts"),
        (PPOConfig, "cliprange_high", "0.28", "a number or null"),
        (PPOConfig, "kl_coef", float("nan"), "finite"),
        (EvalConfig, "models", 1, "a list of texts"),
        (DemoConfig, "num_eval", "600", "a whole number"),
        (RLPConfig, "beta_end", "1", "a number"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(kind, field, value, rule):
    with pytest.raises(ValueError, match="must be") as error:
        kind(**{field: value})
    assert str(error.value) == f"{field}: must be {rule}; got {value!r}"


def test_equivalent_values_are_converted_to_the_declared_type():
    config = DPOConfig(
        output_dir=Path("runs") / "x",
        report_to=["wandb"],
        lora_target_modules="q_proj",
        use_peft=True,
        seed=np.int64(3),
        learning_rate=np.float32(0.5),
        loss_type=["sigmoid", "sft"],
        max_grad_norm=1,
    )
    assert (config.output_dir, config.report_to, config.lora_target_modules) == ("runs/x", ("wandb",), ("q_proj",))
    assert (type(config.seed), type(config.learning_rate), config.loss_type) == (int, float, ("sigmoid", "sft"))
    assert config == replace(config)
    assert DPOConfig(loss_type="ipo").loss_type == "ipo"


@pytest.mark.parametrize(
    ("trainer", "kind", "given", "told"),
    [
        (train_sft, "SFTConfig", PPOConfig(), "an object of PPOConfig"),
        (train_dpo, "DPOConfig", SFTConfig(), "an object of SFTConfig"),
        (train_reward_model, "RewardConfig", {"seed": 1}, "an object of dict"),
        (train_ppo, "PPOConfig", DPOConfig(), "an object of DPOConfig"),
        (train_ppo, "PPOConfig", DRPOConfig, "the class DRPOConfig"),
        (evaluate_models, "EvalConfig", SFTConfig(), "an object of SFTConfig"),
    ],
)
def test_a_trainer_refuses_the_configuration_of_another(trainer, kind, given, told):
    with pytest.raises(TypeError) as error:
        trainer(given)
    assert str(error.value) == f"{trainer.__name__}: config must be an object of {kind}; got {told}"


def test_rlp_refuses_a_policy_configuration_of_another_trainer():
    with pytest.raises(
        TypeError, match=r"^train_rlp: config must be an object of PPOConfig; got an object of DPOConfig$"
    ):
        train_rlp(RLPConfig(), RewardConfig(), DPOConfig())


def test_the_home_folder_is_filled_in_for_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert DemoConfig(out="~/demo").out == "/home/someone/demo"
    config = EvalConfig(models=("~/a", "b"), dataset_name=("~/a.jsonl", "b~"))
    assert (config.models, config.dataset_name) == (("/home/someone/a", "b"), ("/home/someone/a.jsonl", "b~"))
