"""Tests which decoder a model gets, and that a decoder that computes wrong numbers is never used."""

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, DiffLlamaConfig, GptOssConfig, Lfm2Config

from fastrlhf.models.attention import run_alone
from fastrlhf.rollout import generate, kv_cache
from fastrlhf.rollout.engine import TransformersEngine
from fastrlhf.rollout.kv_cache import SlotCache
from fastrlhf.rollout.probe import decoder_of
from fastrlhf.types import Prefix
from tests import tiny

SIZES = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
CONFIGS = {
    "attention called twice": DiffLlamaConfig(**SIZES),
    "short convolutions": Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]),
    "attention sinks": GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
}


def model_of(config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.data.mul_(3)
    return model


def differs_by_one_key(monkeypatch):
    """Makes the slot decoder forget the first token of every text."""
    mask = kv_cache._Step._mask

    def forgetful(self, window, dtype):
        hidden = mask(self, window, dtype).clone()
        hidden[..., 0] = float("-inf")
        return hidden

    monkeypatch.setattr(kv_cache._Step, "_mask", forgetful)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_plain_attention_is_decoded_in_slots(name):
    assert decoder_of(tiny.policy(name)) == "slots"


@pytest.mark.parametrize("name", CONFIGS)
def test_other_families_are_sampled_with_their_own_cache_and_their_own_log_probs(name, caplog):
    """Covers prefixes of three lengths, resets, a batch smaller than the number of prefixes, and a text longer than the
    attention window."""
    model = model_of(CONFIGS[name])
    model.generation_config.repetition_penalty = 3.0  # many checkpoints set a penalty, which must have no effect
    settings = {"eos_token_id": tiny.EOS, "response_length": 7, "temperature": 0.7, "seed": 3, "batch_size": 4}
    starts = [
        Prefix(token_ids=[3 + (i * j) % 20 for j in range(1, 5 + i % 3)], num_reset=i % 4, row=i, episode=i)
        for i in range(20)
    ]
    with caplog.at_level(logging.WARNING):
        rollouts = TransformersEngine(model=model, **settings).generate(starts)
    assert [record.message for record in caplog.records if "the cache of the model's own class" in record.message]
    assert model.generation_config.repetition_penalty == 3.0
    for rollout in rollouts:
        assert rollout.ended or len(rollout.completion) == 7 - rollout.prefix.num_reset
        with torch.no_grad():
            ids = torch.tensor([rollout.prefix.token_ids + rollout.completion])
            logits = model(ids, use_cache=False).logits[0, len(rollout.prefix.token_ids) - 1 : -1]
        told = (logits / 0.7).log_softmax(-1).gather(1, torch.tensor(rollout.completion)[:, None])[:, 0]
        assert rollout.sampler_logprob == pytest.approx(told.tolist(), abs=1e-5)
    again = TransformersEngine(model=model, **settings | {"batch_size": 64}).generate(starts[::-1])[::-1]
    assert [r.completion for r in rollouts] == [r.completion for r in again]


def test_a_slot_decoder_with_wrong_numbers_is_not_used(monkeypatch, caplog):
    differs_by_one_key(monkeypatch)
    assert decoder_of(tiny.policy()) == "own cache"
    assert "LlamaForCausalLM: sampling uses the cache of the model's own class, which is slower (slots: differs" in (
        caplog.text
    )


def test_a_model_for_which_no_decoder_is_right_is_refused(monkeypatch):
    differs_by_one_key(monkeypatch)

    def broken(*_, **__):
        raise KeyError("states\nof many lines")

    monkeypatch.setattr(generate, "decode", broken)
    with pytest.raises(
        ValueError, match=r"^LlamaForCausalLM: decoding token by token does not give .* \(slots: diff"
    ) as e:
        decoder_of(tiny.policy())
    assert "own cache: KeyError: 'states\\nof many lines'; no cache: KeyError" in str(e.value)


def test_out_of_memory_in_the_probe_is_raised(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(SlotCache, "prefill", full)
    with pytest.raises(torch.OutOfMemoryError):
        decoder_of(tiny.policy())


def test_a_model_that_runs_one_sequence_at_a_time_is_not_decoded_in_slots(caplog):
    """The texts of the probe may be shorter than the model's windows or chunks, so the probe could miss wrong
    decoding."""
    model = tiny.policy()
    run_alone(model, "has attention in chunks")
    assert decoder_of(model) == "own cache"
    assert "(slots: its packed forward has attention in chunks)" in caplog.text


def test_a_graph_cannot_be_made_of_another_decoder(monkeypatch):
    model = model_of(CONFIGS["short convolutions"])
    sampler = TransformersEngine(model=model, eos_token_id=1, response_length=3, temperature=1.0, seed=0)
    object.__setattr__(sampler, "decode", "cuda_graph")
    with pytest.raises(ValueError, match=r"^decode: Lfm2ForCausalLM cannot be decoded by cuda_graph; set eager$"):
        sampler.generate([Prefix(token_ids=[3, 4], num_reset=0, row=0, episode=0)])
