"""Runs every section of the recipe rto_ultrafeedback on tiny models and on rows in the formats of its datasets."""

import json
import random
from pathlib import Path

import pytest

from fastrlhf.algorithms.dpo import train_dpo
from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.algorithms.reward_model import train_reward_model
from fastrlhf.algorithms.sft import train_sft
from fastrlhf.cli import parse
from fastrlhf.config import DPOConfig, RewardConfig, RTOConfig, SFTConfig
from tests import tiny

TRAINERS = {
    "sft": (SFTConfig, train_sft),
    "reward": (RewardConfig, train_reward_model),
    "dpo": (DPOConfig, train_dpo),
    "rto": (RTOConfig, train_ppo),
}


def turn(draw: random.Random, role: str) -> dict[str, str]:
    return {"role": role, "content": " ".join(draw.choices(tiny.WORDS, k=draw.randint(2, 6)))}


def rows_of(draw: random.Random) -> dict[str, dict]:
    """Returns one row of each dataset: UltraChat, UltraFeedback binarised, and conversations that end with a user
    turn."""
    question, chosen, rejected = turn(draw, "user"), turn(draw, "assistant"), turn(draw, "assistant")
    pair = {"prompt": question["content"], "chosen": [question, chosen], "rejected": [question, rejected]}
    pair |= {"messages": [question, chosen], "score_chosen": 8.0, "score_rejected": 4.5, "prompt_id": "a"}
    chat = {"prompt": question["content"], "messages": [question, chosen, turn(draw, "user"), rejected]}
    waiting = {"context": "", "context_messages": [question, chosen, turn(draw, "user")], "source": "b"}
    return {"sft": chat, "reward": pair, "dpo": pair, "rto": waiting}


@pytest.fixture
def datasets(tmp_path) -> dict[str, str]:
    draw = random.Random(0)
    rows = [rows_of(draw) for _ in range(20)]
    for name in TRAINERS:
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row[name]) + "\n" for row in rows))
    return {name: str(tmp_path / f"{name}.jsonl") for name in TRAINERS}


def save_chat_model(folder: Path, seed: int) -> str:
    tiny.save_policy(folder, seed)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_every_section_runs_in_the_order_of_the_file(datasets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the recipe's folders are relative, and rto reads the folders of earlier sections
    start = save_chat_model(tmp_path / "mixture", 0)
    small = {"dataset_train_split": "train", "dataset_test_split": "", "num_eval_examples": 4, "dtype": "float32"}
    short = {"max_steps": 2, "train_batch_size": 8, "progress": False}
    starts = {name: {"model_name_or_path": start} for name in TRAINERS}
    starts["reward"] = {"model_name_or_path": save_chat_model(tmp_path / "small", 1), "tokenizer_name_or_path": start}
    starts["sft"]["tokenizer_name_or_path"] = start
    starts["rto"] |= {"response_length": 6, "max_length": 60}

    results = {}
    for name, (kind, train) in TRAINERS.items():
        settings = small | short | starts[name] | {"dataset_name": datasets[name]}
        flags = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        results[name] = train(parse(kind, ["--config", "rto_ultrafeedback", *flags], name))
    row = results["rto"].history[-1]
    assert {"reward/score", "reward/score_clipped", "reward/kl", "reward/dpo", "reward/dpo_clipped"} <= row.keys()
    assert row["reward/dpo"] != 0  # the DPO model comes from its section and has been trained
    assert {"eval_objective/scores", "eval_greedy/scores"} <= results["rto"].final.keys()
