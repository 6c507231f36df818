"""`fastrlhf demo`: runs all stages on the built-in task, with the ordinary trainers.

    SFT -> reward model -> DPO, PPO and DR-PO, each from the same SFT model -> judged on held-out posts

IPO, cDPO, RTO (with and without resets, with token rewards from the DPO model) and RLP (both variants, starting from
the reward model and the PPO policy) run only if `--methods` names them.

GRPO (`--methods grpo`) trains a policy from random weights on sums of two digits, with a reward for the right answer
(fastrlhf/data/arithmetic.py). It needs no other stage and is judged by the share of all sums that it gets right.

The gold judge of the task labels the preference pairs and scores the final policies; no trainer sees it. RLP-SPG groups
answers that state the same facts, so that its result does not depend on the quality of an NLI judge.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastrlhf.algorithms.dpo import train_dpo
from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.algorithms.reward_model import train_reward_model
from fastrlhf.algorithms.rlp import train_rlp
from fastrlhf.algorithms.sft import train_sft
from fastrlhf.config import (
    DemoConfig,
    DPOConfig,
    DRPOConfig,
    GRPOConfig,
    PPOConfig,
    RewardConfig,
    RLPConfig,
    RTOConfig,
    SFTConfig,
    require,
)
from fastrlhf.data import arithmetic
from fastrlhf.data.specials import special_ids
from fastrlhf.data.tokens import tokenize_examples
from fastrlhf.data.toy import MAX_SUMMARY_TOKENS, ToyTask, toy_model_config, toy_tokenizer
from fastrlhf.distributed.ranks import check_one_process
from fastrlhf.evaluation.completions import respond, response_kl
from fastrlhf.evaluation.equivalence import function_judge
from fastrlhf.evaluation.judges import reward_model_judge
from fastrlhf.evaluation.winrates import bootstrap_interval, compare, paired_difference
from fastrlhf.models.loading import load_policy, load_reward_model
from fastrlhf.report.report import write_report
from fastrlhf.runtime.checkpoint import check_output_dir, create_output_dir
from fastrlhf.runtime.result import TrainResult

STAGES = ("sft", "reward", "dpo", "ipo", "cdpo", "ppo", "drpo", "rto", "drpo+rto", "rlp-uml", "rlp-spg", "grpo")
"""Stages in the order in which they run; each starts from the results of earlier ones."""

NUM_SUM_UPDATES = 100
"""Number of updates of GRPO on sums."""

TEMPERATURE = 1.0
"""Sampling temperature, both in training and in the final evaluation."""

NUM_SFT, NUM_PAIRS, NUM_PROMPTS, NUM_ANSWERED = 14_000, 18_000, 8_000, 2_000
"""Numbers of rows: posts with a reference, preference pairs, prompts of the on-policy runs, and prompts that RLP
samples answers to."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Results of one policy on the held-out posts."""

    gold: np.ndarray
    """[n] gold reward of each response, in facts"""
    reference_gold: np.ndarray
    """[n] gold reward of each human-like reference, in facts"""
    score: float | None
    """Mean score of the reward model; None if no reward model was trained"""
    kl: float
    """KL to the SFT model, nats per response"""
    mean_length: float
    """Mean length in tokens, including the EOS"""


