"""Tests of the order and the numbers of draws from several datasets, and of the joining of their rows."""

import itertools
import json
import logging
import random
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from fastrlhf.algorithms import dpo, kto, ppo, psipo_groups, reward_model, sft
from fastrlhf.algorithms.sft import train_sft
from fastrlhf.config import DPOConfig, KTOConfig, PPOConfig, RewardConfig, SFTConfig, Source
from fastrlhf.data.token_report import TokenReport
from fastrlhf.runtime import dataset
from fastrlhf.runtime.inputs import open_inputs
from fastrlhf.runtime.mixing import drawn_after, join_reports, mixed_epochs, shares_of
from fastrlhf.runtime.optim import index_batches
from tests import tiny


def epochs(shares, num, seed=3):
    return [each.tolist() for each in itertools.islice(mixed_epochs(shares, seed), num)]


def test_an_epoch_draws_each_dataset_in_proportion_to_weight_times_size():
    # 2 * 10 : 1 * 20 : 0.5 * 40 = 1 : 1 : 1, and an epoch has 70 rows
    shares = [(10, 2.0), (20, 1.0), (40, 0.5)]
    assert [drawn_after(shares, epoch) for epoch in (1, 2, 3)] == [[24, 23, 23], [47, 47, 46], [70, 70, 70]]
    ends = [0, 10, 30, 70]
    total = np.zeros(3, int)
    for epoch, drawn in enumerate(epochs(shares, 3), start=1):
        assert len(drawn) == 70
        total += np.histogram(drawn, ends)[0]
        assert total.tolist() == drawn_after(shares, epoch)


def test_numbers_of_draws_stay_within_one_of_the_proportion_and_never_decrease():
    draw = random.Random(1)
    for _ in range(200):
        shares = [(draw.randrange(0, 30), draw.choice([0.01, 0.5, 1.0, 1 / 3, 7.0])) for _ in range(draw.randint(1, 3))]
        num = sum(size for size, _ in shares)
        if not num:
            continue
        masses = [size * Fraction(weight) for size, weight in shares]
        before = [0] * len(shares)
        for epoch in range(1, 30):
            now = drawn_after(shares, epoch)
            assert sum(now) == epoch * num
            assert all(new >= old for new, old in zip(now, before, strict=True))
            exact = [epoch * num * mass / sum(masses) for mass in masses]
            assert all(abs(x - y) < 1 for x, y in zip(now, exact, strict=True))
            before = now


def test_rows_of_a_dataset_are_drawn_without_replacement_and_in_a_new_order_after_each_pass():
    shares = [(7, 3.0), (11, 1.0)]
    drawn = [i for epoch in epochs(shares, 30) for i in epoch]
    for first, size in ((0, 7), (7, 11)):
        own = [i for i in drawn if first <= i < first + size]
        passes = [own[at : at + size] for at in range(0, len(own) - size + 1, size)]
        assert len(passes) > 10
        assert all(sorted(one) == list(range(first, first + size)) for one in passes)
        assert len({tuple(one) for one in passes}) == len(passes)
    assert epochs(shares, 2, seed=4) != epochs(shares, 2, seed=3)


def test_batches_depend_only_on_seed_sizes_and_weights():
    shares = [(7, 3.0), (11, 1.0)]
    long = list(index_batches(18, 4, 20, 5, shares))
    assert list(index_batches(18, 4, 9, 5, shares)) == long[:9]
    assert [i for batch in long for i in batch] == [i for one in epochs(shares, 5, seed=5) for i in one][:80]


def report(**values) -> TokenReport:
    zero = dict.fromkeys(("num_examples", "num_kept", "eos_added", "eos_present", "responses_cut", "prompts_cut"), 0)
    return TokenReport(max_length=9, **zero | {"dropped": {}, "firsts": {}} | values)


