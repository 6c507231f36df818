"""Tests on the embedded task whether RLP (arXiv 2403.19279) improves the policy, with control arms that the paper
lacks.

RLP refits the reward model on the policy's answers and trains the policy again.

    r, pi       a reward model, and the policy that PPO trains against it
    P           10 answers of pi to each of 2560 prompts, sampled once
    per arm     r' is refitted from the SFT model on the pairs of r and on P; PPO then trains the SFT model against r'

`lambda 0` trains only on the pairs of r: it is r with a different random seed. All refits of a seed share their random
numbers (head, order of the pairs), and so do all policies, so arms differ only in the data or losses that they add.
`gold pairs` shows what perfect synthetic pairs would give: equally many pairs of the same answers, labelled by the
task's gold judge. SPG groups answers by gold equivalence, so that errors of an NLI model play no role.

To run on a CPU, the experiment is smaller than in the paper: one pass over 8960 pairs (paper: 9.2 k), 2560 prompts
(20 k), 40 updates of 64 episodes, models with 0.9 million parameters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bench.results import append_row
from bench.toy import interval
from fastrlhf.algorithms.completions import ANSWER_STREAM, Answers, sample_answers, write_rows
from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.algorithms.reward_model import held_out_accuracy, train_reward_model
from fastrlhf.algorithms.rlp_report import agreement, view_activity
from fastrlhf.algorithms.rlp_spg import synthetic_pairs
from fastrlhf.algorithms.rlp_uml import Views
from fastrlhf.algorithms.scoring import per_response
from fastrlhf.config import DemoConfig, PPOConfig, RewardConfig, RLPConfig
from fastrlhf.data.specials import special_ids
from fastrlhf.data.tokens import tokenize_examples
from fastrlhf.data.toy import MAX_SUMMARY_TOKENS, ToyTask, toy_tokenizer
from fastrlhf.demo import judge_stage, run_stage, stage_config
from fastrlhf.evaluation.equivalence import function_judge
from fastrlhf.models.forward import sequence_scores
from fastrlhf.models.loading import load_policy, load_reward_model
from fastrlhf.rollout.engine import TransformersEngine
from fastrlhf.runtime.checkpoint import holds_model
from fastrlhf.runtime.metrics import read_metrics, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NUM_PAIRS, NUM_HELD_OUT = 8960, 1024
NUM_PROMPTS, NUM_UNSEEN = 2560, 512
"""Number of prompts on which policies are trained and the answers P are sampled; number of held-out prompts, whose
answers are used only to measure reward models."""
EPISODES, NUM_ANSWERS = 64, 10
OTHER_DRAWS = 100
"""A refit of the reward model uses the seed of the run plus this offset."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    name: str
    refit: Mapping[str, Any] | None = field(default_factory=dict)
    """Keys of RLPConfig for the refit. None means that the arm uses r without a refit."""
    matched: bool = False
    """Whether the number of synthetic pairs is limited to the number in the arm `spg`."""
    told_by_gold: bool = False
    """Whether gold rewards label the synthetic pairs, instead of the scores of r."""
    policy: bool = True
    """Whether a policy is trained after the refit."""

    @property
    def folder(self) -> str:
        return self.name.replace(" ", "_")


ARMS = [
    Arm(name="ppo", refit=None),
    Arm(name="lambda 0", refit={"refinement": "uml", "mib_weight": 0.0}),
    Arm(name="uml paper", refit={"refinement": "uml", "mib_profile": "paper"}),
    Arm(name="uml robust", refit={"refinement": "uml"}),
    Arm(name="spg", refit={}),
]
ABLATIONS = [
    Arm(name="gold pairs", refit={"pairing": "reward"}, matched=True, told_by_gold=True),
    Arm(name="reward", refit={"pairing": "reward"}, matched=True, policy=False),
    Arm(name="select-all", refit={"min_confidence": 0.0}, matched=True, policy=False),
    Arm(name="rlaif", refit={"pairing": "rlaif"}, matched=True, policy=False),
]

Row = dict[str, Any]


