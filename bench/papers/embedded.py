"""RTO and DR-PO on the embedded task, smaller than the demo: which rewards, from which states, on how many prompts?

    granularity  RTO with its token rewards paid at every token, at the end of every fact, at the end, everywhere and
                 taken back at the end, nowhere (arXiv 2404.18922, section 5.2 and figure 4)
    prompts      RTO and PPO, one pass over few or many prompts (figure 4c there)
    resets       DR-PO by the share of episodes that are reset (arXiv 2404.08495, table 2), on the task of
                 `bench.resets` with the gold judge as reward, at about the same number of sampled tokens

SFT, reward and DPO model of a seed and task are made once, with the demo's settings; the arms of a seed share them. The
runs have the demo's settings too, but for half its episodes per update.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, decoders
from transformers import PreTrainedTokenizerFast

from bench.resets import SCALE, gold_judge, strict_task
from bench.results import append_row
from fastrlhf.algorithms.on_policy import train_on_policy
from fastrlhf.config import DemoConfig, PPOConfig
from fastrlhf.data.tokens import special_ids
from fastrlhf.data.toy import FACTS, ToyTask, toy_tokenizer
from fastrlhf.demo import NUM_PROMPTS, judge_stage, run_stage, stage_config
from fastrlhf.evaluation.judges import Judge, reward_model_judge
from fastrlhf.models.loading import load_reward_model
from fastrlhf.types import Rollout

EPISODES = 64
"""Of an update."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    paper: str
    experiment: str
    name: str
    method: str
    """A stage of the demo"""
    num_prompts: int = NUM_PROMPTS
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        return f"{self.experiment}_{self.name}".replace(" ", "_")


def _pass_over(method: str, num_prompts: int) -> Arm:
    return Arm(
        paper="rto",
        experiment="prompts",
        name=f"{method} {num_prompts}",
        method=method,
        num_prompts=num_prompts,
        settings={"max_steps": num_prompts // EPISODES},
    )


UPDATES = {0.0: 40, 0.25: 44, 0.5: 48, 0.75: 54, 1.0: 60}
"""By reset probability: an episode from inside a response samples fewer tokens."""
SHAPINGS = ("token", "sentence", "eos", "rs")
PROMPTS = (320, 640, 1280, 2560)
"""2560 is the whole run of 40 updates: the arms token and none of the granularity"""
GRANULARITY = [
    *(
        Arm(paper="rto", experiment="granularity", name=name, method="rto", settings={"reward_shaping": name})
        for name in SHAPINGS
    ),
    Arm(paper="rto", experiment="granularity", name="none", method="ppo"),
]
RESETS = [
    Arm(
        paper="drpo",
        experiment="resets",
        name=f"{prob:g}",
        method="drpo",
        settings={"reset_prob": prob, "max_steps": updates},
    )
    for prob, updates in UPDATES.items()
]
FEWER_PROMPTS = [_pass_over(method, num) for method, num in product(("rto", "ppo"), PROMPTS[:-1])]
ARMS = {"rto": [*GRANULARITY, *FEWER_PROMPTS], "drpo": RESETS}
"""By paper."""

Row = dict[str, Any]


def run_arms(paper: str, seeds: int, jobs: int, out: Path) -> dict[str, list[Row]]:
    """Trains what is not there yet under `out`, appends a row per new run, and returns the rows of each arm, by its
    folder's name, in the order of the seeds."""
    with ProcessPoolExecutor(jobs) as pool:
        list(pool.map(partial(_make_models, paper, out), range(seeds)))
        cases = list(product(ARMS[paper], range(seeds)))
        rows = list(pool.map(partial(_run_arm, out), *zip(*cases, strict=True)))
    found: dict[str, list[Row]] = {}
    for (arm, _), row in zip(cases, rows, strict=True):
        found.setdefault(arm.folder, []).append(row)
    return found


def _problem(paper: str, seed: int, out: Path) -> tuple[DemoConfig, ToyTask, Path]:
    folder = out / paper / f"seed-{seed}"
    task = ToyTask(seed=seed) if paper == "rto" else strict_task(seed)
    return DemoConfig(out=str(folder), seed=seed), task, folder


def _make_models(paper: str, out: Path, seed: int) -> None:
    torch.set_num_threads(1)
    config, task, folder = _problem(paper, seed, out)
    if not (folder / "tokenizer").exists():
        _sentence_tokenizer().save_pretrained(folder / "tokenizer")
    for stage in ("sft", "reward", "dpo") if paper == "rto" else ("sft", "reward"):
        if not (folder / stage / "config.json").exists():
            run_stage(stage, config, task, folder)


def _sentence_tokenizer() -> PreTrainedTokenizerFast:
    """The embedded task's, but a value is followed by a full stop when it is decoded: a fact is a sentence."""
    tokenizer = toy_tokenizer()
    values = "|".join(sorted(value for values in FACTS.values() for value in values))
    stop, space = decoders.Replace(Regex(rf"(?<=^(?:{values}))$"), "."), decoders.Replace(Regex("$"), " ")
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([stop, space])
    return tokenizer


def _run_arm(out: Path, arm: Arm, seed: int) -> Row:
    torch.set_num_threads(1)
    config, task, folder = _problem(arm.paper, seed, out)
    done = folder / arm.folder / "row.json"
    if not done.exists():
        row = {"bench": "papers", "paper": arm.paper, "experiment": arm.experiment, "arm": arm.name, "seed": seed}
        row |= _train(arm, config, task, folder)
        judged = judge_stage(config, task, folder, arm.folder)
        row |= {"gold_reward": float(judged.gold.mean()), "rm_score": judged.score, "kl": judged.kl}
        append_row(row | {"mean_length": judged.mean_length})
        done.write_text(json.dumps(row))
    return json.loads(done.read_text())


def _train(arm: Arm, config: DemoConfig, task: ToyTask, folder: Path) -> Row:
    """The run's size and its curves: means over the sampled responses of each update, of the score in training and of
    the gold reward in facts."""
    settings = stage_config(arm.method, config, folder)
    assert isinstance(settings, PPOConfig)
    settings = replace(
        settings,
        **{"output_dir": str(folder / arm.folder), "per_device_train_batch_size": EPISODES, "progress": False},
        **{"rollout_batch_size": EPISODES, "num_eval_examples": 0, "num_sample_generations": 1, **arm.settings},
    )
    careful = replace(task, min_haste=0.0, max_haste=0.2) if arm.paper == "drpo" else task
    gold: list[float] = []
    judge = _recorded(partial(gold_judge, task) if arm.paper == "drpo" else _learned_judge(folder), task, gold)
    result = train_on_policy(settings, careful.examples("train", arm.num_prompts), judge=judge)
    return {
        "updates": len(result.history),
        "episodes_per_update": EPISODES,
        "tokens": int(sum(row["num_tokens"] for row in result.history)),
        "score_curve": [round(row["objective/scores"], 4) for row in result.history],
        "gold_curve": [round(value, 4) for value in gold],
    }


def _learned_judge(folder: Path) -> Judge:
    eos, pad = special_ids(toy_tokenizer())
    model = load_reward_model(str(folder / "reward"), pad_token_id=pad, must_be_trained=True)
    return reward_model_judge(model, eos_token_id=eos, micro_batch_tokens=4096)


def _recorded(judge: Judge, task: ToyTask, gold: list[float]) -> Judge:
    """The same judge; the mean gold reward of what it is shown is kept, in facts."""

    def judged(rollouts: Sequence[Rollout]) -> torch.Tensor:
        gold.append(SCALE * float(gold_judge(task, rollouts).mean()))
        return judge(rollouts)

    return judged
