"""The vLLM engine with the real library, on a CPU: `make test-vllm`. Skipped where vLLM is not installed.

Every case is a process of its own, since vLLM stays in one for good. Whole runs: the log-probs of each batch of samples
must be the trainer's, before and after the weights have moved.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests import tiny

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is missing: make test-vllm")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "eos_token_id": tiny.EOS,
    "bos_token_id": None,
    "pad_token_id": 0,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "untied": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen3_tied": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "gpt_neox": GPTNeoXConfig(**SIZES),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
}
MAIN = """
import sys
from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.config import DRPOConfig, PPOConfig
import json, torch
kind, settings = sys.argv[1], json.loads(sys.argv[2])
from tests import tiny
judge = lambda rollouts: torch.tensor([float(len(r.completion)) for r in rollouts])
try:
    result = train_ppo({"ppo": PPOConfig, "drpo": DRPOConfig}[kind](**settings), tiny.examples(40), judge=judge)
except ValueError as error:
    print("REFUSED", error)
else:
    print("HISTORY", json.dumps(result.history))
"""


def run(folder: Path, name: str, kind: str = "ppo", **settings) -> list[dict] | str:
    """The rows of a run of three updates that moves the weights far, or the message it ends with."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[name]).save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    fields = {
        "model_name_or_path": str(folder / "model"),
        "engine": "vllm",
        "device": "cpu",
        "vllm_gpu_memory_utilization": 0.1,
        "advantage_estimator": "rloo",
        "num_generations": 4,
        "per_device_train_batch_size": 32,
        "max_steps": 3,
        "response_length": 12,
        "max_length": 64,
        "temperature": 0.8,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "progress": False,
    }
    environment = os.environ | {"VLLM_CACHE_ROOT": str(folder / "cache"), "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, "-c", MAIN, kind, json.dumps(fields | settings)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("HISTORY "):
            return json.loads(line.removeprefix("HISTORY "))
        if line.startswith("REFUSED "):
            return line.removeprefix("REFUSED ")
    pytest.fail(done.stderr[-3000:])


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("untied", "ppo", {}),
        ("untied", "drpo", {}),
        ("tied", "ppo", {}),
        ("qwen3_tied", "ppo", {"temperature": 1.0}),
        ("tied", "ppo", {"use_peft": True, "lora_r": 4, "learning_rate": 2e-2}),
    ],
    ids=["untied", "drpo", "tied", "qwen3", "lora"],
)
def test_samples_are_drawn_with_the_weights_of_every_update(name, kind, settings, tmp_path):
    """64 rows of embedding for 32 ids of the tokenizer: the others are never sampled."""
    rows = run(tmp_path, name, kind, **settings)
    assert isinstance(rows, list), rows
    assert len(rows) == 3
    for row in rows:
        assert row["sampling/sampling_logp_difference/mean"] < 1e-4
    assert rows[-1]["objective/kl"] > 0.05


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_experts_that_vllm_keeps_as_they_were_on_a_cpu_stop_the_run(name, tmp_path):
    message = run(tmp_path, name)
    assert isinstance(message, str), message
    assert message.startswith("max_sampling_logp_difference: engine vllm samples from another model than the trainer's")


def test_a_class_that_vllm_would_rewrite_under_the_trainer_is_refused(tmp_path):
    message = run(tmp_path, "gpt_neox")
    assert isinstance(message, str), message
    assert message.startswith("engine: vllm has no native GPTNeoXForCausalLM and rewrites that class")
