"""The groups of keys in `--help`. Every key of every command belongs to exactly one group."""

from __future__ import annotations

GROUPS: dict[str, tuple[str, ...]] = {
    "Run": ("output_dir", "out", "seed", "device", "methods"),
    "Model": (
        *(
            "model_name_or_path",
            "models",
            "adapter",
            "adapters",
            "adapter_weights",
            "model_config",
            "tokenizer_name_or_path",
            "eos_token",
            "chat_template",
        ),
        *("chat_template_kwargs", "template_date", "trust_remote_code", "dtype"),
    ),
    "Data": (
        *("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "max_train_examples"),
        *("columns", "system_prompt", "response", "max_length", "truncation_mode", "trailing_space"),
        *("max_bad_fraction", "max_dropped_fraction", "dataset_num_proc", "dataset_cache_dir", "clear"),
    ),
    "Batch and steps": (
        *("per_device_train_batch_size", "train_batch_size", "gradient_accumulation_steps"),
        *("num_train_epochs", "max_steps"),
        *("total_episodes", "num_ppo_epochs", "num_mini_batches"),
    ),
    "Optimiser": (
        *("learning_rate", "value_learning_rate", "head_learning_rate", "lr_scheduler_type"),
        *("lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "value_warmup_steps"),
        *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "optim", "master_weights"),
    ),
    "LoRA": (
        *("use_peft", "lora_r", "lora_alpha", "lora_target_modules", "lora_target_parameters"),
        *("lora_modules_to_save", "use_rslora", "use_dora", "load_in_4bit", "merged_dtype", "max_merge_shift"),
    ),
    "Loss": (
        *("completion_only_loss", "train_on", "train_suffix"),
        *(
            "beta",
            "desirable_weight",
            "undesirable_weight",
            "balance_weights",
            "loss_type",
            "loss_weights",
            "simpo_gamma",
            "margin_scale",
            "label_smoothing",
        ),
        *("length_norm", "center_rewards_coefficient", "router_aux_loss_coef"),
        *("cliprange", "cliprange_high", "dual_clip", "entropy_coef", "loss_aggregation", "target_kl"),
        *("mask_truncated_completions", "sampler_is_cap", "cliprange_value", "vf_coef"),
        *("update", "pair_loss", "pair_select", "pair_eta", "pair_beta"),
    ),
    "Labels and PsiPO": (
        *("label_source", "label_prior", "score_scale", "psi", "psi_clip", "psi_backend", "psi_opponents"),
    ),
    "Reference model": (*("ref_model_name_or_path", "reference_free", "precompute_ref_log_probs", "ref_cache_dir"),),
    "Sampling": (
        *("system", "response_length", "temperature", "temperatures", "top_k", "top_p", "min_p", "stop"),
        *("num_generations", "dynamic_sampling_factor", "rollout_batch_size", "engine", "decode"),
        *("vllm_gpu_memory_utilization", "vllm_devices", "vllm_enable_sleep_mode", "max_sampling_logp_difference"),
    ),
    "Rewards": (
        *("reward_model_path", "score_coef", "score_norm", "score_clip", "missing_eos_penalty", "missing_eos_score"),
        *("dpo_model_path", "dpo_ref_model_path", "dpo_reward_scale", "dpo_reward_norm", "dpo_reward_clip"),
        *("dpo_refine", "dpo_refine_beta", "dpo_refine_learning_rate"),
        *("reward_shaping", "length_coef", "reward_functions", "reward_weights", "reward_function_norm"),
        *("reward_function_clip", "reward_retries", "overlong_buffer", "overlong_penalty", "success_threshold"),
    ),
    "KL": ("kl_coef", "kl_placement", "kl_estimator", "kl_target", "kl_horizon", "max_kl"),
    "Advantages": (
        *("advantage_estimator", "scale_rewards", "critic_model_path", "gamma", "lam", "whiten_rewards"),
        *("truncation", "compat"),
    ),
    "Resets": (
        *("reset_prob", "reset_min", "reset_source", "reset_cut", "reset_band", "reset_curriculum", "reset_group"),
    ),
    "RLP": (
        *("policy", "refinement", "rounds", "refit_from", "policy_path", "num_answers", "answer_temperature"),
        *("num_answer_prompts", "min_reward_variance"),
    ),
    "RLP-UML": (
        *("mib_weight", "mib_loss", "mib_profile", "beta_start", "beta_end", "beta_ramp", "views_per_step"),
        *("view_negatives", "view_critic", "view_learning_rate", "view_width", "view_latent"),
    ),
    "RLP-SPG": (
        *("pairing", "min_confidence", "clustering", "early_reject", "num_calibration_prompts"),
        *("max_synthetic_pairs", "equivalence", "nli_side_tokens", "nli_batch_tokens"),
    ),
    "Memory and speed": (
        *("micro_batch_tokens", "share_prompts", "share_trunks", "activation_checkpointing", "activation_offloading"),
        *("ref_reward_offload", "attn_implementation", "torch_compile", "use_liger_kernel"),
    ),
    "Evaluation": (
        *("num_eval_examples", "num_eval", "eval_steps", "eval_on_start", "eval_reward_model_path", "opponent"),
        *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
        *("early_stopping_patience", "early_stopping_threshold", "num_sample_generations"),
    ),
    "Checkpoints": (
        *("save_steps", "save_total_limit", "disk_wait_minutes"),
        *("resume_from_checkpoint", "resume_changed_functions", "resume_weights_only"),
    ),
    "Hub": ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision"),
    "Logging": ("report_to", "run_name", "progress", "logging_steps", "callbacks", "profile_steps"),
}
"""Heading -> keys, in the order in which `--help` shows them."""
