"""Tests that every command that gives the ids of one model to another model compares the tokenizers. If the ids differ,
the command encodes the text again or raises an error that names the key. Equal tokenizers with embeddings of different
widths are accepted.
"""

import json
import logging

import pytest
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fastrlhf.algorithms.dpo import train_dpo
from fastrlhf.algorithms.kto import train_kto
from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.algorithms.rlp import train_rlp
from fastrlhf.config import DPOConfig, EvalConfig, GRPOConfig, KTOConfig, PPOConfig, RewardConfig, RLPConfig, RTOConfig
from fastrlhf.evaluation.evaluate import evaluate_models
from fastrlhf.types import Example
from tests import tiny

ROWS = tiny.examples(8)
LABELLED = [Example(prompt=row.prompt, reference=row.chosen, label=row.row % 2 == 0, row=row.row) for row in ROWS]
STEP = {"max_steps": 1, "progress": False, "per_device_train_batch_size": 4, "max_length": 32}
SAMPLED = STEP | {"response_length": 4, "num_mini_batches": 1, "num_ppo_epochs": 1}


def swapped():
    """A tokenizer in which two words have each other's id."""
    file = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    words = file["model"]["vocab"]
    words["w3"], words["w4"] = words["w4"], words["w3"]
    tokenizer = tiny.tokenizer()
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(file))
    return tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Folders of a policy and a reward model (judge), and of copies with a wider embedding and with a different
    tokenizer."""
    place = tmp_path_factory.mktemp("models")
    tiny.save_policy(place / "policy")
    tiny.save_reward_model(place / "judge")
    for name, kind in (("policy", AutoModelForCausalLM), ("judge", AutoModelForSequenceClassification)):
        for change in ("wide", "other"):
            model = kind.from_pretrained(place / name)
            if change == "wide":
                model.resize_token_embeddings(tiny.VOCAB + 8)
            folder = place / f"{change} {name}"
            model.save_pretrained(folder)
            (swapped() if change == "other" else tiny.tokenizer()).save_pretrained(folder)
    return {folder.name: str(folder) for folder in place.iterdir()}


def dpo(models, change, _):
    config = DPOConfig(**STEP, model_name_or_path=models["policy"], ref_model_name_or_path=models[f"{change} policy"])
    train_dpo(config, ROWS)


def kto(models, change, _):
    config = KTOConfig(**STEP, model_name_or_path=models["policy"], ref_model_name_or_path=models[f"{change} policy"])
    train_kto(config, LABELLED)


def judge(models, change, _):
    keys = {"model_name_or_path": models["policy"], "reward_model_path": models[f"{change} judge"]}
    train_ppo(PPOConfig(**SAMPLED, **keys, advantage_estimator="rloo", num_generations=2), ROWS)


def grpo(models, change, _):
    keys = {"model_name_or_path": models["policy"], "reward_model_path": models[f"{change} judge"]}
    train_ppo(GRPOConfig(**SAMPLED, **keys, num_generations=2), ROWS)


def critic(models, change, _):
    keys = {"model_name_or_path": models["policy"], "reward_model_path": models["judge"]}
    train_ppo(PPOConfig(**SAMPLED, **keys, critic_model_path=models[f"{change} judge"]), ROWS)


def implicit(models, change, _):
    keys = {"model_name_or_path": models["policy"], "reward_model_path": models["judge"]}
    train_ppo(RTOConfig(**SAMPLED, **keys, dpo_model_path=models[f"{change} policy"]), ROWS)


def evaluated(models, change, folder):
    keys = {"models": (models["policy"], models[f"{change} policy"]), "reward_model_path": models["judge"]}
    evaluate_models(EvalConfig(**keys, response_length=4, max_length=32, output_dir=str(folder / "eval")), ROWS)


def rlp(models, folder, **keys):
    sections = {"reward": {"model_name_or_path": models["policy"]}, "policy": {"model_name_or_path": models["policy"]}}
    for name in sections.keys() & keys.keys():
        sections[name]["model_name_or_path"] = keys.pop(name)
    config = RLPConfig(refinement="uml", output_dir=str(folder / "rlp"), **keys)
    reward, policy = RewardConfig(**STEP, **sections["reward"]), PPOConfig(**SAMPLED, **sections["policy"])
    train_rlp(config, reward, policy, pairs=ROWS, eval_pairs=ROWS[:2], prompts=ROWS)


def rlp_sections(models, change, folder):
    rlp(models, folder, reward=models[f"{change} policy"])


def rlp_reward_model(models, change, folder):
    rlp(models, folder, reward_model_path=models[f"{change} judge"])


def rlp_policy(models, change, folder):
    rlp(models, folder, reward_model_path=models["judge"], policy_path=models[f"{change} policy"])


REFUSED = {
    dpo: "^ref_model_name_or_path: .* has another tokenizer than the run",
    kto: "^ref_model_name_or_path: .* has another tokenizer than the run",
    critic: "^critic_model_path: .* has another tokenizer than the run",
    implicit: "^dpo_model_path: .* has another tokenizer than the run",
    rlp_sections: "^tokenizer_name_or_path: section reward and section .* have tokenizers that differ",
    rlp_reward_model: "^reward_model_path: .* has another tokenizer than the run",
    rlp_policy: "^policy_path: .* has another tokenizer than the run",
}
ENCODED_AGAIN = {judge: "reward_model_path: another tokenizer", grpo: "reward_model_path: another tokenizer"}
ENCODED_AGAIN |= {evaluated: "has another tokenizer than the first"}


@pytest.mark.parametrize("command", REFUSED, ids=lambda command: command.__name__)
def test_models_that_read_the_same_ids_must_have_the_same_tokenizer(models, tmp_path, command):
    with pytest.raises(ValueError, match=REFUSED[command]) as caught:
        command(models, "other", tmp_path)
    assert "'w3' has id 7 there and 6 in the run" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ENCODED_AGAIN, ids=lambda command: command.__name__)
def test_models_that_read_text_encode_it_with_their_own_tokenizer(models, tmp_path, command, caplog):
    with caplog.at_level(logging.INFO):
        command(models, "other", tmp_path)
    assert ENCODED_AGAIN[command] in caplog.text


@pytest.mark.parametrize(
    "command", [dpo, kto, judge, critic, implicit, evaluated], ids=lambda command: command.__name__
)
def test_the_same_tokenizer_with_a_wider_embedding_is_accepted(models, tmp_path, command, caplog):
    with caplog.at_level(logging.INFO):
        command(models, "wide", tmp_path)
    assert "another tokenizer" not in caplog.text


@pytest.mark.parametrize("command", [rlp_sections, rlp_reward_model, rlp_policy], ids=lambda command: command.__name__)
def test_rlp_accepts_the_same_tokenizer_with_a_wider_embedding(models, tmp_path, command, monkeypatch):
    """Replaces the first stage, so that only the checks before this stage run."""
    reached = []

    def stop(self, *_, **__):
        reached.append(self)
        raise InterruptedError

    for stage in ("train_reward", "train_policy", "refit"):
        monkeypatch.setattr(f"fastrlhf.algorithms.rlp._Run.{stage}", stop)
    with pytest.raises(InterruptedError):
        command(models, "wide", tmp_path)
    assert len(reached) == 1
