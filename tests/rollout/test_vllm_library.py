"""Tests of the vLLM engine with the real library on a CPU: `make test-vllm`. Skipped without vLLM.

In whole runs the log-probs of each batch of samples must equal the trainer's, before and after weight updates.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

from fastrlhf.algorithms import roles
from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.config import DRPOConfig, GRPOConfig, PPOConfig
from fastrlhf.models.loading import load_policy
from fastrlhf.models.vocabulary import limit_vocabulary
from fastrlhf.rollout.engine import TransformersEngine, checked_rollouts
from fastrlhf.rollout.vllm import VLLMEngine, open_vllm
from fastrlhf.types import Prefix, Rollout
from tests import tiny

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"
)

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
    "gpt_neox": GPTNeoXConfig(**{key: SIZES[key] for key in SIZES if key not in ("num_key_value_heads", "head_dim")}),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "gemma3": Gemma3TextConfig(**SIZES | {"initializer_range": 0.05}, sliding_window=16),
}


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path_factory):
    """Shares compiled code between the tests and makes the key-value cache small."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path_factory.getbasetemp() / "vllm"))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


def config(folder: Path, name: str, kind: type[PPOConfig] = PPOConfig, **settings) -> PPOConfig:
    """A run of three updates with large weight changes, on a model that is saved to the folder."""
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
        "train_batch_size": 32,
        "max_steps": 3,
        "response_length": 12,
        "max_length": 64,
        "temperature": 0.8,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "progress": False,
    }
    return kind(**fields | settings)


def length(rollouts: list[Rollout]) -> torch.Tensor:
    return torch.tensor([float(len(rollout.completion)) for rollout in rollouts])


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("untied", PPOConfig, {}),
        ("tied", PPOConfig, {}),
        ("tied", PPOConfig, {"use_peft": True, "lora_r": 4, "learning_rate": 2e-2}),
        ("untied", DRPOConfig, {}),
        ("qwen3_tied", GRPOConfig, {"advantage_estimator": "grpo", "temperature": 1.0, "stop": ("w3",)}),
        ("gpt_neox", PPOConfig, {}),
        ("qwen3_moe", PPOConfig, {}),
        ("mixtral", PPOConfig, {}),
        ("gemma3", PPOConfig, {}),
    ],
    ids=["untied", "tied", "lora", "drpo", "grpo", "gpt_neox", "qwen3_moe", "mixtral", "gemma3"],
)
def test_samples_are_drawn_with_the_weights_of_every_update(name, kind, settings, tmp_path):
    """The embedding has 64 rows for 32 ids of the tokenizer; the other ids must never be sampled."""
    run = config(tmp_path, name, kind, **settings)
    generator = torch.get_rng_state()
    rows = train_ppo(run, tiny.examples(40), judge=length).history
    assert len(rows) == 3
    for row in rows:
        assert row["sampling/sampling_logp_difference/mean"] < 1e-4
    assert rows[-1]["objective/kl"] > 0.05
    assert not any(module.split(".")[0] == "vllm" for module in sys.modules)
    assert not torch.distributed.is_initialized()
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_killed_process_leaves_a_checkpoint(tmp_path, monkeypatch):
    opened: list[VLLMEngine] = []

    def opening(*arguments):
        opened.append(open_vllm(*arguments))
        return opened[0]

    def judge(rollouts):
        calls.append(len(rollouts))
        if len(calls) == 2:
            os.kill(opened[0].children[0].pid, signal.SIGKILL)
        return length(rollouts)

    calls: list[int] = []
    monkeypatch.setattr(roles, "open_vllm", opening)
    settings = config(tmp_path, "untied", output_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"^engine: the vLLM process \d+ was killed by SIGKILL") as told:
        train_ppo(settings, tiny.examples(40), judge=judge)
    assert told.value.__notes__ == [f"saved as {tmp_path / 'run' / 'checkpoint-2'}; the same command continues"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]


RANK = """
import json, sys, torch
from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.config import PPOConfig
from tests import tiny

def judge(rollouts):
    return torch.tensor([float(len(rollout.completion)) for rollout in rollouts])

train_ppo(PPOConfig(**json.loads(sys.argv[1])), tiny.examples(40), judge=judge)
"""


def test_under_torchrun_every_process_has_an_engine(tmp_path):
    settings = asdict(config(tmp_path, "tied", output_dir=str(tmp_path / "run"), vllm_gpu_memory_utilization=0.05))
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command += [str(tmp_path / "rank.py"), json.dumps(settings)]
    subprocess.run(command, env=os.environ | paths, timeout=900, check=True)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["sampling/sampling_logp_difference/mean"] < 1e-4 for row in rows)
    assert rows[-1]["objective/kl"] > 0.05


