"""Tests of model and tokenizer objects that a Python program passes in place of configured names."""

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fastrlhf import (
    DPOConfig,
    PPOConfig,
    RewardConfig,
    SFTConfig,
    train_dpo,
    train_ppo,
    train_reward_model,
    train_sft,
)
from fastrlhf.models.adapters import add_adapter
from tests import tiny

FIELDS = {"per_device_train_batch_size": 4, "max_steps": 1, "progress": False, "device": "cpu"}
EXAMPLES = tiny.examples(6)
ROWS = [{"prompt": example.prompt, "completion": example.reference, "other": 1} for example in EXAMPLES]
PAIRS = [{"prompt": e.prompt, "chosen": e.chosen, "rejected": e.rejected} for e in EXAMPLES]


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> str:
    return tiny.save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory) -> str:
    return tiny.save_reward_model(tmp_path_factory.mktemp("reward_model"))


def test_a_model_and_a_tokenizer_in_memory_train_like_those_of_a_folder(policy):
    by_name = train_sft(SFTConfig(model_name_or_path=policy, **FIELDS), EXAMPLES)
    model = AutoModelForCausalLM.from_pretrained(policy)
    before = model.lm_head.weight.clone()
    given = train_sft(SFTConfig(**FIELDS), datasets.Dataset.from_list(ROWS), model=model, tokenizer=tiny.tokenizer())
    assert given.history[0]["loss"] == by_name.history[0]["loss"]
    assert not torch.equal(model.lm_head.weight, before)  # the model was trained in place


def test_dpo_on_a_model_in_memory_starts_at_ln_2(policy):
    model = AutoModelForCausalLM.from_pretrained(policy)
    result = train_dpo(DPOConfig(**FIELDS), PAIRS, model=model, tokenizer=tiny.tokenizer())
    by_name = train_dpo(DPOConfig(model_name_or_path=policy, **FIELDS), PAIRS)
    assert result.history[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert result.history[0]["logps/chosen"] == by_name.history[0]["logps/chosen"]


def test_a_reward_model_in_memory_trains_like_that_of_a_folder(reward_model):
    model = AutoModelForSequenceClassification.from_pretrained(reward_model)
    given = train_reward_model(RewardConfig(**FIELDS), PAIRS, model=model, tokenizer=tiny.tokenizer())
    by_name = train_reward_model(RewardConfig(model_name_or_path=reward_model, **FIELDS), PAIRS)
    assert given.history[0]["loss"] == by_name.history[0]["loss"]


def test_ppo_with_a_model_in_memory_samples_as_with_a_model_folder(policy, reward_model):
    settings = {"reward_model_path": reward_model, "response_length": 4, **FIELDS}
    model = AutoModelForCausalLM.from_pretrained(policy)
    given = train_ppo(PPOConfig(**settings), ROWS, model=model, tokenizer=tiny.tokenizer())
    by_name = train_ppo(PPOConfig(model_name_or_path=policy, **settings), ROWS)
    assert given.history[0]["objective/scores"] == by_name.history[0]["objective/scores"]
    assert given.history[0]["objective/kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"model_name_or_path": "x"}, "^model_name_or_path: must be '' when a model is given; got 'x'$"),
        ({"dtype": "bfloat16"}, "^dtype: must be that of the model given, torch.float32; got 'bfloat16'$"),
        ({"use_peft": True, "load_in_4bit": True}, "load_in_4bit"),
    ],
)
def test_keys_that_contradict_the_model_given_are_refused(policy, settings, told, monkeypatch):
    monkeypatch.setattr("fastrlhf.runtime.inputs.check_libraries", lambda config: None)
    monkeypatch.setattr("fastrlhf.runtime.inputs.check_architecture", lambda config: None)
    model = AutoModelForCausalLM.from_pretrained(policy)
    with pytest.raises(ValueError, match=told):
        train_sft(SFTConfig(**FIELDS, **settings), EXAMPLES, model=model, tokenizer=tiny.tokenizer())


def test_tokenizer_keys_are_refused_with_a_tokenizer_object(policy):
    config = SFTConfig(model_name_or_path=policy, chat_template="hh", **FIELDS)
    with pytest.raises(ValueError, match=r"^chat_template: must be empty when a tokenizer is given"):
        train_sft(config, EXAMPLES, tokenizer=tiny.tokenizer())


def test_a_model_that_is_not_a_classifier_is_refused_as_reward_model(policy):
    model = AutoModelForCausalLM.from_pretrained(policy)
    with pytest.raises(ValueError, match=r"^model: LlamaForCausalLM of 'the model given' has no `score` head"):
        train_reward_model(RewardConfig(**FIELDS), PAIRS, model=model, tokenizer=tiny.tokenizer())


def test_a_model_with_an_adapter_is_refused(policy):
    model = AutoModelForCausalLM.from_pretrained(policy)
    add_adapter(model, SFTConfig(use_peft=True), policy)
    with pytest.raises(ValueError, match=r"^model: must be without an adapter; merge or remove it first"):
        train_sft(SFTConfig(**FIELDS), EXAMPLES, model=model, tokenizer=tiny.tokenizer())