def run_rlp(seeds: int, jobs: int, runs: Path, out: Path) -> str:
    """Runs all arms for all seeds, then the ablations, and returns the table in Markdown.

    Models that exist under `runs` are not trained again. A row per new run is appended to `out/results`; the figure is
    drawn into `out/figures`.
    """
    found: dict[str, list[Row]] = {}
    with ProcessPoolExecutor(jobs) as pool:
        for arms in (ARMS, ABLATIONS):
            for rows in pool.map(partial(_run_seed, runs / "rlp", out / "results", arms), range(seeds)):
                for row in rows:
                    found.setdefault(row["arm"], []).append(row)
    draw(found, out / "figures" / "rlp_embedded.png")
    return table(found)


def _run_seed(runs: Path, results: Path, arms: Sequence[Arm], seed: int) -> list[Row]:
    torch.set_num_threads(1)
    folder, rows = runs / f"seed-{seed}", []
    problem = _Problem(config=DemoConfig(out=str(folder), seed=seed), task=ToyTask(seed=seed), folder=folder)
    problem.make_models()
    for arm in arms:
        done = folder / arm.folder / "row.json"
        if not done.exists():
            row = {"bench": "papers", "paper": "rlp", "experiment": "embedded", "arm": arm.name, "seed": seed}
            row |= problem.run(arm)
            append_row({key: value for key, value in row.items() if key != "gold"}, results)
            done.parent.mkdir(exist_ok=True)
            done.write_text(json.dumps(row))
        rows.append(json.loads(done.read_text()))
    return rows


