"""Tests of metrics that are split by dataset: every number is that of a run on the dataset alone."""

import json
import random

import numpy as np
import pytest
import torch

from fastrlhf.algorithms.dpo import train_dpo
from fastrlhf.algorithms.reward_model import train_reward_model
from fastrlhf.algorithms.sft import train_sft
from fastrlhf.config import DPOConfig, RewardConfig, SFTConfig
from fastrlhf.data.token_set import TokenSet
from fastrlhf.runtime.by_dataset import ByDataset
from tests import tiny


def test_sums_counts_and_means():
    split = ByDataset(names=["a", "b", "c", ""], numbers=np.array([0, 0, 1, 1, 3]))
    indices = [3, 0, 2, 4]
    sums = split.sums(torch.tensor([1.0, 2.0, 4.0, 8.0]), indices)
    assert sums.tolist() == [2.0, 5.0, 0.0, 8.0]
    assert split.counts(indices) == [1, 2, 0, 1]
    assert split.counts(indices, [10, 20, 40, 80]) == [20, 50, 0, 80]
    assert split.losses(sums.tolist(), split.counts(indices), evaluation=False) == {
        "dataset/a/loss": 2.0,
        "dataset/b/loss": 2.5,
    }
    assert split.losses([2.0, 0.0, 3.0, 1.0], [1, 0, 2, 1], evaluation=True) == {"eval_a_loss": 2.0, "eval_c_loss": 1.5}


def test_a_single_dataset_is_not_split():
    for split in (ByDataset.of(TokenSet()), ByDataset.single(2), ByDataset.of(TokenSet.of([]))):
        assert not split
        assert split.sums(torch.ones(2), [0, 1]).tolist() == []
        assert split.counts([0, 1]) == []
        assert split.losses([], [], evaluation=True) == {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    tiny.save_policy(folder / "model")
    tiny.save_policy(folder / "reference", seed=1)
    draw = random.Random(0)

    def words(most: int) -> str:
        return " ".join(draw.choices(tiny.WORDS, k=draw.randint(1, most)))

    for name, num in (("short", 12), ("long", 20)):
        rows = [
            {"prompt": words(3), "completion": words(5), "chosen": "w1 " + words(5), "rejected": "w2 " + words(5)}
            for _ in range(num)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("train", "kind", "keys"),
    [
        (train_sft, SFTConfig, {}),
        (train_reward_model, RewardConfig, {}),
        (train_dpo, DPOConfig, {"ref_model_name_or_path": "reference"}),
        (train_dpo, DPOConfig, {"ref_model_name_or_path": "reference", "loss_type": "ipo"}),
    ],
)
def test_the_losses_of_a_dataset_are_those_of_a_run_on_it(folder, monkeypatch, train, kind, keys):
    monkeypatch.chdir(folder)

    def history(dataset_name, batch):
        shared = {"model_name_or_path": "model", "dataset_cache_dir": "store", "device": "cpu", "progress": False}
        run = {"max_steps": 1, "num_eval_examples": 4, "learning_rate": 1e-12, "micro_batch_tokens": 40}
        config = kind(dataset_name=dataset_name, per_device_train_batch_size=batch, **shared, **run, **keys)
        [step] = train(config).history
        return step

    step = history([{"path": "short.jsonl"}, {"path": "long.jsonl"}], 24)
    for name, num in (("short", 8), ("long", 16)):
        own = history(f"{name}.jsonl", num)
        assert step[f"dataset/{name}/loss"] == pytest.approx(own["loss"], rel=2e-5)
        assert step[f"eval_{name}_loss"] == pytest.approx(own["eval_loss"], rel=2e-5)
        assert not any("dataset/" in key or name in key for key in own)
    assert abs(step["dataset/short/loss"] / step["dataset/long/loss"] - 1) > 1e-3  # so that a mix-up would be seen
