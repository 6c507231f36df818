"""The second engine: vLLM in this process and on this GPU, with the trainer's weights handed over in memory.

`engine: vllm`. It has not run on a GPU, nor with vLLM itself: it is written against the source of vLLM 0.33.0 and
tested with a stand-in of that API. The first thing to look at on a GPU is `sampling/sampling_logp_difference`, between
the log-probs from here and those of the trainer's own forward: near 0 where the weights have arrived, and nats where
they have not. Updates use the trainer's log-probs in any case.

How the pieces fit:
    one process   VLLM_ENABLE_V1_MULTIPROCESSING=0, so that a call reaches the worker without being pickled
    weights       `reload_weights` takes (name, tensor) as a checkpoint has them; the engine starts from random ones
    log-probs     logprobs_mode "processed_logprobs": of the tempered distribution that drew the token
    seeds         one per request, keyed by (seed, episode). Which episodes run side by side may still move a sample,
                  because vLLM's kernels round differently by batch
    ids           prompts and responses are token ids; vLLM reads no tokenizer and no generation_config.json
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from transformers import PreTrainedModel

from fastrlhf.config import PPOConfig
from fastrlhf.data.resets import uniforms
from fastrlhf.models.adapters import plain_weights
from fastrlhf.rollout.engine import SAMPLE_STREAM, as_ids, check_room, first_end
from fastrlhf.types import EndIds, Prefix, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class VLLMEngine:
    """Samples from `policy` as it is at the moment of the call. `open_vllm` makes it.

    A response has at most `response_length` tokens, those of the reset included.
    """

    policy: PreTrainedModel
    llm: Any
    """vllm.LLM of the same architecture"""
    sampling_params: Callable[..., Any]
    """vllm.SamplingParams"""
    eos_token_id: EndIds
    response_length: int
    temperature: float
    seed: int
    stop_at_eos: bool = True

    @torch.no_grad()
    def generate(self, prefixes: Sequence[Prefix]) -> list[Rollout]:
        """One rollout per prefix, in order. Raises ValueError where a prefix leaves no token to sample."""
        check_room(prefixes, self.response_length)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": plain_weights(self.policy)})
        self.llm.reset_prefix_cache()  # keys and values of the weights before
        answers = self.llm.generate(
            [{"prompt_token_ids": prefix.token_ids} for prefix in prefixes],
            [self._request(prefix) for prefix in prefixes],
            use_tqdm=False,
        )
        return [self._rollout(prefix, answer.outputs[0]) for prefix, answer in zip(prefixes, answers, strict=True)]

    def _request(self, prefix: Prefix) -> Any:
        return self.sampling_params(
            temperature=self.temperature,
            max_tokens=self.response_length - prefix.num_reset,
            # The EOS is the trainer's, not the one that vLLM would read from the model's folder.
            ignore_eos=True,
            stop_token_ids=list(as_ids(self.eos_token_id)) if self.stop_at_eos else [],
            seed=int(uniforms(self.seed, SAMPLE_STREAM, prefix.episode, 1)[0] * 2**53),
            logprobs=0,  # none but the sampled token's
            detokenize=False,
        )

    def _rollout(self, prefix: Prefix, output: Any) -> Rollout:
        tokens = list(output.token_ids)
        return Rollout(
            prefix=prefix,
            completion=tokens,
            sampler_logprob=[at[token].logprob for at, token in zip(output.logprobs, tokens, strict=True)],
            ended=first_end(tokens, self.eos_token_id) is not None,
        )


def open_vllm(config: PPOConfig, policy: PreTrainedModel, eos_token_id: EndIds) -> VLLMEngine:
    """The engine of a run, which keeps `vllm_gpu_memory_utilization` of the GPU as long as it lives."""
    vllm = import_vllm()
    llm = vllm.LLM(
        model=config.model_name_or_path,
        load_format="dummy",
        skip_tokenizer_init=True,
        generation_config="vllm",
        logprobs_mode="processed_logprobs",
        hf_overrides={"vocab_size": policy.config.vocab_size},  # of a tokenizer that has grown since
        dtype=str(policy.dtype).removeprefix("torch."),
        max_model_len=config.max_length,
        max_num_seqs=config.rollout_batch_size,
        gpu_memory_utilization=config.vllm_gpu_memory_utilization,
        trust_remote_code=config.trust_remote_code,
        seed=0,  # of requests that have none
    )
    return VLLMEngine(
        policy=policy,
        llm=llm,
        sampling_params=vllm.SamplingParams,
        eos_token_id=eos_token_id,
        response_length=config.response_length,
        temperature=config.temperature,
        seed=config.seed,
        stop_at_eos=config.compat == "fixed",
    )


def import_vllm() -> ModuleType:
    """The module, told to stay in this process. Raises ValueError where it is not installed."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise ValueError(
            f"engine: vllm cannot be imported ({error}); pip install 'fastrlhf[vllm]', or take engine transformers"
        ) from error
