"""What all trainers share, and how its compound keys are read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fastrlhf.config.checks import above_0, at_default, at_least, check_choices, require

COLUMNS = (
    *("prompt", "chosen", "rejected", "reference", "label_prob", "margin"),
    *("responses", "preferences", "scores", "wins", "num_labels"),
)
"""What `columns` may rename."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What all trainers share."""

    UNREAD: ClassVar[tuple[str, ...]] = ()
    """Keys of this class that a command which extends it does not read: they must keep their defaults there."""

    output_dir: str = ""
    """Folder of the run: config, metrics, samples, checkpoints, model. It must not hold a finished run. Empty: nothing
    is written."""
    model_name_or_path: str = ""
    """Folder or hub name of the model to start from."""
    model_config: str = ""
    """Instead of a model: the fields of a transformers configuration (a mapping in YAML, JSON as a flag), built from
    scratch."""
    tokenizer_name_or_path: str = ""
    """Folder or hub name of the tokenizer; empty: the one beside the model."""
    eos_token: str = ""
    """The token that ends a response, for a tokenizer that names none; added to its vocabulary where it is missing."""
    chat_template: str = ""
    """A Jinja template for conversations, or "hh" for the Anthropic form; empty: the tokenizer's own."""
    trust_remote_code: bool = False
    """Run code that comes with a model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights; bfloat16 ones are updated as `master_weights` says. Log-probs, rewards, advantages, heads and
    losses are float32 in any case."""
    use_peft: bool = False
    """Train a low-rank adapter and leave the weights alone; the reference is then the same weights without it. The run
    ends with the adapter in `adapter/` and added to the weights."""
    lora_r: int = 16
    """Rank of the low-rank adapter."""
    lora_alpha: int = 32
    """The adapter is scaled by lora_alpha / lora_r. There is no dropout: log-probs must be the same number twice."""
    lora_target_modules: tuple[str, ...] = ("all-linear",)
    """Ends of the names of the layers that get an adapter. all-linear: every linear layer except heads and routers, and
    the experts of a mixture."""
    lora_target_parameters: tuple[str, ...] = ()
    """Ends of the names of parameters outside of linear layers that get an adapter too, for example
    mlp.experts.down_proj."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(lora_r) (Kalajdzievski 2023, arXiv 2312.03732)."""
    use_dora: bool = False
    """Train the norms of the weights apart (Liu et al. 2024, arXiv 2402.09353)."""
    load_in_4bit: bool = False
    """QLoRA (Dettmers et al. 2023, arXiv 2305.14314): keep the weights of `model_name_or_path` under the adapter in 4
    bits; other models are as they were saved. The run ends with the adapter added to what those 4 bits stand for, in
    `dtype`. It needs bitsandbytes: install fastrlhf[bnb]."""
    merged_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the final weights with the adapter added. bfloat16 halves the file and rounds part of what was learned
    away: how far log-probs of held-out rows shift is measured and written to config.yaml, and above `max_merge_shift`
    the weights are saved in float32 all the same."""
    max_merge_shift: float = 0.01
    """Largest shift, in nats per token, at which merged weights are saved in bfloat16."""
    activation_checkpointing: bool = False
    """Keep the inputs of layers alone and compute the layers again in the backward: a third more time for a fraction of
    the memory. The older name gradient_checkpointing is understood."""
    activation_offloading: bool = False
    """Keep those inputs in the CPU's memory, copied out and back while layers compute; the same numbers bit for bit. It
    needs a CUDA GPU, where it has not yet run."""
    attn_implementation: Literal[
        "auto", "flash_attention_2", "flash_attention_3", "flash_attention_4", "varlen", "flex", "sdpa"
    ] = "auto"
    """Who computes attention over packs, of all models of the run; sampling decides for itself. auto: flash_attention_2
    where flash-attn is installed, else torch's own varlen, on a GPU in bfloat16; else sdpa, one call per sequence."""
    torch_compile: bool = False
    """Compile the layers of every model for packed forwards: slower to start, and fewer passes over memory."""
    use_liger_kernel: bool = False
    """RMSNorm, SwiGLU (GeGLU) and rotary positions by Liger's kernels (`pip install 'fastrlhf[liger]'`), on a GPU."""
    device: str = "auto"
    """auto: the first CUDA GPU, else the CPU; under torchrun the GPU of the place that a process has on its machine."""

    dataset_name: str = ""
    """Hub name, or a local .jsonl[.gz], .json, .csv or .parquet file or folder."""
    dataset_config: str = ""
    """Configuration of a hub dataset."""
    dataset_train_split: str = "train"
    """Split to train on."""
    dataset_test_split: str = ""
    """Split to evaluate on; empty: `num_eval_examples` rows are held out of the training split."""
    num_eval_examples: int = 0
    """Rows to evaluate on, at most; 0: all of `dataset_test_split`, none where that is empty."""
    max_train_examples: int = 0
    """Rows to train on, at most; 0 is all."""
    columns: str = ""
    """Column names of the file where they are not the usual ones, as "prompt=question,chosen=better"."""
    max_bad_fraction: float = 0.1
    """Rows that cannot be used are skipped and counted; more than this share of them is an error."""
    max_length: int = 1024
    """Tokens of prompt and response together."""
    truncation_mode: Literal["keep_start", "keep_end", "drop"] = "keep_start"
    """Longer rows: keep_start cuts the end of the response, keep_end the beginning of the prompt, drop leaves them
    out."""

    per_device_train_batch_size: int = 8
    """Sequences, pairs or episodes of an optimiser step, of all processes together; times
    `gradient_accumulation_steps`."""
    gradient_accumulation_steps: int = 1
    """Multiplies the batch, as in TRL. How a batch is cut to fit memory is `micro_batch_tokens`' business alone."""
    micro_batch_tokens: int = 8192
    """Tokens of one forward and backward, at most; the keys of a shared prompt, gathered anew for every branch, are not
    counted. It changes memory and speed, never a gradient."""
    num_train_epochs: float = 3.0
    """Passes over the data, where `max_steps` is not given."""
    max_steps: int = -1
    """Optimiser steps (updates, in on-policy runs); -1: by epochs."""
    router_aux_loss_coef: float | None = None
    """Weight of the auxiliary loss that spreads tokens over the experts of a mixture, as a mean over the sequences of a
    step; logged as aux_loss. null: the value in the model's configuration; 0 is off."""
    learning_rate: float = 1e-5
    """Peak."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """From the peak to 0 over the run; constant stays."""
    warmup_steps: int = 0
    """Optimiser steps from 0 to the peak."""
    weight_decay: float = 0.0
    """AdamW's, on matrices; vectors have none."""
    adam_beta1: float = 0.9
    """AdamW."""
    adam_beta2: float = 0.999
    """AdamW."""
    adam_epsilon: float = 1e-8
    """AdamW."""
    optim: Literal["adamw_torch_fused", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = "adamw_torch_fused"
    """Which AdamW, by transformers' names; all but the first are those of bitsandbytes (install fastrlhf[bnb]). 8bit:
    moments take 2 bytes per weight in place of 8, but for embeddings. paged: they move to the CPU's memory where the
    GPU's is short (not yet run on a GPU)."""
    master_weights: Literal["float32", "stochastic_rounding"] = "float32"
    """What bfloat16 weights are updated through. float32: copies (4 more bytes per weight). stochastic_rounding: no
    copies; a new weight is rounded up or down at random, so that its mean is right; `seed` and step key the draws."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 is off (the norm is logged all the same)."""
    eval_steps: int = 0
    """Optimiser steps between evaluations on the held-out rows; 0: only at the end."""
    eval_on_start: bool = False
    """Evaluate before the first step too: row 0 of the metrics."""
    save_steps: int = 0
    """Optimiser steps (updates, in on-policy runs) between checkpoints; 0: none but when the run is stopped."""
    save_total_limit: int = 0
    """Checkpoints that are kept, the newest ones; 0 is all."""
    disk_wait_minutes: float = 10.0
    """Minutes that a run waits for room where the disk is full, before it ends; 0: it ends at once."""
    resume_from_checkpoint: Literal["auto", "never"] = "auto"
    """auto: where `output_dir` holds an unfinished run of the same configuration, go on from its newest whole
    checkpoint. never: that is an error."""
    resume_weights_only: bool = False
    """Resume from weights and step alone, the optimiser as new: where its part of the checkpoint is lost."""
    seed: int = 42
    """Of the weights that are new, the order of the data, and every sample."""
    report_to: tuple[str, ...] = ()
    """Services that get the metrics too: tensorboard, wandb, none, or all that are installed. metrics.jsonl is always
    written."""
    run_name: str = ""
    """Name of the run in those services; empty: the name of `output_dir`."""
    progress: bool = True
    """Show how far the run is: a progress bar on a terminal, elsewhere a line every `logging_steps`. false: only
    evaluations are printed."""
    logging_steps: int = 10
    """Optimiser steps (updates, in on-policy runs) between two lines of progress where the output is no terminal: loss
    or score, learning rate, gradient norm, tokens per second, time left. metrics.jsonl has every step in any case."""

    def __post_init__(self) -> None:
        check_choices(self)
        at_least(self, 1, "per_device_train_batch_size", "gradient_accumulation_steps", "micro_batch_tokens")
        at_least(self, 1, "lora_r", "lora_alpha", "logging_steps")
        require(bool(self.lora_target_modules), "lora_target_modules", self.lora_target_modules, "all-linear, or names")
        lora = (
            "lora_r",
            "lora_alpha",
            "lora_target_modules",
            "lora_target_parameters",
            "use_rslora",
            "use_dora",
            "load_in_4bit",
            "merged_dtype",
        )
        at_default(
            self,
            [
                (self.use_peft, "where use_peft is false", lora),
                (self.progress, "where progress is false", ("logging_steps",)),
                (self.dtype == "bfloat16", "where dtype is float32", ("master_weights",)),
                (self.merged_dtype == "bfloat16", "where merged_dtype is float32", ("max_merge_shift",)),
            ],
        )
        require(
            not (self.torch_compile and self.use_liger_kernel),
            "use_liger_kernel",
            self.use_liger_kernel,
            "false where torch_compile is true: both fuse the same operations",
        )
        if self.activation_offloading:
            because = "layers that are not computed again keep more than can be copied meanwhile"
            rule = f"false where activation_checkpointing is false: {because}"
            require(self.activation_checkpointing, "activation_offloading", True, rule)
            require(self.device != "cpu", "activation_offloading", True, "false where device is cpu")
        at_least(self, 2, "max_length")
        at_least(self, 0, "warmup_steps", "eval_steps", "num_eval_examples", "max_train_examples")
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
        require(0 <= self.max_bad_fraction <= 1, "max_bad_fraction", self.max_bad_fraction, "in 0..1")
        require(0 <= self.seed < 2**63, "seed", self.seed, "in 0..2^63 - 1")

    @property
    def batch_size(self) -> int:
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


def parse_columns(columns: str) -> dict[str, str]:
    """ "prompt=question,chosen=better" -> {"prompt": "question", "chosen": "better"}. Raises ValueError on another
    form."""
    pairs = [pair.partition("=") for pair in columns.split(",") if pair]
    for name, equals, column in pairs:
        if not equals or not column or name not in COLUMNS:
            raise ValueError(
                f"columns: {columns!r} must look like prompt=question,chosen=better, of the names {', '.join(COLUMNS)}"
            )
    return {name: column for name, _, column in pairs}


def parse_model_config(model_config: str) -> dict[str, Any]:
    """The JSON of `model_config` as a mapping. Raises ValueError where it is none or names no model_type."""
    try:
        values = json.loads(model_config)
    except json.JSONDecodeError as error:
        raise ValueError(f"model_config: no valid JSON: {error}") from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise ValueError('model_config: must be a mapping with a model_type, such as {"model_type": "llama", ...}')
    return values
