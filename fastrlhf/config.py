"""Every setting of every run: one flat frozen dataclass per command, checked where it is defined.

Names and defaults are those of Hugging Face's TrainingArguments and TRL wherever they have one. A file of YAML gives
some of the keys, flags of the same names beat it, the rest are the defaults below. Nothing is derived silently: what
a run used is written, in full, to `config.yaml` in its output directory.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What all trainers share."""

    output_dir: str = ""
    """Folder of the run: config, metrics, samples, model. It must not hold a run already. Empty: nothing is written."""
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
    """Of the weights; bfloat16 ones are updated through float32 copies (4 more bytes per weight). Log-probs, rewards,
    advantages, heads and losses are float32 in any case."""
    device: str = "auto"
    """auto: the first CUDA GPU, else the CPU."""

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
    """Sequences, pairs or episodes of an optimiser step; times `gradient_accumulation_steps`."""
    gradient_accumulation_steps: int = 1
    """Multiplies the batch, as in TRL. How a batch is cut to fit memory is `micro_batch_tokens`' business alone."""
    micro_batch_tokens: int = 8192
    """Tokens of one forward and backward, at most. It changes memory and speed, never a gradient."""
    num_train_epochs: float = 3.0
    """Passes over the data, where `max_steps` is not given."""
    max_steps: int = -1
    """Optimiser steps (updates, in on-policy runs); -1: by epochs."""
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
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 is off (the norm is logged all the same)."""
    eval_steps: int = 0
    """Optimiser steps between evaluations; 0: only at the end."""
    seed: int = 42
    """Of the weights that are new, the order of the data, and every sample."""
    report_to: tuple[str, ...] = ()
    """Of tensorboard, wandb; metrics.jsonl is always written."""
    run_name: str = ""
    """How the run is called there."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        _check_choices(self)
        _at_least(self, 1, "per_device_train_batch_size", "gradient_accumulation_steps", "micro_batch_tokens")
        _at_least(self, 2, "max_length")
        _at_least(self, 0, "warmup_steps", "eval_steps", "num_eval_examples", "max_train_examples")
        _at_least(self, 0, "weight_decay", "max_grad_norm")
        _above_0(self, "learning_rate", "num_train_epochs", "adam_epsilon")
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


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainConfig):
    """Supervised fine-tuning: the log-likelihood of a response given its prompt."""

    learning_rate: float = 2e-5
    response: Literal["reference", "chosen"] = "reference"
    """Which response is imitated; `reference` is the completion of prompt-completion rows."""
    completion_only_loss: bool = True
    """False trains the tokens of the prompt as well."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig(TrainConfig):
    """A reward model from preference pairs (Bradley-Terry)."""

    learning_rate: float = 1e-4
    num_train_epochs: float = 1.0
    truncation_mode: Literal["keep_start", "keep_end", "drop"] = "drop"
    share_prompts: bool = True
    """Compute the prompt of a pair once, both responses hanging on it; the same numbers with fewer tokens."""


@dataclass(frozen=True, kw_only=True)
class DPOConfig(TrainConfig):
    """Direct preference optimisation, and IPO by `loss_type`."""

    learning_rate: float = 1e-6
    num_train_epochs: float = 1.0
    beta: float = 0.1
    """Strength of the tie to the reference; for ipo the paper's tau."""
    loss_type: Literal["sigmoid", "ipo", "hinge", "robust"] = "sigmoid"
    """sigmoid is DPO."""
    label_smoothing: float = 0.0
    """Share of pairs believed to be labelled the wrong way round (cDPO; robust needs it below 0.5)."""
    length_norm: Literal["auto", "sum", "mean", "pair_mean"] = "auto"
    """Of a response's log-ratio. auto: mean over tokens for ipo (as in TRL), else sum. The IPO paper is `sum`."""
    ref_model_name_or_path: str = ""
    """The reference; empty: the model before training. Its log-probs are computed once, before the first step."""
    share_prompts: bool = True
    """Compute the prompt of a pair once, both responses hanging on it; the same numbers with fewer tokens."""

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        _above_0(self, "beta")
        require(0 <= self.label_smoothing < 0.5, "label_smoothing", self.label_smoothing, "at least 0 and below 0.5")


