"""The table of TRL's and transformers' keys and their counterparts here. Messages about unknown keys and the manual's
page for TRL users are both made from it.

The table covers every field of TRL 1.16's SFTConfig, DPOConfig, RewardConfig, GRPOConfig, ModelConfig and
ScriptArguments (transformers' TrainingArguments included), of the PPOConfig that TRL had until 1.12, and common names
of older releases and of other programs.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

Status = Literal["same", "other name", "always on", "always off", "not supported"]

TRL_CONFIGS = {
    "all": "transformers' TrainingArguments, which every TRL config extends",
    "model": "TRL's ModelConfig",
    "script": "TRL's ScriptArguments",
    "sft": "TRL's SFTConfig",
    "dpo": "TRL's DPOConfig",
    "kto": "TRL's KTOConfig",
    "reward": "TRL's RewardConfig",
    "grpo": "TRL's GRPOConfig",
    "ppo": "TRL's PPOConfig, until 1.12",
    "cpo": "TRL's CPOConfig and ORPOConfig, and its older DPOConfig",
    "older": "older releases of TRL and transformers, and other programs",
}
"""Short name -> the configuration class or release that has a key."""

READ_BY = {
    "dpo": ("dpo", "cpo"),
    "drpo": ("ppo", "grpo"),
    "rto": ("ppo", "grpo"),
    "ppo": ("ppo", "grpo"),
    "grpo": ("grpo", "ppo"),
}
"""Our command -> the TRL configs in which its keys are looked up, in this order. A command that is not listed is looked
up under its own name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key of TRL or transformers."""

    name: str
    configs: tuple[str, ...]
    """Configurations that have this key, by their names in TRL_CONFIGS."""
    status: Status
    ours: str = ""
    """The key (and value) to write here instead, if the status is `other name`."""
    note: str = ""
    """A remark on what differs, why the key is missing, or what to do: one line in lower case without a full stop."""


def _keys(status: Status, configs: str, names: str, note: str = "", ours: str = "") -> tuple[Key, ...]:
    return tuple(
        Key(name=name, configs=tuple(configs.split()), status=status, ours=ours, note=note) for name in names.split()
    )


def _same(configs: str, names: str, note: str = "") -> tuple[Key, ...]:
    return _keys("same", configs, names, note)


def _other(configs: str, name: str, ours: str, note: str = "") -> tuple[Key, ...]:
    return _keys("other name", configs, name, note, ours)


def _on(configs: str, names: str, note: str = "") -> tuple[Key, ...]:
    return _keys("always on", configs, names, note)


def _off(configs: str, names: str, note: str = "") -> tuple[Key, ...]:
    return _keys("always off", configs, names, note)


def _no(configs: str, names: str, note: str) -> tuple[Key, ...]:
    return _keys("not supported", configs, names, note)


KEYS: tuple[Key, ...] = (
    # Model and tokenizer
    *_same("model", "model_name_or_path attn_implementation use_peft lora_r lora_alpha lora_target_modules"),
    *_same("model", "lora_target_parameters lora_modules_to_save use_rslora use_dora load_in_4bit"),
    *_same("model", "dtype", "auto by default: bfloat16 on a GPU, float32 on a CPU"),
    *_same("model all sft dpo kto reward grpo", "trust_remote_code"),
    *_no("model", "model_revision", "download that revision and give its folder as model_name_or_path"),
    *_off("model", "lora_dropout", "log-probs of the same tokens must be reproducible"),
    *_on("model", "lora_task_type", "each command knows its task"),
    *_no("model", "load_in_8bit", "use load_in_4bit"),
    *_on("model", "bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage", "load_in_4bit uses nested nf4"),
    *_other(
        "sft dpo kto reward grpo", "model_init_kwargs", "model_config", "or the keys dtype and attn_implementation"
    ),
    *_other("sft reward", "chat_template_path", "chat_template"),
    *_same("sft reward", "eos_token"),
    *_off("sft dpo reward", "pad_token", "nothing is padded"),
    *_off("sft dpo kto reward grpo", "pad_to_multiple_of", "nothing is padded"),
    *_on("dpo kto reward grpo", "disable_dropout", "all dropout is off in every command"),
    *_same("sft dpo kto grpo", "router_aux_loss_coef", "null: the value in the model's configuration"),
    *_on("grpo", "cast_lm_head_to_fp32", "log-probs are computed in float32"),
    *_other("older", "torch_dtype", "dtype"),
    *_other("older", "model_id", "model_name_or_path"),
    *_other("older", "peft_config", "use_peft", "with lora_r, lora_alpha and lora_target_modules"),
    # Data
    *_same("script", "dataset_name dataset_config dataset_train_split"),
    *_same(
        "script", "dataset_test_split", "empty by default; num_eval_examples rows are held out of the training split"
    ),
    *_no("script", "dataset_streaming", "rows are tokenised before the first step; limit them by max_train_examples"),
    *_no("script", "ignore_bias_buffers", "it concerns buffers under DDP, which is not used"),
    *_other("sft", "dataset_text_field", "columns", "as columns: reference=NAME"),
    *_no("sft", "dataset_kwargs", "prepare the rows beforehand; `fastrlhf inspect` shows what the model sees"),
    *_same("sft dpo kto reward ppo", "dataset_num_proc", "0 by default: one process per available core"),
    *_same("sft dpo kto reward", "max_length"),
    *_same("sft dpo", "truncation_mode"),
    *_on("sft grpo", "shuffle_dataset", "each epoch is shuffled by seed"),
    *_on("sft", "packing packing_strategy eval_packing", "whole sequences share a pack of micro_batch_tokens tokens"),
    *_on("sft dpo", "padding_free"),
    *_same("sft", "completion_only_loss", "true by default, as TRL for prompt-completion rows"),
    *_other("sft", "assistant_only_loss", "train_on", "true is all_assistant; the default is last_assistant"),
    *_same("grpo", "chat_template_kwargs"),
    *_on("all", "remove_unused_columns", "each command reads the columns that it needs"),
    *_no("all", "label_names length_column_name", "columns have fixed names; rename them by `columns`"),
    *_off(
        "all", "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers", "rows are tokenised before"
    ),
    *_off("all", "dataloader_prefetch_factor dataloader_multiprocessing_context", "rows are tokenised before"),
    *_on("all", "dataloader_in_order"),
    *_off("all", "dataloader_drop_last", "the last batch of an epoch is completed by rows of the next"),
    *_on("all", "train_sampling_strategy", "each epoch is shuffled by seed; packing needs no grouping by length"),
    *_on("older", "group_by_length", "packs are made of sequences of any lengths"),
    *_other("all", "data_seed", "seed"),
    *_other("older", "max_seq_length", "max_length"),
    *_other(
        "older", "max_prompt_length", "max_length", "prompt and response together; truncation_mode says what is cut"
    ),
    *_no("older", "formatting_func", "write the rows in a known form; `columns` renames columns"),
    # Batch and steps
    *_same("all", "per_device_train_batch_size"),
    *_same("all", "gradient_accumulation_steps", "multiplies the batch; memory depends only on micro_batch_tokens"),
    *_same("all", "num_train_epochs max_steps"),
    *_on("all", "average_tokens_across_devices", "a loss is divided by the token count of the whole step"),
    *_other("all", "auto_find_batch_size", "micro_batch_tokens", "`fastrlhf plan` shows which size fits"),
    *_other("all", "per_device_eval_batch_size", "micro_batch_tokens", "evaluation uses packs of the same size"),
    *_other("older", "batch_size", "per_device_train_batch_size"),
    *_same("older", "train_batch_size", "the rows of a whole step, over all processes"),
    *_other("older", "num_epochs", "num_train_epochs"),
    # Optimiser
    *_same("all", "learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm warmup_steps"),
    *_same("all", "lr_scheduler_type", "all except reduce_lr_on_plateau and greedy; warm-up never starts at 0"),
    *_same("all", "lr_scheduler_kwargs", "a mapping in YAML, JSON in a flag"),
    *_same("all", "optim", "adamw_torch_fused, adamw_torch, adamw_8bit, adamw_bnb_8bit, paged_adamw_32bit or _8bit"),
    *_no(
        "all", "optim_args optim_target_modules", "AdamW is set by adam_beta1, adam_beta2, adam_epsilon, weight_decay"
    ),
    *_no("all", "label_smoothing_factor", "smoothing over tokens is not offered; DPO has label_smoothing"),
    *_no("all", "neftune_noise_alpha", "noise in embeddings would make log-probs random"),
    *_same("older", "warmup_ratio"),
    *_other("older", "lr", "learning_rate"),
    *_other("older", "optimizer", "optim"),
    # Precision, memory and speed
    *_other("all", "bf16", "dtype: bfloat16", "with float32 master weights"),
    *_no("all", "fp16", "use dtype: bfloat16, which needs no loss scaling"),
    *_other("all", "bf16_full_eval", "dtype: bfloat16", "evaluation runs in the dtype of the weights"),
    *_no("all", "fp16_full_eval", "evaluation runs in the dtype of the weights"),
    *_no("all", "tf32", "call torch.set_float32_matmul_precision in your own script"),
    *_same("all", "activation_checkpointing", "false by default"),
    *_other("all", "gradient_checkpointing", "activation_checkpointing", "the old name is understood"),
    *_on("all", "activation_checkpointing_kwargs gradient_checkpointing_kwargs", "non-reentrant"),
    *_same("sft dpo kto reward", "activation_offloading", "needs activation_checkpointing"),
    *_same("all", "torch_compile use_liger_kernel"),
    *_no("all", "torch_compile_backend torch_compile_mode", "torch_compile uses inductor with dynamic shapes"),
    *_no("all", "liger_kernel_config", "use_liger_kernel replaces RMSNorm, the gated MLP and rotary positions"),
    *_off("all", "use_cache", "training needs no cache; sampling always has one"),
    *_no("all", "torch_empty_cache_steps", "set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"),
    *_other("all", "use_cpu", "device: cpu"),
    *_other("older", "no_cuda", "device: cpu"),
    # Logging
    *_same("all", "report_to", "metrics.jsonl is always written; not all services are supported"),
    *_same(
        "all",
        "logging_steps",
        "steps between lines of progress if the output is not a terminal; metrics.jsonl has every step",
    ),
    *_same("all", "run_name output_dir"),
    *_on("all", "logging_strategy logging_first_step", "metrics.jsonl has a row per optimiser step"),
    *_off("all", "log_on_each_node logging_nan_inf_filter", "rank 0 logs numbers as they are"),
    *_on("all", "include_num_input_tokens_seen", "the metric num_tokens"),
    *_no("all", "log_level log_level_replica", "rank 0 logs; set levels by Python's logging module"),
    *_other("all", "disable_tqdm", "progress: false"),
    *_no("all", "project", "set the environment variable WANDB_PROJECT"),
    *_no("all", "trackio_space_id trackio_bucket_id trackio_static_space_id", "report to tensorboard or wandb"),
    *_other("older", "logging_dir", "output_dir", "TensorBoard's files lie in that folder"),
    # Evaluation
    *_other("all", "eval_strategy", "eval_steps", "0 evaluates at the end only"),
    *_other("older", "evaluation_strategy", "eval_steps", "0 evaluates at the end only"),
    *_same("all", "eval_steps eval_on_start"),
    *_no("all", "eval_delay", "evaluation starts at step eval_steps; eval_on_start adds step 0"),
    *_on("all", "prediction_loss_only eval_do_concat_batches", "evaluation keeps means of metrics"),
    *_off("all", "eval_use_gather_object eval_accumulation_steps", "evaluation keeps means of metrics"),
    *_no("all", "include_for_metrics batch_eval_metrics", "each command has fixed evaluation metrics"),
    *_off("all", "do_train do_eval do_predict", "the command says what to do; `fastrlhf eval` evaluates"),
    *_same("all", "load_best_model_at_end metric_for_best_model greater_is_better", "needs eval_steps, not save_steps"),
    *_same("older", "early_stopping_patience early_stopping_threshold", "of transformers' EarlyStoppingCallback"),
    # Checkpoints
    *_same("all", "save_steps", "0 by default: only the final model, and a checkpoint if the run is stopped"),
    *_same("all", "save_total_limit", "0 keeps all"),
    *_same("all", "resume_from_checkpoint", "auto (default) or never; the run in output_dir is resumed"),
    *_other("all", "save_strategy", "save_steps"),
    *_no(
        "all",
        "save_only_model",
        "a checkpoint holds all that resuming needs; only the final model is saved without the optimiser",
    ),
    *_on("all", "enable_jit_checkpoint", "SIGTERM and Ctrl-C save a checkpoint at the end of the step"),
    *_off("all", "save_on_each_node", "the first process writes"),
    *_on("all", "restore_callback_states_from_checkpoint", "a resumed run continues bit for bit"),
    *_off("all", "ignore_data_skip", "a resumed run continues at the row where it stopped"),
    *_other("older", "overwrite_output_dir", "output_dir", "give a new folder; finished runs are not overwritten"),
    *_on("older", "save_safetensors"),
    *_same("all ppo", "push_to_hub", "the final model and its card, at the end"),
    *_same("all", "hub_model_id hub_private_repo hub_revision"),
    *_no("all", "hub_token", "run `hf auth login` or set HF_TOKEN, so that no file of keys holds a secret"),
    *_no("all", "hub_strategy hub_always_push", "the final model is uploaded once, at the end of the run"),
    # Processes
    *_same("all", "seed"),
    *_on("all", "full_determinism", "random draws are keyed by seed and step; GPU kernels may still reorder sums"),
    *_no("all", "accelerator_config parallelism_config", "start several processes by torchrun; FSDP2 spreads weights"),
    *_on("all", "fsdp fsdp_config", "under torchrun FSDP2 spreads weights, gradients and moments over the processes"),
    *_no("all", "deepspeed", "start several processes by torchrun; FSDP2 spreads weights as ZeRO-3 does"),
    *_no("all", "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph", "no DDP: FSDP2"),
    *_no("all", "ddp_backend ddp_timeout", "nccl on GPUs and gloo on CPUs, with torch's default timeout"),
    *_on("all", "local_rank", "torchrun sets it"),
    *_on("ppo", "world_size", "torchrun sets it"),
    *_no("all", "debug", "a loss or gradient that is not finite stops the run"),
    *_no("all", "skip_memory_metrics", "`fastrlhf plan` shows the memory of every phase beforehand"),
    *_off("grpo ppo", "ds3_gather_for_generation", "DeepSpeed is not used"),
    # SFT, DPO and reward models
    *_no("sft", "loss_type", "SFT has one loss: minus the mean log-prob of the trained tokens"),
    *_same("dpo", "loss_type", "not exo_pair, nca_pair, bco_pair, sppo_hard, aot, discopop: give your own function"),
    *_same("dpo", "loss_weights label_smoothing beta"),
    *_same("dpo kto", "precompute_ref_log_probs", "true by default"),
    *_same("kto", "beta desirable_weight undesirable_weight"),
    *_no("kto", "loss_type", "the loss is that of KTO; apo_zero_unpaired is not offered"),
    *_other("dpo kto", "precompute_ref_batch_size", "micro_batch_tokens"),
    *_no("dpo", "ld_alpha", "LD-DPO is not offered; see length_norm"),
    *_no("dpo", "f_divergence_type f_alpha_divergence_coef", "the divergence is the reverse KL"),
    *_no("dpo", "use_weighting", "WPO is not offered"),
    *_no("dpo", "discopop_tau", "the loss type discopop is not offered"),
    *_no("dpo kto grpo", "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps", "the reference is never updated"),
    *_same("reward", "center_rewards_coefficient", "0 by default, which equals TRL's null"),
    *_other("older", "ref_model", "ref_model_name_or_path"),
    *_same("cpo", "reference_free"),
    *_same("cpo", "simpo_gamma", "with loss_type: simpo"),
    *_other("cpo", "cpo_alpha", "loss_weights", "the second of loss_type: cpo is the weight of the sft term"),
    *_other("older", "rpo_alpha", "loss_type", "write loss_type: [sigmoid, sft] and loss_weights"),
    *_other("older", "precompute_ref_log_prob", "precompute_ref_log_probs"),
    # On-policy
    *_same("grpo", "num_generations", "8 by default in grpo, 1 elsewhere"),
    *_no("grpo", "num_generations_eval", "evaluation samples one response per prompt"),
    *_other("grpo", "max_completion_length", "response_length", "understood as an alias"),
    *_other("older", "max_new_tokens", "response_length"),
    *_same("grpo ppo", "temperature", "0.7 by default in ppo"),
    *_other("grpo", "generation_batch_size", "train_batch_size", "number of episodes in one update"),
    *_other("grpo", "steps_per_generation", "num_mini_batches", "optimiser steps per pass over an update's episodes"),
    *_other("grpo", "num_iterations", "num_ppo_epochs"),
    *_other("grpo", "beta", "kl_coef", "TRL has kl_placement loss, kl_estimator k3; the gradient differs"),
    *_other("grpo", "epsilon", "cliprange"),
    *_other("grpo", "epsilon_high", "cliprange_high", "with loss_type cispo, TRL's value minus 1"),
    *_other("grpo", "delta", "dual_clip"),
    *_same("grpo", "entropy_coef"),
    *_no("grpo", "use_adaptive_entropy entropy_coef_min entropy_coef_max", "entropy_coef is fixed"),
    *_no("grpo", "entropy_coef_delta entropy_target", "entropy_coef is fixed"),
    *_same(
        "grpo", "loss_type", "grpo, dapo, bnpo, dr_grpo, cispo, gspo, or ppo; sapo, luspo and vespo are not offered"
    ),
    *_other("grpo", "importance_sampling_level", "loss_type", "gspo for sequence"),
    *_no("grpo", "sapo_temperature_neg sapo_temperature_pos", "the loss type sapo is not offered"),
    *_no("grpo", "vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg", "the loss type vespo is not offered"),
    *_same("grpo", "top_p top_k min_p", "log-probs are those of the truncated distribution; in TRL, of the whole one"),
    *_no("grpo", "repetition_penalty", "it depends on earlier tokens: log-probs of sampler and trainer would differ"),
    *_no("grpo", "generation_kwargs", "write temperature, top_k, top_p, min_p and stop as keys"),
    *_on("grpo", "cache_implementation", "sampling has its own static cache"),
    *_same("grpo", "reward_weights"),
    *_no("grpo", "multi_objective_aggregation", "rewards are summed"),
    *_same("grpo", "scale_rewards mask_truncated_completions"),
    *_no("grpo", "top_entropy_quantile", "all sampled tokens are trained"),
    *_no("grpo", "max_tool_calling_iterations", "episodes call no tools"),
    *_no("grpo", "off_policy_mask_threshold", "see target_kl and sampler_is_cap"),
    *_no("grpo", "use_bias_correction_kl", "kl_placement and kl_estimator determine the gradient of the KL"),
    *_on("grpo", "log_completions", "written to samples.jsonl, num_sample_generations times per run"),
    *_other("grpo", "num_completions_to_print", "num_sample_generations", "how often samples are written"),
    *_no("grpo", "log_multimodal", "only text models are supported"),
    *_off("grpo", "log_unique_prompts"),
    *_no("grpo", "log_completions_hub_repo", "samples are written to samples.jsonl"),
    *_other("grpo", "use_vllm", "engine: vllm"),
    *_on("grpo", "vllm_mode", "the run starts vLLM, in a process beside the trainer"),
    *_same("grpo", "vllm_gpu_memory_utilization vllm_enable_sleep_mode"),
    *_no("grpo", "vllm_server_base_url vllm_server_host vllm_server_port", "the run starts vLLM itself"),
    *_no("grpo", "vllm_server_timeout vllm_group_port", "the run starts vLLM itself"),
    *_other("grpo", "vllm_tensor_parallel_size", "vllm_devices", "one whole copy of the model on each"),
    *_on("grpo", "vllm_max_model_length", "max_length"),
    *_no("grpo", "vllm_model_impl vllm_structured_outputs_regex", "engine vllm has no further options"),
    *_other("grpo", "vllm_importance_sampling_correction", "sampler_is_cap", "null is off"),
    *_other("grpo", "vllm_importance_sampling_clip_max", "sampler_is_cap"),
    *_other("grpo", "vllm_importance_sampling_cap", "sampler_is_cap"),
    *_on("grpo", "vllm_importance_sampling_mode", "token_truncate"),
    *_no("grpo", "vllm_importance_sampling_clip_min", "ratios are truncated from above only"),
    *_no(
        "grpo", "use_transformers_continuous_batching transformers_continuous_batching_config", "see decode and engine"
    ),
    *_no("grpo", "use_transformers_paged", "see decode and engine"),
    *_same("ppo", "num_ppo_epochs num_mini_batches total_episodes response_length num_sample_generations"),
    *_same("ppo", "reward_model_path whiten_rewards kl_coef cliprange vf_coef cliprange_value gamma lam"),
    *_same("ppo", "missing_eos_penalty"),
    *_same("ppo", "kl_estimator", "k1 in the reward; k3 needs kl_placement: loss"),
    *_other("ppo", "local_rollout_forward_batch_size", "rollout_batch_size", "scoring is sized by micro_batch_tokens"),
    *_other("ppo", "sft_model_path", "model_name_or_path", "the policy and its reference start from it"),
    *_on("ppo", "stop_token", "an episode ends at the EOS token"),
    *_other("ppo", "stop_token_id", "eos_token"),
    *_other("ppo", "num_total_batches", "max_steps"),
    *_other("ppo", "micro_batch_size", "micro_batch_tokens"),
    *_other("ppo", "local_batch_size", "per_device_train_batch_size"),
    *_other("ppo", "mini_batch_size", "num_mini_batches"),
    *_other("ppo", "local_mini_batch_size", "num_mini_batches"),
    *_no("ppo", "model_adapter_name ref_adapter_name", "use_peft trains one adapter; the reference is without it"),
    *_other("older", "init_kl_coef", "kl_coef"),
    *_other("older", "num_sample_generation", "num_sample_generations"),
    *_other("older", "reward_funcs", "reward_functions", "understood as an alias"),
)

COMMANDS = {
    "rloo": "write grpo with advantage_estimator: rloo",
    "ipo": "write dpo with loss_type: ipo",
    **{name: f"write dpo with loss_type: {name}" for name in ("orpo", "cpo", "simpo")},
    **{name: f"{name.upper()} is not supported" for name in ("bco", "gkd")},
    "reward_model": "write reward",
    "rm": "write reward",
    "vllm-serve": "the run starts vLLM itself: engine: vllm",
    "env": "write doctor",
}
"""Commands and trainers of other programs -> what to do here. Only names that are not commands here are looked up."""


def find(name: str, command: str) -> Key | None:
    """Returns the row of a key of TRL or transformers, with the meaning that the key has for `command`; None if the
    table lacks the key."""
    rows = [key for key in KEYS if key.name == name]
    wanted = (*READ_BY.get(command, (command,)), "all", "model", "script", "older")
    return next((key for config in wanted for key in rows if config in key.configs), rows[0] if rows else None)


def explain(name: str, command: str, known: Collection[str], readers: Mapping[str, Collection[str]]) -> str:
    """Returns the text to append to "unknown key NAME": the name to write here, the commands that read the key, the
    most similar of the `known` keys, or nothing. `readers`: command -> its keys."""
    key = find(name, command)
    ours = name if key is None else first_name(key.ours) or name
    note = f" ({key.note})" if key and key.note else ""
    if key and key.status == "other name" and ours in known:
        return f"; here it is {key.ours}{note}"
    if key and key.status == "not supported":
        return f"; not supported: {key.note}"
    if key and key.status in ("always on", "always off"):
        return f"; {key.status}{note}: delete the key"
    if others := [other for other, keys in readers.items() if ours in keys]:
        spelled = "" if ours == name else f", as {ours}"
        return f"; it is a key of {', '.join(others)}{spelled}"
    return nearest(name, known)


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns "; did you mean 'x'?", or nothing if no known name is similar."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def first_name(ours: str) -> str:
    """Returns the key of "key: value"."""
    return ours.partition(":")[0]


def explain_command(name: str, commands: Iterable[str]) -> str:
    """Returns the text to append to "unknown command NAME"."""
    if name in COMMANDS:
        return f": {COMMANDS[name]}"
    return nearest(name, commands)


def rows(config: str) -> list[Key]:
    """Returns the rows for one TRL config, in the order of the table, each key once."""
    return [replace(key, configs=(config,)) for key in KEYS if config in key.configs]
