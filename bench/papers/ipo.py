"""Repeats the bandit experiments of the IPO paper (Azar et al. 2023, arXiv 2310.12036 v2, sections 5.3 and 5.4).

    policy: pi = softmax(theta), starting at theta = 0, the uniform reference
    data: ordered pairs of actions, winner first
    training: mini-batches of pairs drawn with replacement; Adam on `pair_loss`; an action is a response of one token

The paper does not print its values of tau. Its mini-batch is 9 (TRL's notes on the proceedings version say 90). Its
last data set is printed as {(a, b), (b, a)}, "leaving (a, c) unobserved". On these pairs both losses are symmetric in
a and b and ignore c, so the policy stays uniform and cannot give the figure that the paper describes. The data set is
run as printed (D3 literal) and in two other readings: D1 without (a, c) (D3b), and with one more pair, in which c loses
(D3c).

The minimum of IPO is the least-squares solution of theta_w - theta_l = 1 / (2 tau) over the pairs. DPO has a minimum
only in D2 and D3 literal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.results import append_row
from bench.toy import STUDENT_95
from fastrlhf_kernels import pair_loss

TAUS = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0)
KINDS = ("ipo", "dpo")
LEARNING_RATE = 0.01
STEPS, FAST_STEPS, SEEDS = 18_000, 3_000, 10
EVERY = 50


@dataclass(frozen=True, kw_only=True)
class Bandit:
    name: str
    num_actions: int
    pairs: Sequence[tuple[int, int]]
    """(winner, loser) of each observed comparison."""
    dpo_limit: Sequence[float]
    """Action probabilities to which DPO converges from the uniform policy, for any beta."""


THIRD = (1 / 3, 1 / 3, 1 / 3)
BANDITS = (
    Bandit(name="two actions", num_actions=2, pairs=[(0, 1)], dpo_limit=(1, 0)),
    Bandit(name="D1", num_actions=3, pairs=[(0, 1), (1, 2), (0, 2)], dpo_limit=(1, 0, 0)),
    Bandit(name="D2", num_actions=3, pairs=[(0, 1), (1, 2), (2, 0)], dpo_limit=THIRD),
    Bandit(name="D3 literal", num_actions=3, pairs=[(0, 1), (1, 0)], dpo_limit=THIRD),
    Bandit(name="D3b", num_actions=3, pairs=[(0, 1), (1, 2)], dpo_limit=(1, 0, 0)),
    Bandit(name="D3c", num_actions=3, pairs=[(0, 1), (1, 0), (0, 2)], dpo_limit=(0.5, 0.5, 0)),
)
FIGURES = {"ipo_fig1.png": ("D1",), "ipo_fig2.png": ("D3 literal", "D3b", "D3c")}


def tournament(num_actions: int) -> Bandit:
    """A bandit in which every pair of actions is observed once and the smaller index wins."""
    pairs = list(combinations(range(num_actions), 2))
    limit = [1.0] + [0.0] * (num_actions - 1)
    return Bandit(name=f"tournament of {num_actions}", num_actions=num_actions, pairs=pairs, dpo_limit=limit)


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Action probabilities during training, recorded at P points."""

    steps: Tensor
    """[P] int64: number of optimiser steps before each point; the first is 0."""
    probs: Tensor
    """Action probabilities at each point, [P, seeds, taus, actions] float32."""

    def tail(self) -> Tensor:
        """Returns the probabilities in the last sixth of the run (3,000 of 18,000 steps)."""
        return self.probs[self.steps > self.steps[-1] * 5 // 6]


def ipo_minimiser(bandit: Bandit, tau: float) -> Tensor:
    """Returns the action probabilities [actions] float64 that minimise eq. 17 of the paper, averaged over the pairs. If
    there are several minimisers, returns the minimiser whose logits have the smallest norm.
    """
    rows = torch.zeros(len(bandit.pairs), bandit.num_actions, dtype=torch.float64)
    for row, (winner, loser) in zip(rows, bandit.pairs, strict=True):
        row[winner], row[loser] = 1, -1
    targets = torch.full((len(rows),), 1 / (2 * tau), dtype=torch.float64)
    return (torch.linalg.pinv(rows) @ targets).softmax(-1)


def train(
    bandits: Sequence[Bandit],
    kind: str,
    *,
    steps: int,
    batch_size: int | None,
    seeds: int = 1,
    taus: Sequence[float] = TAUS,
) -> dict[str, Curves]:
    """Trains a policy for every bandit, seed and tau, all in one batch; returns bandit name -> learning curves.

    With `batch_size` None no pairs are drawn: each step uses every pair of a bandit equally often. For DPO, tau is
    beta. DPO's loss depends on beta only through beta times the log-probs, so the log-probs are scaled by beta, and a
    single call of `pair_loss` computes the loss for all values.
    """
    tau = torch.tensor(taus)
    actions = torch.from_numpy(_draw_pairs(bandits, steps, batch_size, seeds))
    size = actions.shape[-1] // 2
    shape = (len(bandits), seeds, len(taus))
    num_rows = math.prod(shape) * size * 2
    cu_seqlens, mask = torch.arange(num_rows + 1, dtype=torch.int32), torch.ones(num_rows, dtype=torch.bool)
    target = (1 / (2 * tau)).view(-1, 1).expand(*shape, size).flatten() if kind == "ipo" else None
    scale = tau.view(-1, 1) if kind == "dpo" else 1.0
    missing = torch.arange(max(b.num_actions for b in bandits)) >= torch.tensor([[b.num_actions] for b in bandits])
    start = torch.zeros(missing.shape).masked_fill(missing, -math.inf)[:, None, None]  # [bandits, 1, 1, actions]

    logits = start.repeat(1, *shape[1:], 1).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=LEARNING_RATE)
    points = [logits.detach().softmax(-1)]
    for step in range(steps):
        drawn = actions[step].long().unsqueeze(2).expand(*shape, -1)
        logprob = (scale * logits.log_softmax(-1)).gather(-1, drawn).flatten()
        # The uniform reference has equal log-probs for both actions of a pair, so it cancels in their difference.
        output = pair_loss(logprob, None, cu_seqlens, mask, num_pairs=size, kind=kind, beta=1.0, target=target)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        if (step + 1) % EVERY == 0:
            points.append(logits.detach().softmax(-1))
    probs = torch.stack(points)
    return {
        bandit.name: Curves(steps=EVERY * torch.arange(len(points)), probs=probs[:, i, ..., : bandit.num_actions])
        for i, bandit in enumerate(bandits)
    }


