"""Tests of model cards: the header is readable by the hub, and the text contains no path of the machine."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load

from fastrlhf.config import DPOConfig, GRPOConfig, PPOConfig, RewardConfig, SFTConfig
from fastrlhf.config.command_line import parse
from fastrlhf.config.paths import at_start
from fastrlhf.publish.card import MARK, Card, shown_path, shown_settings

BASE = "Qwen/Qwen3-0.6B-Base"


def card(config, **keys) -> Card:
    measured = {"eval_loss": 0.51234567, "eval_rewards/accuracies": 0.75}
    given = {"datasets": ("owner/pairs",), "num_train": 90, "num_eval": 10, "final": measured, "last": {"loss": 0.6}}
    given["steps"] = 25
    return Card(config=config, **given | keys)


def header(text: str, folder: Path) -> dict:
    """Returns the header of a card, after checking that the hub's own classes read all of it."""
    (folder / "README.md").write_text(text, encoding="utf-8")
    plain = metadata_load(folder / "README.md")
    assert ModelCard(text).data.to_dict() == plain
    return plain


def test_the_header_has_what_the_hub_shows(tmp_path):
    config = DPOConfig(model_name_or_path=BASE, dataset_name="owner/pairs", dataset_test_split="test")
    assert header(card(config).text(), tmp_path) == {
        "base_model": BASE,
        "datasets": ["owner/pairs"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["fastrlhf", "dpo"],
        "model-index": [
            {
                "name": "Qwen3-0.6B-Base-dpo",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {
                            "name": "owner/pairs, 10 held-out rows",
                            "type": "owner/pairs",
                            "split": "test",
                        },
                        "metrics": [
                            {"type": "loss", "value": 0.512346, "name": "eval_loss"},
                            {"type": "rewards/accuracies", "value": 0.75, "name": "eval_rewards/accuracies"},
                        ],
                    }
                ],
            }
        ],
    }


def test_only_measured_finite_figures_are_results(tmp_path):
    config = SFTConfig(model_name_or_path=BASE, dataset_name="owner/rows")
    assert "model-index" not in header(card(config, final={}, num_eval=0).text(), tmp_path)
    text = card(config, final={"eval_loss": float("nan"), "eval_x": 1.0}).text()
    [result] = header(text, tmp_path)["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "x", "value": 1.0, "name": "eval_x"}]


def test_a_local_start_of_ours_gives_its_own_start_and_licence_and_another_only_its_licence(tmp_path):
    sft = tmp_path / "sft"
    sft.mkdir()
    first = card(SFTConfig(model_name_or_path=BASE)).text().replace("library_name", "license: apache-2.0\nlibrary_name")
    (sft / "README.md").write_text(first)
    config = at_start(DPOConfig(model_name_or_path=str(sft), output_dir="out"), DPOConfig, "train_dpo")
    found = header(card(config).text(), tmp_path)
    assert (found["base_model"], found["license"]) == (BASE, "apache-2.0")
    assert "This model is `sft` after training" in card(config).text()
    (sft / "README.md").write_text(first.replace(MARK, ""))
    found = header(card(config).text(), tmp_path)
    assert "base_model" not in found
    assert found["license"] == "apache-2.0"


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("license: mit", {"license": "mit"}),
        ("license: other\nlicense_name: x\nlicense_link: LICENSE", {}),
        (
            "license: other\nlicense_name: x\nlicense_link: https://e.org/x",
            {"license": "other", "license_name": "x", "license_link": "https://e.org/x"},
        ),
        ("license: [mit, bsd]", {}),
        ("license: [", {}),
        ("tags: [a]", {}),
    ],
)
def test_a_licence_is_named_only_if_it_is_known(written, kept, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text(f"---\n{written}\n---\n")
    found = header(card(SFTConfig(model_name_or_path=str(tmp_path / "base"))).text(), tmp_path)
    assert {key: value for key, value in found.items() if key.startswith("license")} == kept


def test_reward_models_and_adapters_say_how_they_are_loaded(tmp_path):
    config = RewardConfig(model_name_or_path=BASE, use_peft=True)
    text, adapter = card(config).text(), card(config).adapter_text()
    assert header(text, tmp_path)["pipeline_tag"] == "text-classification"
    assert "AutoModelForSequenceClassification.from_pretrained(" in text
    found = header(adapter, tmp_path)
    assert (found["library_name"], found["base_model"]) == ("peft", BASE)
    assert "model-index" not in found
    assert f'base = AutoModelForSequenceClassification.from_pretrained("{BASE}", num_labels=1)' in adapter


def test_models_beside_the_policy_say_what_they_are(tmp_path):
    config = PPOConfig(model_name_or_path=BASE, reward_model_path="owner/judge")
    text = card(config, beside="value_model").text()
    assert header(text, tmp_path) == {"library_name": "transformers", "tags": ["fastrlhf", "critic"]}
    assert "# Critic of Qwen3-0.6B-Base-ppo" in text
    assert "The key `critic_model_path` of a later run can name the folder `value_model`." in text


def test_the_settings_start_the_same_run_again(tmp_path):
    given = {"loss_type": ("sigmoid", "sft"), "loss_weights": (1.0, 0.2), "chat_template": "{{ messages }}\n{# 1 #}"}
    config = DPOConfig(model_name_or_path=BASE, dataset_name="owner/pairs", learning_rate=3e-7, max_steps=20, **given)
    config = replace(config, per_device_train_batch_size=4, gradient_accumulation_steps=3)
    text = card(config).text()
    [block] = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert yaml.safe_load(block) == shown_settings(config)
    (tmp_path / "run.yaml").write_text(block)
    again = parse(DPOConfig, ["--config", str(tmp_path / "run.yaml")], "dpo")
    assert again.train_batch_size == config.batch_size == 12
    batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "train_batch_size": 0}
    assert replace(again, **batch) == config


