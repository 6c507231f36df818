import json
import os
import shutil
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
import pytest
import torch

from fastrlhf.config import EvalConfig
from fastrlhf.evaluation import evaluate
from fastrlhf.evaluation.completions import respond
from fastrlhf.evaluation.evaluate import evaluate_models, format_table
from fastrlhf.evaluation.judges import reward_model_judge
from fastrlhf.evaluation.winrates import Comparison, compare
from fastrlhf.models.adapters import has_adapter
from fastrlhf.models.loading import build_policy, load_policy, load_reward_model
from fastrlhf.report.report import write_report
from fastrlhf.runtime import atomic
from fastrlhf.runtime.inputs import open_eval_inputs
from fastrlhf.runtime.metrics import read_rows
from tests import tiny


@pytest.fixture
def config(tmp_path):
    return EvalConfig(
        models=(tiny.save_policy(tmp_path / "a"), tiny.save_policy(tmp_path / "b", seed=5)),
        reward_model_path=tiny.save_reward_model(tmp_path / "reward"),
        response_length=6,
        max_length=32,
        rollout_batch_size=7,
    )


def own_scores(config: EvalConfig, name: str, rows) -> np.ndarray:
    reward_model = load_reward_model(config.reward_model_path, pad_token_id=0)
    rollouts = respond(
        load_policy(name),
        rows,
        eos_token_id=tiny.EOS,
        response_length=config.response_length,
        temperature=config.temperature,
        seed=config.seed,
        batch_size=64,
    )
    return reward_model_judge(reward_model, eos_token_id=tiny.EOS, micro_batch_tokens=8192)(rollouts).numpy()


@torch.no_grad()
def column_scores(config: EvalConfig, rows, column: str) -> np.ndarray:
    model = load_reward_model(config.reward_model_path, pad_token_id=0)
    texts = [torch.tensor([[*row.prompt, *getattr(row, column)]]) for row in rows]
    return np.array([model(text).logits.item() for text in texts])


def agree(ours: Comparison, expected: Comparison) -> None:
    assert (ours.win_rate, ours.win_rate_ci, ours.num) == (expected.win_rate, expected.win_rate_ci, expected.num)
    assert ours.mean_difference == pytest.approx(expected.mean_difference, rel=1e-5)


@pytest.mark.parametrize("column", ["reference", "chosen", "rejected"])
def test_every_model_is_compared_with_a_column_on_the_same_prompts(config, column):
    config = replace(config, opponent=column)
    comparisons = evaluate_models(config, tiny.examples(20))
    tokenizer_config = replace(config, tokenizer_name_or_path=config.models[0])
    rows = open_eval_inputs(tokenizer_config, [column], tiny.examples(20))[1].eval
    assert list(comparisons) == list(config.models)
    for name, comparison in comparisons.items():
        expected = compare(own_scores(config, name, rows), column_scores(config, rows, column), seed=config.seed)
        agree(comparison, expected)
        assert comparison.num == 20


def test_models_are_compared_with_each_other(config):
    one, other = config.models
    [(name, against)] = evaluate_models(replace(config, opponent=other), tiny.examples(20)).items()
    [(_, back)] = evaluate_models(replace(config, opponent=one), tiny.examples(20)).items()
    assert name == one
    assert against.win_rate + back.win_rate == pytest.approx(1)
    assert against.mean_difference == pytest.approx(-back.mean_difference)
    assert against.mean_difference != 0