def _draw_pairs(bandits: Sequence[Bandit], steps: int, batch_size: int | None, seeds: int) -> np.ndarray:
    """Draws the pairs of all steps: uint8 actions [steps, bandits, seeds, 2 * pairs], winner and loser alternating.

    For each seed, all bandits use the same random numbers.
    """
    all_pairs = [np.array(bandit.pairs, dtype=np.uint8) for bandit in bandits]
    if batch_size is None:
        size = math.lcm(*map(len, all_pairs))
        batch = np.stack([np.tile(pairs, (size // len(pairs), 1)).ravel() for pairs in all_pairs])
        return np.tile(batch[:, None], (steps, 1, seeds, 1))
    drawn = []
    for pairs in all_pairs:
        generators = [np.random.default_rng(seed) for seed in range(seeds)]
        indices = np.stack([g.integers(len(pairs), size=(steps, batch_size)) for g in generators], axis=1)
        drawn.append(pairs[indices].reshape(steps, seeds, -1))
    return np.stack(drawn, axis=1)


def run_ipo(batch_size: int, out: Path, *, fast: bool) -> str:
    """Runs the bandits with DPO and IPO and returns the table in Markdown.

    A full run (not `fast`) appends a row per bandit and method to `out/results` and, at the paper's mini-batch of 9,
    draws the paper's two figures into `out/figures`. Raises ValueError if matplotlib is missing for the figures.
    """
    if batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {batch_size}")
    if not fast and batch_size == 9 and find_spec("matplotlib") is None:
        raise ValueError("the figures need matplotlib: pip install -e '.[train,bench]', or pass --fast")
    steps, size, seeds = (FAST_STEPS, None, 1) if fast else (STEPS, batch_size, SEEDS)
    runs = {kind: train(BANDITS, kind, steps=steps, batch_size=size, seeds=seeds) for kind in KINDS}
    if not fast:
        for bandit in BANDITS:
            for kind in KINDS:
                row = {"bench": "papers", "paper": "ipo", "bandit": bandit.name, "method": kind}
                row |= {"steps": steps, "batch_size": size, "seeds": seeds}
                append_row(row | _numbers(bandit, kind, runs[kind][bandit.name]), out / "results")
        if batch_size == 9:
            for name, bandits in FIGURES.items():
                draw([b for b in BANDITS if b.name in bandits], runs, out / "figures" / name)
    return table(runs)


def table(runs: Mapping[str, Mapping[str, Curves]]) -> str:
    """Formats a Markdown table of action probabilities (%): means over seeds and the last sixth of the steps."""
    lines = ["| bandit | | " + " | ".join(f"tau {tau:g}" for tau in TAUS) + " |", "|---|---" + "|---" * len(TAUS) + "|"]
    for bandit in BANDITS:
        means = {kind: runs[kind][bandit.name].tail().mean((0, 1)) for kind in KINDS}
        for label, rows in (
            ("IPO, closed form", [ipo_minimiser(bandit, tau) for tau in TAUS]),
            ("IPO", means["ipo"]),
            ("DPO", means["dpo"]),
            ("DPO, limit", [torch.tensor(bandit.dpo_limit)] * len(TAUS)),
        ):
            cells = (" ".join(f"{100 * prob:.1f}" for prob in row.tolist()) for row in rows)
            lines.append(f"| {bandit.name} | {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(bandits: Sequence[Bandit], runs: Mapping[str, Mapping[str, Curves]], path: Path) -> None:
    """Draws the learning curves: a row of panels per bandit and method, a column per action, a colour per tau.

    Lines are means over seeds with 95 % intervals. Dotted lines are the closed form of IPO and the limit of DPO.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    shown = [(bandit, kind) for bandit in bandits for kind in ("dpo", "ipo")]
    num_actions = bandits[0].num_actions
    figure = Figure(figsize=(3.2 * num_actions, 1 + 1.7 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), num_actions, sharex=True, sharey=True, squeeze=False)
    colors = [colormaps["viridis"](0.95 * i / (len(TAUS) - 1)) for i in range(len(TAUS))]
    for (bandit, kind), row in zip(shown, panels, strict=True):
        curves = runs[kind][bandit.name]
        mean, half = _mean_and_interval(curves.probs)
        for action, panel in enumerate(row):
            for i, (tau, color) in enumerate(zip(TAUS, colors, strict=True)):
                middle, width = mean[:, i, action], half[:, i, action]
                panel.plot(curves.steps, middle, color=color, linewidth=1, label=f"{tau:g}")
                panel.fill_between(curves.steps, middle - width, middle + width, color=color, alpha=0.3, linewidth=0)
                if kind == "ipo":
                    panel.axhline(float(ipo_minimiser(bandit, tau)[action]), color=color, linestyle=":", linewidth=0.8)
            if kind == "dpo":
                panel.axhline(bandit.dpo_limit[action], color="black", linestyle=":", linewidth=0.8)
            panel.set_title(f"{bandit.name}, {kind.upper()}, action {'abc'[action]}", fontsize=8)
            panel.set_ylim(-0.02, 1.02)
            panel.tick_params(labelsize=7)
        row[0].set_ylabel("probability", fontsize=8)
    for panel in panels[-1]:
        panel.set_xlabel("optimiser steps", fontsize=8)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, title="tau", loc="outside upper center", ncols=len(TAUS), fontsize=8, title_fontsize=8
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _mean_and_interval(probs: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean over the seeds of [..., seeds, taus, actions], and half the width of its 95 % interval
    (Student's t)."""
    seeds = probs.shape[-3]
    return probs.mean(-3), STUDENT_95[seeds] * probs.std(-3) / seeds**0.5


def _numbers(bandit: Bandit, kind: str, curves: Curves) -> dict[str, list]:
    """Returns the fields of a result row, per tau and action. `tail_sd` is the standard deviation over seeds and over
    the points of the last sixth of the run.
    """
    mean, half = _mean_and_interval(curves.probs[-1])
    tail = curves.tail()
    closed = [ipo_minimiser(bandit, tau) if kind == "ipo" else torch.tensor(bandit.dpo_limit) for tau in TAUS]
    numbers = {
        "final_mean": mean,
        "final_ci": half,
        "tail_mean": tail.mean((0, 1)),
        "tail_sd": tail.flatten(0, 1).std(0),
        "closed_form": torch.stack(closed),
    }
    return {"taus": list(TAUS)} | {name: _rounded(values) for name, values in numbers.items()}


def _rounded(values: Tensor) -> list[list[float]]:
    return [[round(value, 6) for value in row] for row in values.tolist()]
