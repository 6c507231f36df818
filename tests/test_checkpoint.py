import os

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastrlhf.checkpoint import check_output_dir, create_output_dir, holds_model, save_model
from fastrlhf.config import DemoConfig
from tests import tiny


def test_a_new_folder_is_made_with_its_configuration(tmp_path):
    folder = create_output_dir(str(tmp_path / "runs" / "a"), DemoConfig(seed=3))
    assert folder == tmp_path / "runs" / "a"
    assert yaml.safe_load((folder / "config.yaml").read_text())["seed"] == 3


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_text("mine")
    with pytest.raises(ValueError, match=r"^output_dir: .* is not empty"):
        check_output_dir(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    check_output_dir(str(tmp_path))  # an empty folder will do


@pytest.mark.parametrize(("name", "what"), [("config.yaml", "run"), ("config.json", "model")])
def test_a_folder_that_holds_a_run_or_a_model_is_refused_and_left_as_it_is(tmp_path, name, what):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"^output_dir: .* already holds a {what}; choose another folder"):
        check_output_dir(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_a_file_is_no_folder_and_a_check_makes_none(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^output_dir: .* is a file"):
        check_output_dir(str(tmp_path / "file"))
    check_output_dir(str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_a_saved_model_and_tokenizer_load_with_the_same_numbers(tmp_path):
    model = tiny.policy()
    save_model(model, tiny.tokenizer(), tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path)("w3 w1")["input_ids"] == tiny.tokenizer()("w3 w1")["input_ids"]
    assert not (tmp_path / ".partial").exists()


def test_a_crash_while_saving_leaves_no_folder_that_loads(tmp_path, monkeypatch):
    """However many files were moved before the crash: config.json, which makes a folder a model, is the last."""
    save_model(tiny.policy(), tiny.tokenizer(), tmp_path / "whole")
    num_files = len(list((tmp_path / "whole").iterdir()))
    move, moved = os.replace, []

    def crash_late(source, target):
        if len(moved) == num_files - 1:
            raise KeyboardInterrupt
        move(source, target)
        moved.append(target.name)

    monkeypatch.setattr(os, "replace", crash_late)
    with pytest.raises(KeyboardInterrupt):
        save_model(tiny.policy(), tiny.tokenizer(), tmp_path / "cut")
    assert "model.safetensors" in moved
    assert not (tmp_path / "cut" / "config.json").exists()
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "cut")

    monkeypatch.undo()
    save_model(tiny.policy(), tiny.tokenizer(), tmp_path / "cut")
    whole, mended = ({path.name for path in (tmp_path / name).iterdir()} for name in ("whole", "cut"))
    assert mended == whole


def test_a_run_has_finished_once_its_model_is_there(tmp_path):
    folder = create_output_dir(str(tmp_path / "run"), DemoConfig())
    assert not holds_model(str(folder))
    save_model(tiny.policy(), tiny.tokenizer(), folder / "interrupted")
    assert not holds_model(str(folder))
    save_model(tiny.policy(), tiny.tokenizer(), folder)
    assert holds_model(str(folder))
