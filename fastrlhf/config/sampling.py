"""Keys of on-policy runs for sampling from the policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastrlhf.config.checks import above_0, at_least, require


@dataclass(frozen=True, kw_only=True)
class SamplingKeys:
    """Keys for lengths, the sampling distribution, and the engine that samples."""

    response_length: int = 53
    """Maximum number of tokens of a response, including the tokens that a reset copies."""
    temperature: float = 0.7
    """Sampling temperature. The logits are divided by it for sampling and for every log-prob of the run."""
    stop: tuple[str, ...] = ()
    """Strings that end a response, in addition to the EOS. The response is cut after the token that completes the first
    such string and counts as ended; the tokens sampled after it are dropped."""
    rollout_batch_size: int = 64
    """Number of episodes generated in one batch."""
    decode: Literal["eager", "cuda_graph"] = "eager"
    """How the transformers engine runs a decode step. eager: its kernels are launched one by one. cuda_graph: the step
    is recorded once as a CUDA graph and replayed, which gives the same samples with less launch overhead; a model that
    cannot be recorded is refused. Not yet run on a GPU."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """Engine that generates the episodes. vllm: a vLLM engine in this process (install fastrlhf[vllm]), which receives
    the weights of the policy before each batch; evaluation still uses transformers. Not yet run on a GPU."""
    vllm_gpu_memory_utilization: float = 0.3
    """Share of the GPU's memory that vLLM takes, including its copy of the weights."""

    max_sampling_logp_difference: float | None = None
    """Training stops if the mean absolute difference between the engine's and the trainer's log-probs, logged as
    `sampling/sampling_logp_difference/mean` (nats per token), exceeds this: the samples then come from another model.
    null: 0.1 for the transformers engine in float32 and 0.3 otherwise, divided by `temperature` if it is below 1. 0: no
    limit."""

    def check_sampling(self) -> None:
        at_least(self, 1, "response_length", "rollout_batch_size")
        above_0(self, "temperature")
        require(all(self.stop), "stop", self.stop, "strings that are not empty")
        if self.max_sampling_logp_difference is not None:
            at_least(self, 0, "max_sampling_logp_difference")
        share = self.vllm_gpu_memory_utilization
        require(0 < share < 1, "vllm_gpu_memory_utilization", share, "above 0 and below 1")
        if self.engine == "vllm":
            require(self.temperature >= 0.01, "temperature", self.temperature, "at least 0.01 with engine vllm")
