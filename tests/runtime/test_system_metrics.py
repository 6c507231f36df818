import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fastrlhf.runtime import system_metrics
from fastrlhf.runtime.system_metrics import PEAKS, SystemMetrics, operations_per_token


def llama(tied: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


LAYERS = 2 * (4 * 8 * 8 + 3 * 8 * 24)
HEAD = 11 * 8


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_counts_and_the_embedding_does_not(tied):
    assert operations_per_token(llama(tied)) == 6 * (LAYERS + HEAD)


def test_frozen_weights_have_no_gradient_of_their_own():
    model = get_peft_model(llama(False), LoraConfig(r=2, target_modules=["q_proj"]))
    assert operations_per_token(model) == 4 * (LAYERS + HEAD) + 6 * (2 * 2 * (8 + 8))


def test_learned_positions_are_a_table():
    config = GPT2Config(vocab_size=11, n_embd=8, n_layer=2, n_head=2, n_positions=32)
    assert operations_per_token(GPT2LMHeadModel(config)) == 6 * (2 * (4 + 8) * 8 * 8 + HEAD)


def test_mixtures_of_experts_are_left_out():
    model = llama(False)
    model.register_parameter("experts", torch.nn.Parameter(torch.zeros(4, 8, 8)))
    assert operations_per_token(model) is None


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(system_metrics, "time", clock)
    return clock


def test_the_rate_is_that_of_the_time_since_the_previous_step(clock):
    measured = SystemMetrics(None)
    clock.now += 4
    first = measured.step(1000)
    clock.now += 1
    second = measured.step(1000)
    assert (first["system/tokens_per_second"], second["system/tokens_per_second"]) == (250, 1000)
    assert 0.01 < first["system/cpu_memory_gib"] <= second["system/cpu_memory_gib"] < 100
    assert set(measured.step(0)) == {"system/cpu_memory_gib"}


def test_utilisation_and_memory_of_a_gpu(clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 << 30)
    monkeypatch.setattr(torch.cuda, "utilization", lambda: 97)
    monkeypatch.setattr(system_metrics, "world_size", lambda: 2)
    model = llama(False)
    measured = SystemMetrics(model)
    clock.now += 2
    metrics = measured.step(1e9)
    assert metrics["system/gpu_memory_gib"] == 3
    assert metrics["system/gpu_utilization"] == 97
    assert metrics["system/mfu"] == pytest.approx(6 * (LAYERS + HEAD) * 5e8 / (2 * PEAKS["NVIDIA H200"]))

    def refuse():
        raise ModuleNotFoundError("pynvml")

    monkeypatch.setattr(torch.cuda, "utilization", refuse)
    assert "system/gpu_utilization" not in measured.step(1.0)
    json.dumps(metrics)
