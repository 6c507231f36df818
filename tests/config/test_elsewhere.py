"""Tests of the table of TRL and transformers keys, and of the errors for keys that are not ours."""

import dataclasses
from collections import Counter

import pytest

from fastrlhf.cli import COMMANDS as OUR_COMMANDS
from fastrlhf.config import CONFIGS, DPOConfig, PPOConfig, RewardConfig, SFTConfig
from fastrlhf.config.command_line import parse
from fastrlhf.config.elsewhere import COMMANDS, KEYS, TRL_CONFIGS, explain_command, first_name, rows
from fastrlhf.config.files import ALIASES

FIELDS = {command: {field.name for field in dataclasses.fields(kind)} for command, kind in CONFIGS.items()}
COMMANDS_OF = {
    "sft": ["sft"],
    "dpo": ["dpo"],
    "cpo": ["dpo"],
    "kto": ["kto"],
    "reward": ["reward"],
    "grpo": ["grpo"],
    "ppo": ["ppo"],
}
"""TRL config class -> the commands of fastrlhf that correspond to the class."""


def commands_of(key):
    return [command for config in key.configs for command in COMMANDS_OF.get(config, ["sft", "dpo", "reward", "ppo"])]


def test_a_key_occurs_once_per_config_and_every_config_is_known():
    assert max(Counter((key.name, config) for key in KEYS for config in key.configs).values()) == 1
    assert {config for key in KEYS for config in key.configs} == {*TRL_CONFIGS}


@pytest.mark.parametrize("key", KEYS, ids=lambda key: f"{key.name}-{key.configs[0]}")
def test_the_table_agrees_with_our_keys(key):
    """A key has status `same` if and only if the corresponding commands of fastrlhf have the key. The status `other
    name` must name an existing key. If this test fails after a key was added to fastrlhf, change the row of the key to
    `_same`.
    """
    for command in commands_of(key):
        if key.status == "same":
            assert key.name in FIELDS[command], f"{command} has no {key.name}"
        else:
            assert key.name not in FIELDS[command], f"{command} has {key.name}: make its row _same"
    if key.status == "other name":
        assert any(first_name(key.ours) in FIELDS[command] for command in commands_of(key))
        assert key.ours not in ALIASES
    assert key.note or key.status != "not supported"
    assert not key.note.endswith(".")


def test_the_table_is_complete():
    """Is skipped unless TRL 1.16 is installed; run it with `python -m pytest tests/config/test_elsewhere.py`."""
    trl = pytest.importorskip("trl")
    configs = {"sft": trl.SFTConfig, "dpo": trl.DPOConfig, "reward": trl.RewardConfig, "grpo": trl.GRPOConfig}
    for name, config in (configs | {"model": trl.ModelConfig, "script": trl.ScriptArguments}).items():
        listed = {key.name for key in rows(name)} | {key.name for key in rows("all") if name in configs}
        assert {field.name for field in dataclasses.fields(config)} <= listed


@pytest.mark.parametrize(
    ("command", "flag", "told"),
    [
        ("sft", "--packing", "; always on (whole sequences share a pack of micro_batch_tokens tokens): delete the key"),
        ("sft", "--padding_free", "; always on: delete the key"),
        ("sft", "--bf16", "; here it is dtype: bfloat16 (with float32 master weights)"),
        ("sft", "--torch_dtype", "; here it is dtype"),
        ("dpo", "--torch-dtype=auto", "; here it is dtype"),
        ("dpo", "--hub_strategy", "; not supported: the final model is uploaded once, at the end of the run"),
        ("sft", "--eval_strategy", "; here it is eval_steps (0 evaluates at the end only)"),
        (
            "reward",
            "--per_device_eval_batch_size",
            "; here it is micro_batch_tokens (evaluation uses packs of the same size)",
        ),
        ("ppo", "--epsilon_high", "; here it is cliprange_high (with loss_type cispo, TRL's value minus 1)"),
        ("drpo", "--epsilon", "; here it is cliprange"),
        (
            "grpo",
            "--steps_per_generation",
            "; here it is num_mini_batches (optimiser steps per pass over an update's episodes)",
        ),
        ("ppo", "--num_iterations", "; here it is num_ppo_epochs"),
        ("rto", "--beta", "; here it is kl_coef (TRL has kl_placement loss, kl_estimator k3; the gradient differs)"),
        ("ppo", "--importance_sampling_level", "; here it is loss_type (gspo for sequence)"),
        ("ppo", "--max_new_tokens", "; here it is response_length"),
        ("sft", "--max_seq_length", "; here it is max_length"),
        ("sft", "--lr", "; here it is learning_rate"),
        (
            "dpo",
            "--lora_dropout",
            "; always off (log-probs of the same tokens must be reproducible): delete the key",
        ),
        ("sft", "--beta", "; it is a key of dpo, kto"),
        ("sft", "--num_iterations", "; it is a key of ppo, grpo, drpo, rto, as num_ppo_epochs"),
        ("dpo", "--share_trunks", "; it is a key of ppo, grpo, drpo, rto"),
        ("ppo", "--zzz", ""),
    ],
)
def test_an_unknown_key_is_answered_from_the_table(command, flag, told, tmp_path):
    spelled = flag.partition("=")[0]
    with pytest.raises(ValueError, match=r"^unknown key") as error:
        parse(CONFIGS[command], [flag, "1"], command)
    assert str(error.value) == f"unknown key {spelled}{told}"
    file = tmp_path / "run.yaml"
    name = spelled[2:].replace("-", "_")
    file.write_text(f"{name}: 1\n")
    with pytest.raises(ValueError, match="unknown key") as error:
        parse(CONFIGS[command], ["--config", str(file)], command)
    assert str(error.value) == f"{file}: unknown key {name!r}{told}"


def test_keys_with_the_same_name_are_accepted():
    assert parse(SFTConfig, ["--max_grad_norm", "0.5"], "sft").max_grad_norm == 0.5
    assert parse(DPOConfig, ["--beta", "0.2"], "dpo").beta == 0.2
    assert parse(RewardConfig, ["--eval_steps", "5"], "reward").eval_steps == 5
    assert parse(PPOConfig, ["--num_generations", "8"], "ppo").num_generations == 8


def test_commands_of_other_programs_get_a_clear_answer():
    assert explain_command("rloo", OUR_COMMANDS).startswith(": write grpo with advantage_estimator: rloo")
    assert explain_command("ipo", OUR_COMMANDS) == ": write dpo with loss_type: ipo"
    assert explain_command("stf", OUR_COMMANDS) == "; did you mean 'sft'?"
    assert explain_command("zzz", OUR_COMMANDS) == ""
    assert not {*COMMANDS} & {"sft", "reward", "dpo", "kto", "ppo", "grpo", "drpo", "rto", "rlp"}
    assert not {*COMMANDS} & {"eval", "chat", "merge", "demo"}
