"""Keys of `fastrlhf eval`, `chat`, `merge` and `demo`."""

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
    """How a decode step runs, as in ppo. eager: the kernels of the step are launched one by one. cuda_graph: the step
    is recorded once as a CUDA graph and replayed. Not yet run on a GPU."""
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


CHAT_READS = (
    *("model_name_or_path", "tokenizer_name_or_path", "eos_token", "chat_template", "chat_template_kwargs"),
    *("template_date", "trust_remote_code", "dtype", "device", "seed", "max_length", "micro_batch_tokens"),
    *("trailing_space", "attn_implementation"),
)
"""The keys of TrainConfig that `fastrlhf chat` reads; it refuses the others."""


@dataclass(frozen=True, kw_only=True)
class ChatConfig(TruncationKeys, TrainConfig):
    """Opens a chat with a model in the terminal: `fastrlhf chat MODEL [ADAPTER]`. MODEL and ADAPTER are
    `model_name_or_path` and `adapter`."""

    UNREAD: ClassVar[tuple[str, ...]] = tuple(
        field.name for field in fields(TrainConfig) if field.name not in CHAT_READS
    )

    adapter: str = ""
    """Folder of an adapter over the model."""
    system: str = ""
    """System message of the conversation; empty: none."""
    reward_model_path: str = ""
    """Reward model that scores each answer; empty: none."""
    response_length: int = 512
    """Maximum number of tokens of an answer."""
    temperature: float = 0.7
    """Sampling temperature; 0: greedy decoding."""
    max_length: int = 4096
    """Maximum number of tokens of a conversation, including the answer; never more than the positions of the model."""

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        at_default(self, [(False, "with chat, which trains nothing", self.UNREAD)])
        at_least(self, 1, "response_length")
        at_least(self, 0, "temperature")
        self.check_truncated()
        require(self.response_length < self.max_length, "response_length", self.response_length, "below max_length")


MERGE_READS = ("output_dir", "model_name_or_path", "trust_remote_code", "dtype", "device")
"""The keys of TrainConfig that `fastrlhf merge` reads; it refuses the others."""


@dataclass(frozen=True, kw_only=True)
class MergeConfig(TrainConfig):
    """Merges adapters into their base model: `fastrlhf merge ADAPTER [ADAPTER ...] --output_dir FOLDER`.

    `model_name_or_path` is needed only if the base model is no longer at the path that the first adapter names.
    """

    UNREAD: ClassVar[tuple[str, ...]] = tuple(
        field.name for field in fields(TrainConfig) if field.name not in MERGE_READS
    )

    adapters: tuple[str, ...] = ()
    """Folders of adapters over one base model, or of runs that trained such adapters."""
    adapter_weights: tuple[float, ...] = ()
    """Factor of each adapter's update. Empty: 1 for each."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which the merged weights are saved. bfloat16 loses a part of what the adapters learned, which is
    printed; `dpo --merged_dtype bfloat16` measures it in nats."""
    device: str = "cpu"
    """Device on which the weights are added."""

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        at_default(self, [(False, "with merge, which trains nothing", self.UNREAD)])


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Lists the tokenised rows that runs have kept on this disk, or deletes them."""

    dataset_cache_dir: str = ""
    """Folder of the tokenised rows. Empty: `fastrlhf/tokens` in the cache folder of Hugging Face (HF_HOME)."""
    clear: tuple[str, ...] = ()
    """Entries to delete, by the first letters of their keys, or all. Empty: nothing is deleted."""

    def __post_init__(self) -> None:
        expand_home(self)
        check_types(self)


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