@dataclass(frozen=True, kw_only=True)
class PPOConfig(TrainConfig):
    """PPO with a critic, and DR-PO by `reset_prob`. `model_name_or_path` is the SFT model, which is also the
    reference."""

    learning_rate: float = 3e-6
    per_device_train_batch_size: int = 64
    reward_model_path: str = ""
    """The judge; the critic starts from it too, where there is one."""
    total_episodes: int = 0
    """Episodes of the run, where `max_steps` is not given; 0: by epochs over the prompts."""
    num_train_epochs: float = 1.0
    num_ppo_epochs: int = 4
    """Passes over each batch of episodes."""
    num_mini_batches: int = 1
    """Optimiser steps per pass."""
    response_length: int = 53
    """Tokens of a response at most; the tokens of a reset count."""
    temperature: float = 0.7
    """Divides the logits when sampling and in every log-prob of the run."""
    rollout_batch_size: int = 64
    """Episodes that are generated side by side."""
    missing_eos_penalty: float | None = None
    """Subtracted from the score of a response that did not end (TRL)."""
    missing_eos_score: float | None = None
    """Replaces the score of a response that did not end (the DR-PO paper: -1)."""
    kl_coef: float = 0.05
    """Nats to reward: each token earns -kl_coef * log(policy / reference)."""
    cliprange: float = 0.2
    """The ratio is clipped to 1 - cliprange .. 1 + cliprange."""
    cliprange_value: float = 0.2
    """The value moves this far from its value at sampling time, at most."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    value_learning_rate: float | None = None
    """The critic's; null: `learning_rate`."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """GAE's lambda."""
    advantage_estimator: Literal["gae", "rloo", "grpo"] = "gae"
    """gae needs a critic. The others have none and give every token the advantage of its episode among the
    `reset_group_size` that start where it does: rloo its return minus the mean of the others', grpo minus the mean of
    all, over their standard deviation."""
    whiten_rewards: bool = False
    """Divide rewards by their standard deviation over the batch; the mean stays."""
    reset_prob: float = 0.0
    """Share of episodes that start inside a dataset response; 0 is PPO."""
    reset_min: int = 1
    """Fewest tokens of a reset: 1 as published, 0 so that the initial state is among the reset states."""
    reset_source: Literal["reference", "chosen", "both", "sample"] = "reference"
    """Which response is copied from. both: one of the two, with equal probability. sample: one that the frozen
    reference policy writes to the prompt, at `temperature` (PPO++)."""
    reset_curriculum: float = 0.0
    """Share of the run over which resets move from the end of a response to its beginning: k is uniform on {m, ..., L -
    1}, and m falls linearly from L - 1 to `reset_min`. 0: m is `reset_min` throughout, as published."""
    reset_group_size: int = 1
    """Episodes per prompt of a batch, which has that many times fewer prompts."""
    reset_group: Literal["point", "response"] = "point"
    """Where they start: all at one reset point, or each at a point of its own in one response."""
    share_trunks: bool = True
    """Compute the prefixes of a group once, its episodes hanging on them; the same numbers with fewer tokens."""
    compat: Literal["fixed", "reference"] = "fixed"
    """fixed: an episode is its sampled tokens up to the EOS. reference: what the authors' released code does:
    sampling goes on past the EOS, and KL, values and whitening include the reset tokens and what follows the EOS."""
    num_sample_generations: int = 10
    """Times per run that samples are written to samples.jsonl; 0 is never."""

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        _at_least(self, 1, "num_ppo_epochs", "num_mini_batches", "response_length", "rollout_batch_size")
        _at_least(self, 1, "reset_group_size")
        _at_least(self, 0, "kl_coef", "vf_coef", "total_episodes", "num_sample_generations")
        _above_0(self, "temperature", "cliprange", "cliprange_value")
        if self.value_learning_rate is not None:
            _above_0(self, "value_learning_rate")
        if self.missing_eos_penalty is not None:
            _at_least(self, 0, "missing_eos_penalty")
        for name in ("gamma", "lam", "reset_prob", "reset_curriculum"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in 0..1")
        require(self.reset_min in (0, 1), "reset_min", self.reset_min, "0 or 1")
        require(
            self.missing_eos_penalty is None or self.missing_eos_score is None,
            "missing_eos_penalty",
            self.missing_eos_penalty,
            "null where missing_eos_score is given: one subtracts, the other replaces",
        )
        require(
            self.batch_size % self.reset_group_size == 0,
            "reset_group_size",
            self.reset_group_size,
            f"a divisor of the batch of {self.batch_size} episodes",
        )
        if self.advantage_estimator != "gae":
            because = f"with advantage_estimator {self.advantage_estimator}"
            size, start, compat = self.reset_group_size, self.reset_group, self.compat
            require(size >= 2, "reset_group_size", size, f"at least 2 {because}, which compares episodes")
            require(start == "point", "reset_group", start, f"point {because}, which compares episodes of one state")
            require(self.gamma == 1, "gamma", self.gamma, f"1 {because}, which knows whole episodes only")
            require(compat == "fixed", "compat", compat, f"fixed {because}: the authors' code has a critic")
        groups = self.batch_size // self.reset_group_size
        require(
            groups % self.num_mini_batches == 0,
            "num_mini_batches",
            self.num_mini_batches,
            f"a divisor of the batch of {groups} {'episodes' if groups == self.batch_size else 'groups of episodes'}",
        )
        require(self.response_length < self.max_length, "response_length", self.response_length, "below max_length")


@dataclass(frozen=True, kw_only=True)
class DRPOConfig(PPOConfig):
    """PPO from reset states, with the paper's settings (Chang et al. 2024, arXiv 2404.08495, Table 5)."""

    reset_prob: float = 1.0
    missing_eos_score: float | None = -1.0
    whiten_rewards: bool = True
    adam_epsilon: float = 1e-5


