"""Tests of flags and files combined into one configuration."""

import json

import pytest

from fastrlhf.config import DRPOConfig, EvalConfig, PPOConfig, RewardConfig, SFTConfig
from fastrlhf.config.command_line import _first_paragraph, parse

FILE = """
shared:
  seed: 3
sft:
  learning_rate: "1e-3"
  model_config: {model_type: llama, hidden_size: 16}
drpo:
  response_length: 6
"""


@pytest.fixture(autouse=True)
def _file(monkeypatch, tmp_path):
    (tmp_path / "all.yaml").write_text(FILE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)


def test_flags_override_the_file_and_the_file_overrides_the_defaults():
    flags = ["--config", "all.yaml", "--max_steps", "7", "--lam=0.5", "--whiten_rewards", "False"]
    config = parse(DRPOConfig, flags, "drpo")
    assert (config.max_steps, config.lam, config.whiten_rewards) == (7, 0.5, False)
    assert (config.seed, config.response_length, config.reset_prob) == (3, 6, 1.0)
    assert parse(DRPOConfig, [*flags[2:], "--config=all.yaml"], "drpo") == config


def test_values_keep_their_types():
    config = parse(SFTConfig, ["--config", "all.yaml", "--report_to", "tensorboard", "wandb"], "sft")
    assert config.learning_rate == 1e-3
    assert config.report_to == ("tensorboard", "wandb")
    assert json.loads(config.model_config) == {"model_type": "llama", "hidden_size": 16}
    assert parse(PPOConfig, ["--missing_eos_score", "-1"], "ppo").missing_eos_score == -1.0
    assert parse(DRPOConfig, ["--missing_eos_score", "None"], "drpo").missing_eos_score is None
    assert parse(EvalConfig, ["--models", "a", "b"], "eval").models == ("a", "b")


def test_messages_do_not_depend_on_box_characters_of_the_terminal():
    rounded = "\u256d\u2500 Value error \u2500\u256e\n\u2502 beta: \u2502\n\u2502 bad \u2502\n\u2570\u2500\u256f\n"
    assert _first_paragraph(rounded) == _first_paragraph(" Value error\n ----\n beta:\n bad\n  ----\n") == "beta: bad"


def test_a_key_of_adapters_without_use_peft_is_refused_even_with_its_default_and_ignored_in_shared(tmp_path):
    told = "^lora_target_modules: must be absent when use_peft is false, .*; set use_peft as well$"
    for flags in (["--lora_target_modules", "all-linear"], ["--lora_target_modules=all-linear"]):
        with pytest.raises(ValueError, match=told):
            parse(SFTConfig, flags, "sft")
    assert parse(SFTConfig, ["--use_peft", "--lora_r", "16"], "sft").use_peft
    # The config.yaml of a run holds both keys.
    assert not parse(SFTConfig, ["--use_peft", "false", "--lora_r", "16"], "sft").use_peft
    file = tmp_path / "shared.yaml"
    file.write_text("shared: {lora_r: 8}\nsft: {run_name: x}\nreward: {use_peft: true}\n")
    assert parse(SFTConfig, ["--config", str(file)], "sft").lora_r == 16
    assert parse(RewardConfig, ["--config", str(file)], "reward").lora_r == 8
