"""Commands that train nothing, or everything."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from fastrlhf.config.checks import at_default, at_least, require
from fastrlhf.config.train import TrainConfig

EVAL_READS = (
    *("output_dir", "model_name_or_path", "tokenizer_name_or_path", "eos_token", "chat_template", "trust_remote_code"),
    *("dtype", "device", "seed", "micro_batch_tokens", "max_length", "truncation_mode"),
    *("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "columns", "max_bad_fraction"),
    *("num_eval_examples", "max_train_examples", "attn_implementation", "torch_compile", "use_liger_kernel"),
)
"""The keys of trainers that `fastrlhf eval` reads."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig(TrainConfig):
    """Win rates of models against the responses of a dataset, or against each other, judged by a reward model.

    `model_name_or_path` names no model here but where the tokenizer is, if not beside the first of `models`; and the
    model under `models` and a judge that are adapters, if not the one that the first of them says it was trained over.
    """

    UNREAD: ClassVar[tuple[str, ...]] = tuple(
        field.name for field in fields(TrainConfig) if field.name not in EVAL_READS
    )

    models: tuple[str, ...] = ()
    """Folders or hub names of policies; those that are adapters (`adapter/` of a run) share one base in memory."""
    reward_model_path: str = ""
    """The judge, which may be an adapter over that base too."""
    opponent: str = "reference"
    """What they are compared with: a column (reference, chosen, rejected) or one of `models`."""
    response_length: int = 53
    """Tokens of a response at most."""
    temperature: float = 0.7
    """Of sampling; 0 takes the likeliest token."""
    rollout_batch_size: int = 64
    """Responses that are generated side by side."""
    decode: Literal["eager", "cuda_graph"] = "eager"
    """As in ppo: cuda_graph records a decode step and replays it. Not yet run on a GPU."""
    num_eval_examples: int = 500

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        at_default(self, [(False, "with eval, which trains nothing", self.UNREAD)])
        at_least(self, 1, "response_length", "rollout_batch_size")
        at_least(self, 0, "temperature")
        require(self.decode == "eager" or self.device != "cpu", "decode", self.decode, "eager where device is cpu")
        require(self.response_length < self.max_length, "response_length", self.response_length, "below max_length")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The whole chain on the embedded task: SFT, reward model, DPO, PPO, DR-PO, evaluation."""

    out: str = "runs/demo"
    """Folder of the run; it must not hold one already."""
    seed: int = 0
    """Of the data, the weights and every sample."""
    methods: tuple[str, ...] = ("sft", "reward", "dpo", "ppo", "drpo")
    """Which stages run, among sft, reward, dpo, ipo, cdpo, ppo, drpo, rto, drpo+rto, rlp-uml, rlp-spg; or all."""
    num_eval: int = 600
    """Held-out posts the methods are judged on."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_eval")
        at_least(self, 0, "seed")
