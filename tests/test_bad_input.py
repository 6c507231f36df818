"""Tests of user errors: each error is one clear line, comes before any work is done, and leaves the user's files
untouched."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from fastrlhf.algorithms.dpo import train_dpo
from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.algorithms.sft import train_sft
from fastrlhf.cli import main
from fastrlhf.config import DPOConfig, PPOConfig, SFTConfig
from fastrlhf.models.loading import build_policy
from fastrlhf.types import Example
from tests import tiny

GOOD = {"prompt": "w1 w2", "completion": "w3 w4", "chosen": "w3 w4", "rejected": "w5"}
COMMANDS = ("sft", "reward", "dpo", "ppo", "drpo")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Makes a folder with models and a file of good rows, which is the working directory of the tests."""
    folder = tmp_path_factory.mktemp("place")
    tiny.save_policy(folder / "policy")
    tiny.save_reward_model(folder / "judge")
    (folder / "good.jsonl").write_text(f"{json.dumps(GOOD)}\n" * 12)

    narrow = build_policy(LlamaConfig(**SMALL), vocab_size=tiny.VOCAB - 8, eos_token_id=tiny.EOS, seed=0)
    narrow.save_pretrained(folder / "narrow")
    judge = AutoModelForSequenceClassification.from_pretrained(folder / "narrow", num_labels=1, pad_token_id=0)
    judge.save_pretrained(folder / "narrow_judge")

    broken = AutoModelForSequenceClassification.from_pretrained(folder / "judge")
    with torch.no_grad():
        broken.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    broken.save_pretrained(folder / "broken_judge")
    broken_policy = AutoModelForCausalLM.from_pretrained(folder / "policy")
    with torch.no_grad():
        broken_policy.model.embed_tokens.weight[tiny.ids("w5")[0]] = float("nan")
    broken_policy.save_pretrained(folder / "broken_policy")

    endless = tiny.tokenizer()
    endless.eos_token = None
    endless.save_pretrained(folder / "endless")
    return folder


SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@pytest.fixture(autouse=True)
def _there(place, monkeypatch):
    monkeypatch.chdir(place)


def refuse(capsys, command: str, **settings) -> str:
    """Runs a command that must fail; returns its message and checks that no output folder was made."""
    fields = {
        "model_name_or_path": "policy",
        "dataset_name": "good.jsonl",
        "output_dir": "out",
        "max_length": 16,
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "progress": False,
    }
    if command in ("ppo", "drpo"):
        fields |= {"reward_model_path": "judge", "response_length": 6}
    arguments = [f"--{key}={value}" for key, value in (fields | settings).items()]
    existed = Path("out").exists()
    capsys.readouterr()
    assert main([command, *arguments]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"fastrlhf {command}: ")
    assert Path("out").exists() == existed
    # Messages contain absolute paths; the tests expect paths relative to their folder.
    return last.removeprefix(f"fastrlhf {command}: ").replace(f"{Path.cwd()}{os.sep}", "")


def rows(tmp_path, *changes: dict | None, copies: int = 1) -> str:
    """Writes a file of copies of the good row, each with changes. A column that is changed to None is removed."""
    lines = [json.dumps({k: v for k, v in (GOOD | (c or {})).items() if v is not None}) for c in changes]
    (tmp_path / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines * copies))
    return str(tmp_path / "rows.jsonl")


def test_the_good_rows_are_good(tmp_path):
    """Runs every command on the unchanged input. Every other test changes this input in one place."""
    for command in COMMANDS:
        arguments = ["--model_name_or_path=policy", "--dataset_name=good.jsonl", "--max_steps=1", "--progress=False"]
        arguments += [f"--output_dir={tmp_path / command}", "--max_length=16", "--per_device_train_batch_size=4"]
        if command in ("ppo", "drpo"):
            arguments += ["--reward_model_path=judge", "--response_length=6"]
        assert main([command, *arguments]) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_an_empty_dataset(capsys, tmp_path, command):
    assert re.search(r"rows\.jsonl: split 'train' has no rows", refuse(capsys, command, dataset_name=rows(tmp_path)))


