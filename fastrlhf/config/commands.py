"""Keys of `fastrlhf eval` and `fastrlhf demo`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from fastrlhf.config.checks import at_default, at_least, check_types, expand_home, require
from fastrlhf.config.sampling import TruncationKeys
from fastrlhf.config.train import TrainConfig

EVAL_READS = (
    *("output_dir", "model_name_or_path", "tokenizer_name_or_path", "eos_token", "chat_template", "trust_remote_code"),
    *("chat_template_kwargs", "template_date", "max_dropped_fraction"),
    *("dtype", "device", "seed", "micro_batch_tokens", "max_length", "truncation_mode", "trailing_space"),
    *("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "columns", "system_prompt"),
    "max_bad_fraction",
    *("num_eval_examples", "max_train_examples", "attn_implementation", "torch_compile", "use_liger_kernel"),
)
"""The keys of TrainConfig that `fastrlhf eval` reads; it refuses the others."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig(TruncationKeys, TrainConfig):
    """Measures win rates of models against the responses of a dataset or against each other, judged by a reward model.

    `model_name_or_path` is needed only in two cases: if no tokenizer is saved with a model, or if adapters have another
    base model than the one that the first adapter was trained on.
    """

    UNREAD: ClassVar[tuple[str, ...]] = tuple(
        field.name for field in fields(TrainConfig) if field.name not in EVAL_READS
    )

    models: tuple[str, ...] = ()
    """Folders or hub names of policies; adapters (`adapter/` of a run) share one base model in memory."""
    reward_model_path: str = ""
    """Reward model that judges the responses; it may be an adapter over the same base model."""
    opponent: str = "reference"
    """Opponent of the models: a column of the dataset (reference, chosen or rejected) or one of `models`."""
    response_length: int = 53
    """Maximum number of tokens of a response."""
    temperature: float = 0.7
    """Sampling temperature; 0: greedy decoding."""
    rollout_batch_size: int = 64
    """Number of responses generated in one batch."""
    decode: Literal["eager", "cuda_graph"] = "eager"
    """How a decode step runs, as in ppo. eager: its kernels are launched one by one. cuda_graph: the step is recorded
    once as a CUDA graph and replayed. Not yet run on a GPU."""
    num_eval_examples: int = 500

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        at_default(self, [(False, "with eval, which trains nothing", self.UNREAD)])
        at_least(self, 1, "response_length", "rollout_batch_size")
        at_least(self, 0, "temperature")
        self.check_truncated()
        eager = self.decode == "eager" or not self.truncated
        require(eager, "decode", self.decode, "eager with top_k, top_p or min_p")
        require(self.decode == "eager" or self.device != "cpu", "decode", self.decode, "eager when device is cpu")
        require(self.response_length < self.max_length, "response_length", self.response_length, "below max_length")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Runs all stages on a small built-in task: SFT, reward model, DPO, PPO, DR-PO and evaluation."""

    out: str = "runs/demo"
    """Output folder; it must not contain an earlier run."""
    seed: int = 0
    """Seed of the data, of the weights and of every sample."""
    methods: tuple[str, ...] = ("sft", "reward", "dpo", "ppo", "drpo")
    """Stages to run: sft, reward, dpo, ipo, cdpo, ppo, drpo, rto, drpo+rto, rlp-uml, rlp-spg, grpo, or all."""
    num_eval: int = 600
    """Number of held-out posts on which the methods are judged."""

    def __post_init__(self) -> None:
        expand_home(self)
        check_types(self)
        at_least(self, 1, "num_eval")
        at_least(self, 0, "seed")
