"""Tests of the comparison of REBEL, RRPO and PRIME: the settings of its arms, and the table that it makes of
hand-written rows. No test starts the runs of the comparison, which take minutes.
"""

from pathlib import Path

from bench.papers.pieces import ARMS, UPDATES, table
from fastrlhf.config import PPOConfig
from fastrlhf.demo import DemoConfig, stage_config


def test_every_arm_is_a_valid_configuration_that_differs_from_ppo():
    start = stage_config("ppo", DemoConfig(out="runs", seed=0), Path("runs"))
    own = {"reward_model_path": "", "max_steps": UPDATES}
    arms = {name: PPOConfig(**vars(start) | own | settings) for name, settings in ARMS.items()}
    assert [arms[name].advantage_estimator for name in ARMS] == ["gae", "grpo", "grpo", "grpo", "prime"]
    assert [name for name in ARMS if arms[name].update == "pair"] == ["rebel"]
    assert [name for name in ARMS if arms[name].reset_source == "rollout"] == ["rrpo"]
    assert [name for name in ARMS if arms[name].dpo_refine == "outcome"] == ["prime"]


def test_differences_in_the_table_are_paired_by_seed():
    def rows(*gold: float):
        return [{"gold_reward": value, "kl": 1.0, "tokens": 100} for value in gold]

    found = {"ppo": rows(1.0, 3.0), "grpo": rows(2.0, 4.0), "rrpo": rows(2.5, 4.5)}
    lines = table(found).splitlines()
    assert lines[2].startswith("| ppo | 2.00 +- ")
    assert lines[3].split(" | ")[2:4] == ["1.00 +- 0.00", ""]
    assert lines[4].split(" | ")[2:4] == ["1.50 +- 0.00", "0.50 +- 0.00"]
    assert lines[4].endswith("| 1.00 | 100 |")
