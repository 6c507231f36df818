import json

import pytest

from bench.labels import ARMS, Arm, table


def row(gold: float, kl: float) -> dict[str, float]:
    return {"gold_reward": gold, "kl": kl, "held_out_accuracy": 0.75, "train_accuracy": 1.0, "train_log_ratio": 26.04}


def test_the_table_gives_means_and_students_intervals_over_seeds():
    arm = Arm(0.0, 12, "dpo", 0.1)
    lines = table([{None: row(3.0, 0.0), arm: row(gold, 2.0)} for gold in (4.0, 6.0)]).splitlines()
    assert lines[2].startswith("| | 0 | sft | | 3.00 +- 0.00 |")
    # mean of 4 and 6: 5; half interval for n = 2: t_0.975 * s / sqrt(n) = 12.71 * sqrt(2) / sqrt(2)
    expected = "| temperature 0 | 12 | dpo | 0.1 | 5.00 +- 12.71 | 2.00 +- 0.00 | 75.00 +- 0.00 | 26.0 | 100 |"
    assert lines[3:] == [expected]


def test_each_arm_trains_on_its_own_labels_and_is_judged_once(monkeypatch, tmp_path):
    """Trains two arms on 16 pairs after two steps of SFT. A second call must find all results and train nothing."""
    from bench import labels
    from fastrlhf import demo

    full, trained, rows = demo.stage_config, [], []

    def short(name, config, out):
        settings = full(name, config, out)
        return labels.replace(settings, max_steps=2, warmup_steps=0, progress=False)

    def train(config, pairs, held_out):
        trained.append((config, pairs, held_out))
        return labels_train(config, pairs, held_out)

    labels_train = labels.train_dpo
    monkeypatch.setattr(demo, "stage_config", short)
    monkeypatch.setattr(demo, "NUM_SFT", 128)
    monkeypatch.setattr(labels, "train_dpo", train)
    monkeypatch.setattr(labels, "append_row", rows.append)
    monkeypatch.setattr(labels, "ARMS", [Arm(50.0, 2, "dpo", 0.1), Arm(0.0, 2, "ipo", 1.0)])
    for name, number in {"NUM_PAIRS": 32, "BATCH": 16, "NUM_HELD_OUT": 8, "NUM_POSTS": 8}.items():
        monkeypatch.setattr(labels, name, number)
    first = labels._run_seed(tmp_path / "runs", 0)
    assert labels._run_seed(tmp_path / "runs", 0) == first
    assert [(r["method"], r.get("temperature")) for r in rows] == [("sft", None), ("dpo", 50.0), ("ipo", 0.0)]
    assert len(trained) == 2
    (dpo, noisy, held_out), (ipo, certain, same) = trained
    assert (dpo.max_steps, dpo.loss_type, dpo.beta) == (4, "sigmoid", 0.1)
    assert (ipo.max_steps, ipo.loss_type, ipo.length_norm, ipo.beta) == (4, "ipo", "sum", 1.0)
    assert [{e.chosen, e.rejected} for e in noisy] == [{e.chosen, e.rejected} for e in certain]
    assert [e.chosen for e in noisy] != [e.chosen for e in certain]
    assert held_out == same
    task = labels.ToyTask(seed=0)
    for e in (*certain, *held_out):
        assert task.gold_reward(e.prompt, e.chosen) >= task.gold_reward(e.prompt, e.rejected)
    assert first[Arm(0.0, 2, "ipo", 1.0)]["kl"] >= 0
    assert json.loads((tmp_path / "runs/seed-0/sft/row.json").read_text()) == first[None]


def test_the_largest_beta_runs_with_noisy_and_with_deterministic_labels():
    for method in ("dpo", "ipo"):
        for temperature in (0.0, 4.0):
            assert {arm.beta for arm in ARMS if arm[:3] == (temperature, 12, method)} == {0.1, 1.0}


def test_more_seeds_than_the_table_of_students_t_has_are_refused(monkeypatch, capsys):
    from bench.__main__ import main

    monkeypatch.setattr("sys.argv", ["bench", "labels", "--seeds", "11"])
    with pytest.raises(SystemExit):
        main()
    assert "--seeds" in capsys.readouterr().err
