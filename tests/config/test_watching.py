import re

import pytest

from fastrlhf.config import PPOConfig, SFTConfig
from fastrlhf.config.command_line import parse
from fastrlhf.config.paths import at_start

BEST = {"load_best_model_at_end": True, "eval_steps": 10, "output_dir": "runs/x"}


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (
            {"load_best_model_at_end": True, "output_dir": "x"},
            "eval_steps: must be above 0 with load_best_model_at_end, which compares evaluations; got 0",
        ),
        (
            {"early_stopping_patience": 3},
            "eval_steps: must be above 0 with early_stopping_patience, which compares evaluations; got 0",
        ),
        ({"profile_steps": "8:5"}, "profile_steps: must be the first and the last step, such as 5:8; got '8:5'"),
        ({"profile_steps": "0:5"}, "profile_steps: must be the first and the last step, such as 5:8; got '0:5'"),
        (
            {"metric_for_best_model": "eval_loss"},
            "metric_for_best_model: must be '' without load_best_model_at_end and early_stopping_patience, since it "
            "would have no effect; got 'eval_loss'",
        ),
        (
            {"greater_is_better": False},
            "greater_is_better: must be None without load_best_model_at_end and early_stopping_patience, since it "
            "would have no effect; got False",
        ),
        (
            BEST | {"early_stopping_threshold": 0.1},
            "early_stopping_threshold: must be 0.0 when early_stopping_patience is 0, since it would have no effect; "
            "got 0.1",
        ),
    ],
)
def test_keys_without_effect_and_runs_without_evaluations_are_refused(keys, told):
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        SFTConfig(**keys)


@pytest.mark.parametrize(
    ("kind", "keys", "metric", "larger"),
    [
        (SFTConfig, {}, "eval_loss", False),
        (PPOConfig, {}, "eval_objective/scores", True),
        (SFTConfig, {"metric_for_best_model": "accuracy"}, "eval_accuracy", True),
        (SFTConfig, {"metric_for_best_model": "eval_loss", "greater_is_better": True}, "eval_loss", True),
        (
            PPOConfig,
            {"metric_for_best_model": "eval_kl", "greater_is_better": False},
            "eval_kl",
            False,
        ),
    ],
)
def test_the_metric_and_its_direction(kind, keys, metric, larger):
    config = kind(**BEST, **keys)
    assert (config.best_metric, config.larger_is_better) == (metric, larger)


@pytest.mark.parametrize("spelled", ["true", "True"])
def test_a_truth_value_that_may_be_null_is_read_from_flags_and_files(spelled, tmp_path):
    flags = ["--load_best_model_at_end", "--eval_steps", "5", "--output_dir", "x"]
    assert parse(SFTConfig, [*flags, "--greater_is_better", spelled], "sft").greater_is_better is True
    (tmp_path / "run.yaml").write_text(f"greater_is_better: {spelled}\n")
    assert parse(SFTConfig, ["--config", str(tmp_path / "run.yaml"), *flags], "sft").greater_is_better is True
    (tmp_path / "run.yaml").write_text("greater_is_better: null\n")
    assert parse(SFTConfig, ["--config", str(tmp_path / "run.yaml"), *flags], "sft").greater_is_better is None


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (BEST, "load_best_model_at_end: must be false without output_dir, to which the best weights are written"),
        ({"profile_steps": "5:8"}, "profile_steps: must be empty without output_dir, to which profiles are written"),
    ],
)
def test_a_trainer_refuses_keys_that_need_a_folder_if_there_is_none(keys, told):
    with pytest.raises(ValueError, match=f"^{told}"):
        at_start(SFTConfig(**keys | {"output_dir": ""}), SFTConfig, "train_sft")
