from dataclasses import replace

import pytest

from fastrlhf.config import DPOConfig, PPOConfig, SFTConfig
from fastrlhf.config.compare import check_unchanged, differences
from fastrlhf.config.files import as_yaml
from fastrlhf.config.paths import at_start
from fastrlhf.runtime.checkpoint import create_output_dir


def test_a_finished_run_of_other_settings_is_refused_with_every_key_that_differs(tmp_path):
    config = DPOConfig(output_dir=str(tmp_path), beta=0.5, loss_weights=(1.0,))
    (tmp_path / "config.yaml").write_text(as_yaml(config))
    check_unchanged(config, "dpo")
    check_unchanged(replace(config, micro_batch_tokens=64, progress=False, report_to=("wandb",)), "dpo")
    with pytest.raises(
        ValueError, match=r"beta was 0.5 and is 0.1, loss_weights was \[1.0\] and is \[\]; give .* output_dir"
    ):
        check_unchanged(replace(config, beta=0.1, loss_weights=()), "dpo")
    (tmp_path / "config.yaml").unlink()
    check_unchanged(replace(config, beta=0.1), "dpo")


def test_a_run_of_the_previous_release_is_compared_by_the_new_names(tmp_path):
    (tmp_path / "config.yaml").write_text(as_yaml(PPOConfig(num_generations=2)))
    text = (tmp_path / "config.yaml").read_text().replace("num_generations", "reset_group_size")
    (tmp_path / "config.yaml").write_text(text)
    assert differences(PPOConfig(num_generations=2), tmp_path / "config.yaml") == []


def test_the_keys_in_which_a_run_differs_are_named_with_both_values(tmp_path):
    (tmp_path / "config.yaml").write_text(as_yaml(PPOConfig(seed=1, report_to=("wandb",), learning_rate=1e-5)))
    assert differences(PPOConfig(seed=1, report_to=("wandb",), learning_rate=1e-5), tmp_path / "config.yaml") == []
    other = PPOConfig(seed=2, report_to=(), learning_rate=1e-5)
    assert differences(other, tmp_path / "config.yaml") == [
        "seed: 1 there, 2 here",
        "report_to: ['wandb'] there, [] here",
    ]
    assert differences(other, tmp_path / "config.yaml", ["seed", "report_to"]) == []
    (tmp_path / "config.yaml").write_text("unknown: 3\n")
    assert "unknown: 3 there, 'absent' here" in differences(other, tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("written", "here", "told"),
    [
        ({"per_device_train_batch_size": 8}, {"train_batch_size": 8}, []),
        ({"per_device_train_batch_size": 8}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, []),
        ({"train_batch_size": 16}, {"per_device_train_batch_size": 16}, []),
        ({"train_batch_size": 16}, {}, ["batch of a step: 16 rows there, 8 x 1 process x 1 = 8 rows here"]),
        ({}, {"train_batch_size": 6}, ["batch of a step: 8 rows there, 6 rows over 1 process here"]),
    ],
)
def test_a_run_is_the_same_if_its_steps_have_as_many_rows_whatever_their_keys(written, here, told, tmp_path):
    (tmp_path / "config.yaml").write_text(as_yaml(SFTConfig(**written)))
    assert differences(SFTConfig(**here), tmp_path / "config.yaml") == told
    finished = SFTConfig(**here, output_dir=str(tmp_path))
    if told:
        with pytest.raises(ValueError, match=r"the batch of a step was (16|8) rows and is "):
            check_unchanged(finished, "sft")
    else:
        check_unchanged(finished, "sft")


def test_another_number_of_processes_keeps_the_batch_or_is_refused_with_the_numbers(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "config.yaml").write_text(as_yaml(SFTConfig(per_device_train_batch_size=8)))
    assert differences(SFTConfig(per_device_train_batch_size=8), tmp_path / "config.yaml") == []
    monkeypatch.setenv("WORLD_SIZE", "4")
    for kept in ({"per_device_train_batch_size": 4}, {"train_batch_size": 16}):
        assert differences(SFTConfig(**kept), tmp_path / "config.yaml") == []
    assert differences(SFTConfig(per_device_train_batch_size=8), tmp_path / "config.yaml") == [
        "batch of a step: 16 rows there, 8 x 4 processes x 1 = 32 rows here"
    ]
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert differences(PPOConfig(), tmp_path / "config.yaml")[0] == (
        "batch of a step: 16 episodes there, 64 x 1 process x 1 = 64 episodes here"
    )


