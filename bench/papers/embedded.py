"""Experiments with RTO and DR-PO on the embedded task, with smaller runs than the demo.

    granularity  RTO with its token rewards paid at every token, at the end of every fact, at the end of the response,
                 at every token but subtracted again at the end, or not at all (arXiv 2404.18922, section 5.2, figure 4)
    prompts      RTO and PPO with one pass over few or many prompts (arXiv 2404.18922, figure 4c)
    resets       DR-PO with different reset probabilities (arXiv 2404.08495, table 2), on the task of `bench.resets`,
                 with the gold judge as reward and about equally many sampled tokens
    lengths      PPO, and DR-PO with every episode reset, on posts in which 3, 5 or 7 facts matter. Section 5 of arXiv
                 2404.08495 says that without resets the cost of exploration grows with the horizon. The starting models
                 are trained on posts with 3 to 7 facts.

An arm is one method with its settings. The SFT, reward and DPO models of a seed and task are trained once, with the
demo's settings, and shared by all arms. The arms use the demo's settings too, but half its episodes per update.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Regex, decoders
from transformers import PreTrainedTokenizerFast

from bench.resets import SCALE, gold_judge, strict_task
from bench.results import append_row
from bench.toy import interval
from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.config import DemoConfig, PPOConfig
from fastrlhf.data.specials import special_ids
from fastrlhf.data.toy import FACTS, ToyTask, toy_tokenizer
from fastrlhf.demo import NUM_PROMPTS, judge_stage, run_stage, stage_config
from fastrlhf.evaluation.judges import Judge, reward_model_judge
from fastrlhf.models.loading import load_reward_model
from fastrlhf.types import Rollout

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EPISODES = 64
"""Episodes per update."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    paper: str
    experiment: str
    name: str
    method: str
    """Name of the demo stage whose trainer and settings the arm uses: "ppo", "drpo" or "rto"."""
    num_prompts: int = NUM_PROMPTS
    settings: Mapping[str, Any] = field(default_factory=dict)
    facts: int = 0
    """Number of facts that matter in every post. 0 means the default of the experiment's task."""

    @property
    def models(self) -> str:
        """Name of the set of starting models. Arms with equal names share the models of a seed."""
        return "lengths" if self.facts else self.paper

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


def _method(reset_prob: float) -> str:
    return "drpo" if reset_prob else "ppo"


def _settings(reset_prob: float) -> dict[str, Any]:
    return {"max_steps": UPDATES[reset_prob]} | ({"reset_prob": reset_prob} if reset_prob else {})


UPDATES = {0.0: 40, 0.25: 44, 0.5: 48, 0.75: 54, 1.0: 60}
"""Reset probability -> number of updates, chosen so that all arms sample about equally many tokens. An episode that
starts inside a response samples fewer tokens."""
SHAPINGS = ("token", "sentence", "eos", "rs")
PROMPTS = (320, 640, 1280, 2560)
"""Numbers of prompts in the experiment `prompts`. Its runs with 2560 prompts (40 updates) are the arms "token" (RTO)
and "none" (PPO) of the experiment `granularity`."""
GRANULARITY = [
    *(
        Arm(paper="rto", experiment="granularity", name=name, method="rto", settings={"reward_shaping": name})
        for name in SHAPINGS
    ),
    Arm(paper="rto", experiment="granularity", name="none", method="ppo"),
]
RESETS = [
    Arm(paper="drpo", experiment="resets", name=f"{prob:g}", method=_method(prob), settings=_settings(prob))
    for prob in UPDATES
]
LENGTHS = (3, 5, 7)
BY_LENGTH = [
    Arm(
        paper="drpo",
        experiment="lengths",
        name=f"{_method(prob)} {facts}",
        method=_method(prob),
        settings=_settings(prob),
        facts=facts,
    )
    for facts, prob in product(LENGTHS, (0.0, 1.0))
]
FEWER_PROMPTS = [_pass_over(method, num) for method, num in product(("rto", "ppo"), PROMPTS[:-1])]
ARMS = {"rto": [*GRANULARITY, *FEWER_PROMPTS], "drpo": [*RESETS, *BY_LENGTH]}
"""Paper -> arms of its experiments."""

