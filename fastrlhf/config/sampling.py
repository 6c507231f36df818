"""Keys of on-policy runs that say how the policy samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastrlhf.config.checks import above_0, at_least, require


@dataclass(frozen=True, kw_only=True)
class SamplingKeys:
    """Lengths, the sampling distribution, and the engine that samples."""

    response_length: int = 53
    """Maximum number of tokens of a response, including those of a reset."""
    temperature: float = 0.7
    """Divides the logits when sampling and in every log-prob of the run."""
    stop: tuple[str, ...] = ()
    """Strings that end a response besides the EOS: it is cut after the token that completes the first of them, and
    counts as ended. The tokens after it are sampled and dropped."""
    rollout_batch_size: int = 64
    """Number of episodes generated in one batch."""
    decode: Literal["eager", "cuda_graph"] = "eager"
    """How the transformers engine runs a decode step. cuda_graph: a step is recorded once and replayed, which gives the
    same samples without the cost of launching kernels; a model that cannot be recorded is refused. Not yet run on a
    GPU."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What generates the episodes. vllm: a vLLM engine in this process (install fastrlhf[vllm]), which receives the
    weights of the policy before each batch; evaluation stays with transformers. Not yet run on a GPU."""
    vllm_gpu_memory_utilization: float = 0.3
    """Share of the GPU's memory that vLLM takes, its copy of the weights included."""

    max_sampling_logp_difference: float | None = None
    """Nats per token: training stops where `sampling/sampling_logp_difference/mean`, the distance of the engine's
    log-probs from the trainer's, exceeds this, which means that another model drew the samples. null: 0.1 for the
    transformers engine in float32 and 0.3 otherwise, divided by `temperature` where that is below 1. 0: no limit."""

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