@dataclass(frozen=True, kw_only=True)
class _Problem:
    """The models, prompts and answers of one seed, which all arms share."""

    config: DemoConfig
    task: ToyTask
    folder: Path

    def make_models(self) -> None:
        """Trains the SFT model, r and pi; samples pi's answers to training and held-out prompts; scores the answers to
        training prompts with r."""
        if not (self.folder / "tokenizer").exists():
            _tokenizer().save_pretrained(self.folder / "tokenizer")
        if not holds_model(str(self.folder / "sft")):
            run_stage("sft", self.config, self.task, self.folder)
        self._train_reward(self.folder / "reward", self.config.seed)
        self._train_policy(self.folder / "ppo/policy", self.folder / "reward")
        for split, num in (("train", NUM_PROMPTS), ("validation", NUM_UNSEEN)):
            file = self.folder / f"answers_{split}.jsonl"
            if not file.exists():
                write_rows(file, map(asdict, self._sample(split, num)))
        scores = self.folder / "scores.json"
        if not scores.exists():
            of_r = self._scores(self.folder / "reward", self._answers("train"))
            scores.write_text(json.dumps([score.tolist() for score in of_r]))

    def run(self, arm: Arm) -> Row:
        """Refits the reward model of an arm, trains the policy if the arm has one, and returns the result row. The row
        holds accuracies relative to the gold order and, if there is a policy, the gold reward of the policy on unseen
        posts.
        """
        own, row = self.folder / arm.folder, {}
        reward = self.folder / "reward"
        if arm.refit is not None:
            reward = own / "reward"
            row |= self._refit(arm, reward)
        row |= self._measure(reward)
        if not arm.policy:
            return row
        self._train_policy(own / "policy", reward)
        judged = judge_stage(self.config, self.task, self.folder, f"{arm.folder}/policy")
        history = read_metrics(own / "policy" / "metrics.jsonl")
        return row | {
            "gold_reward": float(judged.gold.mean()),
            "rm_score": judged.score,
            "kl": judged.kl,
            "mean_length": judged.mean_length,
            "score_curve": [round(step["objective/scores"], 4) for step in history],
            "gold": judged.gold.tolist(),
        }

    def _refit(self, arm: Arm, folder: Path) -> Row:
        answers, found = self._answers("train"), {}
        num_pairs = json.loads((self.folder / "spg/row.json").read_text())["pairs"] if arm.matched else 0
        settings = RLPConfig(
            seed=self.config.seed,
            num_answers=NUM_ANSWERS,
            num_calibration_prompts=0,
            max_synthetic_pairs=num_pairs,
            **arm.refit or {},
        )
        synthetic = []
        if settings.with_pairs:
            made = synthetic_pairs(
                settings,
                answers,
                [_text(one.prompt) for one in answers],
                [[_text(response) for response in one.responses] for one in answers],
                self._gold(answers).tolist()
                if arm.told_by_gold
                else json.loads((self.folder / "scores.json").read_text()),
                function_judge(self.task.same_meaning),
            )
            synthetic = made.pairs
            sides = [
                [self._worth(pair.prompt, side or []) for side in (pair.chosen, pair.rejected)] for pair in synthetic
            ]
            margins = -torch.tensor(sides).diff(dim=1)
            found |= {name: made.report[name] for name in ("pairs", "acceptance_rate", "sizes")}
            found["pair_accuracy"] = agreement(margins, margins.abs())
        views = Views(config=settings, answers=answers) if settings.with_views else None
        self._train_reward(folder, self.config.seed + OTHER_DRAWS, synthetic=synthetic, views=views)
        return found | view_activity(read_metrics(folder / "metrics.jsonl"))

    def _measure(self, reward: Path) -> Row:
        """Compares a reward model with the gold order. Returns its accuracy on held-out pairs, its accuracy on all
        pairs of pi's answers to a held-out prompt, and the mean variance of its scores among the answers to a prompt.
        """
        answers = self._answers("validation")
        gold, scores = self._gold(answers), torch.stack(self._scores(reward, answers))
        examples = replace(self.task, label_temperature=0.0).examples("preferences_test", NUM_HELD_OUT)
        pairs = tokenize_examples(examples, _tokenizer(), max_length=64, fields=("chosen", "rejected")).examples
        return {
            "rm_accuracy_offline": held_out_accuracy(self._reward_config, _load_reward(reward), pairs),
            "rm_accuracy_policy": agreement(_differences(scores), _differences(gold)),
            "rm_variance": float(scores.var(1).mean()),
        }

    @property
    def _reward_config(self) -> RewardConfig:
        settings = stage_config("reward", self.config, self.folder)
        assert isinstance(settings, RewardConfig)
        return replace(settings, max_steps=-1, num_train_epochs=1.0, progress=False)

    def _train_reward(self, folder: Path, seed: int, **added: Any) -> None:
        if not holds_model(str(folder)):
            settings = replace(self._reward_config, output_dir=str(folder), seed=seed)
            train_reward_model(settings, self.task.examples("preferences", NUM_PAIRS), **added)

    def _train_policy(self, folder: Path, reward: Path) -> None:
        if holds_model(str(folder)):
            return
        settings = stage_config("ppo", self.config, self.folder)
        assert isinstance(settings, PPOConfig)
        settings = replace(
            settings,
            output_dir=str(folder),
            reward_model_path=str(reward),
            max_steps=NUM_PROMPTS // EPISODES,
            per_device_train_batch_size=EPISODES,
            rollout_batch_size=EPISODES,
            num_eval_examples=0,
            num_sample_generations=1,
            progress=False,
        )
        train_ppo(settings, self.task.examples("train", NUM_PROMPTS))

    def _sample(self, split: str, num: int) -> list[Answers]:
        tokenizer = _tokenizer()
        engine = TransformersEngine(
            model=load_policy(str(self.folder / "ppo/policy")),
            eos_token_id=special_ids(tokenizer)[0],
            response_length=MAX_SUMMARY_TOKENS,
            temperature=1.0,
            seed=self.config.seed,
            batch_size=1024,
            stream=ANSWER_STREAM,
        )
        examples = tokenize_examples(self.task.examples(split, num), tokenizer, max_length=64, fields=()).examples
        return sample_answers(engine, examples, NUM_ANSWERS, round_=1)

    def _answers(self, split: str) -> list[Answers]:
        return [Answers(**row) for row in read_rows(self.folder / f"answers_{split}.jsonl")]

    def _scores(self, reward: Path, answers: Sequence[Answers]) -> list[Tensor]:
        model = _load_reward(reward)
        trees = [one.tree for one in answers]
        return per_response(model, trees, 4096, sequence_scores, str(reward))

    def _gold(self, answers: Sequence[Answers]) -> Tensor:
        """Returns the gold rewards in facts, [prompts, answers]."""
        return torch.tensor([[self._worth(one.prompt, text) for text in one.responses] for one in answers])

    def _worth(self, prompt: Sequence[int], response: Sequence[int]) -> float:
        # rounded to 6 digits, because equal rewards may differ by rounding errors
        return round(self.task.gold_reward(_text(prompt), _text(response)), 6)


