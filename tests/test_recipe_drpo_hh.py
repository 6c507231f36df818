"""Runs every section of the recipe drpo_hh on a tiny model and on dialogues in the dataset's raw format."""

import json
import random

import pytest

from fastrlhf.algorithms.dpo import train_dpo
from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.algorithms.reward_model import train_reward_model
from fastrlhf.algorithms.sft import train_sft
from fastrlhf.cli import parse
from fastrlhf.config import DPOConfig, DRPOConfig, EvalConfig, RewardConfig, SFTConfig
from fastrlhf.evaluation.evaluate import evaluate_models
from tests import tiny

TRAINERS = {
    "sft": (SFTConfig, train_sft),
    "reward": (RewardConfig, train_reward_model),
    "dpo": (DPOConfig, train_dpo),
    "drpo": (DRPOConfig, train_ppo),
}


@pytest.fixture
def dialogues(tmp_path) -> str:
    """Returns 24 rows in the raw format of HH, with one to three questions each."""
    draw = random.Random(0)

    def words() -> str:
        return " ".join(draw.choices(tiny.WORDS, k=draw.randint(2, 6)))

    rows = []
    for _ in range(24):
        start = "".join(f"\n\nHuman: {words()}\n\nAssistant: {words()}" for _ in range(draw.randint(0, 2)))
        prompt = f"{start}\n\nHuman: {words()}\n\nAssistant: "
        rows.append({"chosen": prompt + words(), "rejected": prompt + words()})
    path = tmp_path / "hh.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_every_section_runs_in_the_order_of_the_file(dialogues, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the recipe's folders are relative, and sections read the folders of earlier ones
    small = {"dataset_name": dialogues, "dataset_test_split": "", "num_eval_examples": 4, "dtype": "float32"}
    short = small | {"max_steps": 2, "train_batch_size": 8, "progress": False}
    own = {"sft": {"model_name_or_path": tiny.save_policy(tmp_path / "base")}, "drpo": {"response_length": 6}}

    def config(command, kind, settings):
        flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        return parse(kind, ["--config", "drpo_hh", *flags], command)

    results = {
        command: train(config(command, kind, short | own.get(command, {})))
        for command, (kind, train) in TRAINERS.items()
    }
    resets = [row["drpo/prefix_len_mean"] for row in results["drpo"].history]
    assert all(length >= 1 for length in resets)  # resets use chosen responses, because the rows have no reference
    assert {"eval_objective/scores", "eval_greedy/scores"} <= results["drpo"].final.keys()
    compared = evaluate_models(config("eval", EvalConfig, small | {"response_length": 6}))
    assert list(compared) == [f"runs/drpo_hh/{name}" for name in ("sft", "dpo", "drpo")]
    assert all(comparison.num == 4 for comparison in compared.values())