def test_reports_add_up():
    shown = {"a": list("12345")}
    one = report(num_kept=3, dropped={"a": 1}, firsts={"a": "row 1"}, ends=("<eos>",), dropped_rows=shown)
    two = report(num_kept=4, dropped={"a": 2, "b": 1}, firsts={"a": "row 2", "b": "row 3"}, dropped_rows={"a": ["6"]})
    assert join_reports([one, two]) == report(
        num_kept=7,
        dropped={"a": 3, "b": 1},
        firsts={"a": "row 1", "b": "row 3"},
        ends=("<eos>",),
        dropped_rows=shown,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    draw = random.Random(0)
    for name, num, prompt in (("short", 12, "prompt"), ("long", 20, "question")):
        rows = [
            {prompt: " ".join(draw.choices(tiny.WORDS, k=3)), "completion": f"w{i % 29} w{len(name)}"}
            for i in range(num)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def config_of(folder: Path, dataset_name, **keys) -> SFTConfig:
    fields = {
        "tokenizer_name_or_path": str(folder / "tokenizer"),
        "model_config": '{"model_type": "llama"}',
        "dataset_cache_dir": str(folder / "store"),
        "max_length": 40,
        "num_eval_examples": 4,
    }
    return SFTConfig(dataset_name=dataset_name, device="cpu", **fields | keys)


def entries(folder: Path, weight=1.0):
    return [
        {"path": str(folder / "short.jsonl"), "weight": weight},
        {"path": str(folder / "long.jsonl"), "columns": {"prompt": "question"}},
    ]


def opened(config, **keys):
    return open_inputs(config, ["reference"], None, None, **keys)[1]


def test_joined_rows_are_those_of_each_dataset_with_row_numbers_that_continue(folder, caplog):
    caplog.set_level(logging.INFO)
    data = opened(config_of(folder, entries(folder, 2.0)))
    assert caplog.messages[-2:] == [
        "train: 24 rows of 2 datasets: short 8 (numbered from 0, weight 2, 50.0% of all draws), "
        "long 16 (numbered from 12, weight 1, 50.0% of all draws)",
        "eval: 8 rows of 2 datasets: short 4 (numbered from 0), long 4 (numbered from 12)",
    ]
    short = opened(config_of(folder, str(folder / "short.jsonl")))
    long = opened(config_of(folder, str(folder / "long.jsonl"), columns="prompt=question"))
    moved = [[replace(row, row=row.row + 12) for row in rows] for rows in (long.train, long.eval)]
    assert data.train == [*short.train, *moved[0]]
    assert data.eval == [*short.eval, *moved[1]]
    names, numbers = data.train.datasets()
    assert (names, numbers.tolist()) == (["short", "long"], [0] * 8 + [1] * 16)
    assert data.train.place(9) == "row 13 (row 1 of long)"
    assert data.report.num_kept == 24
    assert len(list((folder / "store").iterdir())) == 4  # a run on one of the datasets shares the stored entries
    again = opened(config_of(folder, entries(folder, 2.0)))
    assert again.fingerprint == data.fingerprint
    backwards = opened(config_of(folder, entries(folder, 2.0)[::-1]))
    assert backwards.fingerprint != data.fingerprint


def test_rows_with_text_have_the_same_numbers(folder):
    data = opened(config_of(folder, entries(folder)), keep_rows=True)
    assert sorted(data.train_rows) == [row.row for row in data.train] == [*range(8), *range(12, 28)]
    assert data.train_rows[13].reference == "w1 w4"
    assert data.train_rows[1].reference == "w1 w5"


def test_equal_weights_give_the_order_of_one_dataset(folder):
    config = config_of(folder, entries(folder))
    train = opened(config).train
    assert shares_of(config, train) == []
    assert shares_of(config_of(folder, [{**entry, "weight": 3} for entry in entries(folder)]), train) == []
    assert shares_of(config_of(folder, entries(folder, 2.0)), train) == [(8, 2.0), (16, 1.0)]
    assert shares_of(config_of(folder, entries(folder, 2.0)), train.select([0, 9, 10])) == [(1, 2.0), (2, 1.0)]
    assert shares_of(config_of(folder, "rows.jsonl"), train) == []


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"path": "none.jsonl"}, r"^dataset_name\[1\]: none.jsonl: no such file or folder"),
        ({"path": "long.jsonl", "columns": "prompt=text"}, r"^dataset_name\[1\]: columns: .* has no column 'text'"),
        ({"path": "long.jsonl", "split": "test"}, r"^dataset_name\[1\]: .*: no split 'test' among \['train'\]"),
    ],
)
def test_errors_name_the_index_of_the_entry(folder, monkeypatch, entry, message):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=message):
        opened(config_of(folder, [Source("short.jsonl"), entry]))


def test_a_row_that_is_too_long_is_named_with_its_dataset(folder):
    from fastrlhf.data.packing import check_micro_batch

    config = config_of(folder, entries(folder), micro_batch_tokens=5)
    rows = opened(config).train
    with pytest.raises(ValueError, match=r"at least 9, the tokens of row 14 \(row 2 of long\); or lower max_length"):
        check_micro_batch(config, rows, [6] * 10 + [9] + [6] * 13)


class Cut:
    def on_save(self, *_):
        raise RuntimeError("power failure")


