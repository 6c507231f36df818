"""Tests of the help pages of the commands."""

import shlex
from dataclasses import fields

import pytest

from fastrlhf.cli import main
from fastrlhf.config import CONFIGS, DPOConfig, DRPOConfig, EvalConfig, PPOConfig, RLPConfig
from fastrlhf.config.command_line import parse
from fastrlhf.config.groups import GROUPS
from fastrlhf.config.help import EXAMPLES, as_yaml, format_help, keys_of


def test_keys_have_the_type_the_default_and_the_docstring_of_their_field():
    keys = keys_of(DRPOConfig)
    assert list(keys) == [field.name for field in fields(DRPOConfig)]
    assert keys["reset_prob"].default == 1.0
    assert keys["reset_prob"].help == keys_of(PPOConfig)["reset_prob"].help != ""
    assert keys["master_weights"].type == "float32, stochastic_rounding"
    assert keys["missing_eos_score"].type == "number or null"
    assert keys["report_to"].type == "list of texts"
    assert keys["use_peft"].type == "true or false"
    assert keys_of(DPOConfig)["loss_type"].type == "text or list of texts"


@pytest.mark.parametrize("kind", CONFIGS.values())
def test_every_key_is_documented(kind):
    assert [key.name for key in keys_of(kind).values() if not key.help] == []


def test_a_command_shows_only_the_keys_that_it_reads():
    assert "lora_r" not in keys_of(EvalConfig)
    assert "learning_rate" not in keys_of(RLPConfig)
    assert {"output_dir", "dtype", "rounds"} <= {*keys_of(RLPConfig)}


@pytest.mark.parametrize("command", CONFIGS)
def test_a_page_has_examples_and_every_key_once_under_its_group_in_100_columns(command, capsys):
    assert main([command, "--help"]) == 0
    page = capsys.readouterr().out
    assert page == format_help(command) + "\n"
    lines = page.splitlines()
    assert max(map(len, lines)) <= 100
    assert 2 <= len(EXAMPLES[command]) <= 3
    shown = [line.split()[0].removeprefix("--") for line in lines if line.startswith("  --")]
    keys = keys_of(CONFIGS[command])
    assert sorted(shown) == sorted(keys)
    headings = [line for line in lines if line in GROUPS]
    assert headings == [group for group, names in GROUPS.items() if {*names} & {*keys}]


@pytest.mark.parametrize("example", [example for examples in EXAMPLES.values() for example in examples])
def test_the_examples_are_valid_commands(example, monkeypatch):
    monkeypatch.setenv("FASTRLHF_DATA", "/data")
    program, command, *arguments = shlex.split(example)
    assert program == "fastrlhf"
    parse(CONFIGS[command], arguments, command)


def test_the_text_of_an_entry():
    page = format_help("sft")
    assert "\n  --max_grad_norm  number  [1]\n      Gradients are clipped to this total norm" in page
    assert "\n  --dataset_test_split  text\n" in page


def test_a_long_example_continues_on_the_next_line_as_the_shell_reads_it():
    page = format_help("dpo")
    start = page.index("  fastrlhf dpo --model")
    first = page[start:].split("\n  fastrlhf")[0].replace("\\\n", " ")
    assert shlex.split(first) == shlex.split(EXAMPLES["dpo"][0])


@pytest.mark.parametrize(
    ("value", "text"), [("", ""), ((), ""), (1e-6, "1e-06"), (None, "null"), (True, "true"), (("a", "b"), '["a", "b"]')]
)
def test_defaults_are_shown_as_yaml(value, text):
    assert as_yaml(value) == text
