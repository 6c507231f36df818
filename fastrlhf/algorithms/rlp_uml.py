"""RLP-UML: a reward model whose representation is trained on views (Lang et al. 2024, arXiv 2403.19279, section 4.2).

Two different answers of the policy to one prompt are its views v1, v2. From the hidden state h of a view that the score
head reads, two networks compute a Gaussian latent z ~ N(mean(h), std(h)^2). In addition to the loss on pairs, the
reward model minimises

    lambda L_M,   L_M = mean over prompts of -I(z1; z2) + beta SKL(p(z|v1), p(z|v2))

the multi-view information bottleneck (Federici et al. 2020, arXiv 2002.07017, eq. 4): features that two answers share
are kept, others are not. I is the Jensen-Shannon estimate of mutual information (Hjelm et al. 2019, arXiv 1808.06670,
eq. 4), with a critic T that is trained at the same time:

    I = mean -softplus(-T(z1_i, z2_i)) - mean over j != i of softplus(T(z1_j, z2_i)),   between -log 4 and 0

and SKL is the mean of the two directed KLs, in closed form. Heads and critic are discarded afterwards.

The paper does not give the position of h (here the last token, which the score reads), the sizes of the networks, the
negatives, their learning rate, or a schedule of beta; these are keys of RLPConfig. Constant beta 1 ("paper")
collapses: I ends at -log 4, no information. The ramp ("robust") is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrlhf.algorithms.completions import Answers, two_that_differ
from fastrlhf.config import RLPConfig, require
from fastrlhf.data.packing import group
from fastrlhf.types import Segment
from fastrlhf_kernels import LossOutput, Metric, Sum

ORDER_STREAM, PAIR_STREAM, NOISE_STREAM = 11, 12, 13
"""Streams of the random draws: prompts of a step, the two views of a prompt, noise of a latent."""

INACTIVE = -1.36
"""Below this, I is close to -log 4 = -1.386, the value of a critic that distinguishes nothing."""

CONTRAST_TEMPERATURE = 0.1


class Gaussian(NamedTuple):
    """A factorised normal distribution per row: mean and log of the standard deviation, [N, L] float32 each."""

    mean: Tensor
    """[N, L]"""
    log_std: Tensor
    """[N, L]"""


class ViewHeads(nn.Module):
    """The two networks of the latents and the critic, in float32; their initial weights depend only on the seed."""

    def __init__(self, config: RLPConfig, hidden_size: int, device: torch.device) -> None:
        super().__init__()
        width, latent = config.view_width, config.view_latent
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.mean = _mlp(hidden_size, width, latent)
            self.std = _mlp(hidden_size, width, latent)
            anchor = hidden_size if config.mib_loss == "infomax" else latent
            self.critic = _mlp(anchor + latent, width, 1) if config.view_critic == "mlp" else None
        self.to(device)

    def forward(self, hidden: Tensor) -> Gaussian:
        """Computes the latents of hidden states [N, D] of any dtype."""
        hidden = hidden.float()
        return Gaussian(self.mean(hidden), (F.softplus(self.std(hidden)) + 1e-4).log())

    def score(self, first: Tensor, second: Tensor) -> Tensor:
        """Returns [B, B]: T(first_j, second_i) of latents [B, L]."""
        if self.critic is None:
            return first @ second.T
        num = len(first)
        rows = torch.cat([first.repeat_interleave(num, 0), second.repeat(num, 1)], 1)
        return self.critic(rows).view(num, num)


def symmetrised_kl(first: Gaussian, second: Gaussian) -> Tensor:
    """Returns (KL(p1 || p2) + KL(p2 || p1)) / 2, [N] nats. The logarithms cancel, and the result is never below 0."""
    log_ratio = (2 * (first.log_std - second.log_std)).clamp(-20, 20)
    squared = (first.mean - second.mean) ** 2
    scaled = squared * ((-2 * first.log_std).exp() + (-2 * second.log_std).exp())
    return 0.25 * (log_ratio.exp() + (-log_ratio).exp() + scaled - 2).sum(-1)


def jensen_shannon(scores: Tensor, negatives: str = "all") -> Tensor:
    """Returns [B], the contribution to I of each column i of the critic's scores [B, B], T(z1_j, z2_i). `negatives`:
    "all" other prompts, or "roll", the previous one. Raises ValueError for a batch of one, which has no negative."""
    num = len(scores)
    require(num >= 2, "views_per_step", num, "at least 2 prompts: the others are a view's negatives")
    positive = -F.softplus(-scores.diagonal())
    against = F.softplus(scores)
    if negatives == "roll":
        columns = torch.arange(num, device=scores.device)
        return positive - against[columns - 1, columns]
    return positive - (against.sum(0) - against.diagonal()) / (num - 1)


def info_nce(first: Tensor, second: Tensor) -> Tensor:
    """Returns [B], the symmetric contrastive loss in nats of two batches of latents [B, L] (van den Oord et al. 2018,
    arXiv 1807.03748)."""
    logits = F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).T / CONTRAST_TEMPERATURE
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels, reduction="none") + F.cross_entropy(logits.T, labels, reduction="none")) / 2


def view_loss(
    config: RLPConfig, heads: ViewHeads, hidden: Tensor, noise: Tensor, *, beta: float, num_views: float
) -> LossOutput:
    """Computes L_M from hidden states [2B, D] and standard normal noise [2B, L]; the two views of a prompt are
    adjacent.

    The loss is a sum over the B prompts, which are each other's negatives, divided by `num_views`. Metrics are sums:
    views, jsd, skl, mutual_information (nats; the estimate of Federici et al., logged and not trained), std and
    mean_square (per dimension of a latent).
    """
    latent = heads(hidden)
    sample = latent.mean + latent.log_std.exp() * noise
    first, second = Gaussian(latent.mean[::2], latent.log_std[::2]), Gaussian(latent.mean[1::2], latent.log_std[1::2])
    skl, num = symmetrised_kl(first, second), len(first.mean)
    metrics: dict[str, Tensor] = {"skl": skl.sum()}
    if config.mib_loss == "cl":
        require(num >= 2, "views_per_step", num, "at least 2 prompts: the others are a view's negatives")
        losses = info_nce(first.mean, second.mean)
    else:
        anchor = hidden[::2].float() if config.mib_loss == "infomax" else sample[::2]
        scores = heads.score(anchor, sample[::2] if config.mib_loss == "infomax" else sample[1::2])
        information = jensen_shannon(scores, config.view_negatives)
        losses = -information + beta * skl if config.mib_loss == "mib" else -information
        metrics |= {"jsd": information.sum(), "mutual_information": num * _mutual_information(scores)}
    metrics |= {"std": latent.log_std.exp().mean() * num, "mean_square": (latent.mean**2).mean() * num}
    sums: dict[str, Metric] = {name: Sum(value.detach()) for name, value in metrics.items()}
    return LossOutput(losses.sum() / num_views, sums | {"views": Sum(torch.tensor(float(num), device=hidden.device))})


def beta_at(config: RLPConfig, step: int, num_steps: int) -> float:
    """Returns beta, the weight of SKL, at a step counted from 0."""
    ramp = config.beta_ramp * (num_steps - 1)
    if config.mib_profile == "paper" or step >= ramp:
        return config.beta_end
    return config.beta_start * (config.beta_end / config.beta_start) ** (step / ramp)


def is_active(jsd: Sequence[float]) -> bool:
    """Returns whether the mean of I over the last tenth of a run is above `INACTIVE`; otherwise the views had no
    effect."""
    last = jsd[-max(1, len(jsd) // 10) :]
    return sum(last) / len(last) > INACTIVE


@dataclass(frozen=True, kw_only=True)
class Views:
    """The second objective of a reward model, the loss on views, and the answers from which its views are drawn."""

    config: RLPConfig
    answers: Sequence[Answers]

    def open(self, hidden_size: int, device: torch.device, num_steps: int) -> ViewObjective:
        """Makes the loss on views for a run of `num_steps` steps. Raises ValueError if fewer prompts than a step needs
        have two different answers."""
        usable = [answers for answers in self.answers if answers.differ]
        most = len(usable)
        require(
            self.config.views_per_step <= most,
            "views_per_step",
            self.config.views_per_step,
            f"at most {most}, the prompts with two different answers among {len(self.answers)}",
        )
        return ViewObjective(
            config=self.config,
            answers=usable,
            heads=ViewHeads(self.config, hidden_size, device),
            num_steps=num_steps,
        )


@dataclass(frozen=True, kw_only=True)
class ViewObjective:
    """Draws the views of every step and computes their loss."""

    config: RLPConfig
    answers: Sequence[Answers]
    heads: ViewHeads
    num_steps: int

    def draw(self, step: int) -> list[list[Segment]]:
        """Draws `views_per_step` different prompts and two views of each, as trees. Every prompt is drawn once
        before any is drawn again, except for a remainder smaller than a step."""
        trees = []
        for epoch, i in self._prompts(step):
            answers = self.answers[i]
            draw = np.random.default_rng([self.config.seed, PAIR_STREAM, epoch, answers.row])
            responses = [answers.responses[k] for k in two_that_differ(answers, draw)]
            trees.append(group(answers.prompt, responses, scored=False, share_prompt=True))
        return trees

    def loss(self, hidden: Tensor, step: int) -> LossOutput:
        """Computes lambda L_M from the last hidden states [2B, D] of the views that `draw` returned for this step."""
        noise = np.concatenate(
            [
                np.random.default_rng([self.config.seed, NOISE_STREAM, step, self.answers[i].row]).standard_normal(
                    (2, self.config.view_latent), dtype=np.float32
                )
                for _, i in self._prompts(step)
            ]
        )
        output = view_loss(
            self.config,
            self.heads,
            hidden,
            torch.from_numpy(noise).to(hidden.device, non_blocking=True),
            beta=self.beta(step),
            num_views=len(hidden) // 2,
        )
        return LossOutput(self.config.mib_weight * output.loss, output.metrics)

    @property
    def learning_rate(self) -> float:
        return self.config.view_learning_rate

    def beta(self, step: int) -> float:
        return beta_at(self.config, step, self.num_steps)

    def _prompts(self, step: int) -> list[tuple[int, int]]:
        """Returns (epoch, index into the answers) of every prompt of a step."""
        size = self.config.views_per_step
        epoch, batch = divmod(step, len(self.answers) // size)
        order = np.random.default_rng([self.config.seed, ORDER_STREAM, epoch]).permutation(len(self.answers))
        return [(epoch, i) for i in order[batch * size : (batch + 1) * size].tolist()]


def _mutual_information(scores: Tensor) -> Tensor:
    """Mutual information in nats, exact for an optimal critic: mean T(positive) - mean exp T(negative) + 1."""
    num = len(scores)
    ratios = scores.clamp(max=20).exp()
    return scores.diagonal().mean() - (ratios.sum() - ratios.diagonal().sum()) / (num * (num - 1)) + 1


def _mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs))
    )
