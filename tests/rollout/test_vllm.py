"""The vLLM engine against a stand-in: vLLM needs a GPU, so a small module has the part of its API that is used.

The stand-in takes the keywords that vLLM 0.33.0 takes and no others, starts from random weights, and samples with the
forward of transformers, one generator per request.
"""

import os
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.algorithms.roles import make_engine
from fastrlhf.config import DRPOConfig
from fastrlhf.models.loading import load_policy
from fastrlhf.rollout.engine import checked_rollouts
from fastrlhf.types import Prefix
from tests import tiny


class SamplingParams:
    def __init__(
        self,
        *,
        temperature: float = 1.0,
        max_tokens: int = 16,
        ignore_eos: bool = False,
        stop_token_ids: list[int] | None = None,
        seed: int | None = None,
        logprobs: int | None = None,
        detokenize: bool = True,
    ):
        assert temperature >= 0.01
        assert max_tokens >= 1
        assert ignore_eos, "else vLLM stops at the EOS of the model's folder too"
        assert logprobs == 0
        assert not detokenize, "there is no tokenizer"
        self.temperature, self.max_tokens, self.seed = temperature, max_tokens, seed
        self.stop_token_ids = stop_token_ids or []


class LLM:
    made: ClassVar[list["LLM"]] = []

    def __init__(
        self,
        model: str,
        *,
        load_format: str,
        skip_tokenizer_init: bool,
        generation_config: str,
        logprobs_mode: str,
        hf_overrides: dict,
        dtype: str,
        max_model_len: int,
        max_num_seqs: int,
        gpu_memory_utilization: float,
        trust_remote_code: bool,
        seed: int,
    ):
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        assert (load_format, skip_tokenizer_init, generation_config) == ("dummy", True, "vllm")
        self.tempered = logprobs_mode == "processed_logprobs"
        self.max_model_len = max_model_len
        config = AutoConfig.from_pretrained(model)
        config.update(hf_overrides)
        self.model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
        self.cache_is_stale = False
        self.updates = 0
        LLM.made.append(self)

    def collective_rpc(self, method: str, timeout=None, args=(), kwargs=None):
        assert method == "reload_weights"
        weights = dict(kwargs["weights_iterator"])
        assert not any(weight.requires_grad for weight in weights.values())
        self.model.load_state_dict(weights)
        self.cache_is_stale = True
        self.updates += 1
        return [None]

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        self.cache_is_stale = False
        return True

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        assert not self.cache_is_stale
        return [
            SimpleNamespace(outputs=[self._answer(prompt["prompt_token_ids"], params)])
            for prompt, params in zip(prompts, sampling_params, strict=True)
        ]

    def _answer(self, prompt, params):
        generator = torch.Generator().manual_seed(params.seed)
        tokens, logprobs = [], []
        while len(tokens) < params.max_tokens and len(prompt) + len(tokens) < self.max_model_len:
            logits = self.model(torch.tensor([[*prompt, *tokens]])).logits[0, -1].float()
            tempered = (logits / params.temperature).log_softmax(-1)
            token = int(torch.multinomial(tempered.exp(), 1, generator=generator))
            told = tempered if self.tempered else logits.log_softmax(-1)
            tokens.append(token)
            logprobs.append({token: SimpleNamespace(logprob=told[token].item())})
            if token in params.stop_token_ids:
                break
        return SimpleNamespace(token_ids=tokens, logprobs=logprobs)


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=SamplingParams))
    monkeypatch.setattr(LLM, "made", [])


@pytest.fixture
def paths(tmp_path):
    return {
        "model_name_or_path": tiny.save_policy(tmp_path / "sft"),
        "reward_model_path": tiny.save_reward_model(tmp_path / "reward"),
    }


def config(paths, **settings):
    fields = {
        "engine": "vllm",
        "per_device_train_batch_size": 8,
        "max_steps": 3,
        "response_length": 6,
        "max_length": 32,
        "temperature": 0.8,
        "learning_rate": 1e-2,
        "progress": False,
    }
    return DRPOConfig(**paths, **fields | settings)


def prefixes(count: int) -> list[Prefix]:
    return [
        Prefix(token_ids=[3 + (i * j) % 20 for j in range(1, 6 + i % 4)], num_reset=i % 4, row=i, episode=i)
        for i in range(count)
    ]


def test_a_run_samples_with_the_weights_of_every_update(paths):
    """The log-probs that vLLM tells are those of the trainer's own forward, before and after the weights have moved."""
    result = train_ppo(config(paths), tiny.examples(20))
    [llm] = LLM.made
    assert llm.updates == 3
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-5 for row in result.history)
    assert result.history[-1]["objective/kl"] > 0.01


def test_rollouts_keep_the_promises_of_an_engine(paths):
    cfg = config(paths)
    policy = load_policy(cfg.model_name_or_path)
    starts = prefixes(60)
    engine = make_engine(cfg, policy, tiny.EOS)
    rollouts = checked_rollouts(engine.generate(starts), starts, eos_token_id=tiny.EOS, stops_at_eos=True)
    assert {r.ended for r in rollouts} == {True, False}
    assert all(len(r.completion) == 6 - r.prefix.num_reset for r in rollouts if not r.ended)


def test_a_seed_belongs_to_an_episode_and_to_the_run(paths):
    cfg = config(paths)
    policy = load_policy(cfg.model_name_or_path)
    starts = prefixes(20)

    def completions(starts, **settings):
        return [r.completion for r in make_engine(replace(cfg, **settings), policy, tiny.EOS).generate(starts)]

    assert completions(starts) == completions(starts[::-1])[::-1]
    assert completions(starts) != completions(starts, seed=cfg.seed + 1)
    same = [replace(starts[0], episode=i) for i in range(20)]
    assert len({tuple(tokens) for tokens in completions(same)}) > 10


def test_told_to_go_on_it_writes_past_the_eos(paths):
    cfg = config(paths, compat="reference")
    engine = make_engine(cfg, load_policy(cfg.model_name_or_path), tiny.EOS)
    rollouts = engine.generate(prefixes(60))
    assert all(len(r.completion) == 6 - r.prefix.num_reset for r in rollouts)
    assert any(r.ended and r.completion[-1] != tiny.EOS for r in rollouts)


def test_a_policy_with_a_larger_vocabulary_than_its_folder_is_handed_over_whole(paths):
    cfg = config(paths)
    policy = load_policy(cfg.model_name_or_path)
    policy.resize_token_embeddings(tiny.VOCAB + 3)
    make_engine(cfg, policy, tiny.EOS).generate(prefixes(2))
    assert torch.equal(LLM.made[0].model.lm_head.weight, policy.lm_head.weight)


def test_a_reset_that_leaves_nothing_to_sample_is_refused(paths):
    cfg = config(paths)
    engine = make_engine(cfg, load_policy(cfg.model_name_or_path), tiny.EOS)
    with pytest.raises(ValueError, match="leaves nothing to sample after the 6 reset tokens of row 4"):
        engine.generate([Prefix(token_ids=[5] * 10, num_reset=6, row=4, episode=0)])


def test_without_vllm_a_run_is_told_how_to_install_it_before_anything_is_loaded(paths, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=r"^engine: vllm cannot be imported .*pip install 'fastrlhf\[vllm\]'"):
        train_ppo(config(paths | {"model_name_or_path": "nowhere"}), tiny.examples(4))