def test_runs_compare_missing_keys_by_default_and_paths_by_their_target(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    written = SFTConfig(model_name_or_path="model", seed=3)
    (tmp_path / "config.yaml").write_text(as_yaml(written))
    lines = [line for line in (tmp_path / "config.yaml").read_text().splitlines() if "disk_wait_minutes" not in line]
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    assert differences(replace(written, model_name_or_path=str(tmp_path / "model")), tmp_path / "config.yaml") == []
    changed = replace(written, model_name_or_path=str(tmp_path), disk_wait_minutes=3.0)
    assert differences(changed, tmp_path / "config.yaml") == [
        f"model_name_or_path: 'model' there, {str(tmp_path)!r} here",
        "disk_wait_minutes: 10.0 there, 3.0 here",
    ]


def test_relative_paths_are_compared_from_another_working_directory(tmp_path, monkeypatch):
    for name in ("there/model", "there/other", "here/model"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "there" / "rows.jsonl").touch()
    keys = {"output_dir": "run", "dataset_name": ("rows.jsonl",)}
    monkeypatch.chdir(tmp_path / "there")
    config = at_start(SFTConfig(model_name_or_path="model", **keys), SFTConfig, "train_sft")
    file = create_output_dir(config.output_dir, config) / "config.yaml"
    assert "model_name_or_path: model\n" in file.read_text()
    monkeypatch.chdir(tmp_path / "here")
    moved = {"output_dir": "../there/run", "dataset_name": ("../there/rows.jsonl",)}
    for place in ("../there/model", str(tmp_path / "there" / "model")):
        again = SFTConfig(model_name_or_path=place, **moved)
        assert differences(again, file, ("output_dir",)) == []
        assert differences(at_start(again, SFTConfig, "train_sft"), file, ("output_dir",)) == []
    other = SFTConfig(model_name_or_path="../there/other", **moved)
    assert differences(other, file, ("output_dir",)) == ["model_name_or_path: 'model' there, '../there/other' here"]
    other = SFTConfig(model_name_or_path="model", **moved)
    told = f"model_name_or_path: '{tmp_path}/there/model' there, '{tmp_path}/here/model' here"
    assert differences(other, file, ("output_dir",)) == [told]
    file.write_text(file.read_text().replace('{"', "{"))  # a damaged line counts as absent
    assert len(differences(SFTConfig(model_name_or_path="../there/model", **moved), file, ("output_dir",))) == 2


@pytest.mark.parametrize(
    ("before", "after", "allowed"),
    [
        ({"max_steps": 5}, {"max_steps": 9}, True),
        ({"num_train_epochs": 1.0}, {"num_train_epochs": 2.0}, True),
        ({"max_steps": 9}, {"max_steps": 5}, False),  # refused, because the run may have a checkpoint of a step after 5
        ({"max_steps": -1}, {"max_steps": 5}, False),
        ({"max_steps": 5, "lr_scheduler_type": "linear"}, {"max_steps": 9}, False),
        ({"max_steps": 5, "lr_scheduler_type": "inverse_sqrt"}, {"max_steps": 9}, True),
        ({"max_steps": 5, "warmup_ratio": 0.5}, {"max_steps": 9}, False),
    ],
)
def test_a_run_may_be_extended_if_nothing_so_far_depends_on_its_length(before, after, allowed, tmp_path):
    written = SFTConfig(**{"lr_scheduler_type": "constant"} | before)
    (tmp_path / "config.yaml").write_text(as_yaml(written))
    assert (differences(replace(written, **after), tmp_path / "config.yaml") == []) == allowed
