"""Tests of the best model and of early stopping, with evaluations that return a fixed value for each step."""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from fastrlhf.algorithms import sft
from fastrlhf.config import SFTConfig
from fastrlhf.runtime.best import BestModel
from fastrlhf.runtime.run import Run
from tests.resumable import Killed, Watch, run, save_models, untimed_log

LOSSES = {0: 9.0, 1: 5.0, 2: 3.0, 3: 4.0, 4: 3.5, 5: 6.0}
BEST = {"load_best_model_at_end": True, "eval_steps": 1}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def weights(monkeypatch):
    """Makes evaluations return LOSSES. The fixture is a dict of step -> weights at the evaluation after this step."""
    seen, step, log = {}, [0], Run.log

    def counted(self, number, *arguments, **keywords):
        step[0] = number
        log(self, number, *arguments, **keywords)

    def evaluate(model, *_):
        seen[step[0]] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return {"eval_loss": LOSSES[step[0]], "eval_half": LOSSES[step[0]] / 2}

    monkeypatch.setattr(Run, "log", counted)
    monkeypatch.setattr(sft, "evaluate", evaluate)
    return seen


def test_the_final_folder_holds_the_weights_and_the_result_the_metrics_of_the_best_step(paths, tmp_path, weights):
    result = run("sft", paths, tmp_path / "run", **BEST)
    assert [row["eval_loss"] for row in result.history] == [5.0, 3.0, 4.0, 3.5, 6.0]
    assert result.final == {"eval_loss": 3.0, "eval_half": 1.5}
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(saved[name], weights[2][name]) for name in saved)
    assert not all(torch.equal(saved[name], weights[5][name]) for name in saved)
    text = (tmp_path / "run" / "README.md").read_text()
    assert "Best evaluation, after step 2, whose weights the model has, on " in text
    assert "Last training step (5):" in text
    assert not list((tmp_path / "run").glob("best-*"))


def test_the_largest_value_of_any_metric_may_be_the_best(paths, tmp_path, weights):
    keys = {"metric_for_best_model": "half", "greater_is_better": True, "eval_on_start": False}
    result = run("sft", paths, tmp_path / "run", **BEST, **keys)
    assert result.final["eval_half"] == 3.0
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(saved[name], weights[5][name]) for name in saved)


def test_a_run_stops_after_evaluations_without_improvement_and_keeps_its_last_weights(paths, tmp_path, weights):
    result = run("sft", paths, tmp_path / "run", eval_steps=1, early_stopping_patience=2)
    assert [row["eval_loss"] for row in result.history] == [5.0, 3.0, 4.0, 3.5]
    assert result.final["eval_loss"] == 3.5
    text = (tmp_path / "run" / "README.md").read_text()
    assert "Last evaluation, on " in text
    assert "Last training step (4):" in text
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(saved[name], weights[4][name]) for name in saved)


@pytest.mark.parametrize("where", [(2, "after"), (3, "after"), (4, "before"), (4, "after")])
def test_a_killed_run_has_the_same_best_step_and_stops_at_the_same_step(where, paths, tmp_path, weights, monkeypatch):
    watch, keys = Watch("sft", monkeypatch), BEST | {"early_stopping_patience": 2}
    whole = untimed_log(tmp_path / "whole", run("sft", paths, tmp_path / "whole", **keys))
    watch.kill = where
    with pytest.raises(Killed):
        run("sft", paths, tmp_path / "cut", **keys)
    watch.kill = None
    assert untimed_log(tmp_path / "cut", run("sft", paths, tmp_path / "cut", **keys)) == whole


def test_a_lost_best_model_is_forgotten_with_a_warning(paths, tmp_path, weights, monkeypatch, caplog):
    watch = Watch("sft", monkeypatch)
    watch.kill = (3, "after")
    with pytest.raises(Killed):
        run("sft", paths, tmp_path, **BEST)
    shutil.rmtree(tmp_path / "best-2")
    watch.kill = None
    assert run("sft", paths, tmp_path, **BEST).final["eval_loss"] == 3.5
    assert "best-2 is lost: only later evaluations can be best" in caplog.text


def test_a_metric_that_evaluations_do_not_have_is_refused_with_those_that_they_have(paths, tmp_path, weights):
    told = "^metric_for_best_model: must be one of eval_half, eval_loss; got 'eval_accuracy'"
    with pytest.raises(ValueError, match=told):
        run("sft", paths, tmp_path, **BEST, metric_for_best_model="accuracy")


@pytest.mark.parametrize(
    ("values", "threshold", "stops_at", "best"),
    [
        ([5.0, 4.0, 4.0, 4.0], 0.0, 3, 1),  # an equal value is no improvement
        ([5.0, 4.9, 4.8, 4.0], 0.5, 2, 2),  # improvements below the threshold do not reset the count
        ([5.0, 4.9, 4.4, 4.3, 4.2], 0.3, 4, 4),
        ([math.nan, 5.0, math.nan, 4.0, math.inf], 0.0, None, 3),  # a value that is not finite is never best
        ([math.nan, math.nan], 0.0, 1, None),
    ],
)
def test_the_rule_of_transformers_for_improvements(values, threshold, stops_at, best):
    config = SFTConfig(early_stopping_patience=2, early_stopping_threshold=threshold, eval_steps=1)
    watched = BestModel(config, None, {}, None)
    stopped, improved = [], []
    for step, value in enumerate(values):
        improved += [step] * watched.seen(step, {"eval_loss": value})
        if watched.stopped:
            stopped.append(step)
            break
    assert (stopped or [None])[0] == stops_at
    assert (improved or [None])[-1] == best