def run_demo(config: DemoConfig, task: ToyTask | None = None) -> dict[str, Any]:
    """Runs the stages and returns the summary. Writes a folder per stage, summary.json and report.html.

    Raises ValueError, before training starts, for an unknown stage, for a stage that needs another one that is not in
    `methods`, and for a folder that already holds a run.
    """
    check_one_process("demo")
    stages = _stages(config.methods)
    task = task or ToyTask(seed=config.seed)
    check_output_dir(config.out)
    out = create_output_dir(config.out, config)
    toy_tokenizer().save_pretrained(out / "tokenizer")
    results: dict[str, TrainResult] = {}
    seconds: dict[str, float] = {}
    for name in stages:
        start = time.perf_counter()
        results[name] = run_stage(name, config, task, out)
        seconds[name] = time.perf_counter() - start

    start = time.perf_counter()
    judged = {name: judge_stage(config, task, out, name) for name in stages if name not in ("reward", "grpo")}
    summary = {
        "task": "toy",
        "seed": config.seed,
        "device": str(next(iter(results.values())).model.device),
        "evaluation_seconds": time.perf_counter() - start,
        "reward_model": results["reward"].final if "reward" in results else {},
        "rlp": {name: results[name].final for name in stages if name.startswith("rlp")},
        "methods": {
            name: judged_row(config.seed, name, judged, seconds[name], _tokens(results[name])) for name in judged
        },
    }
    if "grpo" in results:
        summary["methods"]["grpo"] = _sums_row(results["grpo"], seconds["grpo"])
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    write_report(out)
    return summary


def stage_config(
    name: str, config: DemoConfig, out: Path
) -> SFTConfig | RewardConfig | DPOConfig | PPOConfig | RLPConfig:
    """Returns the configuration of one stage, as for `fastrlhf NAME`."""
    shared: dict[str, Any] = {
        "output_dir": str(out / name),
        "tokenizer_name_or_path": str(out / "tokenizer"),
        "model_name_or_path": str(out / "sft"),
        "seed": config.seed,
        "max_length": 64,
        "micro_batch_tokens": 4096,
        "adam_beta2": 0.99,
        "per_device_train_batch_size": 64,
    }
    pairwise: dict[str, Any] = shared | {"max_steps": 120, "learning_rate": 3e-4, "warmup_steps": 10}
    on_policy: dict[str, Any] = shared | {
        "reward_model_path": str(out / "reward"),
        "max_steps": 40,
        "per_device_train_batch_size": 128,
        "learning_rate": 3e-4,
        "num_mini_batches": 2,
        "num_ppo_epochs": 2,
        "response_length": MAX_SUMMARY_TOKENS,
        "temperature": TEMPERATURE,
        "rollout_batch_size": 128,
        "kl_coef": 0.1,
        "adam_epsilon": 1e-8,
        "missing_eos_score": None,
        "missing_eos_penalty": 1.0,
        "whiten_rewards": False,
        "num_eval_examples": 128,
        "lr_scheduler_type": "linear",
    }
    token_rewards: dict[str, Any] = {"dpo_model_path": str(out / "dpo"), "dpo_reward_scale": 0.3}
    match name:
        case "sft":
            model = toy_model_config().to_diff_dict() | {"model_type": "llama"}
            return SFTConfig(
                **{**shared, "model_name_or_path": "", "model_config": json.dumps(model)},
                max_steps=220,
                learning_rate=2e-3,
                warmup_steps=20,
                lr_scheduler_type="cosine",
            )
        case "reward":
            return RewardConfig(
                **shared, max_steps=280, learning_rate=5e-4, warmup_steps=10, lr_scheduler_type="cosine"
            )
        case "dpo":
            return DPOConfig(**pairwise, beta=0.1)
        case "ipo":
            return DPOConfig(**pairwise, beta=0.02, loss_type="ipo", length_norm="sum")
        case "cdpo":
            return DPOConfig(**pairwise, beta=0.1, label_smoothing=0.1)
        case "ppo":
            return PPOConfig(**on_policy)
        case "grpo":
            arithmetic.tokenizer().save_pretrained(out / "arithmetic_tokenizer")
            model = arithmetic.model_config().to_diff_dict() | {"model_type": "llama"}
            return GRPOConfig(
                output_dir=str(out / name),
                tokenizer_name_or_path=str(out / "arithmetic_tokenizer"),
                model_config=json.dumps(model),
                reward_functions=("fastrlhf.data.arithmetic:right_sum",),
                seed=config.seed,
                max_steps=NUM_SUM_UPDATES,
                per_device_train_batch_size=256,
                rollout_batch_size=256,
                num_generations=16,
                response_length=1,
                max_length=8,
                learning_rate=3e-3,
                adam_beta2=0.99,
                eval_on_start=True,
            )
        case "rto":
            return RTOConfig(**on_policy | token_rewards)
        case "rlp-uml" | "rlp-spg":
            return RLPConfig(
                output_dir=str(out / name),
                seed=config.seed,
                refinement="uml" if name == "rlp-uml" else "spg",
                reward_model_path=str(out / "reward"),
                policy_path=str(out / "ppo"),
                num_answer_prompts=NUM_ANSWERED,
            )
        case _:
            # Episodes that start inside a response have fewer sampled tokens; more updates make up for it.
            both = token_rewards if name == "drpo+rto" else {}
            return DRPOConfig(**{**on_policy, "max_steps": 48, **both}, reset_prob=0.5, reset_min=0)


