"""Computes those metrics of a batch of episodes that are known before the update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from fastrlhf.algorithms.advantages import explained_variance
from fastrlhf.algorithms.guards import raise_not_finite
from fastrlhf.config import PPOConfig
from fastrlhf.rewards.terms import Term, reward_metrics
from fastrlhf.types import Experience, Rollout
from fastrlhf_kernels import kl_estimate

NUM_DEPTHS = 5
"""Number of equal bins for the scores by reset depth, which is the share of the response that the reset copied."""


def episode_metrics(
    config: PPOConfig,
    rollouts: Sequence[Rollout],
    terms: Mapping[str, Term],
    experience: Experience,
    entropy: Tensor,
    drawn: Tensor,
    exact_kl: Tensor | None,
) -> dict[str, float]:
    """Returns the metrics of episodes under TRL's names. `objective/kl` covers only the sampled tokens, which are fewer
    after a reset; to compare runs with different reset probabilities, use `eval_objective/kl`, which covers full
    responses. It is the mean of k1; `objective/kl_k2` and `objective/kl_k3` are the means of the estimates k2 and k3,
    which are never negative. `sampling/outside_clip` is the share of tokens whose ratio between trainer and engine lies
    outside the clip range of the loss. `completions/clipped_ratio` is the share of responses that were cut at the
    length limit, and `objective/scores_clipped` their mean score, if there are any.

    Raises ValueError, naming the row, if an advantage, or a number from which it is computed, is not finite. This check
    does not add a wait for the GPU.
    """
    mask, logprob, scores = experience.mask, experience.sampler_logprob, experience.scores
    assert scores is not None

    def over_sampled(values: Tensor) -> Tensor:  # indexing by the mask would wait for the GPU
        return torch.where(mask, values, 0.0).sum()

    def kl(kind: str) -> Tensor:
        return kl_estimate(logprob, experience.reference_logprob, kind=kind)

    log_ratio = logprob - logprob.masked_scatter(mask, drawn)
    difference, ratio = log_ratio.abs(), log_ratio.exp()
    high = config.cliprange if config.cliprange_high is None else config.cliprange_high
    outside = ((ratio < 1 - config.cliprange) | (ratio > 1 + high)).float()
    num, num_sampled = len(rollouts), len(drawn)
    paid = {name: over_sampled(term.reward) / num for name, term in terms.items()}
    total = torch.stack(list(paid.values())).sum()
    # TRL counts the penalty for a missing EOS as part of the score.
    by_score = sum(paid[name] for name in score_names(terms)) + paid.get("missing_eos", 0.0)
    values = {
        "objective/scores": scores.mean(),
        "objective/kl": over_sampled(logprob - experience.reference_logprob) / num,
        **{f"objective/kl_{kind}": over_sampled(kl(kind)) / num for kind in ("k2", "k3")},
        "objective/entropy": -over_sampled(logprob) / num,
        "objective/non_score_reward": total - by_score,
        "objective/rlhf_reward": total,
        "policy/entropy_avg": over_sampled(entropy) / num_sampled,
        "sampling/sampling_logp_difference/mean": over_sampled(difference) / num_sampled,
        "sampling/sampling_logp_difference/max": difference.max(),
        "sampling/outside_clip": over_sampled(outside) / num_sampled,
        **reward_metrics(terms, experience.cu_rows),
        "all_finite": experience.advantage.isfinite().all(),
    }
    if experience.value is not None and experience.returns is not None:
        explained = explained_variance(experience.value, experience.returns, torch.ones_like(mask))
        values["critic/explained_var"] = explained
    if exact_kl is not None:
        values["objective/kl_exact"] = over_sampled(exact_kl) / num
    if experience.weight is not None:
        capped = (experience.weight == config.sampler_is_cap).float()
        values["sampling/is_weight_mean"] = over_sampled(experience.weight) / num_sampled
        values["sampling/is_weight_capped"] = over_sampled(capped) / num_sampled
    numbers = torch.stack([value.float() for value in values.values()]).tolist()
    metrics = dict(zip(values, numbers, strict=True))
    if not metrics.pop("all_finite"):
        raise_not_finite(_numbers(terms, experience), experience.cu_rows, rollouts)
    metrics |= {
        "policy/kl_coef": experience.kl_coef,
        "val/num_eos_tokens": float(sum(rollout.ended for rollout in rollouts)),
        "completions/mean_length": float(np.mean([len(rollout.completion) for rollout in rollouts])),
    }
    by_episode, clipped = scores.cpu().numpy(), np.array([not rollout.ended for rollout in rollouts])
    metrics["completions/clipped_ratio"] = float(clipped.mean())
    if clipped.any():
        metrics["objective/scores_clipped"] = float(by_episode[clipped].mean())
    if config.reset_prob > 0:
        metrics |= _reset_metrics(rollouts, by_episode)
    return metrics


def score_names(terms: Mapping[str, Term]) -> list[str]:
    """Returns the names of the rewards that count as the score: the judge's or, without a judge, those of the reward
    functions or of a DPO model."""
    others = ("missing_eos", "kl", "length", "overlong")
    return ["score"] if "score" in terms else [name for name in terms if name not in others]


def sum_of_rewards(terms: Mapping[str, Term], cu_rows: Tensor) -> Tensor:
    """Returns [N], the sum of rewards that replaces the score if there is no judge."""
    rewards = reduce(torch.add, (terms[name].reward for name in score_names(terms)))
    return torch.segment_reduce(rewards, "sum", lengths=cu_rows.diff().long(), unsafe=True)


def _numbers(terms: Mapping[str, Term], experience: Experience) -> dict[str, Tensor]:
    """Returns all tensors [R] from which the advantages are computed, by their names in error messages, causes before
    effects."""
    numbers = {"log-prob of the policy": experience.sampler_logprob}
    numbers["log-prob of the reference"] = experience.reference_logprob
    if experience.value is not None:
        numbers["value of the critic"] = experience.value
    numbers |= {f"reward {name!r}": term.reward for name, term in terms.items()}
    return numbers | {"advantage": experience.advantage}


def _reset_metrics(rollouts: Sequence[Rollout], scores: np.ndarray) -> dict[str, float]:
    """Returns mean scores by the place where episodes start. `drpo/score_depth_i` is the mean over resets that copied a
    share of the response in [i / 5, (i + 1) / 5); it is absent if there is no such reset."""
    num_reset = np.array([rollout.prefix.num_reset for rollout in rollouts])
    fifth = np.array([int(NUM_DEPTHS * rollout.prefix.reset_depth) for rollout in rollouts])
    members = {"drpo/score_reset": num_reset > 0, "drpo/score_scratch": num_reset == 0}
    members |= {f"drpo/score_depth_{i}": (num_reset > 0) & (fifth == i) for i in range(NUM_DEPTHS)}
    return {
        "drpo/reset_fraction": float((num_reset > 0).mean()),
        "drpo/prefix_len_mean": float(num_reset.mean()),
        **{name: float(scores[inside].mean()) for name, inside in members.items() if inside.any()},
    }
