"""Runs every section of the recipes drpo_tldr and drpo_rto_tldr on a tiny model and on rows in their datasets'
formats."""

import json
import random

import pytest

from fastrlhf.algorithms.dpo import train_dpo
from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.algorithms.reward_model import train_reward_model
from fastrlhf.algorithms.sft import train_sft
from fastrlhf.cli import parse
from fastrlhf.config import DPOConfig, DRPOConfig, EvalConfig, PPOConfig, RewardConfig, SFTConfig
from fastrlhf.evaluation.evaluate import evaluate_models
from tests import tiny

TRAINERS = {
    "sft": (SFTConfig, train_sft),
    "reward": (RewardConfig, train_reward_model),
    "dpo": (DPOConfig, train_dpo),
    "ppo": (PPOConfig, train_ppo),
    "drpo": (DRPOConfig, train_ppo),
}
SECTIONS = {"drpo_tldr": ("sft", "reward", "dpo", "ppo", "drpo"), "drpo_rto_tldr": ("sft", "reward", "dpo", "drpo")}


@pytest.fixture
def datasets(tmp_path) -> dict[str, str]:
    """Returns 20 posts with summaries, and 20 comparisons in the format that OpenAI published."""
    draw = random.Random(0)

    def words() -> str:
        return " ".join(draw.choices(tiny.WORDS, k=draw.randint(2, 6)))

    posts = [{"id": str(i), "subreddit": words(), "title": words(), "post": words()} for i in range(20)]
    summaries = [post | {"summary": words()} for post in posts]
    pairs = [{"info": post, "summaries": [{"text": words()} for _ in range(2)], "choice": 1} for post in posts]
    for name, rows in (("posts", summaries), ("comparisons", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    comparisons = dict.fromkeys(("reward", "dpo"), str(tmp_path / "comparisons.jsonl"))
    return dict.fromkeys((*TRAINERS, "eval"), str(tmp_path / "posts.jsonl")) | comparisons


@pytest.mark.parametrize("recipe", SECTIONS)
def test_every_section_runs_in_the_order_of_the_file(recipe, datasets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the recipe's folders are relative, and sections read the folders of earlier ones
    small = {"dataset_test_split": "", "num_eval_examples": 4, "dtype": "float32"}
    short = small | {"max_steps": 2, "train_batch_size": 8, "progress": False}
    own = {"sft": {"model_name_or_path": tiny.save_policy(tmp_path / "base")}}
    own |= {key: {"dataset_config": ""} for key in ("reward", "dpo")}
    own |= {key: {"response_length": 6} for key in ("ppo", "drpo")}

    def config(command, kind, settings):
        flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        return parse(kind, ["--config", recipe, "--dataset_name", datasets[command], *flags], command)

    results = {
        name: TRAINERS[name][1](config(name, TRAINERS[name][0], short | own.get(name, {}))) for name in SECTIONS[recipe]
    }
    row = results["drpo"].history[-1]
    assert row["drpo/prefix_len_mean"] >= 1  # resets use human summaries
    assert ("reward/dpo" in row) == (recipe == "drpo_rto_tldr")
    assert {"eval_objective/scores", "eval_objective/kl"} <= results["drpo"].final.keys()
    compared = evaluate_models(config("eval", EvalConfig, small | {"response_length": 6}))
    assert list(compared) == [f"runs/{recipe}/{name}" for name in SECTIONS[recipe] if name != "reward"]