def test_a_resumed_run_draws_the_rows_of_an_uninterrupted_run(folder):
    model = {
        "model_name_or_path": tiny.save_policy(folder / "policy"),
        "model_config": "",
        "tokenizer_name_or_path": "",
    }
    keys = {**model, "max_steps": 6, "learning_rate": 1e-2, "progress": False, "save_steps": 2, "save_total_limit": 0}
    whole = train_sft(config_of(folder, entries(folder, 2.0), **keys | {"save_steps": 0})).history
    keys |= {"output_dir": str(folder / "run")}
    with pytest.raises(RuntimeError, match="power failure"):
        train_sft(config_of(folder, entries(folder, 2.0), **keys), callbacks=[Cut()])
    with pytest.raises(ValueError, match=r"dataset_name: .*'weight': 2.0.* there, .*'weight': 3.0.* here"):
        train_sft(config_of(folder, entries(folder, 3.0), **keys))
    resumed = train_sft(config_of(folder, entries(folder, 2.0), **keys)).history
    assert [row["loss"] for row in resumed] == [row["loss"] for row in whole]


def test_prompts_of_episodes_are_drawn_with_weights(folder, monkeypatch):
    seen = []
    draw = ppo.draw_prefixes
    monkeypatch.setattr(
        ppo, "draw_prefixes", lambda config, rows, *a, **k: seen.extend(rows) or draw(config, rows, *a, **k)
    )
    tiny.save_policy(folder / "policy")
    config = PPOConfig(
        model_name_or_path=str(folder / "policy"),
        reward_model_path=tiny.save_reward_model(folder / "judge"),
        dataset_name=entries(folder, 4.0),
        dataset_cache_dir=str(folder / "store"),
        per_device_train_batch_size=32,
        total_episodes=32,
        response_length=2,
        max_length=40,
        progress=False,
        device="cpu",
    )
    ppo.train_ppo(config)
    # an epoch of 12 and 20 rows, in which a row of the first dataset is drawn 4 times as often
    assert sum(row.row < 12 for row in seen) == drawn_after([(12, 4.0), (20, 1.0)], 1)[0] == 23
    assert len(seen) == 32


PAIR = {"prompt": "w3 w4", "chosen": "w1", "rejected": "w2 w5"}


@pytest.mark.parametrize(
    ("module", "train", "kind", "keys", "row"),
    [
        (sft, sft.train_sft, SFTConfig, {}, {"prompt": "w3", "completion": "w1"}),
        (reward_model, reward_model.train_reward_model, RewardConfig, {}, PAIR),
        (dpo, dpo.train_dpo, DPOConfig, {}, PAIR),
        (
            psipo_groups,
            dpo.train_dpo,
            DPOConfig,
            {"loss_type": "ipo", "psi_backend": "groupwise"},
            {"prompt": "w3", "responses": ["w1", "w2"], "scores": [1.0, 0.0]},
        ),
        (kto, kto.train_kto, KTOConfig, {}, {"prompt": "w3", "completion": "w1", "label": True}),
    ],
    ids=["sft", "reward", "dpo", "groups", "kto"],
)
def test_every_offline_trainer_draws_with_weights(tmp_path, monkeypatch, module, train, kind, keys, row):
    class Seen(Exception):
        pass

    def draws(num_items, batch_size, steps, seed, shares=()):
        raise Seen(num_items, list(shares))

    tiny.save_policy(tmp_path / "policy")
    for name, num in (("short", 4), ("long", 6)):
        rows = [row | ({"label": i % 2 == 0} if "label" in row else {}) for i in range(num)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    monkeypatch.setattr(module, "index_batches", draws)
    config = kind(
        model_name_or_path=str(tmp_path / "policy"),
        dataset_name=[{"path": str(tmp_path / "short.jsonl"), "weight": 3}, str(tmp_path / "long.jsonl")],
        dataset_cache_dir=str(tmp_path / "store"),
        per_device_train_batch_size=4,
        device="cpu",
        progress=False,
        **keys,
    )
    with pytest.raises(Seen) as seen:
        train(config)
    assert seen.value.args == (10, [(4, 3.0), (6, 1.0)])


def test_an_entry_is_read_with_its_own_configuration_columns_and_split(folder, monkeypatch):
    read = []
    monkeypatch.setattr(dataset, "_parts", lambda config, *_, **__: read.append(config) or [None, None])
    named = [Source("a/x", config="main", split="train[:9]", columns="prompt=q"), Source("a/y")]
    config = config_of(folder, named, dataset_config="other", columns="prompt=p")
    dataset.dataset_parts(config, None, [], dataset.training_rows(config), "", keep_rows=False)
    assert [(each.dataset_name, each.dataset_config, each.columns) for each in read] == [
        ("a/x", "main", "prompt=q"),
        ("a/y", "other", "prompt=p"),
    ]
