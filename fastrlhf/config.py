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

COLUMNS = (
    *("prompt", "chosen", "rejected", "reference", "label_prob", "margin"),
    *("responses", "preferences", "scores", "wins", "num_labels"),
)
"""What `columns` may rename."""
PAIR_LOSSES = ("sigmoid", "ipo", "hinge", "robust", "sft")


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
    center_rewards_coefficient: float = 0.0
    """Times (score of chosen + score of rejected)^2 is added to the loss, so that scores centre on 0 (Eisenstein et
    al. 2023, arXiv 2312.09244, eq. 2); TRL advises 0.01."""
    margin_scale: float = 0.0
    """Times the column `margin` is what the scores of a pair must differ by (Touvron et al. 2023, arXiv 2307.09288,
    eq. 2); 0 reads no such column."""
    share_prompts: bool = True
    """Compute the prompt of a pair once, both responses hanging on it; the same numbers with fewer tokens."""

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        _at_least(self, 0, "center_rewards_coefficient", "margin_scale")


@dataclass(frozen=True, kw_only=True)
class DPOConfig(TrainConfig):
    """Direct preference optimisation, and IPO by `loss_type`. `psi`, `psi_backend` and `label_source` make IPO the
    general PsiPO (Azar et al. 2023, arXiv 2310.12036), which sums log-ratios over a response."""

    learning_rate: float = 1e-6
    num_train_epochs: float = 1.0
    beta: float = 0.1
    """Strength of the tie to the reference; for ipo the paper's tau."""
    loss_type: str | tuple[str, ...] = "sigmoid"
    """sigmoid (DPO), ipo, hinge or robust; or several, added up, among them sft: minus the mean log-prob of a token of
    the chosen responses."""
    loss_weights: tuple[float, ...] = ()
    """Of each of several losses; empty: 1."""
    margin_scale: float = 0.0
    """Times the column `margin` is subtracted from beta times the difference of log-ratios (Amini et al. 2024, arXiv
    2402.10571); not for ipo. 0 reads no such column."""
    label_smoothing: float = 0.0
    """Share of pairs believed to be labelled the wrong way round (cDPO; robust needs it below 0.5)."""
    length_norm: Literal["auto", "sum", "mean", "pair_mean"] = "auto"
    """Of a response's log-ratio. auto: mean over tokens for ipo (as in TRL), else sum. The IPO paper is `sum`."""
    ref_model_name_or_path: str = ""
    """The reference; empty: the model before training."""
    precompute_ref_log_probs: bool = True
    """Compute the reference's log-probs once, before the first step, and keep no second model. False: at every step,
    from a copy."""
    ref_cache_dir: str = ""
    """Folder that keeps precomputed log-probs by a fingerprint of reference, tokens and dtype: the next run with the
    same ones loads no reference. Empty: they are not kept."""
    share_prompts: bool = True
    """Compute the prompt of a pair once, both responses hanging on it; the same numbers with fewer tokens."""
    psi: str = "identity"
    """What PsiPO does to the probability that a response is better: identity (IPO), logit (the optimum of RLHF),
    clipped_logit, or a non-decreasing function of yours, as module:function or file.py:function."""
    psi_clip: float = 3.0
    """Nats; of clipped_logit, for which no preference is surer than sigmoid(psi_clip), 0.953."""
    psi_backend: Literal["pairwise", "groupwise"] = "pairwise"
    """pairwise: pairs, for a psi that is odd about 1/2. groupwise: rows with a list of `responses`, drawn alike, and
    their `preferences` or `scores`; 2 per prompt are enough where psi is odd, 3 for any other."""
    label_source: Literal["data", "label_prob", "counts", "reward_model"] = "data"
    """Where probabilities of labels come from. data: chosen is better; of groups, `preferences`, or sigmoid of
    differences of `scores`. label_prob: the column of that name. counts: the columns wins and num_labels. reward_model:
    sigmoid of differences of its scores. Not for hinge and robust."""
    label_prior: float = 0.5
    """Of counts: the probability is (label_prior + wins) / (2 label_prior + num_labels)."""
    score_scale: float = 1.0
    """Multiplies scores before the sigmoid: how many nats one point of a rating is worth."""
    reward_model_path: str = ""
    """The reward model of label_source; it scores every response once, before training."""

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        _above_0(self, "beta", "psi_clip", "score_scale")
        _at_least(self, 0, "margin_scale", "label_prior")
        require(0 <= self.label_smoothing < 0.5, "label_smoothing", self.label_smoothing, "at least 0 and below 0.5")
        losses, weights = self.losses, self.loss_weights
        require(bool({*losses} - {"sft"}), "loss_type", self.loss_type, "at least one loss on pairs")
        require({*losses} <= {*PAIR_LOSSES}, "loss_type", self.loss_type, f"of {', '.join(PAIR_LOSSES)}")
        require(len({*losses}) == len(losses), "loss_type", losses, "without repeats")
        require(len(weights) in (0, len(losses)), "loss_weights", weights, f"{len(losses)} numbers, one per loss_type")
        require(all(weight > 0 for weight in weights), "loss_weights", weights, "above 0")
        smooth, soft = self.label_smoothing > 0, self.label_source != "data"
        if "hinge" in losses:
            require(not smooth, "label_smoothing", self.label_smoothing, "0 where loss_type is hinge")
        if soft:
            hard = {"hinge", "robust"} & {*losses}
            require(not hard, "label_source", self.label_source, "data for hinge and robust")
            require(not smooth, "label_smoothing", self.label_smoothing, "0 where label_source is not data")
        judged, path = self.label_source == "reward_model", self.reward_model_path
        require(
            bool(path) == judged, "reward_model_path", path, "given where label_source is reward_model, and only there"
        )
        self._check_psi()
        if "ipo" in losses:
            require(not self.margin_scale, "margin_scale", self.margin_scale, "0 where loss_type is ipo")
        cache = self.ref_cache_dir
        require(
            not cache or self.precompute_ref_log_probs, "ref_cache_dir", cache, "empty where nothing is precomputed"
        )

    @property
    def losses(self) -> tuple[str, ...]:
        return (self.loss_type,) if isinstance(self.loss_type, str) else self.loss_type

    def _check_psi(self) -> None:
        groups = self.psi_backend == "groupwise"
        if groups or self.psi != "identity":
            because = "where psi_backend is groupwise" if groups else "where psi is not identity"
            require(self.losses == ("ipo",), "loss_type", self.loss_type, f"ipo {because}")
            require(self.length_norm in ("auto", "sum"), "length_norm", self.length_norm, f"auto or sum {because}")
            require(not self.label_smoothing, "label_smoothing", self.label_smoothing, f"0 {because}")
        if groups:
            sources = ("data", "reward_model")
            require(self.label_source in sources, "label_source", self.label_source, f"data or reward_model {because}")


