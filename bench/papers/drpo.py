"""Tests the theory of DR-PO (Chang et al. 2024, arXiv 2404.08495, section 4, Algorithm 3) on tabular policies, float64.

The first experiment (`run_npg`) checks the natural policy gradient step of mirror descent, which has a closed form,

    pi'(a|s) = argmax <pi, Q> - lam KL(pi || pi_SFT) - KL(pi || pi_t) / eta
             ~ pi_SFT^(eta lam / (eta lam + 1))  pi_t^(1 / (eta lam + 1))  exp(eta Q / (eta lam + 1))

against a numerical optimiser of the objective, on random deterministic MDPs. The second (`run_lock`) measures the value
of resets on a combination lock: at each of H steps one of two tokens is right, a wrong token ends the episode, and a
response of H right tokens earns 1. pi_SFT is uniform. Episodes start either at the first step or at a uniformly drawn
step of a given response. Q is the mean return of each state and token, and the update is the closed form above. The
compared methods differ only in the starts of their episodes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.results import append_row

LAM, ETA = 0.1, 1.0
ITERATIONS = 200
MDPS, FAST_MDPS = 50, 5

LOCK_LAM, LOCK_ETA = 0.01, 4.0
BATCH = 32
"""Episodes per update of the lock experiment."""
MAX_EPISODES = 2**18
SEEDS, FAST_SEEDS = 10, 3
HORIZONS, FAST_HORIZONS = (2, 4, 6, 8, 10, 12, 14, 16, 24, 32, 48, 64), (2, 4, 6, 8, 10)
GIVEN = {"no resets": None, "right in 100 %": 1.0, "right in 90 %": 0.9, "from pi_SFT": 0.5}
"""Kind of resets -> probability that a token of the response that episodes are reset into is right (0.5 for responses
of pi_SFT). None means no resets."""


@dataclass(frozen=True, kw_only=True)
class Mdp:
    """A deterministic MDP of `horizon` steps."""

    horizon: int
    following: Tensor
    """Index of the next state, [states, actions] int64."""
    reward: Tensor
    """Rewards, [states, actions] float64."""
    log_sft: Tensor
    """Log-probs of pi_SFT, [states, actions] float64."""


def random_mdp(seed: int, states: int = 6, actions: int = 3, horizon: int = 5) -> Mdp:
    generator = torch.Generator().manual_seed(seed)
    shape = (states, actions)
    return Mdp(
        horizon=horizon,
        following=torch.randint(states, shape, generator=generator),
        reward=torch.rand(shape, generator=generator, dtype=torch.float64),
        log_sft=torch.randn(shape, generator=generator, dtype=torch.float64).log_softmax(-1),
    )


def action_values(mdp: Mdp, policy: Tensor, lam: float) -> Tensor:
    """Returns Q values [horizon, states, actions]: the sum of rewards, minus lam times the KL to pi_SFT at all *later*
    steps.

    `policy` holds log-probs [horizon, states, actions]. Algorithm 3 of the paper sums only rewards (lam 0). The trainer
    of this project subtracts the KL from the rewards, as is usual for PPO on language models.
    """
    value, q = torch.zeros_like(mdp.reward[:, 0]), torch.empty_like(policy)
    for h in reversed(range(mdp.horizon)):
        q[h] = mdp.reward + value[mdp.following]
        value = (policy[h].exp() * (q[h] - lam * (policy[h] - mdp.log_sft))).sum(-1)
    return q


def objective(mdp: Mdp, policy: Tensor, lam: float) -> float:
    """Returns the objective of a policy: E[sum of rewards] - lam KL(policy

    pi_SFT), averaged over all first states.
    """
    first = action_values(mdp, policy, lam)[0] - lam * (policy[0] - mdp.log_sft)
    return float((policy[0].exp() * first).sum(-1).mean())


def optimum(mdp: Mdp, lam: float) -> Tensor:
    """Returns the log-probs [horizon, states, actions] of the policy that maximises `objective`, by soft value
    iteration."""
    value, policy = torch.zeros_like(mdp.reward[:, 0]), mdp.log_sft.repeat(mdp.horizon, 1, 1)
    for h in reversed(range(mdp.horizon)):
        scores = mdp.log_sft + (mdp.reward + value[mdp.following]) / lam
        policy[h], value = scores.log_softmax(-1), lam * scores.logsumexp(-1)
    return policy


def npg_step(q: Tensor, log_sft: Tensor, log_old: Tensor, *, lam: float, eta: float) -> Tensor:
    """Takes one update by the closed form in the module docstring; returns log-probs [..., actions]."""
    return ((eta * lam * log_sft + log_old + eta * q) / (eta * lam + 1)).log_softmax(-1)


def direct_step(q: Tensor, log_sft: Tensor, log_old: Tensor, *, lam: float, eta: float) -> Tensor:
    """Finds the update of `npg_step` numerically, by L-BFGS on the logits of all states at once."""
    logits = torch.zeros_like(q, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=2000,
        tolerance_grad=1e-13,
        tolerance_change=0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        policy = logits.log_softmax(-1)
        gain = q - lam * (policy - log_sft) - (policy - log_old) / eta
        value = -(policy.exp() * gain).sum()
        value.backward()
        return value

    optimizer.step(loss)
    return logits.detach().log_softmax(-1)


def mirror_descent(mdp: Mdp, *, lam: float, eta: float, steps: int, kl_in_q: bool) -> Tensor:
    """Runs `steps` updates from pi_SFT with exact Q; returns the log-probs of the last policy.

    The result is [horizon, states, actions]. With `kl_in_q`, Q includes the KL at later steps.
    """
    sft = mdp.log_sft.repeat(mdp.horizon, 1, 1)
    policy = sft
    for _ in range(steps):
        policy = npg_step(action_values(mdp, policy, lam if kl_in_q else 0.0), sft, policy, lam=lam, eta=eta)
    return policy


def run_npg(seeds: int) -> str:
    """Compares the closed form with the optimiser on random MDPs; returns a table of means in Markdown."""
    rows = []
    for seed in range(seeds):
        mdp = random_mdp(seed)
        sft = mdp.log_sft.repeat(mdp.horizon, 1, 1)
        q = action_values(mdp, sft, 0.0)
        old = mirror_descent(mdp, lam=LAM, eta=ETA, steps=3, kl_in_q=False)
        step = npg_step(q, sft, old, lam=LAM, eta=ETA)
        error = (step.exp() - direct_step(q, sft, old, lam=LAM, eta=ETA).exp()).abs().max()
        best = objective(mdp, optimum(mdp, LAM), LAM)
        without, within = (
            best - objective(mdp, mirror_descent(mdp, lam=LAM, eta=ETA, steps=ITERATIONS, kl_in_q=kl_in_q), LAM)
            for kl_in_q in (False, True)
        )
        rows.append([float(error), best - objective(mdp, sft, LAM), without, within])
    columns = list(zip(*rows, strict=True))
    means = [sum(column) / seeds for column in columns[1:]]
    return "\n".join(
        [
            "| MDPs | closed form minus L-BFGS, worst probability | gap of pi_SFT "
            f"| after {ITERATIONS} steps, Q of rewards | Q with later KL |",
            "|---|---|---|---|---|",
            f"| {seeds} | {max(columns[0]):.0e} | {means[0]:.4f} | {means[1]:.4f} | {means[2]:.0e} |",
        ]
    )


def episodes_to_solve(horizon: int, right: float | None, seeds: int, max_episodes: int = MAX_EPISODES) -> Tensor:
    """Returns the number of episodes until the policy, from the first step, opens the lock with a probability above
    1/2.

    The result is [seeds] float64, with inf for seeds that need more than `max_episodes`. `right` is the probability
    that a token of the response that episodes are reset into is right; None means no resets. The right token has index
    0.
    """
    generator = torch.Generator().manual_seed(horizon)
    uniform = torch.full((seeds, horizon, 2), math.log(0.5), dtype=torch.float64)
    policy, steps = uniform, torch.arange(horizon)
    solved = torch.full((seeds,), math.inf, dtype=torch.float64)
    for update in range(max_episodes // BATCH):
        shape = (seeds, BATCH, 1)
        start = torch.zeros(shape, dtype=torch.int64)
        alive = torch.ones(shape, dtype=torch.bool)
        if right is not None:
            start = torch.randint(horizon, shape, generator=generator)
            alive = torch.rand(shape, generator=generator, dtype=torch.float64) < right ** start.double()
        drawn = torch.rand((seeds, BATCH, horizon), generator=generator, dtype=torch.float64)
        wrong = (drawn > policy[..., 0].exp().unsqueeze(1)) & (steps >= start)
        mistakes = wrong.cumsum(-1)
        visited = alive & (steps >= start) & (mistakes - wrong.long() == 0)
        opened = alive & (mistakes[..., -1:] == 0)
        q = torch.stack([_mean_return(visited & (wrong == taken), opened) for taken in (False, True)], -1)
        policy = npg_step(q, uniform, policy, lam=LOCK_LAM, eta=LOCK_ETA)
        chance = policy[..., 0].sum(-1).exp()
        solved = torch.where(solved.isinf() & (chance > 0.5), BATCH * (update + 1.0), solved)
        if not solved.isinf().any():
            break
    return solved


def _mean_return(visits: Tensor, opened: Tensor) -> Tensor:
    """Returns the fraction of the visits to each step that end with an open lock, [seeds, horizon]. The fraction is 0
    for a step without visits. `visits` is [seeds, episodes, horizon].
    """
    return (visits & opened).sum(1).double() / visits.sum(1).clamp(min=1)


def run_lock(out: Path, *, fast: bool) -> str:
    """Runs the lock experiment and returns its table in Markdown.

    For each horizon the table holds the number of episodes until the lock is solved: median over seeds, fastest and
    slowest seed. A full run (not `fast`) also appends a row per kind of resets to `out/results` and draws
    `out/figures/drpo_lock.png`.
    """
    horizons, seeds, limit = (FAST_HORIZONS, FAST_SEEDS, 2**13) if fast else (HORIZONS, SEEDS, MAX_EPISODES)
    found: dict[str, dict[int, Tensor]] = {}
    for name, right in GIVEN.items():
        found[name] = {}
        for horizon in horizons:
            found[name][horizon] = episodes_to_solve(horizon, right, seeds, limit)
            if found[name][horizon].isinf().all():
                break  # longer locks are harder
    if not fast:
        for name, by_horizon in found.items():
            row = {"bench": "papers", "paper": "drpo", "experiment": "lock", "resets": name, "batch": BATCH}
            row["episodes"] = {
                horizon: [n if n < math.inf else None for n in e.tolist()] for horizon, e in by_horizon.items()
            }
            append_row(row | {"max_episodes": limit, "seeds": seeds}, out / "results")
        draw(found, out / "figures" / "drpo_lock.png")
    return table(found)


def _or_none(number: float) -> float | None:
    """Replaces inf, which JSON does not have, by None."""
    return number if number < math.inf else None


def table(found: Mapping[str, Mapping[int, Tensor]]) -> str:
    horizons = list(dict.fromkeys(horizon for by_horizon in found.values() for horizon in by_horizon))
    lines = ["| H | " + " | ".join(found) + " |", "|---" * (1 + len(found)) + "|"]
    for horizon in horizons:
        cells = [_cell(by_horizon[horizon]) if horizon in by_horizon else "" for by_horizon in found.values()]
        lines.append(f"| {horizon} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(episodes: Tensor) -> str:
    middle, low, high = episodes.quantile(0.5, interpolation="lower"), episodes.min(), episodes.max()
    return f"{middle:.0f} [{low:.0f}, {high:.0f}]"


def draw(found: Mapping[str, Mapping[int, Tensor]], path: Path) -> None:
    """Draws the median number of episodes to solve against the horizon, on logarithmic axes.

    Error bars reach from the fastest to the slowest seed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.6), layout="constrained")
    panel = figure.subplots()
    for name, by_horizon in found.items():
        solved = {h: e[e.isfinite()] for h, e in by_horizon.items() if e.isfinite().all()}
        middle = [float(e.median()) for e in solved.values()]
        bars = [[m - float(e.min()) for m, e in zip(middle, solved.values(), strict=True)]]
        bars.append([float(e.max()) - m for m, e in zip(middle, solved.values(), strict=True)])
        panel.errorbar(list(solved), middle, bars, label=name, linewidth=1, capsize=2, marker="o", markersize=3)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    panel.set_xlabel("length of the lock", fontsize=8)
    panel.set_ylabel("episodes until it opens in half of all tries", fontsize=8)
    panel.legend(fontsize=7, title="responses that are reset to", title_fontsize=7)
    panel.tick_params(labelsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
