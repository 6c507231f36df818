"""The keys that all trainers share, and the parsers of their compound values."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from datetime import date
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fastrlhf.config.batch import BatchKeys
from fastrlhf.config.checks import above_0, at_default, at_least, check_types, expand_home, require
from fastrlhf.config.elsewhere import explain
from fastrlhf.config.schedule import ScheduleKeys
from fastrlhf.config.sources import Source, read_sources
from fastrlhf.config.watching import WatchKeys

LORA_KEYS = (
    *("lora_r", "lora_alpha", "lora_target_modules", "lora_target_parameters", "lora_modules_to_save"),
    *("use_rslora", "use_dora", "load_in_4bit", "merged_dtype"),
)
"""Keys that only a run with an adapter reads."""
REPOSITORY = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]{0,95}", re.ASCII)
"""Matches the name of a model on the hub, with or without an owner."""
HUB_KEYS = ("hub_model_id", "hub_private_repo", "hub_revision")
"""Keys that only a run with push_to_hub reads."""

OPTIM_NAMES = {"adamw_torch": "adamw_torch_fused", "adamw_bnb_8bit": "adamw_8bit"}
"""Names of transformers for an implementation of AdamW -> the name that the configuration keeps."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(WatchKeys, ScheduleKeys, BatchKeys):
    """The keys that all trainers share."""

    UNREAD: ClassVar[tuple[str, ...]] = ()
    """Keys of this class that a subclass does not read; there they must keep their defaults."""

    output_dir: str = ""
    """Folder to which the run writes its configuration, metrics, samples, checkpoints and model. It must not hold a
    finished run. Empty: nothing is written."""
    model_name_or_path: str = ""
    """Folder or hub name of the model to start from."""
    model_config: str = ""
    """Fields of a transformers configuration, from which the model is built with random weights, in place of
    model_name_or_path: a mapping in YAML, or JSON in a flag."""
    tokenizer_name_or_path: str = ""
    """Folder or hub name of the tokenizer. Empty: the one saved with the model."""
    eos_token: str = ""
    """Token that ends a response, for a tokenizer without an EOS token. If the vocabulary lacks it, it is added."""
    chat_template: str = ""
    """Chat template: Jinja text, a file that holds it, or "hh" for Anthropic's Human/Assistant format. Empty: the
    template of the tokenizer."""
    chat_template_kwargs: str = ""
    """Variables passed to the chat template in addition to the turns, for example {"enable_thinking": false}: a mapping
    in YAML, or JSON in a flag. Variables in the column chat_template_kwargs of a row take precedence."""
    template_date: str = ""
    """Date for a chat template that writes the current date, for example 2026-11-30. Empty: the date recorded by the
    run in `output_dir` or by the run that trained the model, otherwise today. The run records it in config.yaml."""
    trust_remote_code: bool = False
    """Allow Python code that comes with a model to run."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the weights. auto: bfloat16 on a GPU of compute capability 8.0 or more, float32 elsewhere and for
    weights with a merged adapter; the run records its choice in config.yaml. Log-probs, rewards, advantages, heads and
    losses are float32 in all cases. `master_weights` says how bfloat16 weights are updated."""
    use_peft: bool = False
    """Train a low-rank adapter (LoRA) and freeze the weights; the reference is then the same model without the adapter.
    The run saves the adapter in `adapter/` and also the whole model, with the adapter merged into its weights."""
    lora_r: int = 16
    """Rank of the low-rank adapter."""
    lora_alpha: int = 32
    """The adapter is scaled by lora_alpha / lora_r. There is no dropout, because log-probs of the same tokens must be
    reproducible."""
    lora_target_modules: tuple[str, ...] = ("all-linear",)
    """Layers that get an adapter, given by the ends of their names. all-linear: the experts of a mixture-of-experts
    model, and every linear layer except heads and routers."""
    lora_target_parameters: tuple[str, ...] = ()
    """Parameters outside of linear layers that get an adapter too, given by the ends of their names, for example
    mlp.experts.down_proj."""
    lora_modules_to_save: tuple[str, ...] = ()
    """Ends of the names of modules that are trained whole and saved with the adapter, for example embed_tokens and
    lm_head, which new tokens need. The reference keeps a copy of each."""
    use_rslora: bool = False
    """Scale the adapter by lora_alpha / sqrt(lora_r) in place of lora_alpha / lora_r (Kalajdzievski 2023, arXiv
    2312.03732)."""
    use_dora: bool = False
    """DoRA: train the norms of the weight vectors separately from their directions (Liu et al. 2024, arXiv
    2402.09353)."""
    load_in_4bit: bool = False
    """QLoRA (Dettmers et al. 2023, arXiv 2305.14314): store the frozen weights of `model_name_or_path` in 4 bits and
    train the adapter; other models keep their precision. At the end the adapter is merged into the dequantised weights,
    in `merged_dtype`. It needs bitsandbytes: install fastrlhf[bnb]."""
    merged_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the final weights, into which the adapter is merged. bfloat16 halves the file, but rounding loses
    part of the update: the shift of the log-probs of held-out rows is measured and written to config.yaml, and if it
    exceeds `max_merge_shift` the weights are saved in float32 instead."""
    max_merge_shift: float = 0.01
    """Largest shift of the log-probs, in nats per token, at which merged weights are still saved in bfloat16."""
    activation_checkpointing: bool = False
    """Keep only the inputs of the layers and recompute the layers in the backward pass: it takes about a third more
    time and a fraction of the memory. The older name gradient_checkpointing is accepted too."""
    activation_offloading: bool = False
    """Keep the inputs of the layers in CPU memory and copy them back during the backward pass, while other layers are
    computed; the results are identical bit for bit. It needs activation_checkpointing and a CUDA GPU. Not yet run on a
    GPU."""
    attn_implementation: Literal[
        "auto", "flash_attention_2", "flash_attention_3", "flash_attention_4", "varlen", "flex", "sdpa"
    ] = "auto"
    """Attention kernel for packed sequences, for all models of the run; sampling has its own kernel. auto: on a GPU in
    bfloat16, flash_attention_2 if flash-attn is installed, otherwise torch's varlen; in all other cases sdpa, one call
    per sequence."""
    torch_compile: bool = False
    """Compile the layers of every model for packed sequences: the start takes longer, and each step reads and writes
    less memory."""
    use_liger_kernel: bool = False
    """Use Liger's kernels for RMSNorm, SwiGLU (GeGLU) and rotary positions. It needs a GPU and fastrlhf[liger]."""
    device: str = "auto"
    """Device of the run. auto: the first CUDA GPU, or the CPU if there is none; under torchrun, the GPU whose index is
    the local rank of the process."""

    dataset_name: str | tuple[str, ...] | tuple[Source, ...] = ""
    """Hub name of the dataset, or a local file (.jsonl, .ndjson, .json, .csv, each also .gz or .zst, or .parquet) or
    folder. A list of datasets is concatenated. An entry of the list may be a mapping of path, weight, columns, split
    and config: in YAML, or as JSON in a flag. The rows of a dataset are then drawn in proportion to its weight,
    and sft, reward and dpo also report the loss of each dataset."""
    dataset_config: str = ""
    """Name of the configuration of a hub dataset that has several."""
    dataset_train_split: str = "train"
    """Split to train on, or a slice of one, for example train[:500] or train[10%:]."""
    dataset_test_split: str = ""
    """Split to evaluate on. Empty: the last `num_eval_examples` rows of the training split are held out."""
    num_eval_examples: int = 0
    """Maximum number of rows to evaluate on. 0: all rows of `dataset_test_split`, or none if `dataset_test_split` is
    empty. It counts for each dataset of a list of mappings separately."""
    max_train_examples: int = 0
    """Maximum number of rows to train on, for each dataset of a list of mappings separately; 0: all."""
    dataset_num_proc: int = 0
    """Number of processes that tokenise the rows; 1: the process of the run itself; 0: one per available core."""
    dataset_cache_dir: str = ""
    """Folder in which tokenised rows are kept, so that a later run with the same rows, tokenizer and keys does not
    tokenise again. Empty: `fastrlhf/tokens` in the cache folder of Hugging Face (HF_HOME)."""
    columns: str = ""
    """Names of the dataset's columns that differ from the expected names, for example
    "prompt=question,chosen=better"."""
    system_prompt: str = ""
    """Text of a system turn before every prompt that does not begin with one, for example the form in which an answer
    is expected. Rows of text become conversations: the prompt is a turn of the user, a response a turn of the
    assistant. The column `system` of a row takes precedence. Empty: no turn is added."""
    max_bad_fraction: float = 0.1
    """Largest share of rows that may be unusable, or refused or changed by the chat template; a larger share is an
    error."""
    max_dropped_fraction: float = 0.5
    """Largest share of rows that tokenisation may drop, because they do not fit `max_length` or for another reason; a
    larger share is an error."""
    max_length: int = 1024
    """Maximum number of tokens of prompt and response together."""
    truncation_mode: Literal["keep_start", "keep_end", "drop"] = "keep_start"
    """What happens to rows longer than `max_length`. keep_start: the end of the response is cut. keep_end: the
    beginning of the prompt is cut. drop: the row is dropped."""
    trailing_space: Literal["prompt", "response"] = "prompt"
    """Where white space at the end of a prompt belongs. prompt: it is the end of the prompt. response: it is the
    beginning of the response if the tokenizer joins the two, as in TRL: "TL;DR: " before "cats" becomes "TL;DR:" before
    " cats"."""

    micro_batch_tokens: int = 8192
    """Maximum number of tokens in one forward and backward pass; a shared prompt counts once. It changes memory use and
    speed but no gradient."""
    num_train_epochs: float = 3.0
    """Number of passes over the data, if `max_steps` is -1."""
    max_steps: int = -1
    """Number of optimiser steps (on-policy: updates). -1: `num_train_epochs` determines it."""
    router_aux_loss_coef: float | None = None
    """Weight of the auxiliary loss that balances the load of the experts of a mixture-of-experts model, averaged over
    the sequences of a step and logged as aux_loss. null: the value in the model's configuration. 0: off."""
    learning_rate: float = 1e-5
    """Peak learning rate, after warm-up."""
    weight_decay: float = 0.0
    """Weight decay of AdamW. It applies to matrices, not to vectors such as biases and norms."""
    adam_beta1: float = 0.9
    """Decay rate of AdamW's mean of gradients."""
    adam_beta2: float = 0.999
    """Decay rate of AdamW's mean of squared gradients."""
    adam_epsilon: float = 1e-8
    """Constant in AdamW's denominator."""
    optim: Literal[
        "adamw_torch_fused", "adamw_torch", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit"
    ] = "adamw_torch_fused"
    """Implementation of AdamW, under the name that transformers uses. adamw_torch_fused and adamw_torch: torch's fused
    AdamW. All others are from bitsandbytes (install fastrlhf[bnb]); adamw_8bit and adamw_bnb_8bit mean the same. 8bit:
    the moments take 2 bytes per weight instead of 8, except for embeddings. paged: the moments move to CPU memory when
    GPU memory is short (not yet run on a GPU)."""
    master_weights: Literal["float32", "stochastic_rounding"] = "float32"
    """How bfloat16 weights are updated. float32: a float32 copy of the weights is kept (4 more bytes per weight).
    stochastic_rounding: no copy is kept; each new weight is rounded up or down at random, without bias, with draws that
    depend on `seed` and the step."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this total norm. 0: no clipping. The norm before clipping is always logged."""
    eval_steps: int = 0
    """Number of optimiser steps between evaluations on the held-out rows. 0: evaluation only at the end."""
    eval_on_start: bool = False
    """Also evaluate before the first step; the result is logged as step 0."""
    save_steps: int = 0
    """Number of optimiser steps (on-policy: updates) between checkpoints. 0: a checkpoint is saved only if the run is
    stopped."""
    save_total_limit: int = 0
    """Number of newest checkpoints to keep; older ones are deleted. 0: all are kept."""
    disk_wait_minutes: float = 10.0
    """Number of minutes that a run waits for free space if the disk is full, before it ends. 0: it ends at once."""
    resume_from_checkpoint: Literal["auto", "never"] = "auto"
    """What to do if `output_dir` holds an unfinished run. auto: continue it from its newest complete checkpoint, if its
    configuration is the same. never: raise an error."""
    resume_changed_functions: bool = False
    """Resume even if the file of a user-defined function has changed since the checkpoint."""
    resume_weights_only: bool = False
    """Resume with the weights and the step but a new optimiser, for a checkpoint whose optimiser file is lost."""
    seed: int = 42
    """Seed of new weights, of the order of the data and of all sampling."""
    report_to: tuple[str, ...] = ()
    """Services to which the metrics are also sent: tensorboard, wandb, trackio, mlflow, swanlab; none; or all (every
    service that is installed). A resumed run continues the same run there. metrics.jsonl is always written."""
    run_name: str = ""
    """Name of the run in the services of `report_to`. Empty: the name of `output_dir`."""
    push_to_hub: bool = False
    """Upload the final model and its card to the Hugging Face hub at the end of the run. The token is that of
    `hf auth login` or the environment variable HF_TOKEN. Whether it may write to the repository is checked at the
    start. rlp uploads its last policy."""
    hub_model_id: str = ""
    """Repository to upload to, as owner/name; it is created if it does not exist. Empty: the name of `output_dir`, in
    the account of the token."""
    hub_private_repo: bool = False
    """Create the repository as a private one. A run that would upload to an existing public repository is refused.
    false: the default of the account."""
    hub_revision: str = ""
    """Branch to upload to; it is created if it does not exist. Empty: main."""
    progress: bool = True
    """Show progress: a bar on a terminal, or a line every `logging_steps` if the output is not a terminal. false: only
    evaluations are printed."""
    logging_steps: int = 10
    """Number of optimiser steps (on-policy: updates) between two lines of progress if the output is not a terminal. A
    line has loss or score, learning rate, gradient norm, tokens per second and time left. metrics.jsonl always has
    every step."""

    if not TYPE_CHECKING:  # type checkers know the keys from the fields

        def __new__(cls, **given: Any) -> Any:
            known, command = [field.name for field in fields(cls)], cls.__name__.removesuffix("Config").lower()
            for key in given:
                if key not in known:
                    raise TypeError(f"{cls.__name__} has no key {key!r}{explain(key, command, known, {})}")
            return super().__new__(cls)

    def __post_init__(self) -> None:
        self.read_sources()
        expand_home(self)
        if self.report_to == ("none",):
            object.__setattr__(self, "report_to", ())
        check_types(self)
        parse_template_kwargs(self.chat_template_kwargs)
        require(_is_day(self.template_date), "template_date", self.template_date, "a date such as 2026-11-30, or empty")
        object.__setattr__(self, "optim", OPTIM_NAMES.get(self.optim, self.optim))
        self.check_batch()
        self.check_schedule()
        self.check_watching(self.eval_steps)
        at_least(self, 0, "dataset_num_proc")
        at_least(self, 1, "micro_batch_tokens", "lora_r", "lora_alpha", "logging_steps")
        require(bool(self.lora_target_modules), "lora_target_modules", self.lora_target_modules, "all-linear, or names")
        at_default(
            self,
            [
                (self.use_peft, "when use_peft is false", LORA_KEYS),
                (self.progress, "when progress is false", ("logging_steps",)),
                (self.push_to_hub, "when push_to_hub is false", HUB_KEYS),
                (self.dtype != "float32", "when dtype is float32", ("master_weights",)),
                (self.merged_dtype == "bfloat16", "when merged_dtype is float32", ("max_merge_shift",)),
            ],
        )
        require(
            not (self.torch_compile and self.use_liger_kernel),
            "use_liger_kernel",
            self.use_liger_kernel,
            "false when torch_compile is true: both fuse the same operations",
        )
        if self.activation_offloading:
            because = "without recomputation there is too much to copy"
            rule = f"false when activation_checkpointing is false: {because}"
            require(self.activation_checkpointing, "activation_offloading", True, rule)
            require(self.device != "cpu", "activation_offloading", True, "false when device is cpu")
        if self.hub_model_id:
            rule = "a repository of the hub, as owner/name"
            require(bool(REPOSITORY.fullmatch(self.hub_model_id)), "hub_model_id", self.hub_model_id, rule)
        at_least(self, 2, "max_length")
        at_least(self, 0, "eval_steps", "num_eval_examples", "max_train_examples")
        at_least(self, 0, "save_steps", "save_total_limit", "disk_wait_minutes")
        if self.router_aux_loss_coef is not None:
            at_least(self, 0, "router_aux_loss_coef")
        at_least(self, 0, "weight_decay", "max_grad_norm")
        above_0(self, "max_merge_shift", "learning_rate", "num_train_epochs", "adam_epsilon")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "at least 0 and below 1")
        require(
            self.max_steps == -1 or self.max_steps >= 1, "max_steps", self.max_steps, "at least 1, or -1 for epochs"
        )
        for name in ("max_bad_fraction", "max_dropped_fraction"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in 0..1")
        require(0 <= self.seed < 2**63, "seed", self.seed, "in 0..2^63 - 1")

    def read_sources(self) -> None:
        """Makes the entries of `dataset_name` objects of `Source`."""
        object.__setattr__(self, "dataset_name", read_sources(self.dataset_name))


def _is_day(text: str) -> bool:
    try:
        return not text or bool(date.fromisoformat(text))
    except ValueError:
        return False


def parse_template_kwargs(chat_template_kwargs: str) -> dict[str, Any]:
    """Parses the JSON of `chat_template_kwargs` to a mapping; empty text gives an empty mapping. Raises ValueError if
    it is not a mapping."""
    try:
        values = json.loads(chat_template_kwargs or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"chat_template_kwargs: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError('chat_template_kwargs: must be a mapping, such as {"enable_thinking": false}')
    return values


def parse_model_config(model_config: str) -> dict[str, Any]:
    """Parses the JSON of `model_config` to a mapping. Raises ValueError if it is not a mapping or has no model_type."""
    try:
        values = json.loads(model_config)
    except json.JSONDecodeError as error:
        raise ValueError(f"model_config: not valid JSON: {error}") from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise ValueError('model_config: must be a mapping with a model_type, such as {"model_type": "llama", ...}')
    return values