def test_a_dataset_that_does_not_exist(capsys, tmp_path):
    assert "no such file or folder" in refuse(capsys, "sft", dataset_name=str(tmp_path / "none.jsonl"))
    assert "dataset_name: must be a hub name" in refuse(capsys, "sft", dataset_name="")


@pytest.mark.parametrize("command", ["reward", "dpo"])
def test_pairs_with_equal_chosen_and_rejected_responses(capsys, tmp_path, command):
    told = refuse(capsys, command, dataset_name=rows(tmp_path, {"rejected": "w3 w4"}))
    assert "none of 1 rows can be used (1 chosen_equals_rejected)" in told
    assert "row 0 (rows.jsonl line 1)" in told
    told = refuse(capsys, command, dataset_name=rows(tmp_path, None, {"rejected": "w3 w4"}))
    assert "1 of 2 rows cannot be used" in told
    assert "more than max_bad_fraction 0.1 allows" in told
    assert "row 1 (rows.jsonl line 2)" in told


def test_an_empty_completion(capsys, tmp_path):
    told = refuse(capsys, "sft", dataset_name=rows(tmp_path, None, {"completion": " \n"}))
    assert "1 empty_response" in told
    assert "row 1 (rows.jsonl line 2)" in told


def test_a_file_that_is_not_utf8(capsys, tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "w1", "completion": "w2"}\n{"prompt": "caf\xe9"}\n')
    told = refuse(capsys, "sft", dataset_name=str(tmp_path / "latin.jsonl"))
    assert "latin.jsonl line 2: not UTF-8" in told
    assert "convert the file to UTF-8" in told


@pytest.mark.parametrize(("command", "column"), [("sft", "completion"), ("dpo", "rejected"), ("reward", "chosen")])
def test_a_missing_column(capsys, tmp_path, command, column):
    told = refuse(capsys, command, dataset_name=rows(tmp_path, {column: None}))
    assert f"no {'reference' if column == 'completion' else column} in" in told
    assert "name the column by columns" in told


def test_an_example_without_the_response_that_training_needs():
    example = Example(prompt="w1", chosen="w2", row=7)
    with pytest.raises(ValueError, match="train: row 7 has no reference"):
        train_sft(SFTConfig(model_name_or_path="policy"), [example])
    with pytest.raises(ValueError, match="train: row 7 has no rejected"):
        train_dpo(DPOConfig(model_name_or_path="policy"), [example])


@pytest.mark.parametrize("command", COMMANDS)
def test_a_tokenizer_without_an_eos(capsys, command):
    told = refuse(capsys, command, tokenizer_name_or_path="endless")
    assert "tokenizer endless: it has no EOS token" in told
    assert "eos_token" in told


def test_models_of_different_vocabularies(capsys):
    told = refuse(capsys, "dpo", ref_model_name_or_path="narrow")
    assert "ref_model_name_or_path: its vocabulary of 24 is smaller than the tokenizer's 32" in told
    told = refuse(capsys, "ppo", reward_model_path="narrow_judge")
    assert "reward_model_path: its vocabulary of 24 is smaller than the tokenizer's 32" in told


def test_prompts_longer_than_the_budget(capsys, tmp_path):
    path = rows(tmp_path, {"prompt": "w1 " * 20})
    assert "prompt_fills_max_length" in refuse(capsys, "sft", dataset_name=path)
    assert "longer_than_max_length" in refuse(capsys, "reward", dataset_name=path)
    assert "max_length" in refuse(capsys, "ppo", dataset_name=path)
    path = rows(tmp_path, {"prompt": "w1 " * 12})
    assert "max_length: no train prompt leaves room for a response" in refuse(capsys, "ppo", dataset_name=path)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_row_that_no_micro_batch_can_hold(capsys, command):
    assert re.search("micro_batch_tokens: must be at least .* of row 0", refuse(capsys, command, micro_batch_tokens=4))


def test_a_model_with_nan_in_its_weights(capsys):
    assert "its weights give numbers that are not finite" in refuse(
        capsys, "ppo", reward_model_path="broken_judge"
    )  # the error comes before the first episode
    told = refuse(capsys, "dpo", model_name_or_path="broken_policy", tokenizer_name_or_path="policy")
    assert "finite" in told


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_nan(bad):
    config = PPOConfig(
        model_name_or_path="policy", reward_model_path="judge", max_length=16, response_length=6, progress=False
    )

    def judge(rollouts):
        return torch.tensor([bad, *[0.0] * (len(rollouts) - 1)])

    with pytest.raises(ValueError, match=r"judge: the score of a response to row .* is (nan|inf)"):
        train_ppo(config, tiny.examples(8), judge=judge)