Row = dict[str, Any]


def run_embedded(paper: str, seeds: int, jobs: int, runs: Path, out: Path) -> str:
    """Runs the experiments of a paper and returns the tables in Markdown.

    Models that exist under `runs` are not trained again. A row per new run is appended to `out/results`; the figures
    are drawn into `out/figures`.
    """
    found = run_arms(paper, seeds, jobs, runs, out / "results")
    figures = out / "figures"
    if paper == "drpo":
        draw_resets(found, figures / "drpo_resets.png")
        draw_lengths(found, figures / "drpo_lengths.png")
        return f"{resets_table(found)}\n\n{lengths_table(found)}"
    draw_granularity(found, figures / "rto_granularity.png")
    draw_prompts(found, figures / "rto_prompts.png")
    return f"{granularity_table(found)}\n\n{prompts_table(found)}"


def run_arms(paper: str, seeds: int, jobs: int, runs: Path, results: Path) -> dict[str, list[Row]]:
    """Trains the arms of a paper for all seeds; returns folder name -> rows in the order of the seeds."""
    with ProcessPoolExecutor(jobs) as pool:
        models = dict.fromkeys(arm.models for arm in ARMS[paper])
        list(pool.map(partial(_make_models, runs), *zip(*product(models, range(seeds)), strict=True)))
        cases = list(product(ARMS[paper], range(seeds)))
        rows = list(pool.map(partial(_run_arm, runs, results), *zip(*cases, strict=True)))
    found: dict[str, list[Row]] = {}
    for (arm, _), row in zip(cases, rows, strict=True):
        found.setdefault(arm.folder, []).append(row)
    return found


def _problem(models: str, seed: int, runs: Path) -> tuple[DemoConfig, ToyTask, Path]:
    folder = runs / models / f"seed-{seed}"
    task = ToyTask(seed=seed) if models == "rto" else strict_task(seed)
    if models == "lengths":
        task = replace(task, min_salient=min(LENGTHS), max_salient=max(LENGTHS))
    return DemoConfig(out=str(folder), seed=seed), task, folder


def _make_models(runs: Path, models: str, seed: int) -> None:
    torch.set_num_threads(1)
    config, task, folder = _problem(models, seed, runs)
    if not (folder / "tokenizer").exists():
        _sentence_tokenizer().save_pretrained(folder / "tokenizer")
    for stage in ("sft", "reward", "dpo") if models == "rto" else ("sft", "reward"):
        if not (folder / stage / "config.json").exists():
            run_stage(stage, config, task, folder)


def _sentence_tokenizer() -> PreTrainedTokenizerFast:
    """Returns the tokenizer of the embedded task, changed so that it decodes a full stop after each value. A fact is
    then a sentence, as the reward shaping "sentence" requires.
    """
    tokenizer = toy_tokenizer()
    values = "|".join(sorted(value for values in FACTS.values() for value in values))
    stop, space = decoders.Replace(Regex(rf"(?<=^(?:{values}))$"), "."), decoders.Replace(Regex("$"), " ")
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([stop, space])
    return tokenizer


def _run_arm(runs: Path, results: Path, arm: Arm, seed: int) -> Row:
    torch.set_num_threads(1)
    config, task, folder = _problem(arm.models, seed, runs)
    if arm.facts:
        task = replace(task, min_salient=arm.facts, max_salient=arm.facts)
    done = folder / arm.folder / "row.json"
    if not done.exists():
        row = {"bench": "papers", "paper": arm.paper, "experiment": arm.experiment, "arm": arm.name, "seed": seed}
        row |= _train(arm, config, task, folder)
        judged = judge_stage(config, task, folder, arm.folder)
        row |= {"gold_reward": float(judged.gold.mean()), "rm_score": judged.score, "kl": judged.kl}
        append_row(row | {"mean_length": judged.mean_length}, results)
        done.write_text(json.dumps(row))
    return json.loads(done.read_text())