def format_summary(summary: Mapping[str, Any]) -> str:
    """Formats the table that the demo prints: one line per method, with 95 % intervals."""
    lines = ["method   win rate % vs reference  gold reward  minus SFT                RM score     KL  length  seconds"]
    for name, row in summary["methods"].items():
        if "accuracy" in row:
            continue
        gain = f"{row['minus_sft']:+.3f} {_interval(row['minus_sft_ci'], '+.3f')}" if "minus_sft" in row else ""
        win_rate = f"{100 * row['win_rate']:.1f} {_interval([100 * end for end in row['win_rate_ci']], '.1f')}"
        rm_score = "" if row["rm_score"] is None else f"{row['rm_score']:.3f}"
        lines.append(
            f"{name:8} {win_rate:23}  {row['gold_reward']:11.3f}  {gain:23}  {rm_score:>8} {row['kl']:6.2f} "
            f"{row['mean_length']:7.1f} {row['seconds']:8.0f}"
        )
    if sums := summary["methods"].get("grpo"):
        before, after = 100 * sums["accuracy_before"], 100 * sums["accuracy"]
        lines.append(
            f"grpo     sums of two digits, from random weights: {before:.0f} % right before, {after:.0f} % after "
            f"{NUM_SUM_UPDATES} updates ({sums['seconds']:.0f} seconds)"
        )
    return "\n".join(lines)


def _interval(ends: Sequence[float], form: str) -> str:
    low, high = ends
    return f"[{low:{form}}, {high:{form}}]"


def _stages(methods: Sequence[str]) -> list[str]:
    asked = set(STAGES if "all" in methods else methods)
    for name in sorted(asked - set(STAGES)):
        raise ValueError(f"methods: unknown method {name!r}; choose among {', '.join(STAGES)}, or all")
    rule = "a list with sft, from which every method except grpo starts"
    require("sft" in asked or asked == {"grpo"}, "methods", methods, rule)
    on_policy, by_token = asked & {"ppo", "drpo", "rto", "drpo+rto"}, asked & {"rto", "drpo+rto"}
    refits = asked & {"rlp-uml", "rlp-spg"}
    needs = (
        ("reward", on_policy, "judges"),
        ("dpo", by_token, "rewards the tokens of"),
        ("ppo", refits, "answers for"),
    )
    for needed, by, what in needs:
        require(needed in asked or not by, "methods", methods, f"with {needed}, which {what} {', '.join(sorted(by))}")
    return [name for name in STAGES if name in asked]


