"""Checks every recipe against the settings in its paper or released code. A recipe must mark every value that neither
source gives.
"""

import re
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastrlhf.config import DPOConfig, DRPOConfig, GRPOConfig, PPOConfig, RewardConfig, RLPConfig, RTOConfig, SFTConfig
from fastrlhf.config.command_line import parse
from fastrlhf.config.files import RECIPES, load_yaml

CONFIGS = {
    **{"sft": SFTConfig, "reward": RewardConfig, "dpo": DPOConfig, "ppo": PPOConfig},
    **{"grpo": GRPOConfig, "drpo": DRPOConfig, "rto": RTOConfig, "rlp": RLPConfig},
}
DRPO = "arXiv 2404.08495"
RTO = "arXiv 2404.18922"
DPO = "arXiv 2305.18290"
RLP = "arXiv 2403.19279"
PRIME = "released run_prime_main.sh"
FARM = "AlpacaFarm's scripts, which RLP leaves as they are"

ON_POLICY = {  # settings of both PPO and DR-PO in the DR-PO paper
    "learning_rate": (3e-6, f"{DRPO} Table 5"),
    "lr_scheduler_type": ("linear", f"{DRPO} Table 5"),
    "warmup_steps": (0, "released drpo.py"),
    "batch_size": (512, f"{DRPO} Table 5"),
    "total_episodes": (1_000_000, "released drpo.py; the paper says one epoch"),
    "num_ppo_epochs": (4, f"{DRPO} Table 5"),
    "num_mini_batches": (1, f"{DRPO} Table 5"),
    "response_length": (53, f"{DRPO} Table 5"),
    "temperature": (0.7, "released drpo.py; the paper says 0.1"),
    "kl_coef": (0.05, f"{DRPO} Table 5"),
    "kl_estimator": ("k1", "released drpo.py"),
    "kl_placement": ("reward", "released drpo.py"),
    "cliprange": (0.2, f"{DRPO} Table 5"),
    "cliprange_value": (0.2, f"{DRPO} Table 5"),
    "vf_coef": (0.1, f"{DRPO} Table 5"),
    "gamma": (1.0, f"{DRPO} Table 5"),
    "lam": (0.95, f"{DRPO} Table 5"),
    "whiten_rewards": (True, f"{DRPO} Table 5"),
    "missing_eos_score": (-1.0, f"{DRPO} Table 5"),
    "adam_epsilon": (1e-5, "released drpo.py"),
    "weight_decay": (0.01, "released drpo.py: AdamW's default"),
    "adam_beta2": (0.999, "released drpo.py: AdamW's default"),
    "seed": (555134, "released drpo.py"),
}
OFFLINE = {
    "batch_size": (64, f"{DRPO} Table 5"),
    "num_train_epochs": (1, f"{DRPO} Table 5"),
    "learning_rate": (3e-6, f"{DRPO} Table 5"),
    "lr_scheduler_type": ("linear", f"{DRPO} Table 5"),
}
ULTRAFEEDBACK = {  # settings of all stages of RTO
    "lr_scheduler_type": ("cosine", f"{RTO} App. D, which ends at a tenth of the peak"),
    "adam_beta1": (0.9, f"{RTO} App. D"),
    "adam_beta2": (0.95, f"{RTO} App. D"),
    "weight_decay": (0.0, f"{RTO} App. D"),
    "num_train_epochs": (1, f"{RTO} App. D"),
    "max_length": (2048, f"{RTO} App. D"),
    "max_grad_norm": (1.0, "released script"),
}
ANTHROPIC = {
    "batch_size": (64, f"{DPO} App. B"),
    "warmup_steps": (150, f"{DPO} App. B"),
    "lr_scheduler_type": ("constant", "released config.yaml, which has no decay"),
    "max_grad_norm": (10.0, "released config.yaml"),
    "max_length": (512, "released config.yaml"),
    "num_train_epochs": (1, "released config.yaml"),
}
PAPERS: dict[str, dict[str, dict[str, tuple[Any, str]]]] = {
    "drpo_tldr": {
        "sft": OFFLINE | {"completion_only_loss": (False, "released sft.py")},
        "reward": OFFLINE | {"max_length": (638, "released rm.py"), "adam_epsilon": (1e-5, "released rm.py")},
        "dpo": OFFLINE | {"beta": (0.05, f"{DRPO} Table 5"), "max_length": (638, "released dpo.py")},
        "drpo": ON_POLICY
        | {
            "reset_prob": (1.0, f"{DRPO} section 6.2"),
            "reset_min": (1, "released drpo.py"),
            "reset_source": ("reference", f"{DRPO} section 6"),
            "max_length": (565, "released drpo.py: 512 and 53"),
        },
        "ppo": ON_POLICY | {"reset_prob": (0.0, f"{DRPO} section 4")},
    },
    "rto_ultrafeedback": {
        "reward": ULTRAFEEDBACK | {"batch_size": (128, f"{RTO} App. D"), "learning_rate": (1e-6, f"{RTO} App. D")},
        "dpo": ULTRAFEEDBACK
        | {
            "batch_size": (256, f"{RTO} App. D"),
            "learning_rate": (5e-7, f"{RTO} App. D"),
            "beta": (0.1, f"{RTO} App. D"),
        },
        "rto": ULTRAFEEDBACK
        | {
            "batch_size": (1024, f"{RTO} App. D: 8 steps of 128 per rollout"),
            "num_mini_batches": (8, f"{RTO} App. D"),
            "num_ppo_epochs": (1, f"{RTO} App. D"),
            "response_length": (1024, f"{RTO} App. D"),
            "learning_rate": (5e-7, f"{RTO} App. D"),
            "value_learning_rate": (9e-6, f"{RTO} App. D"),
            "kl_coef": (0.01, f"{RTO} App. D: beta2"),
            "kl_estimator": ("k1", "released code"),
            "dpo_reward_scale": (0.05, f"{RTO} App. D: beta1"),
            "dpo_reward_clip": (0.05, "released script"),
            "score_coef": (1.0, f"{RTO} App. D: beta3"),
            "score_clip": (10.0, "released code"),
            "reward_shaping": ("token", f"{RTO} eq. 4.7"),
            "loss_aggregation": ("sequence", "released code: over tokens of a sequence, then over sequences"),
            "temperature": (1.0, "released script"),
            "cliprange": (0.2, f"{RTO} App. D"),
            "cliprange_value": (0.2, "released code"),
            "gamma": (1.0, "released code"),
            "lam": (0.95, f"{RTO} App. D"),
            "entropy_coef": (0.0, "released code"),
        },
    },
    "dpo_ultrafeedback": {
        "dpo": {name: value for name, value in ULTRAFEEDBACK.items() if name != "max_grad_norm"}
        | {
            "batch_size": (256, f"{RTO} App. D"),
            "learning_rate": (5e-7, f"{RTO} App. D"),
            "beta": (0.1, f"{RTO} App. D"),
        }
    },
    "dpo_hh": {
        "sft": ANTHROPIC,
        "dpo": ANTHROPIC | {"beta": (0.1, f"{DPO} App. B"), "learning_rate": (1e-6, f"{DPO} App. B")},
    },
    "prime_gsm8k": {
        "grpo": {
            "batch_size": (1024, f"{PRIME}: train_batch_size 256 prompts, n_samples 4"),
            "num_generations": (4, f"{PRIME}: n_samples"),
            "num_mini_batches": (4, f"{PRIME}: ppo_mini_batch_size 256"),
            "num_ppo_epochs": (1, f"{PRIME}: ppo_epochs, by default"),
            "num_train_epochs": (1, f"{PRIME}: total_epochs"),
            "learning_rate": (5e-7, f"{PRIME}: actor.optim.lr"),
            "lr_scheduler_type": ("constant", f"{PRIME}: warmup_style, by default"),
            "warmup_steps": (0, f"{PRIME}: lr_warmup_steps_ratio, by default"),
            "response_length": (3072, f"{PRIME}: max_response_length"),
            "max_length": (4096, f"{PRIME}: max_prompt_length 1024 and max_response_length 3072"),
            "temperature": (1.0, f"{PRIME}: rollout.temperature, by default"),
            "kl_coef": (0.0, f"{PRIME}: kl_ctrl.kl_coef"),
            "entropy_coef": (0.0, f"{PRIME}: entropy_coeff"),
            "loss_type": ("ppo", f"{PRIME}: the clipped loss, averaged over tokens"),
            "cliprange": (0.2, f"{PRIME}: clip_ratio, by default"),
            "gamma": (1.0, f"{PRIME}: verifier_gamma, reward_model_gamma"),
            "dpo_refine": ("outcome", f"{PRIME}: prime_model.update"),
            "dpo_refine_beta": (0.05, f"{PRIME}: prime_model.beta_train"),
            "dpo_refine_learning_rate": (1e-6, f"{PRIME}: prime_model.optim.lr"),
            "dpo_reward_norm": ("batch", f"{PRIME}: prime_norm, by default"),
            "dpo_reward_scale": (1.0, "the released RLOO, which weighs its sources alike"),
            "reward_shaping": ("token", f"{PRIME}: prime_granularity"),
            "advantage_estimator": ("prime", f"{PRIME}: adv_estimator rloo"),
        },
    },
    "rlp_alpacafarm": {
        "sft": {
            "batch_size": (128, FARM),
            "num_train_epochs": (3, FARM),
            "learning_rate": (2e-5, FARM),
            "lr_scheduler_type": ("cosine", FARM),
            "max_length": (512, FARM),
            "weight_decay": (0.0, FARM),
        },
        "reward": {
            "batch_size": (16, FARM),
            "num_train_epochs": (1, FARM),
            "learning_rate": (3e-6, FARM),
            "lr_scheduler_type": ("cosine", FARM),
            "weight_decay": (0.0, FARM),
        },
        "ppo": {
            "batch_size": (512, FARM),
            "num_mini_batches": (2, FARM),
            "num_ppo_epochs": (2, FARM),
            "learning_rate": (1e-5, FARM),
            "warmup_steps": (5, FARM),
            "response_length": (300, FARM),
            "temperature": (1.0, FARM),
            "adam_epsilon": (1e-5, FARM),
            "whiten_rewards": (True, FARM),
            "kl_coef": (0.0067, FARM),
            "cliprange": (0.2, FARM),
            "cliprange_value": (0.2, FARM),
            "vf_coef": (0.1, FARM),
            "gamma": (1.0, FARM),
            "lam": (1.0, FARM),
        },
        "rlp": {
            "num_answers": (10, f"{RLP} section 5"),
            "answer_temperature": (1.0, f"{RLP} section 5.3"),
            "mib_weight": (0.5, f"{RLP} section 5: lambda"),
            "min_confidence": (0.5, f"{RLP} section 5: gamma"),
        },
    },
}
NO_SETTING = {  # keys that need no source: names, paths, logging, and how a step is split to fit a machine
    *("output_dir", "model_name_or_path", "tokenizer_name_or_path", "reward_model_path", "dpo_model_path", "run_first"),
    *("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "columns", "chat_template"),
    *("num_eval_examples", "eval_steps", "ref_cache_dir", "dtype", "response", "seed", "truncation_mode", "policy"),
    *("refinement", "rounds", "equivalence", "num_answer_prompts", "max_steps"),
    *("per_device_train_batch_size", "train_batch_size", "gradient_accumulation_steps"),  # they give batch_size
}
SECTIONS = [(recipe, section) for recipe, sections in PAPERS.items() for section in sections]


@pytest.mark.parametrize(("recipe", "section"), SECTIONS)
def test_a_recipe_has_the_papers_value_of_every_key(recipe: str, section: str, monkeypatch):
    monkeypatch.setenv("FASTRLHF_DATA", "data")
    config = parse(CONFIGS[section], ["--config", recipe], section)
    for key, (value, source) in PAPERS[recipe][section].items():
        assert getattr(config, key) == value, f"{key}: {source}"


@pytest.mark.parametrize(("recipe", "section"), SECTIONS)
def test_a_setting_that_no_paper_has_is_marked(recipe: str, section: str):
    """A mark is the comment `# ours`, or a comment that gives the source of the value."""
    text = Path(RECIPES, f"{recipe}.yaml").read_text(encoding="utf-8").splitlines()
    start = text.index(f"{section}:")
    lines = list(takewhile(lambda line: not re.match(r"\w", line), text[start + 1 :]))
    stated = {*PAPERS[recipe][section], *NO_SETTING}
    given = yaml.safe_load("\n".join(lines))
    assert given.keys() == (load_yaml(recipe)[section] or {}).keys()
    for line in lines:
        if match := re.match(r"  (\w+):", line):
            assert match[1] in stated or "#" in line, f"{recipe}, {section}: {match[1]} is neither a paper's nor marked"
