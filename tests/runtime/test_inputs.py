import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastrlhf.config import EvalConfig, SFTConfig, TrainConfig
from fastrlhf.models import layers
from fastrlhf.models.loading import open_policy
from fastrlhf.runtime.inputs import Data, open_eval_inputs, open_inputs, open_tokenizer, with_room
from fastrlhf.types import TokenizedExample
from tests import tiny


@pytest.fixture
def tokenizer_path(tmp_path):
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


@pytest.fixture
def config(tmp_path, tokenizer_path):
    """A configuration with a dataset of 20 rows. Row i begins with the word w<i>; row 17 has no reference."""
    rows = [{"prompt": f"w{i} w0", "completion": "" if i == 17 else "w1 w2", "chosen": "w3"} for i in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SFTConfig(dataset_name=str(tmp_path / "a.jsonl"), tokenizer_name_or_path=tokenizer_path)


def eval_config(config: TrainConfig, **settings) -> EvalConfig:
    """Returns a configuration of `fastrlhf eval` with the dataset keys of `config`."""
    names = ("tokenizer_name_or_path", "dataset_name", "dataset_train_split", "dataset_test_split", "columns")
    shared = {name: getattr(config, name) for name in (*names, "num_eval_examples", "max_train_examples")}
    return EvalConfig(**shared | settings)


def rows(examples: list[TokenizedExample]) -> list[int]:
    return [example.row for example in examples]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "paged_adamw_8bit"}, "optim: must be .* without a CUDA GPU"),
        ({"attn_implementation": "varlen"}, "attn_implementation: varlen needs a CUDA GPU"),
        ({"use_liger_kernel": True}, "use_liger_kernel: "),
        ({"activation_checkpointing": True, "activation_offloading": True}, "activation_offloading: needs a CUDA GPU"),
    ],
)
def test_unsupported_options_of_the_device_are_refused_before_a_row_is_read(settings, message, config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(layers._triton, "INTERPRETED", False)
    with pytest.raises(ValueError, match=f"^{message}"):
        open_inputs(replace(config, dataset_name="nowhere.jsonl", **settings), [], None, None)


def test_rows_are_tokenised_with_the_fields_asked_for(config):
    tokenizer, data = open_inputs(config, ["chosen"], None, None)
    assert len(tokenizer) == tiny.VOCAB
    assert data.eval == []
    assert data.train[0] == TokenizedExample(prompt=[3, 3], chosen=[6, tiny.EOS], row=0)


def test_examples_from_python_replace_the_dataset(tokenizer_path):
    config = SFTConfig(tokenizer_name_or_path=tokenizer_path)
    _, data = open_inputs(config, ["reference"], tiny.examples(5), tiny.examples(3, seed=1))
    assert (rows(data.train), rows(data.eval)) == ([*range(5)], [*range(3)])
    assert open_inputs(config, ["reference"], tiny.examples(5), None)[1].eval == []


def test_rows_that_are_kept_hold_their_other_columns_by_number(tmp_path, config):
    lines = [{"prompt": f"w{i}", "completion": "w1", "answer": i, "meta": {"id": [i]}} for i in range(4)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    config = replace(config, dataset_name=str(tmp_path / "b.jsonl"), num_eval_examples=1)
    _, data = open_inputs(config, ["reference"], None, None, keep_rows=True)
    assert {row: example.columns for row, example in data.train_rows.items()} == {
        i: {"completion": "w1", "answer": i, "meta": {"id": [i]}} for i in range(3)
    }
    assert data.eval_rows[3].columns["answer"] == 3
    assert data.eval_rows[3].prompt == "w3"
    assert open_inputs(config, ["reference"], None, None)[1].train_rows == {}


def test_the_last_rows_are_held_out_for_any_needed_fields(config):
    held_out = replace(config, num_eval_examples=4)
    for fields, missing in (([], []), (["chosen"], []), (["reference"], [17])):
        _, data = open_inputs(held_out, fields, None, None)
        assert rows(data.train) == [*range(16)]
        assert rows(data.eval) == [row for row in range(16, 20) if row not in missing]


@pytest.mark.parametrize(
    "keys", [{"num_eval_examples": 4}, {"num_eval_examples": 4, "max_train_examples": 9}, {"num_eval_examples": 19}]
)
@pytest.mark.parametrize("fields", [[], ["reference"]])
def test_eval_judges_exactly_the_rows_that_training_held_out(config, keys, fields):
    training = replace(config, **keys)
    _, data = open_inputs(training, fields, None, None)
    _, judged = open_eval_inputs(eval_config(training), fields, None)
    assert judged.eval == data.eval
    assert not set(rows(judged.eval)) & set(rows(data.train))


def test_an_evaluation_on_start_needs_rows_that_are_held_out(config):
    with pytest.raises(ValueError, match=r"^eval_on_start: must be false when no rows are held out; give num_eval_"):
        open_inputs(replace(config, eval_on_start=True), [], None, None)
    _, data = open_inputs(replace(config, eval_on_start=True, num_eval_examples=4), [], None, None)
    assert len(data.eval) == 4


def test_max_train_rows_keeps_the_rows_before_the_held_out_ones(config):
    _, data = open_inputs(replace(config, num_eval_examples=4, max_train_examples=9), [], None, None)
    assert (rows(data.train), rows(data.eval)) == ([*range(9)], [*range(16, 20)])
    assert rows(open_inputs(replace(config, max_train_examples=9), [], None, None)[1].train) == [*range(9)]


def test_a_test_split_is_evaluated_on_and_nothing_is_held_out(config, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for split, count in (("train", 6), ("test", 5)):
        lines = [json.dumps({"prompt": f"w{i}", "completion": split}) + "\n" for i in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    config = replace(config, dataset_name=str(folder), dataset_test_split="test")
    for most, expected in ((0, 5), (3, 3), (9, 5)):
        limited = replace(config, num_eval_examples=most)
        _, data = open_inputs(limited, ["reference"], None, None)
        assert (len(data.train), len(data.eval)) == (6, expected)
        assert open_eval_inputs(eval_config(limited), ["reference"], None)[1].eval == data.eval


def test_if_training_holds_out_nothing_all_rows_are_judged(config):
    assert rows(open_eval_inputs(eval_config(config), [], None)[1].eval) == [*range(20)]


def test_a_test_file_may_have_fewer_rows_than_the_limit(config):
    assert rows(open_eval_inputs(eval_config(config, num_eval_examples=500), [], None)[1].eval) == [*range(20)]


def test_examples_from_python_are_judged_all(tokenizer_path):
    config = EvalConfig(tokenizer_name_or_path=tokenizer_path, num_eval_examples=2)
    assert rows(open_eval_inputs(config, ["reference"], tiny.examples(5))[1].eval) == [*range(5)]


@pytest.mark.parametrize("num_eval_examples", [20, 21])
def test_at_least_one_row_must_remain_for_training(config, num_eval_examples):
    with pytest.raises(ValueError, match=f"^num_eval_examples: {num_eval_examples} rows held out leave none to train"):
        open_inputs(replace(config, num_eval_examples=num_eval_examples), [], None, None)


def test_the_tokenizer_comes_from_the_model_folder_unless_another_is_named(tmp_path, tokenizer_path):
    policy = tiny.save_policy(tmp_path / "policy")
    beside, _ = open_inputs(SFTConfig(model_name_or_path=policy), ["reference"], tiny.examples(1), None)
    named = SFTConfig(model_name_or_path=policy, tokenizer_name_or_path=tokenizer_path, eos_token="<end>")
    other, _ = open_inputs(named, ["reference"], tiny.examples(1), None)
    assert (len(beside), len(other), other.eos_token) == (tiny.VOCAB, tiny.VOCAB + 1, "<end>")


def test_bad_input_is_refused_before_any_folder_is_made(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    out = tmp_path / "out"
    for settings, message in (
        ({"report_to": ("tensorbord",)}, "^report_to: unknown reporter 'tensorbord'"),
        ({"output_dir": str(tmp_path / "run")}, "^output_dir: .* already holds an unfinished run"),
        ({"dataset_name": ""}, "^dataset_name: must be a hub name, or a local file or folder; got ''"),
        ({"tokenizer_name_or_path": ""}, "^model_name_or_path: must be a folder or a hub name; got ''"),
        ({"columns": "prompt"}, "^columns: "),
        ({"max_bad_fraction": 0.0}, "more than max_bad_fraction 0 allows"),
    ):
        with pytest.raises(ValueError, match=message):
            open_inputs(replace(config, **{"output_dir": str(out)} | settings), ["reference"], None, None)
    assert not out.exists()


@pytest.mark.parametrize(("key", "value", "off"), [("eval_steps", 5, "0"), ("eval_on_start", True, "false")])
def test_evaluations_without_held_out_rows_are_refused_before_a_row_is_read(config, key, value, off):
    asked, message = replace(config, **{key: value}), f"^{key}: must be {off} when no rows are held out; give num_eval"
    with pytest.raises(ValueError, match=message):
        open_inputs(replace(asked, dataset_name="nowhere.jsonl"), ["reference"], None, None)
    with pytest.raises(ValueError, match=message):
        open_inputs(asked, ["reference"], tiny.examples(4), None)
    _, data = open_inputs(asked, ["reference"], tiny.examples(4), tiny.examples(2))
    assert len(data.eval) == 2
    _, data = open_inputs(replace(asked, num_eval_examples=3), ["reference"], None, None)
    assert rows(data.eval) == [18, 19]  # row 17 cannot be used, because it has no reference


def test_a_prompt_without_room_for_a_response_is_dropped_and_reported(caplog):
    examples = [TokenizedExample(prompt=[5] * length, row=length) for length in (3, 6, 7)]
    with caplog.at_level(logging.WARNING):
        assert rows(with_room(examples, "eval", max_length=10, response_length=4)) == [3, 6]
        assert "eval: 1 of 3 prompts exceed 6 tokens" in caplog.text
        caplog.clear()
        assert with_room(examples, "eval", max_length=11, response_length=4) == examples
        assert caplog.text == ""
    with pytest.raises(ValueError, match=r"^max_length: no eval prompt leaves room for a response of 4 tokens"):
        with_room(examples, "eval", max_length=6, response_length=4)


def test_the_fingerprint_is_of_every_number_of_every_row_in_order(config):
    report = open_inputs(config, [], None, None)[1].report
    rows = [TokenizedExample(prompt=[1, 2], chosen=[3], row=0), TokenizedExample(prompt=[4], scores=[1, 0.5], row=1)]
    base = Data(train=rows, eval=rows[:1], report=report).fingerprint
    assert base == Data(train=list(rows), eval=rows[:1], report=report).fingerprint
    assert base["train"].startswith("2 rows of hash ")
    for changed in (
        [rows[1], rows[0]],
        [replace(rows[0], prompt=[1], chosen=[2, 3]), rows[1]],
        [replace(rows[0], chosen=None, rejected=[3]), rows[1]],
        [rows[0], replace(rows[1], scores=[1, 0.25])],
        rows[:1],
    ):
        found = Data(train=changed, eval=rows[:1], report=report).fingerprint
        assert found["train"] != base["train"]
        assert found["eval"] == base["eval"]


@pytest.mark.parametrize(
    ("in_config", "in_generation", "eos_token", "expected"),
    [
        (1, 1, "", (1, 1)),
        (1, [1, 2], "", (1, [1, 2])),
        ([2, 1], [2, 1], "", ([1, 2], [1, 2])),
        (1, 1, "<unk>", (2, [2, 1])),
        (2, [2, 1], "w3", (6, [6, 2, 1])),
    ],
)
def test_a_model_is_saved_with_the_ends_that_it_was_trained_with(
    in_config, in_generation, eos_token, expected, tmp_path
):
    source = tiny.save_policy(tmp_path / "model")
    for name, ids in (("config.json", in_config), ("generation_config.json", in_generation)):
        file = Path(source) / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": ids}))
    config = SFTConfig(model_name_or_path=source, eos_token=eos_token)
    tokenizer = open_tokenizer(config)
    open_policy(config, tokenizer).save_pretrained(tmp_path / "saved")
    saved = [json.loads((tmp_path / "saved" / name).read_text()) for name in ("config.json", "generation_config.json")]
    assert tuple(each["eos_token_id"] for each in saved) == expected