def run_stage(name: str, config: DemoConfig, task: ToyTask, out: Path) -> TrainResult:
    """Trains one stage into `out/name`, starting from the results of earlier stages there."""
    settings = stage_config(name, config, out)
    match settings:
        case SFTConfig():
            return train_sft(settings, task.examples("train", NUM_SFT), task.examples("validation", 256))
        case RewardConfig():
            return train_reward_model(
                settings, task.examples("preferences", NUM_PAIRS), task.examples("preferences_test", 512)
            )
        case DPOConfig():
            return train_dpo(settings, task.examples("preferences", NUM_PAIRS), task.examples("preferences_test", 512))
        case GRPOConfig():
            return train_ppo(settings, arithmetic.examples(), arithmetic.examples())
        case RLPConfig():
            reward, ppo = (stage_config(stage, config, out) for stage in ("reward", "ppo"))
            assert isinstance(reward, RewardConfig)
            assert isinstance(ppo, PPOConfig)
            return train_rlp(
                settings,
                reward,
                ppo,
                pairs=task.examples("preferences", NUM_PAIRS),
                eval_pairs=task.examples("preferences_test", 512),
                prompts=task.examples("train", NUM_PROMPTS),
                eval_prompts=task.examples("validation", 128),
                equivalence=function_judge(task.same_meaning),
                gold=task.gold_reward,
            )
        case _:
            return train_ppo(settings, task.examples("train", NUM_PROMPTS), task.examples("validation", 128))


def judge_stage(config: DemoConfig, task: ToyTask, out: Path, name: str) -> Judged:
    """Samples from the policy of stage `name` in `out` and scores the responses."""
    tokenizer = toy_tokenizer()
    eos, pad = special_ids(tokenizer)
    folder = out / name / "round-1" / "policy" if name.startswith("rlp") else out / name
    policy, sft = load_policy(str(folder)), load_policy(str(out / "sft"))
    examples = task.examples("test", config.num_eval)
    rollouts = respond(
        policy,
        tokenize_examples(examples, tokenizer, max_length=64, fields=()).examples,
        eos_token_id=eos,
        response_length=MAX_SUMMARY_TOKENS,
        temperature=TEMPERATURE,
        seed=config.seed,
        batch_size=config.num_eval,
    )
    texts = [str(tokenizer.decode(rollout.completion, skip_special_tokens=True)) for rollout in rollouts]
    score = None
    if (out / "reward").exists():
        judge = load_reward_model(str(out / "reward"), pad_token_id=pad, must_be_trained=True)
        score = reward_model_judge(judge, eos_token_id=eos, micro_batch_tokens=8192)(rollouts).mean().item()
    return Judged(
        gold=np.array([task.gold_reward(str(e.prompt), text) for e, text in zip(examples, texts, strict=True)]),
        reference_gold=np.array([task.gold_reward(str(e.prompt), str(e.reference)) for e in examples]),
        score=score,
        kl=response_kl(policy, sft, rollouts, temperature=TEMPERATURE, micro_batch_tokens=8192),
        mean_length=float(np.mean([len(rollout.completion) for rollout in rollouts])),
    )


def judged_row(seed: int, name: str, judged: Mapping[str, Judged], seconds: float, tokens: int) -> dict[str, Any]:
    """Returns the results of the method `name` for summary.json, with bootstrap intervals drawn with `seed`, and its
    difference to SFT."""
    own = judged[name]
    against = compare(own.gold, own.reference_gold, seed=seed)
    row = {
        "win_rate": against.win_rate,
        "win_rate_ci": against.win_rate_ci,
        "gold_reward": float(own.gold.mean()),
        "gold_reward_ci": bootstrap_interval(own.gold, seed=seed),
        "rm_score": own.score,
        "kl": own.kl,
        "mean_length": own.mean_length,
        "seconds": seconds,
        "tokens": tokens,
    }
    if name != "sft":
        row["minus_sft"], row["minus_sft_ci"] = paired_difference(own.gold, judged["sft"].gold, seed=seed)
    return row


def _sums_row(result: TrainResult, seconds: float) -> dict[str, Any]:
    """Returns the results of GRPO on sums: the share of all sums that the policy gets right with greedy decoding,
    before and after training."""
    return {
        "accuracy_before": result.initial["eval_greedy/scores"],
        "accuracy": result.final["eval_greedy/scores"],
        "seconds": seconds,
        "tokens": _tokens(result),
    }


def _tokens(result: TrainResult) -> int:
    return int(sum(row["num_tokens"] for row in result.history))