def test_what_it_prints_is_left_in_a_file_that_the_report_shows(config, tmp_path):
    folder = tmp_path / "eval"
    comparisons = evaluate_models(replace(config, output_dir=str(folder)), tiny.examples(20))
    summary = json.loads((folder / "summary.json").read_text())
    methods = summary["methods"]
    for name, comparison in comparisons.items():
        low, high = comparison.mean_difference_ci
        assert summary["methods"][name]["mean_difference"] == comparison.mean_difference
        assert summary["methods"][name]["mean_difference_ci"] == [low, high]
        assert (summary["methods"][name]["win_rate"], summary["methods"][name]["num"]) == (comparison.win_rate, 20)
    rows = read_rows(folder / "samples.jsonl")
    assert len(rows) == 20 * 3  # responses of both models, and of the dataset
    means = {name: np.mean([row["score"] for row in rows if row["model"] == name]) for name in (*methods, "reference")}
    assert {name: row["mean_score"] for name, row in methods.items()} | {
        "reference": summary["opponent_mean_score"]
    } == pytest.approx(means, rel=1e-12)  # the means average the same float32 scores in float64
    assert (summary["opponent"], summary["judge"]) == ("reference", config.reward_model_path)
    page = write_report(folder).read_text()
    columns = ("Win rate", "Mean score", "Score difference", "Prompts")
    assert [page.count(f">{column}</th>") for column in columns] == [1, 1, 1, 1]
    last = [row["response"] for row in rows if row["row"] >= 14]  # the last 6 prompts, three answers each
    assert len(last) == 6 * 3
    assert all(f"<div>{escape(response)}</div>" in page for response in last)


def test_a_killed_evaluation_leaves_nothing_that_counts_and_runs_again(config, tmp_path, monkeypatch):
    folder = tmp_path / "eval"
    keys = replace(config, models=config.models[:1], output_dir=str(folder))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):  # noqa: PT012 (killed after the first of three renames)
        patch.setattr(atomic, "sweep_files", lambda *arguments: None)
        names = []

        def replaced(source, target, rename=os.replace):
            names.append(target.name)
            if len(names) == 2:
                raise SystemExit
            rename(source, target)

        patch.setattr(os, "replace", replaced)
        evaluate_models(keys, tiny.examples(6))
    assert names == ["samples.jsonl", "summary.json"]
    with pytest.raises(ValueError, match="nothing to report"):
        write_report(folder)
    evaluate_models(keys, tiny.examples(6))
    assert {path.name for path in folder.iterdir()} == {"samples.jsonl", "summary.json", "config.yaml"}
    assert len(read_rows(folder / "samples.jsonl")) == 12
    with pytest.raises(ValueError, match="already holds a run"):
        evaluate_models(keys, tiny.examples(6))


def test_a_truncated_response_of_the_dataset_is_judged_without_an_eos(config):
    """A response that is truncated at max_length has no EOS, and the judge must score it without one."""
    examples = [replace(example, rejected="w1 " * 30) for example in tiny.examples(12)]
    config = replace(config, opponent="rejected", max_length=20)
    source = replace(config, tokenizer_name_or_path=config.models[0])
    rows = open_eval_inputs(source, ["rejected"], examples)[1].eval
    assert all(row.rejected[-1] != tiny.EOS for row in rows)
    for name, comparison in evaluate_models(config, examples).items():
        agree(comparison, compare(own_scores(config, name, rows), column_scores(config, rows, "rejected"), seed=42))


