import os
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fastrlhf.config import DemoConfig, PPOConfig, SFTConfig
from fastrlhf.config.compare import SAME_MODEL
from fastrlhf.models.adapters import add_adapter
from fastrlhf.runtime.checkpoint import (
    Checkpointer,
    check_output_dir,
    check_run_dir,
    check_same_data,
    checkpoints,
    create_output_dir,
    find_checkpoint,
    holds_model,
    is_unfinished,
    save_model,
)
from tests import tiny

DIFFERENT = {
    "device": "cpu",
    "progress": False,
    "report_to": (),
    "run_name": "b",
    "micro_batch_tokens": 9,
    "attn_implementation": "sdpa",
    "torch_compile": True,
    "save_steps": 3,
}


def test_a_new_folder_is_made_with_its_configuration(tmp_path):
    folder = create_output_dir(str(tmp_path / "runs" / "a"), DemoConfig(seed=3))
    assert folder == tmp_path / "runs" / "a"
    assert yaml.safe_load((folder / "config.yaml").read_text())["seed"] == 3


def test_a_folder_with_unknown_files_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_text("mine")
    with pytest.raises(ValueError, match=r"^output_dir: .* is not empty"):
        check_output_dir(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    check_output_dir(str(tmp_path))  # an empty folder is accepted


@pytest.mark.parametrize(("name", "what"), [("config.yaml", "run"), ("config.json", "model")])
def test_a_folder_that_holds_a_run_or_a_model_is_refused_and_left_as_it_is(tmp_path, name, what):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"^output_dir: .* already holds a {what}; choose another folder"):
        check_output_dir(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_a_file_is_refused_as_a_folder_and_a_check_makes_no_folder(tmp_path):
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
    """config.json is moved last. A folder does not load without this file, so no crash during the moves leaves a folder
    that loads."""
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
    whole, restored = ({path.name for path in (tmp_path / name).iterdir()} for name in ("whole", "cut"))
    assert restored == whole


def test_a_run_has_finished_once_its_model_is_there(tmp_path):
    folder = create_output_dir(str(tmp_path / "run"), DemoConfig())
    assert not holds_model(str(folder))
    save_model(tiny.policy(), tiny.tokenizer(), folder / "interrupted")
    assert not holds_model(str(folder))
    save_model(tiny.policy(), tiny.tokenizer(), folder)
    assert holds_model(str(folder))


class Counter:
    """A fake part of a run, with a number and a tensor as its state."""

    def __init__(self, count: int):
        self.count, self.total = count, torch.full((2,), float(count), dtype=torch.float64)

    def state_dict(self):
        return {"count": self.count, "total": self.total}

    def load_state_dict(self, state, /):
        self.count, self.total = state["count"], state.get("total", torch.zeros(2))


def checkpointer(folder, model, part, **settings):
    folder.mkdir(exist_ok=True)
    values = {"models": {"": model}, "data": {"train": "3 rows"}} | settings
    return Checkpointer(folder, values["models"], tiny.tokenizer(), {"counter": part}, values["data"])


def loaded_ends(folder):
    return GenerationConfig.from_pretrained(folder).eos_token_id


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_a_checkpoint_loads_as_a_model_and_into_the_one_that_wrote_it(name, tmp_path):
    models = {"": tiny.policy(name), "value_model": tiny.policy(name, seed=1)}
    models[""].generation_config.eos_token_id = [1, 2]
    saved = {place: {k: v.clone() for k, v in model.state_dict().items()} for place, model in models.items()}
    kept, part = checkpointer(tmp_path / "run", models[""], Counter(3), models=models), Counter(8)
    path = kept.save(7)
    again = checkpointer(tmp_path / "run", models[""], part, models=models)
    with torch.no_grad():
        for model in models.values():
            for tensor in model.parameters():
                tensor.add_(1.0)
    assert again.load() == 7
    assert (part.count, part.total.tolist(), part.total.dtype) == (3, [3.0, 3.0], torch.float64)
    for place, model in models.items():
        loaded = AutoModelForCausalLM.from_pretrained(path / place).state_dict()
        assert loaded.keys() == saved[place].keys()
        assert loaded_ends(path / place) == ([1, 2] if place == "" else 1)
        for key, value in saved[place].items():
            assert torch.equal(model.state_dict()[key], value)
            assert torch.equal(loaded[key], value)
    assert AutoTokenizer.from_pretrained(path)("w3")["input_ids"] == tiny.tokenizer()("w3")["input_ids"]
    assert not [file for file in path.rglob("*") if file.suffix not in (".safetensors", ".json", ".jinja", "")]


def test_tied_weights_are_kept_once(tmp_path):
    config = tiny.model_config()
    config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(config)
    path = checkpointer(tmp_path / "run", model, Counter(0)).save(1)
    with safe_open(path / "model.safetensors", "pt") as content:
        assert set(content.keys()) == set(model.state_dict()) - {"lm_head.weight"}
    loaded = AutoModelForCausalLM.from_pretrained(path)
    assert torch.equal(loaded.lm_head.weight, model.model.embed_tokens.weight)


def test_a_checkpoint_of_an_adapter_holds_only_trained_weights(tmp_path, monkeypatch):
    model = tiny.policy()
    add_adapter(model, SFTConfig(use_peft=True, lora_r=2), "base")
    path = checkpointer(tmp_path / "run", model, Counter(0)).save(1)
    with safe_open(path / "model.safetensors", "pt") as content:
        assert set(content.keys()) == {name for name, weight in model.named_parameters() if weight.requires_grad}
        assert all(".lora_" in name for name in content.keys())  # noqa: SIM118 (it is no mapping)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.base_layer.weight.view(-1)[0] += 1
    with pytest.raises(ValueError, match="started from other weights than those of the models in the configuration"):
        checkpointer(tmp_path / "run", model, Counter(0)).load()


def test_only_the_last_checkpoints_are_kept(tmp_path):
    kept = checkpointer(tmp_path / "run", tiny.policy(), Counter(0))
    (tmp_path / "run" / "checkpoint-30").mkdir()  # an incomplete folder of a later step, which is ignored
    (tmp_path / "run" / "checkpoint-best").mkdir()
    for step in (8, 9, 10, 11):
        kept.save(step, limit=2)
    found = [path.name for path in checkpoints(tmp_path / "run")]
    assert found == ["checkpoint-10", "checkpoint-11", "checkpoint-30"]
    assert (tmp_path / "run" / "checkpoint-best").exists()
    assert find_checkpoint(tmp_path / "run").name == "checkpoint-11"


def test_with_weights_only_the_other_parts_start_anew_at_this_step(tmp_path):
    model, part = tiny.policy(), Counter(8)
    path = checkpointer(tmp_path / "run", model, Counter(3)).save(7)
    (path / "counter.safetensors").unlink()
    kept = checkpointer(tmp_path / "run", model, part)
    with pytest.raises(ValueError, match=r"checkpoint-7: counter.safetensors is missing"):
        kept.load()
    assert (kept.load(weights_only=True), part.count, part.total.tolist()) == (7, 3, [0.0, 0.0])


@pytest.mark.parametrize("other", ["mistral", "gpt_neox"])
def test_weights_of_another_model_are_refused(other, tmp_path, monkeypatch):
    checkpointer(tmp_path / "run", tiny.policy(), Counter(3)).save(7)
    with pytest.raises(ValueError, match="started from other weights"):
        checkpointer(tmp_path / "run", tiny.policy(seed=2), Counter(3)).load()
    monkeypatch.setattr("fastrlhf.runtime.checkpoint._start", lambda models: "")
    checkpointer(tmp_path / "run", tiny.policy(), Counter(3)).save(7)
    if other == "gpt_neox":
        with pytest.raises(ValueError, match=r"is of another model: .* is missing in the checkpoint or in the model"):
            checkpointer(tmp_path / "run", tiny.policy(other), Counter(3)).load()
    with pytest.raises(ValueError, match=r"is torch.float32 \[.*\] in the checkpoint and torch.bfloat16"):
        checkpointer(tmp_path / "run", tiny.policy().bfloat16(), Counter(3)).load()


def test_a_part_that_the_checkpoint_does_not_know_is_named(tmp_path):
    checkpointer(tmp_path / "run", tiny.policy(), Counter(3)).save(7)
    later = Checkpointer(tmp_path / "run", {"": tiny.policy()}, tiny.tokenizer(), {"controller": Counter(1)}, {})
    with pytest.raises(ValueError, match="has no state of 'controller'"):
        later.load()


def test_the_global_generators_continue_where_they_were(tmp_path):
    def draw():
        return random.random(), random.gauss(0, 1), np.random.normal(), torch.rand(()).item()

    draw()
    kept = checkpointer(tmp_path / "run", tiny.policy(), Counter(0))
    kept.save(1)
    expected = draw()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    kept.load()
    assert draw() == expected


def test_the_newest_readable_checkpoint_determines_the_dataset(tmp_path):
    kept = checkpointer(tmp_path / "run", tiny.policy(), Counter(0))
    check_same_data(str(tmp_path / "nowhere"), {"train": "4 rows"})
    for step in (1, 2):
        kept.save(step)
    state = tmp_path / "run" / "checkpoint-2" / "state.json"
    # The altered state file does not match its hash, so the dataset is compared with that of checkpoint-1
    state.write_text(state.read_text().replace("3 rows", "2 rows"))
    check_same_data(str(tmp_path / "run"), {"train": "3 rows"})
    with pytest.raises(ValueError, match=r"checkpoint-1' was .* dataset: train was 3 rows and is 4 rows"):
        check_same_data(str(tmp_path / "run"), {"train": "4 rows"})


def test_only_an_unfinished_run_of_the_same_configuration_continues(tmp_path):
    config = SFTConfig(output_dir=str(tmp_path / "run"), learning_rate=1e-4, report_to=("wandb",))
    check_run_dir(config)
    create_output_dir(config.output_dir, config)
    assert is_unfinished(config.output_dir)
    check_run_dir(config)
    check_run_dir(replace(config, **{name: DIFFERENT.get(name, 3) for name in SAME_MODEL if name in DIFFERENT}))
    for settings, message in (
        ({"learning_rate": 1e-3}, r"learning_rate: 0.0001 there, 0.001 here"),
        ({"seed": 1, "max_steps": 9}, r"max_steps: -1 there, 9 here; seed: 42 there, 1 here"),
        ({"resume_from_checkpoint": "never"}, "already holds a run; choose another folder"),
    ):
        with pytest.raises(ValueError, match=f"^output_dir: .*{message}"):
            check_run_dir(replace(config, **settings))
    with pytest.raises(ValueError, match=r"response: 'reference' there, 'absent' here; completion"):
        check_run_dir(PPOConfig(output_dir=config.output_dir))
    (tmp_path / "run" / "interrupted").mkdir()
    with pytest.raises(ValueError, match="already holds a run that failed before its first checkpoint"):
        check_run_dir(config)
    (tmp_path / "run" / "checkpoint-3").mkdir()
    check_run_dir(config)
    save_model(tiny.policy(), tiny.tokenizer(), tmp_path / "run")
    with pytest.raises(ValueError, match="already holds a run; choose another folder"):
        check_run_dir(config)


def test_a_run_killed_at_its_start_leaves_a_folder_that_counts_as_empty(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / ".config.yaml").write_text("seed: 1")
    check_output_dir(str(tmp_path))
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="is not empty"):
        check_output_dir(str(tmp_path))
