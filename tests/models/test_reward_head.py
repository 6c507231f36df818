"""Tests that reward models over any backbone can be made, saved, and loaded by plain transformers."""

import json

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

from bench.models.checks import write_model
from fastrlhf.config import SFTConfig
from fastrlhf.data.packing import pack
from fastrlhf.models.adapters import add_adapter
from fastrlhf.models.forward import sequence_scores
from fastrlhf.models.loading import build_policy, load_policy, load_reward_model
from fastrlhf.models.reward_head import scorer_class
from fastrlhf.runtime.merging import save_trained
from fastrlhf.types import Segment
from tests import tiny

SEQUENCES = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16]]


@pytest.fixture
def policy(tmp_path) -> str:
    """A Granite policy; transformers has no sequence classifier for Granite."""
    config = transformers.GraniteConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = build_policy(config, vocab_size=tiny.VOCAB, eos_token_id=tiny.EOS, seed=0)
    model.save_pretrained(tmp_path / "policy")
    return str(tmp_path / "policy")


def test_transformers_class_is_used_if_its_head_is_a_single_linear_layer():
    assert scorer_class(tiny.model_config()) is LlamaForSequenceClassification
    assert scorer_class(transformers.GraniteConfig()).__name__ == "GraniteForSequenceClassification"
    with pytest.raises(ValueError, match=r"^clip: transformers has no causal language model of this type"):
        scorer_class(transformers.CLIPConfig())


def test_a_saved_reward_model_is_read_by_plain_transformers_and_by_us(policy, tmp_path):
    model = load_reward_model(policy, pad_token_id=0, seed=3)
    assert {name for name, p in model.named_parameters() if "score" in name or "lm_head" in name} == {"score.weight"}
    folder = tmp_path / "reward"
    model.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["auto_map"] == {
        "AutoModelForSequenceClassification": "reward_head.RewardModel"
    }
    ours = sequence_scores(model, pack([Segment(token_ids=ids) for ids in SEQUENCES]))
    again = load_reward_model(str(folder), pad_token_id=0, must_be_trained=True)
    theirs = sequence_scores(again, pack([Segment(token_ids=ids) for ids in SEQUENCES]))
    torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-7)
    plain = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
    padded = torch.tensor([ids + [0] * (6 - len(ids)) for ids in SEQUENCES])
    with torch.no_grad():
        scores = plain(padded, attention_mask=(padded != 0).long()).logits[:, 0]
    torch.testing.assert_close(scores, ours.detach(), rtol=1e-5, atol=1e-6)


def test_a_reward_model_trained_with_an_adapter_is_saved_and_may_be_trained_again(policy, tmp_path):
    batch, source = pack([Segment(token_ids=ids) for ids in SEQUENCES]), policy
    for name in ("first", "second"):  # the configuration saved first names the code of the head
        model = load_reward_model(source, pad_token_id=0)
        add_adapter(model, SFTConfig(use_peft=True, lora_r=2), source)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
            expected = sequence_scores(model, batch)
            source = str(tmp_path / name)
            save_trained(model, tiny.tokenizer(), tmp_path / name)
            found = sequence_scores(load_reward_model(source, pad_token_id=0, must_be_trained=True), batch)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_trained_head_with_several_labels_is_refused(policy, tmp_path):
    config = transformers.AutoConfig.from_pretrained(policy, num_labels=3)
    scorer_class(config).from_pretrained(policy, config=config).save_pretrained(tmp_path / "three")
    with pytest.raises(ValueError, match=r"^reward_model_path: .*three' has a trained head with 3 labels"):
        load_reward_model(str(tmp_path / "three"), pad_token_id=0)


def test_a_head_of_ours_initialises_what_is_not_in_the_file(tmp_path):
    """Uses Falcon-H1, whose backbone computes buffers of its layers when it initialises weights."""
    source = str(tmp_path / "policy")
    write_model("falcon_h1", tmp_path / "policy")
    model, policy = load_reward_model(source, pad_token_id=0), load_policy(source)
    for ours, theirs in zip(model.base_model.buffers(), policy.base_model.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_family_that_initialises_its_own_head_gets_a_head_of_ours(tmp_path):
    """ModernBERT's decoder has its own initialisation of the head over the vocabulary, and a reward model has no such
    head."""
    write_model("modernbert-decoder", tmp_path)
    head = load_reward_model(str(tmp_path), pad_token_id=0).score.weight
    assert head.shape == (1, 32)
    assert head.any()