@dataclass(frozen=True, kw_only=True)
class EvalConfig(TrainConfig):
    """Win rates of models against the responses of a dataset, or against each other, judged by a reward model."""

    models: tuple[str, ...] = ()
    """Folders or hub names of policies."""
    reward_model_path: str = ""
    """The judge."""
    opponent: str = "reference"
    """What they are compared with: a column (reference, chosen, rejected) or one of `models`."""
    response_length: int = 53
    """Tokens of a response at most."""
    temperature: float = 0.7
    """Of sampling; 0 takes the likeliest token."""
    rollout_batch_size: int = 64
    """Responses that are generated side by side."""
    num_eval_examples: int = 500

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        _at_least(self, 1, "response_length", "rollout_batch_size")
        _at_least(self, 0, "temperature")
        require(self.response_length < self.max_length, "response_length", self.response_length, "below max_length")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The whole chain on the embedded task: SFT, reward model, DPO, PPO, DR-PO, evaluation."""

    out: str = "runs/demo"
    """Folder of the run; it must not hold one already."""
    seed: int = 0
    """Of the data, the weights and every sample."""
    methods: str = "sft,reward,dpo,ppo,drpo"
    """Which stages run, separated by commas, or "all"."""
    num_eval: int = 600
    """Held-out posts the methods are judged on."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "num_eval")
        _at_least(self, 0, "seed")


def require(ok: bool, name: str, value: object, rule: str) -> None:
    """Raises ValueError naming the field, its value and the rule it breaks."""
    if not ok:
        raise ValueError(f"{name}: must be {rule}; got {value!r}")


def _at_least(config: object, least: int, *names: str) -> None:
    for name in names:
        require(getattr(config, name) >= least, name, getattr(config, name), f"at least {least}")


def _above_0(config: object, *names: str) -> None:
    for name in names:
        require(getattr(config, name) > 0, name, getattr(config, name), "above 0")


def _check_choices(config: object) -> None:
    """What dataclasses leave unchecked: a Literal field holds one of its values, and every number is finite."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal:
            require(value in get_args(hint), name, value, f"one of {', '.join(map(str, get_args(hint)))}")
        require(not isinstance(value, float) or math.isfinite(value), name, value, "finite")


def parse_columns(columns: str) -> dict[str, str]:
    """ "prompt=question,chosen=better" -> {"prompt": "question", "chosen": "better"}. Raises ValueError on another
    form."""
    pairs = [pair.partition("=") for pair in columns.split(",") if pair]
    for name, equals, column in pairs:
        if not equals or not column or name not in ("prompt", "chosen", "rejected", "reference"):
            raise ValueError(f"columns: {columns!r} must look like prompt=question,chosen=better,rejected=worse")
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