@pytest.mark.parametrize("kind", [SFTConfig, RewardConfig, DPOConfig, PPOConfig, GRPOConfig])
def test_no_path_of_the_machine_is_in_a_card(kind, tmp_path, monkeypatch):
    """Sets every text key that accepts a path, and the datasets, to absolute paths. Splits are not paths."""
    secret = tmp_path / "secret-folder"
    secret.mkdir()
    (secret / "pairs.jsonl").write_text("{}\n")
    monkeypatch.setenv("SECRET", str(secret))
    place, num = str(secret / "pairs.jsonl"), 0
    for field in fields(kind):
        hint = get_type_hints(kind)[field.name]
        texts = (str, tuple[str, ...], str | tuple[str, ...])
        if hint in texts and field.name not in ("dataset_train_split", "dataset_test_split"):
            function = field.name in ("loss_type", "psi", "reward_functions", "callbacks")
            value = f"{place}:mine" if function else place
            try:
                config = kind(**{"model_name_or_path": place, field.name: value})
            except ValueError:
                continue
            num += 1
            resolved = at_start(config, kind, "train")
            written = card(resolved, datasets=(place,))
            for text in (written.text(), written.adapter_text(), card(resolved, beside="value_model").text()):
                assert "secret-folder" not in text, field.name
                assert str(Path.home()) + "/" not in text, field.name
    assert num > 5


def test_paths_are_shortened_to_names_and_hub_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/sft").mkdir(parents=True)
    assert shown_path("runs/sft") == "sft"
    shown = [shown_path(text) for text in ("owner/name", "gpt2", "/a/b.jsonl", "~/b.jsonl", "./b", "$DATA/b", "a/b/c")]
    assert shown == ["owner/name", "gpt2", "b.jsonl", "b.jsonl", "b", "b", "c"]


def test_rows_and_models_from_python_are_called_so():
    text = card(SFTConfig(), datasets=()).text()
    assert "This model is a model given in Python after training with `fastrlhf sft`: Supervised fine-tuning" in text
    assert "- rows given in Python\n\nTrained on 90 rows, evaluated on 10 held-out rows." in text
    assert "This model is a model with random weights" in card(SFTConfig(model_config='{"model_type": "llama"}')).text()


def test_data_methods_results_and_citations_are_in_the_text():
    config = GRPOConfig(
        model_name_or_path=BASE, dataset_name=("owner/rows", "/rows/more.jsonl"), reward_functions=("f:g",)
    )
    text = card(config, datasets=config.dataset_name, last={"objective/scores": 0.25, "timing/rollout": 3.0}).text()
    assert (
        "- [owner/rows](https://huggingface.co/datasets/owner/rows), split `train`\n- `more.jsonl`, split `train`"
        in text
    )
    assert (
        "- DAPO's loss: mean over all tokens ([Yu et al. 2025](https://arxiv.org/abs/2503.14476), eq. 8): "
        "`loss = -mean of min(r * A, clip(r, 1 - e, 1 + e) * A); r = pi / pi_old of a token, A its advantage, "
        "e = cliprange`\n"
    ) in text
    assert "Last evaluation, on 10 held-out rows; losses and log-probs in nats:\n\n| metric | value |" in text
    assert "| `eval_loss` | 0.5123 |" in text
    assert "Last training step (25):\n\n| metric | value |\n|---|---|\n| `objective/scores` | 0.25 |" in text
    assert "timing" not in text
    assert text.count("@misc{") == 2
    assert "@misc{shao2024grpo," in text


def test_a_card_says_that_the_model_has_the_weights_of_the_best_step():
    text = card(SFTConfig(model_name_or_path=BASE), best_step=10).text()
    assert "Best evaluation, after step 10, whose weights the model has, on 10 held-out rows; losses and" in text
    assert "Last evaluation" not in text
    assert "Last training step (25):" in text