def _train(arm: Arm, config: DemoConfig, task: ToyTask, folder: Path) -> Row:
    """Trains the policy of an arm; returns the size of the run and its learning curves.

    The curves are the mean training score and the mean gold reward (in facts) of the responses sampled in each update.
    """
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
    result = train_ppo(settings, careful.examples("train", arm.num_prompts), judge=judge)
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
    """Wraps a judge: every call also appends the mean gold reward (in facts) of the scored responses to `gold`."""

    def judged(rollouts: Sequence[Rollout]) -> torch.Tensor:
        gold.append(SCALE * float(gold_judge(task, rollouts).mean()))
        return judge(rollouts)

    return judged


def granularity_table(found: Mapping[str, Sequence[Row]]) -> str:
    """Formats a Markdown table of the granularity arms: means with 95 % intervals, differences paired by seed.

    Values "over the run" are means over all updates of the sampled responses; values "at the end" are measured on
    held-out posts. Every seed has its own reward model, so only differences of RM scores are comparable.
    """
    none = found["granularity_none"]
    unpaid = [fmean(row["score_curve"]) for row in none]
    lines = [
        "| paid at | RM score over the run | minus none | gold over the run | gold at the end | minus none | KL |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in GRANULARITY:
        rows = found[arm.folder]
        score, gold = ([fmean(row[name]) for row in rows] for name in ("score_curve", "gold_curve"))
        faster = [one - other for one, other in zip(score, unpaid, strict=True)]
        kl = fmean(row["kl"] for row in rows)
        lines.append(
            f"| {arm.name} | {fmean(score):.2f} | {_unless(arm.name == 'none', faster)} | {interval(gold)} "
            f"| {interval(_gold(rows))} | {_unless(arm.name == 'none', _minus(rows, none))} | {kl:.2f} |"
        )
    return "\n".join(lines)


def prompts_table(found: Mapping[str, Sequence[Row]]) -> str:
    """Formats a Markdown table: gold rewards of PPO and RTO by number of prompts, means with 95 % intervals."""
    lines = ["| prompts | PPO | RTO | RTO minus PPO | RTO minus PPO on all prompts |", "|---|---|---|---|---|"]
    full = _on_prompts(found, "ppo", PROMPTS[-1])
    for num in PROMPTS:
        ppo, rto = (_on_prompts(found, method, num) for method in ("ppo", "rto"))
        cells = (_gold(ppo), _gold(rto), _minus(rto, ppo), _minus(rto, full))
        lines.append(f"| {num} | " + " | ".join(map(interval, cells)) + " |")
    return "\n".join(lines)


def resets_table(found: Mapping[str, Sequence[Row]]) -> str:
    """Formats a Markdown table: gold reward, KL and sampled tokens by reset probability."""
    lines = ["| reset probability | gold reward | minus 0 | KL | sampled tokens |", "|---|---|---|---|---|"]
    for arm in RESETS:
        rows = found[arm.folder]
        kl, tokens = (fmean(row[name] for row in rows) for name in ("kl", "tokens"))
        gain = _unless(arm.name == "0", _minus(rows, found["resets_0"]))
        lines.append(f"| {arm.name} | {interval(_gold(rows))} | {gain} | {kl:.2f} | {tokens:.0f} |")
    return "\n".join(lines)


def lengths_table(found: Mapping[str, Sequence[Row]]) -> str:
    """Formats a Markdown table: gold rewards of PPO and DR-PO by the number of facts that matter in a post."""
    lines = ["| facts that matter | PPO | DR-PO | DR-PO minus PPO | sampled tokens |", "|---|---|---|---|---|"]
    for facts in LENGTHS:
        ppo, drpo = (found[f"lengths_{name}_{facts}"] for name in ("ppo", "drpo"))
        cells = map(interval, (_gold(ppo), _gold(drpo), _minus(drpo, ppo)))
        tokens = " and ".join(f"{fmean(row['tokens'] for row in rows):.0f}" for rows in (ppo, drpo))
        lines.append(f"| {facts} | " + " | ".join(cells) + f" | {tokens} |")
    return "\n".join(lines)


def _on_prompts(found: Mapping[str, Sequence[Row]], method: str, num_prompts: int) -> Sequence[Row]:
    if num_prompts == PROMPTS[-1]:
        return found["granularity_token" if method == "rto" else "granularity_none"]
    return found[f"prompts_{method}_{num_prompts}"]


def _gold(rows: Sequence[Row]) -> list[float]:
    return [row["gold_reward"] for row in rows]


def _minus(rows: Sequence[Row], others: Sequence[Row]) -> list[float]:
    return [one - other for one, other in zip(_gold(rows), _gold(others), strict=True)]


def _unless(same: bool, values: Sequence[float]) -> str:
    return "" if same else interval(values)


def draw_granularity(found: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Draws two learning curves per arm: RM score minus PPO's RM score of the same seed, and gold reward.

    Lines are means over seeds, bands reach from the lowest to the highest seed.
    """
    figure, panels = _figure(2)
    names = {"score_curve": "RM score minus PPO's", "gold_curve": "gold reward, facts"}
    for panel, (curve, label) in zip(panels, names.items(), strict=True):
        for arm in GRANULARITY:
            curves = torch.tensor([row[curve] for row in found[arm.folder]])
            if curve == "score_curve":
                curves = curves - torch.tensor([row[curve] for row in found["granularity_none"]])
            updates = torch.arange(1, curves.shape[1] + 1)
            (line,) = panel.plot(updates, curves.mean(0), linewidth=1.2, label=arm.name)
            panel.fill_between(updates, curves.amin(0), curves.amax(0), color=line.get_color(), alpha=0.12, linewidth=0)
        panel.set_ylabel(label, fontsize=8)
        panel.set_xlabel("update", fontsize=8)
    panels[0].legend(fontsize=7)
    _save(figure, path)


def draw_prompts(found: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Draws the gold reward of RTO and PPO against the number of prompts: a line for the mean, a dot per seed."""
    figure, (panel,) = _figure(1)
    for method in ("rto", "ppo"):
        gold = torch.tensor([_gold(_on_prompts(found, method, num)) for num in PROMPTS])
        (line,) = panel.plot(PROMPTS, gold.mean(1), linewidth=1.2, label=method.upper())
        panel.plot(PROMPTS, gold, ".", color=line.get_color(), markersize=4)
    panel.set_xscale("log", base=2)
    panel.set_xticks(PROMPTS, map(str, PROMPTS))
    panel.set_xlabel("prompts, one pass", fontsize=8)
    panel.set_ylabel("gold reward, facts", fontsize=8)
    panel.legend(fontsize=7)
    _save(figure, path)


def draw_resets(found: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Draws the gold reward against the reset probability: a black line for the mean, a grey line per seed."""
    figure, (panel,) = _figure(1)
    gold = torch.tensor([_gold(found[arm.folder]) for arm in RESETS])
    panel.plot(list(UPDATES), gold, "o-", linewidth=0.6, markersize=3, alpha=0.5, color="gray")
    panel.plot(list(UPDATES), gold.mean(1), linewidth=1.5, color="black")
    panel.set_xlabel("reset probability", fontsize=8)
    panel.set_ylabel("gold reward, facts", fontsize=8)
    _save(figure, path)


def draw_lengths(found: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Draws DR-PO's gold reward minus PPO's against the number of facts that matter.

    The mean is a black line, each seed a grey one.
    """
    figure, (panel,) = _figure(1)
    gain = torch.tensor([_minus(found[f"lengths_drpo_{num}"], found[f"lengths_ppo_{num}"]) for num in LENGTHS])
    panel.plot(LENGTHS, gain, "o-", linewidth=0.6, markersize=3, alpha=0.5, color="gray")
    panel.plot(LENGTHS, gain.mean(1), linewidth=1.5, color="black")
    panel.axhline(0, color="black", linewidth=0.5)
    panel.set_xticks(LENGTHS)
    panel.set_xlabel("facts that matter in a post", fontsize=8)
    panel.set_ylabel("DR-PO minus PPO, facts", fontsize=8)
    _save(figure, path)


def _figure(num_panels: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * num_panels, 3.2), layout="constrained")
    panels = list(figure.subplots(1, num_panels, squeeze=False)[0])
    for panel in panels:
        panel.tick_params(labelsize=7)
    return figure, panels


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