def _load_reward(folder: Path) -> Any:
    return load_reward_model(str(folder), pad_token_id=special_ids(_tokenizer())[1], must_be_trained=True)


def _text(tokens: Sequence[int]) -> str:
    return str(_tokenizer().decode(list(tokens), skip_special_tokens=True))


@cache
def _tokenizer() -> PreTrainedTokenizerFast:
    return toy_tokenizer()


def _differences(values: Tensor) -> Tensor:
    """Returns the differences of values [prompts, answers] for all ordered pairs of answers to one prompt,
    flattened."""
    return (values[:, :, None] - values[:, None, :]).flatten()


def seeds_and_prompts_interval(differences: Sequence[Sequence[float]], samples: int = 10000) -> tuple[float, float]:
    """Returns the 95 % percentile bootstrap interval of the mean of differences [seeds, prompts]. Each bootstrap sample
    draws seeds with replacement, and prompts with replacement within each seed.
    """
    values, rng = np.asarray(differences), np.random.default_rng(0)
    num_seeds, num_prompts = values.shape
    means = np.empty(samples)
    for i in range(samples):
        prompts = rng.integers(num_prompts, size=(num_seeds, num_prompts))
        means[i] = np.take_along_axis(values[rng.integers(num_seeds, size=num_seeds)], prompts, 1).mean()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def table(found: Mapping[str, Sequence[Row]]) -> str:
    """Formats the results as a Markdown table of means over seeds.

    Differences of gold reward are paired by seed and post, with bootstrap intervals over both.
    """
    lines = [
        "| arm | gold reward | minus PPO | minus lambda 0 | RM score of r | KL | length "
        "| RM accuracy offline % | on policy % | variance / r's | synthetic pairs | right % |",
        "|" + "---|" * 12,
    ]
    for arm in (*ARMS, *ABLATIONS):
        rows = found[arm.name]
        cells = [""] * 6
        if arm.policy:
            numbers = (f"{fmean(row[name] for row in rows):.2f}" for name in ("rm_score", "kl", "mean_length"))
            minus = [_minus(rows, found[other]) if arm.name != other else "" for other in ("ppo", "lambda 0")]
            cells = [interval([row["gold_reward"] for row in rows]), *minus, *numbers]
        for name in ("rm_accuracy_offline", "rm_accuracy_policy"):
            cells.append(f"{100 * fmean(row[name] for row in rows):.1f}")
        ratios = [row["rm_variance"] / r["rm_variance"] for row, r in zip(rows, found["ppo"], strict=True)]
        cells.append(f"{fmean(ratios):.2f}")
        with_pairs = "pairs" in rows[0]
        cells.append(f"{fmean(row['pairs'] for row in rows):.0f}" if with_pairs else "")
        cells.append(f"{100 * fmean(row['pair_accuracy'] for row in rows):.1f}" if with_pairs else "")
        lines.append(f"| {arm.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _minus(rows: Sequence[Row], others: Sequence[Row]) -> str:
    differences = [np.subtract(row["gold"], other["gold"]) for row, other in zip(rows, others, strict=True)]
    low, high = seeds_and_prompts_interval(differences)
    return f"{np.mean(differences):+.2f} [{low:+.2f}, {high:+.2f}]"


def draw(found: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Draws two panels with a column per arm: gold reward minus PPO's gold reward, and accuracy on the policy's answers
    minus the accuracy of r. Seeds are grey dots, means are black dashes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    panels = figure.subplots(1, 2)
    labels = {"gold_reward": "gold reward minus PPO's, facts", "rm_accuracy_policy": "accuracy on policy minus r's"}
    for panel, (name, label) in zip(panels, labels.items(), strict=True):
        arms = [arm.name for arm in (*ARMS[1:], *ABLATIONS) if name in found[arm.name][0]]
        gains = np.array([[row[name] - r[name] for row, r in zip(found[a], found["ppo"], strict=True)] for a in arms])
        panel.axhline(0, color="gray", linewidth=0.6)
        panel.plot(arms, gains, ".", color="gray", markersize=5)
        panel.plot(arms, gains.mean(1), "_", color="black", markersize=14)
        panel.set_ylabel(label, fontsize=8)
        panel.tick_params(labelsize=7)
        panel.tick_params(axis="x", rotation=30)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
