"""Runs Algorithm 1 of RTO (Zhong et al. 2024, arXiv 2404.18922, section 4.1) on small trees: does pessimism help?

A response consists of `HORIZON` tokens out of `ACTIONS`; the state is the sequence of tokens so far. The true reward is
linear, phi . theta*, with one feature per state and token and |theta*| = `BOUND`. Pairs of responses are labelled by a
Bradley-Terry model on the sums of their token rewards. From these labels the algorithm computes

    theta        the maximum-likelihood estimate with |theta| <= BOUND
    Sigma        RIDGE I + sum over pairs of D D^T, where D is the difference of the two feature sums
    reward       phi . theta - rho |phi| in the norm of Sigma^-1, at every token
    policy       exact soft value iteration against a uniform reference with KL coefficient `BETA`

The sub-optimality is V*(s_1) - V(s_1), where both values use the true reward and the KL. Whether pessimism helps
depends on the policy that wrote the responses. There are three kinds of writers: good writers rarely choose a bad
token, blind writers rarely choose the last token regardless of its reward, bad writers rarely choose a good token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.results import append_row

HORIZON, ACTIONS = 3, 3
BOUND, BETA, RIDGE = 6.0, 0.1, 1.0
WRITERS = ("good", "blind", "bad")
NUM_PAIRS = (50, 200, 1000)
RHOS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, math.inf)
"""Strengths of the pessimism penalty. With inf the policy minimises only the penalty."""
PROBLEMS, FAST_PROBLEMS = 100, 20
FIT_STEPS = 2000

SIZES = tuple(ACTIONS ** (level + 1) for level in range(HORIZON))
NUM_FEATURES, NUM_RESPONSES = sum(SIZES), ACTIONS**HORIZON


def levels(cells: Tensor) -> list[Tensor]:
    """Splits [..., features] into one view per step h = 0 .. HORIZON - 1: [..., ACTIONS^h states, ACTIONS]."""
    return [level.unflatten(-1, (-1, ACTIONS)) for level in cells.split(SIZES, -1)]


def response_features() -> Tensor:
    """Returns the feature sum of every response, [responses, features] float64. Responses are in lexical order."""
    columns = [torch.eye(size, dtype=torch.float64).repeat_interleave(NUM_RESPONSES // size, 0) for size in SIZES]
    return torch.cat(columns, 1)


def plan(reward: Tensor, log_reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Finds the policy that maximises E[sum of rewards - beta KL], by soft value iteration.

    `reward` and `log_reference` are token rewards and log-probs [..., features]. Returns the policy's log-probs
    [..., features] and its value [...] at the prompt:

    V(s) = beta log sum_a pi_ref(a|s) exp((r(s, a) + V(s')) / beta), pi = pi_ref exp((r + V(s') - V(s)) / beta).
    """
    value = reward.new_zeros((*reward.shape[:-1], NUM_RESPONSES))
    policy: list[Tensor] = []
    for earned, log_ref in zip(reversed(levels(reward)), reversed(levels(log_reference)), strict=True):
        q = earned + value.view_as(earned)
        value = beta * (log_ref + q / beta).logsumexp(-1)
        policy.insert(0, (log_ref + (q - value.unsqueeze(-1)) / beta).flatten(-2))
    return torch.cat(policy, -1), value.squeeze(-1)


def evaluate(logprob: Tensor, reward: Tensor, log_reference: Tensor, beta: float) -> Tensor:
    """Returns the value E[sum of rewards - beta log(policy / reference)] of a policy at the prompt, [...]. `logprob`
    holds the log-probs [..., features] of the policy.
    """
    value = reward.new_zeros((*reward.shape[:-1], NUM_RESPONSES))
    charged = reward - beta * (logprob - log_reference)
    for earned, log_pi in zip(reversed(levels(charged)), reversed(levels(logprob)), strict=True):
        value = (log_pi.exp() * (earned + value.view_as(earned))).sum(-1)
    return value.squeeze(-1)


def uniform_policy() -> Tensor:
    """Returns the log-probs of the uniform policy, [features] float64."""
    return torch.full((NUM_FEATURES,), -math.log(ACTIONS), dtype=torch.float64)