@dataclass(frozen=True, kw_only=True)
class PPOConfig(TrainConfig):
    """PPO with a critic, DR-PO by `reset_prob`, RTO by `dpo_model_path`, and any mix of them. `model_name_or_path` is
    the SFT model, which is also the reference."""

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
    """Nats to reward: each token earns -kl_coef * log(policy / reference). RTO's beta2."""
    score_coef: float = 1.0
    """Weight of the judge's score. RTO's beta3 (arXiv 2404.18922, eq. 4.7)."""
    score_norm: Literal["none", "running"] = "none"
    """Of the score, before its weight. running: minus the mean of all scores of the run so far, over their standard
    deviation."""
    score_clip: float = 0.0
    """Scores are clipped to +-score_clip, after score_norm; 0 is off."""
    dpo_model_path: str = ""
    """A model trained by DPO or IPO that rewards every token by log(it / its reference) at temperature 1: RTO's r_DPO.
    Empty: no such reward."""
    dpo_ref_model_path: str = ""
    """The reference of its training; empty: `model_name_or_path`."""
    dpo_reward_scale: float = 0.05
    """Reward per nat of that log-ratio, the DPO beta included; negative is allowed. RTO's beta1."""
    dpo_reward_clip: float = 0.0
    """Each token's DPO reward is clipped to +-dpo_reward_clip, after the scale; 0 is off (the authors' code: 0.05)."""
    reward_shaping: Literal["token", "sentence", "eos", "rs", "none"] = "token"
    """Where the DPO rewards are paid: at each token, at ends of sentences (. ! ? or a new line), at the end of the
    response, at each token and taken back at the end (rs), nowhere."""
    length_coef: float = 0.0
    """Each sampled token costs this much."""
    reward_function: str = ""
    """One more reward: "module:function" or "file.py:function" of a Rollout, giving a number, or one per token."""
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
        _at_least(self, 0, "score_coef", "score_clip", "dpo_reward_clip", "length_coef")
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
        require(
            not self.dpo_ref_model_path or bool(self.dpo_model_path),
            "dpo_ref_model_path",
            self.dpo_ref_model_path,
            "empty where there is no dpo_model_path",
        )


@dataclass(frozen=True, kw_only=True)
class DRPOConfig(PPOConfig):
    """PPO from reset states, with the paper's settings (Chang et al. 2024, arXiv 2404.08495, Table 5)."""

    reset_prob: float = 1.0
    missing_eos_score: float | None = -1.0
    whiten_rewards: bool = True
    adam_epsilon: float = 1e-5


@dataclass(frozen=True, kw_only=True)
class RTOConfig(PPOConfig):
    """PPO on token rewards of a DPO model, with the paper's settings (Zhong et al. 2024, arXiv 2404.18922, App. D)."""

    kl_coef: float = 0.01
    temperature: float = 1.0


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
    """Which stages run, separated by commas, among sft, reward, dpo, ipo, cdpo, ppo, drpo, rto, drpo+rto; or "all"."""
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
