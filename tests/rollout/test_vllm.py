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
from safetensors.torch import load_file
from torch.nn import Linear
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig

from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.algorithms.roles import make_engine
from fastrlhf.config import DRPOConfig, SFTConfig
from fastrlhf.models.adapters import add_adapter, merged_copy
from fastrlhf.models.loading import load_policy
from fastrlhf.models.vocabulary import limit_vocabulary
from fastrlhf.rollout.engine import checked_rollouts
from fastrlhf.rollout.vllm import checkpoint_weights
from fastrlhf.types import Prefix
from tests import tiny


class TransformersForCausalLM(Linear):
    """What vLLM wraps around the class of transformers."""

    def __init__(self):
        super().__init__(1, 1)


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
        allowed_token_ids: list[int] | None = None,
    ):
        assert temperature >= 0.01
        assert max_tokens >= 1
        assert ignore_eos, "else vLLM stops at the EOS of the model's folder too"
        assert logprobs == 0
        assert not detokenize, "there is no tokenizer"
        self.temperature, self.max_tokens, self.seed = temperature, max_tokens, seed
        self.stop_token_ids = stop_token_ids or []
        self.allowed_token_ids = allowed_token_ids


class LLM:
    made: ClassVar[list["LLM"]] = []
    gives_up_its_cache: ClassVar[bool] = True

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
        self.cache_is_stale = not LLM.gives_up_its_cache
        return LLM.gives_up_its_cache

    def apply_model(self, func):
        return [func(self.model)]

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
            if params.allowed_token_ids is not None:
                hidden = torch.ones_like(logits, dtype=torch.bool)
                hidden[params.allowed_token_ids] = False
                logits = logits.masked_fill(hidden, float("-inf"))
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


def test_keys_and_values_of_old_weights_stop_the_run(paths, monkeypatch):
    engine = make_engine(config(paths), load_policy(paths["model_name_or_path"]), tiny.EOS)
    monkeypatch.setattr(LLM, "gives_up_its_cache", False)
    with pytest.raises(ValueError, match=r"^engine: vllm did not give up the keys and values of the weights before"):
        engine.generate(prefixes(2))


def test_weights_that_do_not_arrive_stop_the_run_at_its_first_update(paths, monkeypatch):
    """As a tied head did on a CPU: the engine goes on with the random weights that it started from."""
    monkeypatch.setattr(LLM, "collective_rpc", lambda *_, **__: [None])
    with pytest.raises(
        ValueError,
        match=r"^max_sampling_logp_difference: engine vllm samples from another model than the trainer's: for update 1 "
        r"its log-probs are \d\.\d+ nats per token away .*: the weights of the policy have not reached vLLM",
    ):
        train_ppo(config(paths), tiny.examples(20))


def test_a_prefix_without_room_for_a_response_is_an_error_and_no_cut(paths):
    engine = make_engine(config(paths), load_policy(paths["model_name_or_path"]), tiny.EOS)
    fits = Prefix(token_ids=[5] * 28, num_reset=2, row=7, episode=0)
    assert len(engine.generate([fits])) == 1
    with pytest.raises(ValueError, match=r"^max_length: row 8 needs 33 tokens .*, more than 32; vLLM would cut"):
        engine.generate([replace(fits, token_ids=[5] * 29, row=8)])


def test_the_generators_of_the_process_are_left_alone_and_the_seed_is_the_runs(paths, monkeypatch):
    init = LLM.__init__

    def seeding(self, *arguments, seed, **keywords):
        LLM.seed = seed
        torch.manual_seed(seed)
        init(self, *arguments, seed=seed, **keywords)

    monkeypatch.setattr(LLM, "__init__", seeding)
    policy = load_policy(paths["model_name_or_path"])
    before = torch.get_rng_state()
    make_engine(config(paths, seed=11), policy, tiny.EOS)
    assert torch.equal(torch.get_rng_state(), before)
    assert LLM.seed == 11


def test_ids_above_the_tokenizer_are_not_asked_for(paths):
    policy = load_policy(paths["model_name_or_path"])
    policy.resize_token_embeddings(tiny.VOCAB + 3)
    with torch.no_grad():
        policy.lm_head.weight[tiny.VOCAB :] = 10 * policy.lm_head.weight[:3]
    limit_vocabulary(policy, tiny.tokenizer())
    rollouts = make_engine(config(paths), policy, tiny.EOS).generate(prefixes(40))
    assert max(max(r.completion) for r in rollouts) < tiny.VOCAB


def test_an_architecture_that_vllm_would_rewrite_is_refused(paths, monkeypatch):
    monkeypatch.setattr(LLM, "apply_model", lambda self, func: [func(TransformersForCausalLM())])
    with pytest.raises(ValueError, match=r"^engine: vllm has no native LlamaForCausalLM and rewrites that class"):
        make_engine(config(paths), load_policy(paths["model_name_or_path"]), tiny.EOS)


def test_experts_are_handed_over_by_the_names_of_a_checkpoint(tmp_path):
    """Mixtral's are fused in memory; an adapter over them is added first."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": tiny.VOCAB}
    model = AutoModelForCausalLM.from_config(MixtralConfig(**sizes))
    add_adapter(model, SFTConfig(use_peft=True, lora_r=2), "base")
    merged_copy(model).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    handed = dict(checkpoint_weights(model))
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in handed
    assert set(handed) == set(saved)
    assert all(torch.equal(handed[name], saved[name]) for name in saved)


def test_a_reset_that_leaves_nothing_to_sample_is_refused(paths):
    cfg = config(paths)
    engine = make_engine(cfg, load_policy(cfg.model_name_or_path), tiny.EOS)
    with pytest.raises(ValueError, match="leaves nothing to sample after the 6 reset tokens of row 4"):
        engine.generate([Prefix(token_ids=[5] * 10, num_reset=6, row=4, episode=0)])


def test_without_vllm_a_run_is_told_how_to_install_it_before_anything_is_loaded(paths, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=r"^engine: vllm cannot be imported .*pip install 'fastrlhf\[vllm\]'"):
        train_ppo(config(paths | {"model_name_or_path": "nowhere"}), tiny.examples(4))