def fit_reward(wins: Tensor, bound: float) -> Tensor:
    """Returns the maximum-likelihood estimate of theta in the Bradley-Terry model with |theta| <= bound, [problems,
    features].

    `wins` [problems, responses, responses] counts how often the first response was preferred to the second. Uses
    projected gradient ascent with Nesterov momentum from theta = 0. Directions of theta that no pair determines stay 0.
    """
    features = response_features()
    pairs = wins.sum((-2, -1), keepdim=True)
    # If all pairs compare a response with itself, there is nothing to fit and theta stays 0.
    curvature = (0.25 * torch.linalg.matrix_norm(_scatter(wins, features) / pairs, 2)).clamp(min=1e-9)
    theta = look = torch.zeros(len(wins), features.shape[1], dtype=torch.float64)
    momentum = 1.0
    for _ in range(FIT_STEPS):
        total = look @ features.T
        surprise = wins / pairs * (total.unsqueeze(-2) - total.unsqueeze(-1)).sigmoid()
        step = look + ((surprise.sum(-1) - surprise.sum(-2)) @ features) / curvature.unsqueeze(-1)
        new = step * (bound / step.norm(dim=-1, keepdim=True).clamp(min=bound))
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        look = new + (momentum - 1) / following * (new - theta)
        theta, momentum = new, following
    return theta


def _scatter(wins: Tensor, features: Tensor) -> Tensor:
    """Returns the sum over pairs of D D^T (see the module docstring), [problems, features, features]."""
    met = wins + wins.transpose(-2, -1)
    return features.T @ (torch.diag_embed(met.sum(-1)) - met) @ features


def covariance(wins: Tensor) -> Tensor:
    """Returns the matrix Sigma of the module docstring, [problems, features, features] float64."""
    return RIDGE * torch.eye(NUM_FEATURES, dtype=torch.float64) + _scatter(wins, response_features())


@dataclass(frozen=True, kw_only=True)
class Problems:
    """Problems with random true rewards, and labelled pairs of responses by one kind of writers."""

    theta: Tensor
    """The true theta*, [problems, features] float64."""
    wins: Tensor
    """How often the first response was preferred to the second, [problems, responses, responses] float64."""


def draw_problems(writers: str, num_pairs: int, num_problems: int) -> Problems:
    """Draws problems. The rewards and random numbers of problem i do not depend on the kind of writers and the number
    of pairs."""
    features, rows = response_features(), torch.arange(num_pairs)
    thetas, counts = [], []
    for problem in range(num_problems):
        generator = torch.Generator().manual_seed(problem)
        theta = torch.randn(NUM_FEATURES, generator=generator, dtype=torch.float64)
        theta *= BOUND / theta.norm()
        written = (features @ _write(writers, theta)).exp()
        pairs = torch.multinomial(written, 2 * num_pairs, replacement=True, generator=generator).view(num_pairs, 2)
        gap = (features @ theta)[pairs] @ torch.tensor([1.0, -1.0], dtype=torch.float64)
        first = torch.rand(num_pairs, generator=generator, dtype=torch.float64) < gap.sigmoid()
        winner, loser = pairs[rows, (~first).long()], pairs[rows, first.long()]
        count = torch.zeros(NUM_RESPONSES, NUM_RESPONSES, dtype=torch.float64)
        counts.append(count.index_put_((winner, loser), torch.ones(num_pairs, dtype=torch.float64), accumulate=True))
        thetas.append(theta)
    return Problems(theta=torch.stack(thetas), wins=torch.stack(counts))


