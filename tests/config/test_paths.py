"""Tests that relative paths are made absolute, and that a written configuration has the values that the user gave."""

from dataclasses import fields

import pytest
import yaml

from fastrlhf.config import CONFIGS, DPOConfig, EvalConfig, PPOConfig, SFTConfig
from fastrlhf.config.command_line import parse
from fastrlhf.config.compare import differences
from fastrlhf.config.files import as_yaml
from fastrlhf.config.paths import FUNCTIONS, as_given, at_start, filled_in, is_same

PATHS = {
    *("output_dir", "ref_cache_dir", "dataset_cache_dir", "dataset_name", "chat_template"),
    *("model_name_or_path", "tokenizer_name_or_path", "ref_model_name_or_path"),
    *("reward_model_path", "eval_reward_model_path", "critic_model_path", "dpo_model_path", "dpo_ref_model_path"),
    *("policy_path", "reward_functions", "psi", "equivalence", "loss_type", "callbacks"),
}


def test_the_keys_that_hold_paths_are_known(tmp_path, monkeypatch):
    """Sets every text key of every trainer to the name of a file. Only the keys that hold paths may resolve the
    name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").touch()
    found = set()
    for kind in CONFIGS.values():
        for field in fields(kind) if kind not in (CONFIGS["eval"], CONFIGS["demo"], CONFIGS["cache"]) else ():
            config = object.__new__(kind)
            for other in fields(kind):
                object.__setattr__(config, other.name, other.default)
            text = "there:f" if field.name in FUNCTIONS else "there"
            if isinstance(field.default, (str, tuple)):
                value = (text,) if isinstance(field.default, tuple) else text
                object.__setattr__(config, field.name, value)
                with monkeypatch.context() as patch:
                    patch.setattr(kind, "__post_init__", lambda self: None)
                    patch.setattr(kind, "check_folder", lambda self, folder: None)
                    resolved = getattr(at_start(config, kind, "it"), field.name)
                if resolved != value:
                    assert resolved in (f"{tmp_path}/{text}", (f"{tmp_path}/{text}",))
                    found.add(field.name)
    assert found == PATHS


def test_inputs_are_resolved_if_they_exist_and_outputs_always(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    given = DPOConfig(output_dir="run", ref_cache_dir="cache", model_name_or_path="owner", dataset_name="owner/data")
    config = at_start(given, DPOConfig, "train_dpo")
    assert (config.output_dir, config.ref_cache_dir) == (f"{tmp_path}/run", f"{tmp_path}/cache")
    assert (config.model_name_or_path, config.dataset_name) == (f"{tmp_path}/owner", "owner/data")
    assert as_given(config) == as_given(given)
    stage = as_given(PPOConfig(output_dir=f"{tmp_path}/run/policy", reward_model_path=f"{tmp_path}/run/reward"))
    assert (stage["output_dir"], stage["reward_model_path"]) == ("run/policy", "run/reward")
    assert at_start(config, DPOConfig, "train_dpo") == config
    with pytest.raises(TypeError, match="train_sft: config must be an object of SFTConfig; got an object of DPOConfig"):
        at_start(given, SFTConfig, "train_sft")


def test_an_environment_variable_is_expanded_for_use_and_written_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", str(tmp_path / "data"))
    file = tmp_path / "run.yaml"
    file.write_text("{dataset_name: $PLACE/a.jsonl, reward_functions: ['$PLACE/r.py:f'], reward_model_path: judge}")
    config = parse(PPOConfig, ["--config", str(file)], "ppo")
    assert config.dataset_name == f"{tmp_path}/data/a.jsonl"
    assert config.reward_functions == (f"{tmp_path}/data/r.py:f",)
    (tmp_path / "config.yaml").write_text(as_yaml(config))
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (written["dataset_name"], written["reward_functions"]) == ("$PLACE/a.jsonl", ["$PLACE/r.py:f"])
    assert as_given(config)["reward_functions"] == ("$PLACE/r.py:f",)  # experiment trackers log the unexpanded value
    assert parse(PPOConfig, ["--config", str(tmp_path / "config.yaml")], "ppo") == config
    assert differences(config, tmp_path / "config.yaml") == []
    monkeypatch.setenv("PLACE", "elsewhere")
    assert differences(config, tmp_path / "config.yaml") == [
        f"dataset_name: '$PLACE/a.jsonl' there, '{tmp_path}/data/a.jsonl' here",
        f"reward_functions: ['$PLACE/r.py:f'] there, ['{tmp_path}/data/r.py:f'] here",
    ]


def test_values_are_equal_by_text_by_variable_or_by_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").touch()
    monkeypatch.setenv("PLACE", str(tmp_path))
    assert is_same("dataset_name", "a", f"{tmp_path}/a")
    assert is_same("dataset_name", "$PLACE/a", f"{tmp_path}/a")
    assert is_same("stop", ["$PLACE"], ("$PLACE",))
    assert not is_same("dataset_name", "a", f"{tmp_path}/b")
    assert filled_in("chat_template", "$PLACE") == "$PLACE"
    assert EvalConfig(models=("a",)).models == ("a",)


def test_a_variable_of_a_file_is_kept_under_a_key_of_numbers_too(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPS_OF_TEST", "5")
    monkeypatch.setenv("RATE_OF_TEST", "2e-3")
    file = tmp_path / "sft.yaml"
    file.write_text("max_steps: $STEPS_OF_TEST\nlearning_rate: $RATE_OF_TEST\nseed: 5\n")
    config = parse(SFTConfig, ["--config", str(file)], "sft")
    assert (config.max_steps, config.learning_rate) == (5, 2e-3)
    written = as_given(config)
    assert (written["max_steps"], written["learning_rate"], written["seed"]) == ("$STEPS_OF_TEST", "$RATE_OF_TEST", 5)
    assert is_same("max_steps", "$STEPS_OF_TEST", 5)
    assert not is_same("max_steps", "$STEPS_OF_TEST", 6)
    at_run = as_given(at_start(config, SFTConfig, "train_sft"))
    assert at_run["max_steps"] == "$STEPS_OF_TEST"
    assert as_given(SFTConfig(max_steps=5))["max_steps"] == 5  # given as 5, without a variable
    flagged = parse(SFTConfig, ["--config", str(file), "--max_steps", "7"], "sft")
    assert as_given(flagged)["max_steps"] == 7


def test_the_file_of_a_loss_is_found_from_another_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "losses.py").touch()
    config = DPOConfig(loss_type=("losses.py:mine", "sft"), output_dir="run")
    assert at_start(config, DPOConfig, "train_dpo").loss_type == (f"{tmp_path}/losses.py:mine", "sft")
    assert at_start(DPOConfig(loss_type="sigmoid"), DPOConfig, "train_dpo").loss_type == "sigmoid"
