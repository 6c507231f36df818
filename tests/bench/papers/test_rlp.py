from dataclasses import replace

import numpy as np
import pytest

from bench.papers import rlp
from bench.papers.rlp import ABLATIONS, ARMS, seeds_and_prompts_interval
from fastrlhf import demo
from fastrlhf.config import RLPConfig
from fastrlhf.evaluation.winrates import bootstrap_interval


@pytest.fixture
def short(monkeypatch):
    """Makes the experiment tiny: a few steps per model, 16 prompts with 4 answers each, and one PPO update. Returns the
    list to which the experiment appends its result rows.
    """
    full, rows = demo.stage_config, []
    few = {"sft": {"max_steps": 2, "progress": False}, "reward": {}, "ppo": {"num_ppo_epochs": 1}}

    def stage_config(name, config, out):
        return replace(full(name, config, out), per_device_train_batch_size=16, **few[name])

    for module in (demo, rlp):
        monkeypatch.setattr(module, "stage_config", stage_config)
    monkeypatch.setattr(demo, "NUM_SFT", 32)
    sizes = {"NUM_PAIRS": 32, "NUM_HELD_OUT": 16, "NUM_PROMPTS": 16, "NUM_UNSEEN": 8, "EPISODES": 16, "NUM_ANSWERS": 4}
    for name, size in sizes.items():
        monkeypatch.setattr(rlp, name, size)
    monkeypatch.setattr(rlp, "DemoConfig", lambda out, seed: demo.DemoConfig(out=out, seed=seed, num_eval=8))
    monkeypatch.setattr(rlp, "append_row", lambda row, folder: rows.append(row))
    return rows


def test_arms_share_the_models_of_a_seed_and_run_once(short, tmp_path):
    some_pairs = rlp.Arm(name="spg", refit={"min_confidence": 0.5}, policy=False)
    control, gold_pairs = ARMS[1], replace(ABLATIONS[0], policy=False)
    first = rlp._run_seed(tmp_path, tmp_path, [ARMS[0], replace(control, policy=False), some_pairs, gold_pairs], 0)
    models = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*.safetensors"))
    again = rlp._run_seed(tmp_path, tmp_path, [ARMS[0], replace(control, policy=False), some_pairs, gold_pairs], 0)
    assert again == first
    assert models == sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*.safetensors"))
    assert [row["arm"] for row in short] == ["ppo", "lambda 0", "spg", "gold pairs"]
    ppo, plain, spg, gold = first
    assert ppo["gold_reward"] == pytest.approx(np.mean(ppo["gold"]), abs=1e-9)
    assert "gold" not in short[0]
    assert len(ppo["score_curve"]) == 1
    assert ppo["rm_variance"] != plain["rm_variance"]  # the reward models had different random numbers
    assert 2 < spg["pairs"] == gold["pairs"] < 16
    assert gold["pair_accuracy"] == 1.0
    assert "gold_reward" not in spg


def test_with_equal_random_numbers_the_control_is_plain_ppo(short, tmp_path, monkeypatch):
    monkeypatch.setattr(rlp, "OTHER_DRAWS", 0)
    plain, control = rlp._run_seed(tmp_path, tmp_path, ARMS[:2], 0)
    assert {**control, "arm": "ppo"} == plain


def test_every_arm_adds_its_data_or_loss_and_the_control_adds_nothing():
    configs = {arm.name: RLPConfig(**arm.refit) for arm in (*ARMS[1:], *ABLATIONS)}
    assert {name: (config.with_views, config.with_pairs) for name, config in configs.items()} == {
        "lambda 0": (False, False),
        **dict.fromkeys(("uml paper", "uml robust"), (True, False)),
        **dict.fromkeys(("spg", "gold pairs", "reward", "select-all", "rlaif"), (False, True)),
    }


def test_the_bootstrap_draws_seeds_and_then_prompts():
    draws = np.random.default_rng(0).normal(size=400)
    # Both intervals are bootstraps of 10,000 samples with half-widths of about 0.1; they differ by sampling noise.
    assert seeds_and_prompts_interval([draws]) == pytest.approx(bootstrap_interval(draws), abs=0.01)
    # Half of the bootstrap samples contain one of the two seeds twice, so the interval reaches from 0 to 10.
    assert seeds_and_prompts_interval([[0.0] * 9, [10.0] * 9]) == (0.0, 10.0)


def test_the_table_pairs_seeds_and_posts_and_the_figure_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    measured = {"rm_accuracy_offline": 0.8, "rm_accuracy_policy": 0.6, "rm_variance": 2.0}
    found = {}
    for i, arm in enumerate((*ARMS, *ABLATIONS)):
        row = {**measured, "rm_variance": 2.0 + i}
        if arm.policy:
            row |= {"rm_score": 1.0, "kl": 2.0, "mean_length": 12.0}
        if "pairing" in (arm.refit or {}):
            row |= {"pairs": 30, "pair_accuracy": 0.75}
        golds = ([0.0, 4.0], [100.0, 104.0])
        found[arm.name] = [row | {"gold": [x + i for x in gold], "gold_reward": gold[0] + 2 + i} for gold in golds]
    lines = rlp.table(found).splitlines()
    assert lines[2].startswith(
        "| ppo | 52.00 +- 635.50 |  | -1.00 [-1.00, -1.00] | 1.00 | 2.00 | 12.00 | 80.0 | 60.0 |"
    )
    assert lines[4].startswith("| uml paper | 54.00 +- 635.50 | +2.00 [+2.00, +2.00] | +1.00 [+1.00, +1.00] |")
    assert "| 2.00 |  |  |" in lines[4]
    assert lines[-1] == "| rlaif |  |  |  |  |  |  | 80.0 | 60.0 | 5.00 | 30 | 75.0 |"
    rlp.draw(found, tmp_path / "figures" / "x.png")
    assert (tmp_path / "figures" / "x.png").stat().st_size > 0