@pytest.mark.parametrize(
    ("command", "field"),
    [
        *((command, "model_name_or_path") for command in COMMANDS),
        ("dpo", "ref_model_name_or_path"),
        ("ppo", "reward_model_path"),
    ],
)
@pytest.mark.parametrize("path", ["nowhere/at/all", "no-such-owner/no-such-model"])
def test_a_model_that_does_not_exist(capsys, command, field, path):
    told = refuse(capsys, command, tokenizer_name_or_path="policy", **{field: path})
    assert told.startswith(f"{field}: {path!r}")


def test_a_tokenizer_that_does_not_exist(capsys):
    assert "tokenizer nowhere/at/all: no such folder" in refuse(capsys, "sft", tokenizer_name_or_path="nowhere/at/all")
    assert "tokenizer good.jsonl: no tokenizer found" in refuse(capsys, "sft", tokenizer_name_or_path="good.jsonl")


def test_a_reward_model_that_was_never_trained(capsys):
    told = refuse(capsys, "ppo", reward_model_path="policy")
    assert "reward_model_path: 'policy' has no trained score head; train one with `fastrlhf reward`" in told


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("left", "what"), [("config.yaml", "run"), ("config.json", "model")])
def test_an_output_folder_that_holds_something(capsys, place, command, left, what):
    Path("out").mkdir(exist_ok=True)
    (place / "out" / left).write_text("mine")
    try:
        assert f"output_dir: 'out' already holds a {what}; choose another folder" in refuse(capsys, command)
        assert [path.name for path in Path("out").iterdir()] == [left]
        assert (place / "out" / left).read_text() == "mine"
    finally:
        (place / "out" / left).unlink()
        Path("out").rmdir()


def test_an_output_folder_that_is_a_file(capsys):
    assert "output_dir: 'good.jsonl' is a file" in refuse(capsys, "sft", output_dir="good.jsonl")


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_folder_that_cannot_be_made(capsys, command):
    told = refuse(capsys, command, output_dir="good.jsonl/run", dataset_name="nowhere.jsonl")
    assert told == "output_dir: 'good.jsonl/run' cannot be made: 'good.jsonl' is a file"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("kind", "what"), [("t5", "an encoder-decoder model"), ("bert", "an encoder")])
def test_a_model_that_is_not_a_decoder(capsys, command, kind, what):
    if not Path(kind).exists():
        AutoConfig.for_model(kind).save_pretrained(kind)
        tiny.tokenizer().save_pretrained(kind)
    told = refuse(capsys, command, model_name_or_path=kind, dataset_name="nowhere.jsonl")
    assert told.startswith(f"model_name_or_path: '{kind}' is {what} ({kind})")
    assert told.endswith("; give a causal language model (decoder only)")


@pytest.mark.parametrize("command", COMMANDS)
def test_evaluation_steps_without_rows_to_evaluate_on(capsys, command):
    told = refuse(capsys, command, eval_steps=5, dataset_name="nowhere.jsonl")
    rule = "0 when no rows are held out; give num_eval_examples or dataset_test_split"
    assert told == f"eval_steps: must be {rule}; got 5"


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_reporter(capsys, command):
    told = refuse(capsys, command, report_to="tensorbord")
    assert "report_to: unknown reporter 'tensorbord'; known are tensorboard, wandb" in told


def test_a_broken_model_configuration(capsys):
    def told(text: str) -> str:
        return refuse(capsys, "sft", model_name_or_path="", tokenizer_name_or_path="policy", model_config=text)

    assert "model_config: not valid JSON" in told("{")
    assert "model_config: must be a mapping with a model_type" in told("[1]")
    assert "model_config.model_type: 'lama' is not known" in told('{"model_type": "lama"}')
    assert "model_config" in refuse(capsys, "sft", model_config='{"model_type": "llama"}')
