"""Keys of on-policy runs for sampling from the policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastrlhf.config.checks import above_0, at_least, require


@dataclass(frozen=True, kw_only=True)
class TruncationKeys:
    """Keys that restrict the tokens that can be drawn."""

    top_k: int = 0
    """Only this many of the most likely tokens can be drawn; 0: all. In training, top_k, top_p and min_p change the
    log-probs of policy, sampler and reference: all three are taken over the tokens that the sampler kept."""
    top_p: float = 1.0
    """Only the fewest most likely tokens with at least this probability together can be drawn, after top_k; 1: all."""
    min_p: float | None = None
    """Only tokens with at least this share of the probability of the most likely token can be drawn; null: all."""

    @property
    def truncated(self) -> bool:
        """Whether top_k, top_p or min_p excludes tokens."""
        return self.top_k > 0 or self.top_p < 1 or bool(self.min_p)

    def check_truncated(self) -> None:
        """Raises ValueError for a key outside its range."""
        at_least(self, 0, "top_k")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        require(self.min_p is None or 0 <= self.min_p <= 1, "min_p", self.min_p, "null, or in 0..1")


@dataclass(frozen=True, kw_only=True)
class SamplingKeys(TruncationKeys):
    """Keys for lengths, the sampling distribution, and the engine that samples."""

    response_length: int = 53
    """Maximum number of tokens of a response, including the tokens that a reset copies."""
    temperature: float = 0.7
    """Sampling temperature. The logits are divided by it for sampling and for every log-prob of the run."""
    temperatures: tuple[float, ...] = ()
    """Temperatures of the episodes of a group, in turn: with [0.7, 1.0] and num_generations 4 they are 0.7, 1.0, 0.7,
    1.0. Each episode is sampled and scored at its own temperature. Empty: `temperature`, which evaluation always
    uses."""
    stop: tuple[str, ...] = ()
    """Strings that end a response, in addition to the EOS. The response is cut after the token that completes the first
    such string and counts as ended; the tokens sampled after it are dropped."""
    dynamic_sampling_factor: float = 1.0
    """Maximum number of groups sampled per update, as a multiple of the groups of a batch (DAPO's dynamic sampling,
    arXiv 2503.14476, eq. 11). Above 1: a group whose responses all have one outcome (score and rewards from functions)
    is dropped, and a group of another prompt is sampled in its place until this limit. 1: off."""
    rollout_batch_size: int = 64
    """Number of episodes generated in one batch."""
    decode: Literal["eager", "cuda_graph"] = "eager"
    """How the transformers engine runs a decode step. eager: the kernels of the step are launched one by one.
    cuda_graph: the step is recorded once as a CUDA graph and replayed, which gives the same samples with less launch
    overhead; a model that cannot be recorded is refused. Not yet run on a GPU."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """Engine that generates the episodes. vllm: a vLLM engine in its own process (install fastrlhf[vllm]), which
    receives the weights of the policy before each batch; evaluation still uses transformers. Not yet run on a GPU."""
    vllm_gpu_memory_utilization: float = 0.3
    """Share of the GPU's memory that vLLM takes, including its copy of the weights; on a CPU, share of the machine's
    memory."""
    vllm_devices: tuple[int, ...] = ()
    """Numbers of the GPUs that vLLM uses, as torch numbers them in the trainer: each gets a process with a copy of the
    weights, which samples a part of every batch. Empty: the GPU of the trainer."""
    vllm_enable_sleep_mode: bool = False
    """vLLM frees its GPU memory while the trainer trains, and allocates it again for each batch."""

    max_sampling_logp_difference: float | None = None
    """Training stops if the mean absolute difference between the engine's and the trainer's log-probs, logged as
    `sampling/sampling_logp_difference/mean` (nats per token), exceeds this: the samples then come from another model.
    null: 0.1 for the transformers engine in float32 and 0.3 otherwise, divided by `temperature` if it is below 1. 0: no
    limit."""

    def check_sampling(self) -> None:
        at_least(self, 1, "response_length", "rollout_batch_size")
        above_0(self, "temperature")
        at_least(self, 1, "dynamic_sampling_factor")
        self._check_distribution()
        require(all(self.stop), "stop", self.stop, "strings that are not empty")
        if self.max_sampling_logp_difference is not None:
            at_least(self, 0, "max_sampling_logp_difference")
        share = self.vllm_gpu_memory_utilization
        require(0 < share < 1, "vllm_gpu_memory_utilization", share, "above 0 and below 1")
        require(min(self.vllm_devices, default=0) >= 0, "vllm_devices", self.vllm_devices, "numbers of GPUs")
        distinct = len({*self.vllm_devices}) == len(self.vllm_devices)
        require(distinct, "vllm_devices", self.vllm_devices, "different GPUs")
        if self.engine == "vllm":
            require(self.temperature >= 0.01, "temperature", self.temperature, "at least 0.01 with engine vllm")
            coldest = min(self.temperatures, default=1.0)
            require(coldest >= 0.01, "temperatures", self.temperatures, "at least 0.01 with engine vllm")

    def _check_distribution(self) -> None:
        heats = self.temperatures
        require(all(heat > 0 for heat in heats), "temperatures", heats, "above 0")
        self.check_truncated()
        if self.truncated:
            name = "top_k" if self.top_k else "top_p" if self.top_p < 1 else "min_p"
            because = f"with {name}: the loss needs the tokens that the sampler kept, which only"
            require(self.engine == "transformers", "engine", self.engine, f"transformers {because} this engine reports")
            require(self.decode == "eager", "decode", self.decode, f"eager {because} eager decoding can record")
