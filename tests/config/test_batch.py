import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml

from fastrlhf.config import CONFIGS, TRAIN_NOTHING, KTOConfig, PPOConfig, SFTConfig
from fastrlhf.config.batch import processes
from fastrlhf.config.command_line import parse
from fastrlhf.config.files import as_yaml
from fastrlhf.config.paths import Filled, with_variables

FACTORS = "{per_device_train_batch_size: 4, gradient_accumulation_steps: 2}"
TRAINERS = [name for name in CONFIGS if name not in ("rlp", *TRAIN_NOTHING)]


@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")


def test_the_number_of_processes_is_that_of_torchrun_or_of_torch(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert processes() == 1
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert processes() == 8
    started = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 3)
    monkeypatch.setitem(sys.modules, "torch.distributed", started)
    assert processes() == 3


@pytest.mark.parametrize("command", TRAINERS)
def test_the_batch_is_the_device_batch_times_processes_times_accumulation(command, monkeypatch):
    keys = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    for number, batch in ((1, 16), (2, 32), (4, 64)):
        monkeypatch.setenv("WORLD_SIZE", str(number))
        assert CONFIGS[command](**keys).batch_size == batch
        assert CONFIGS[command](train_batch_size=16).batch_size == 16


def test_the_first_line_of_a_run_shows_the_product(monkeypatch):
    assert SFTConfig().describe_batch() == "8 x 1 process x 1 = 8 rows"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert SFTConfig().describe_batch() == "8 x 2 processes x 1 = 16 rows"
    assert SFTConfig(train_batch_size=6).describe_batch() == "6 rows over 2 processes"
    assert PPOConfig(gradient_accumulation_steps=3).describe_batch() == "64 x 2 processes x 3 = 384 episodes"


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (
            {"train_batch_size": 16, "per_device_train_batch_size": 4},
            "per_device_train_batch_size: must be absent when train_batch_size is 16, since it would have no effect: "
            "4 x 2 processes x 1 is 8; got 4",
        ),
        (
            {"train_batch_size": 32, "gradient_accumulation_steps": 4},
            "gradient_accumulation_steps: must be absent when train_batch_size is 32, since it would have no effect: "
            "8 x 2 processes x 4 is 64; got 4",
        ),
        ({"train_batch_size": -1}, "train_batch_size: must be at least 0; got -1"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(two_processes, keys, told):
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        SFTConfig(**keys)


def test_keys_that_agree_are_accepted(two_processes):
    assert SFTConfig(train_batch_size=8, per_device_train_batch_size=4).batch_size == 8
    assert SFTConfig(train_batch_size=32, gradient_accumulation_steps=2).batch_size == 32
    assert SFTConfig(train_batch_size=10).batch_size == 10


def test_a_section_may_replace_a_shared_batch(tmp_path):
    (tmp_path / "run.yaml").write_text("shared: {per_device_train_batch_size: 4}\ndpo: {train_batch_size: 64}\n")
    config = parse(CONFIGS["dpo"], ["--config", str(tmp_path / "run.yaml")], "dpo")
    assert (config.batch_size, config.per_device_train_batch_size) == (64, 8)


def test_several_processes_write_the_rows_of_a_step_and_one_process_writes_its_keys(monkeypatch):
    config = replace(SFTConfig(), gradient_accumulation_steps=3)
    for number, written in ((1, 0), (2, 48)):
        monkeypatch.setenv("WORLD_SIZE", str(number))
        values = yaml.safe_load(as_yaml(config))
        assert (values["per_device_train_batch_size"], values["gradient_accumulation_steps"]) == (8, 3)
        assert values["train_batch_size"] == written


def test_variables_are_kept_beside_the_batch_of_several_processes(two_processes):
    config = with_variables(SFTConfig(learning_rate=0.5), {"learning_rate": Filled("0.5", "$RATE")})
    assert yaml.safe_load(as_yaml(config))["learning_rate"] == "$RATE"


def test_the_kl_of_kto_needs_two_rows_per_step(monkeypatch):
    with pytest.raises(ValueError, match=r"^per_device_train_batch_size: must be 2 or more"):
        KTOConfig(per_device_train_batch_size=1)
    with pytest.raises(ValueError, match=r"^train_batch_size: must be 2 or more"):
        KTOConfig(train_batch_size=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert KTOConfig(per_device_train_batch_size=1).batch_size == 2


@pytest.mark.parametrize(
    ("file", "flags", "rows"),
    [
        ("train_batch_size: 64", ["--per_device_train_batch_size", "4"], 4),
        ("train_batch_size: 64", ["--gradient_accumulation_steps=2"], 16),
        ("train_batch_size: 64", [], 64),
        (FACTORS, ["--train_batch_size", "32"], 32),
        (FACTORS, ["--gradient_accumulation_steps", "3"], 12),
    ],
)
def test_a_flag_replaces_the_keys_of_a_file_that_determine_the_batch(tmp_path, file, flags, rows):
    path = tmp_path / "sft.yaml"
    path.write_text(file)
    assert parse(SFTConfig, ["--config", str(path), *flags], "sft").batch_size == rows