def prefixes(count: int, seed: int = 0) -> list[Prefix]:
    draw = np.random.default_rng(seed)
    texts = [draw.integers(3, 30, draw.integers(1, 40)).tolist() for _ in range(count)]
    return [Prefix(token_ids=ids, num_reset=min(i % 4, len(ids)), row=i, episode=i) for i, ids in enumerate(texts)]


@torch.no_grad()
def differences(
    policy: PreTrainedModel, rollouts: list[Rollout], temperature: float, num: int, holes: Collection[int] = ()
) -> np.ndarray:
    """Returns |engine - plain forward| of every log-prob; the plain softmax is over the first `num` ids except
    `holes`."""
    found = []
    for rollout in rollouts:
        start = len(rollout.prefix.token_ids)
        logits = policy(torch.tensor([rollout.prefix.token_ids + rollout.completion])).logits[0, start - 1 : -1, :num]
        logits[:, sorted(holes)] = -torch.inf
        logprobs = (logits.float() / temperature).log_softmax(-1)
        own = logprobs.gather(1, torch.tensor(rollout.completion)[:, None])[:, 0]
        found += (own - torch.tensor(rollout.sampler_logprob)).abs().tolist()
    return np.array(found)


def test_temperatures_ends_and_the_distribution_are_those_of_the_policy(tmp_path):
    """One process tests temperatures from 0.01 to 2, a list of EOS ids, ids without a token, and a chi-squared test of
    the first token against the built-in engine."""
    settings = config(tmp_path, "tied", rollout_batch_size=64)
    policy = load_policy(settings.model_name_or_path)
    policy.resize_token_embeddings(75)
    holes = {4, 17, 30}
    limit_vocabulary(policy, tiny.tokenizer(holes))
    ends, starts = [tiny.EOS, 7], prefixes(32)
    engine = open_vllm(settings, policy, ends)
    for temperature, limit in ((0.01, 1e-3), (0.05, 1e-3), (0.8, 1e-4), (2.0, 1e-4)):
        rollouts = replace(engine, temperature=temperature).generate(starts)
        checked_rollouts(rollouts, starts, eos_token_id=ends, stops_at_eos=True)
        assert differences(policy, rollouts, temperature, tiny.VOCAB, holes).mean() < limit
    mixed = engine.generate([replace(prefix, temperature=(0.05, 2.0)[prefix.episode % 2]) for prefix in starts])
    assert differences(policy, list(mixed[::2]), 0.05, tiny.VOCAB, holes).mean() < 1e-3
    assert differences(policy, list(mixed[1::2]), 2.0, tiny.VOCAB, holes).mean() < 1e-4
    assert any(rollout.completion[-1] == 7 for rollout in rollouts)
    number, prompt = 3000, [5, 9, 11]
    many = [Prefix(token_ids=prompt, num_reset=0, row=0, episode=i) for i in range(number)]
    with torch.no_grad():
        logits = policy(torch.tensor([prompt])).logits[0, -1, : tiny.VOCAB].float()
        logits[sorted(holes)] = -torch.inf
    expected = number * (logits / 0.8).softmax(-1).numpy()
    built_in = TransformersEngine(
        model=policy, eos_token_id=ends, response_length=1, temperature=0.8, seed=0, batch_size=1000
    )
    for sampler in (replace(engine, response_length=1), built_in):
        counts = np.bincount([r.completion[0] for r in sampler.generate(many)], minlength=tiny.VOCAB)
        assert not counts[sorted(holes)].any()
        frequent = expected >= 5
        chi2 = ((counts - expected)[frequent] ** 2 / expected[frequent]).sum()
        # Chi squared has mean df and variance 2 df; the bound is four standard deviations.
        df = frequent.sum() - 1
        assert chi2 < df + 4 * (2 * df) ** 0.5


def test_bfloat16_differs_by_its_rounding(tmp_path):
    """Uses more prompt tokens than vLLM prefills in one step (4096)."""
    settings = config(tmp_path, "untied", dtype="bfloat16", rollout_batch_size=256)
    policy = load_policy(settings.model_name_or_path, dtype="bfloat16")
    starts = prefixes(256)
    assert sum(len(prefix.token_ids) for prefix in starts) > 4096
    rollouts = open_vllm(settings, policy, tiny.EOS).generate(starts)
    assert 1e-4 < differences(policy, rollouts, 0.8, 64).mean() < 0.1


def test_two_processes_share_the_prefixes(tmp_path, monkeypatch):
    settings = config(tmp_path, "tied")
    policy = load_policy(settings.model_name_or_path)
    monkeypatch.setattr("fastrlhf.rollout.vllm._visible_devices", lambda *_: ["", ""])
    starts = prefixes(9)
    rollouts = checked_rollouts(
        open_vllm(settings, policy, tiny.EOS).generate(starts), starts, eos_token_id=tiny.EOS, stops_at_eos=True
    )
    assert differences(policy, list(rollouts), 0.8, 64).mean() < 1e-4