def _write(writers: str, theta: Tensor) -> Tensor:
    """Returns the log-probs of the policy of a kind of writers ("good", "blind" or "bad"), [features]."""
    if writers == "blind":
        return torch.tensor([0.6, 0.37, 0.03], dtype=torch.float64).log().repeat(NUM_FEATURES // ACTIONS)
    return plan(theta if writers == "good" else -theta, uniform_policy(), beta=0.4)[0]


def pessimism(problems: Problems) -> dict[str, Tensor]:
    """Returns the sub-optimality [problems] of the policy for each rho, and of the reference.

    The entry "error" uses the true error |theta - theta*|_Sigma as rho; this error is the entry "radius". "guarantee"
    is the paper's upper bound on the sub-optimality at this rho, 2 rho E*[sum |phi|] - beta KL(pi*

    pi).
    """
    reference = uniform_policy()
    best, best_value = plan(problems.theta, reference.expand_as(problems.theta), BETA)
    fitted, sigma = fit_reward(problems.wins, BOUND), covariance(problems.wins)
    penalty = torch.linalg.inv(sigma).diagonal(dim1=-2, dim2=-1).sqrt()
    error = fitted - problems.theta
    radius = torch.einsum("pi,pij,pj->p", error, sigma, error).sqrt()
    rewards = {f"{rho:g}": -penalty * 1e6 if math.isinf(rho) else fitted - rho * penalty for rho in RHOS}
    rewards["error"] = fitted - radius.unsqueeze(-1) * penalty
    policies = {name: plan(reward, reference.expand_as(reward), BETA)[0] for name, reward in rewards.items()}
    policies["reference"] = reference.expand_as(problems.theta)
    gaps = {name: best_value - evaluate(policy, problems.theta, reference, BETA) for name, policy in policies.items()}
    met = visits(best)
    divergence = (met * (best - policies["error"])).sum(-1)
    return gaps | {"guarantee": 2 * radius * (met * penalty).sum(-1) - BETA * divergence, "radius": radius}


def visits(logprob: Tensor) -> Tensor:
    """Returns the probability that a policy reaches a state and chooses a token in this state, [..., features]."""
    features = response_features()
    return (logprob @ features.T).exp() @ features


def theory_rho(delta: float = 0.1) -> float:
    """Returns the rho of the paper's theorem, with the unspecified constant C set to 1."""
    spread = 2 * HORIZON * BOUND
    inverse = 2 + math.exp(-spread) + math.exp(spread)
    return math.sqrt(NUM_FEATURES * math.log(1 / delta) * inverse + RIDGE * BOUND**2)


def run_pessimism(out: Path, *, fast: bool) -> str:
    """Runs Algorithm 1 for all kinds of writers and numbers of pairs; returns the table in Markdown.

    A full run (not `fast`) also appends a row per kind of writers and number of pairs to `out/results`, and draws
    `out/figures/rto_pessimism.png`.
    """
    num_problems = FAST_PROBLEMS if fast else PROBLEMS
    found = {
        (writers, num): pessimism(draw_problems(writers, num, num_problems)) for writers in WRITERS for num in NUM_PAIRS
    }
    if not fast:
        for (writers, num), gaps in found.items():
            row = {"bench": "papers", "paper": "rto", "experiment": "pessimism", "writers": writers, "num_pairs": num}
            append_row(row | {"problems": num_problems} | _numbers(gaps), out / "results")
        draw(found, out / "figures" / "rto_pessimism.png")
    return table(found)


def _numbers(gaps: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    means = {name: mean_and_interval(values) for name, values in gaps.items()}
    return {
        "mean": {name: round(mean, 5) for name, (mean, _) in means.items()},
        "ci": {name: round(half, 5) for name, (_, half) in means.items()},
    }


def mean_and_interval(values: Tensor) -> tuple[float, float]:
    """Returns the mean and half the width of its 95 % interval, by the normal approximation (there are many
    problems)."""
    return float(values.mean()), 1.96 * float(values.std()) / len(values) ** 0.5


def table(found: Mapping[tuple[str, int], Mapping[str, Tensor]]) -> str:
    """Formats a Markdown table: mean sub-optimality by kind of writers, number of pairs and rho.

    The last column is the difference between rho = true error and rho = 0, paired by problem, with its 95 % interval.
    """
    names = [f"{rho:g}" for rho in RHOS] + ["error"]
    lines = ["| writers | pairs | reference | " + " | ".join(f"rho {name}" for name in names) + " | error minus 0 |"]
    lines.append("|---" * (4 + len(names)) + "|")
    for (writers, num), gaps in found.items():
        mean, half = mean_and_interval(gaps["error"] - gaps["0"])
        cells = [f"{float(gaps[name].mean()):.3f}" for name in ["reference", *names]]
        lines.append(f"| {writers} | {num} | " + " | ".join(cells) + f" | {mean:.3f} +- {half:.3f} |")
    return "\n".join(lines)


def draw(found: Mapping[tuple[str, int], Mapping[str, Tensor]], path: Path) -> None:
    """Draws the sub-optimality against rho: a panel per kind of writers, a line per number of pairs.

    The dotted line is the reference policy.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    panels = figure.subplots(1, len(WRITERS), sharey=True)
    names = [f"{rho:g}" for rho in RHOS]
    for writers, panel in zip(WRITERS, panels, strict=True):
        for num in NUM_PAIRS:
            means, halves = zip(*(mean_and_interval(found[writers, num][name]) for name in names), strict=True)
            panel.errorbar(range(len(names)), means, halves, label=f"{num} pairs", linewidth=1, capsize=2)
        panel.axhline(float(found[writers, NUM_PAIRS[0]]["reference"].mean()), color="black", ls=":", linewidth=0.8)
        panel.set_xticks(range(len(names)), names, fontsize=7)
        panel.set_title(f"{writers} writers", fontsize=9)
        panel.set_xlabel("rho", fontsize=8)
        panel.tick_params(labelsize=7)
    panels[0].set_ylabel("sub-optimality", fontsize=8)
    panels[0].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