def test_only_the_held_out_rows_are_judged(config, tmp_path, monkeypatch):
    rows = [{"prompt": f"w{i}", "completion": "w1"} for i in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = []

    def record(model, rows, **settings):
        seen.append([row.row for row in rows])
        return respond(model, rows, **settings)

    monkeypatch.setattr(evaluate, "respond", record)
    held_out = replace(config, dataset_name=str(tmp_path / "a.jsonl"), num_eval_examples=6)
    assert {comparison.num for comparison in evaluate_models(held_out).values()} == {6}
    assert seen == [[14, 15, 16, 17, 18, 19]] * 2


def test_rows_that_a_model_was_trained_on_are_reported(config, tmp_path, caplog):
    """Judges the last 6 of 20 rows; the cases differ in the rows on which the judged model was trained. Its training
    run held out 2 or 6 rows, read another split or file, or read only the first 15 rows. For an adapter, the
    configuration of the training run is in the parent folder.
    """
    rows = [{"prompt": f"w{i}", "completion": "w1"} for i in range(20)]
    data = tmp_path / "a.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(config, dataset_name=str(data), num_eval_examples=6, models=config.models[:1])
    run, adapter = Path(config.models[0]), tmp_path / "run" / "adapter"
    trained = {"dataset_name": str(data), "dataset_config": "", "dataset_train_split": "train", "num_eval_examples": 2}
    for settings, told in (
        ({}, 4),
        ({"num_eval_examples": 6}, 0),
        ({"dataset_train_split": "other"}, 0),
        ({"dataset_name": "other.jsonl"}, 0),
        ({"max_train_examples": 15}, 1),
        ({"dataset_test_split": "test"}, 6),
    ):
        (run / "config.yaml").write_text(json.dumps(trained | settings))
        caplog.clear()
        evaluate_models(config)
        message = f"models: {run} was trained on at least {told} of the 6 rows on which it is judged"
        warned = [record.getMessage().split(";")[0] for record in caplog.records if record.levelname == "WARNING"]
        assert warned == ([message] if told else [])
    shutil.copytree(tiny.save_adapter(tmp_path / "trained", str(run), 1), adapter)
    (adapter.parent / "config.yaml").write_text(json.dumps(trained))
    caplog.clear()
    evaluate_models(replace(config, models=(str(adapter),)))
    assert f"models: {adapter} was trained on at least 4 of the 6 rows" in caplog.text


def test_a_prompt_without_room_for_a_response_is_left_out(config):
    examples = [replace(example, prompt="w1 " * (20 + i)) for i, example in enumerate(tiny.examples(12))]
    [comparison, _] = evaluate_models(config, examples).values()
    # Prompts have 20 to 31 tokens. max_length 32 minus 6 tokens of response leaves room for prompts of at most 26.
    assert comparison.num == 7
    with pytest.raises(ValueError, match=r"^max_length: no eval prompt leaves room for a response of 6 tokens"):
        evaluate_models(replace(config, max_length=25, max_dropped_fraction=1.0), examples)


def test_bad_input_is_refused_before_anything_is_generated(config, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "respond", None)
    one = config.models[0]
    small = tmp_path / "small"
    build_policy(tiny.model_config(), vocab_size=tiny.VOCAB - 1, eos_token_id=1, seed=0).save_pretrained(small)
    for settings, message in (
        ({"models": ()}, "^models: must be at least one folder"),
        ({"models": (one, str(tmp_path / "nowhere"))}, "^models: '.*nowhere' is neither a local folder nor"),
        ({"models": (str(small),), "tokenizer_name_or_path": one}, ".*small: its vocabulary of 31 is smaller than"),
        ({"models": (config.reward_model_path,)}, "^models: .* lacks the weights"),
        ({"reward_model_path": ""}, "^reward_model_path: must be the reward model that judges; got ''"),
        ({"reward_model_path": one}, "^reward_model_path: .* has no trained score head"),
        (
            {"opponent": "references"},
            r"^opponent: must be a column \(reference, chosen, rejected\) or one of the models",
        ),
        ({"models": (one,), "opponent": one}, "^opponent: must be different from the only model"),
        ({"dataset_name": ""}, "^dataset_name: "),
    ):
        examples = None if "dataset_name" in settings else tiny.examples(4)
        with pytest.raises(ValueError, match=message):
            evaluate_models(replace(config, **settings), examples)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """Saves a base model and the folders of two runs with adapters over this base: a policy and a judge."""
    place = tmp_path_factory.mktemp("adapted")
    base = tiny.save_policy(place / "base")
    policy = tiny.save_adapter(place / "policy", base, 1)
    return {"base": base, "policy": policy, "judge": tiny.save_adapter(place / "judge", base, 2, scores=True)}


def whole(adapter: str) -> str:
    """Returns the folder of the run that trained an adapter. The folder holds the weights with the merged adapter."""
    return adapter.removesuffix("/adapter")


def test_adapters_give_the_results_of_their_merged_models(adapted, config):
    """Evaluates adapters over their base and the merged weights of the same runs; results may differ only by
    rounding."""
    other = config.models[0]
    roles = replace(config, models=(adapted["policy"], other), reward_model_path=adapted["judge"])
    runs = replace(roles, models=(whole(adapted["policy"]), other), reward_model_path=whole(adapted["judge"]))
    for ours, theirs in zip(*(evaluate_models(c, tiny.examples(20)).values() for c in (roles, runs)), strict=True):
        agree(ours, theirs)
        assert abs(ours.mean_difference) > 1e-3
    alone = replace(config, models=(other,), reward_model_path=adapted["judge"])
    [only] = evaluate_models(alone, tiny.examples(20)).values()
    agree(only, theirs)


def test_an_adapter_is_laid_over_the_model_that_is_given_and_no_other(adapted, config, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "respond", None)
    moved, other = tiny.save_policy(tmp_path / "moved"), config.models[1]
    unnamed = tmp_path / "unnamed"
    shutil.copytree(adapted["policy"], unnamed)
    settings = json.loads((unnamed / "adapter_config.json").read_text())
    (unnamed / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    roles = replace(config, models=(adapted["policy"],), reward_model_path=adapted["judge"])
    for settings, message in (
        # `moved` passes all checks; the test replaces `respond` by None, which raises the error
        ({"model_name_or_path": moved}, "'NoneType' object is not callable"),
        ({"model_name_or_path": other}, "^reward_model_path: .* was trained over the weights of '.*base', but the"),
        ({"models": (config.models[0], adapted["judge"])}, "^models: '.*judge/adapter' is a reward model$"),
        ({"reward_model_path": adapted["policy"]}, "^reward_model_path: .* has no trained score head"),
        (
            {"models": (str(unnamed),), "reward_model_path": config.reward_model_path},
            "^models: '.*unnamed' is an adapter that does not name its base model; set model_",
        ),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            evaluate_models(replace(roles, **settings), tiny.examples(4))


def test_a_run_folder_is_judged_without_rounding_its_adapter_away(config, tmp_path, monkeypatch, caplog):
    """For a run folder with an adapter, dtype float32 evaluates the merged weights, and bfloat16 the adapter over its
    base."""
    base, opponent = config.models[0], config.models[1]
    adapter = tiny.save_adapter(tmp_path / "run", base, 3)
    run = str(tmp_path / "run")
    opened = []

    def seen(policy, *arguments, **keywords):
        opened.append(has_adapter(policy))
        return respond(policy, *arguments, **keywords)

    monkeypatch.setattr(evaluate, "respond", seen)

    def judged(name: str, dtype: str) -> Comparison:
        keys = replace(config, models=(name, opponent), opponent=opponent, dtype=dtype)
        return evaluate_models(keys, tiny.examples(12))[name]

    alone = replace(config, model_name_or_path=base, models=(adapter, opponent), opponent=opponent, dtype="bfloat16")
    expected = evaluate_models(alone, tiny.examples(12))[adapter]
    opened.clear()
    assert judged(run, "bfloat16") == expected
    assert judged(run, "float32") != expected
    assert opened == [True, False, False, False]
    assert "loses a part of what the adapter learned" not in caplog.text
    shutil.move(base, tmp_path / "gone")
    judged(run, "bfloat16")
    assert (
        f"models: {run} is judged by its merged weights, rounded to bfloat16: model_name_or_path: '{base}'"
        in caplog.text
    )
    assert f"models: {run} holds weights with a merged adapter; bfloat16 loses a part of what" in caplog.text


def test_the_table_is_aligned():
    """Checks the printed table. The opponent's mean score is the model's mean score minus the mean difference: 1.25 +
    0.5."""
    comparison = Comparison(
        win_rate=0.625,
        win_rate_ci=(0.5, 0.75),
        mean_score=1.25,
        mean_difference=-0.5,
        mean_difference_ci=(-1.0, 0.25),
        num=8,
    )
    compared = {"a": comparison, "runs/long/name": comparison}
    judge, header, first, second, last = format_table(compared, "reference", "runs/judge").splitlines()
    assert judge == "judged by runs/judge, intervals of 95 %"
    assert header == "model           win rate % vs reference  mean score  minus reference             prompts"
    assert first == "a                62.5 [ 50.0,  75.0]          1.250   -0.500 [ -1.000,  +0.250]        8"
    assert second == first.replace("a             ", "runs/long/name", 1)
    assert last == "reference                                     1.750"
    for opponent in ("b", "runs/" + "b" * 30):  # the length of a name does not shift the columns
        _, header, first, last = format_table({"a": comparison}, opponent, "runs/judge").splitlines()
        assert header.index("mean score") + 10 == first.index("1.250") + 5 == last.index("1.750") + 5
        assert header.index("minus") == first.index("-0.500") - 1
        assert len(header) == len(first)
