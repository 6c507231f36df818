"""The on-policy update: trains with the clipped losses in several passes over the packs of a batch of episodes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrlhf.algorithms.experience import Pack, pack_episodes
from fastrlhf.algorithms.open_update import OpenUpdate
from fastrlhf.config import PPOConfig
from fastrlhf.distributed.ranks import gathered, total
from fastrlhf.distributed.rows import Rows, SpreadRows
from fastrlhf.models.forward import scored_states, state_kl, state_logprobs, state_policy_loss, token_values
from fastrlhf.models.router_loss import begin_step
from fastrlhf.runtime.optim import Optimizer
from fastrlhf.runtime.step_metrics import StepMetrics
from fastrlhf.types import Experience, Rollout
from fastrlhf_kernels import LossOutput, Metric, Sum, policy_loss, value_loss
from fastrlhf_kernels.policy_loss import LOSS_TYPES


def update(
    config: PPOConfig,
    policy: PreTrainedModel,
    critic: PreTrainedModel | None,
    optimizer: Optimizer,
    rollouts: Sequence[Rollout],
    experience: Experience,
    packs: Sequence[Sequence[Pack]],
    seed: tuple[int, int],
    *,
    reference: PreTrainedModel | None = None,
    critic_only: bool = False,
    opened: OpenUpdate | None = None,
) -> dict[str, float]:
    """Makes `num_ppo_epochs` passes over the batch. After the first pass, mini-batches are drawn and packed anew. With
    compat "reference", which averages every micro-batch separately, micro-batches are drawn anew too.

    `reference` is needed only for an exact KL in the loss, which uses the output layer of the reference; the hidden
    states of the reference are in the experience. In the first pass a rank holds the states that it needs; later, the
    ranks exchange states before each mini-batch. With `critic_only` the policy is neither computed nor updated, and its
    metrics are absent. If the KL of a mini-batch exceeds `target_kl`, the update ends before the step of this
    mini-batch; the first step, at ratio 1, is always taken. `opened` keeps the progress of the update, which may have
    begun before the run was resumed.
    """
    opened = opened or OpenUpdate()
    policy_totals, value_totals, steps = opened.totals["policy"], opened.totals["value"], opened.steps
    num_stopped = 0
    # With compat "reference" losses and metrics of every micro-batch are averaged separately, as in the authors' code.
    alone = config.compat == "reference"
    # Losses are weighted means over the tokens of a mini-batch. For aggregation "sequence", the weight of a token is 1
    # / the tokens of its episode.
    by_sequence = config.aggregation == "sequence"
    shares = _episode_shares(experience.cu_rows, experience.trained) if by_sequence else None
    value_shares = _episode_shares(experience.cu_rows, torch.ones_like(experience.mask)) if by_sequence else None
    states = _reference_states(experience)
    for epoch, mini in remaining(mini_batches(config, rollouts, packs, seed, policy.device), opened):
        own_rows = torch.cat([item.index for item in mini])
        in_mini = gathered(own_rows)
        known = None if states is None or critic_only else states.rows(own_rows)
        drift = torch.zeros((), device=policy.device)
        for model in (policy, critic) if critic else (policy,):
            begin_step(model, config.batch_size // config.num_mini_batches)
        live_share = 0.0 if critic_only else _live_share(config, experience, policy_totals)
        for item in mini:
            inside = item.index if alone else in_mini
            share = len(mini) if alone else 1
            if not critic_only:
                num_tokens = experience.trained[inside].sum() * share
                weight = None if shares is None else _with_mean_1(shares, item.index, inside, num_tokens)
                if config.aggregation == "constant":
                    limit = config.batch_size // config.num_mini_batches * config.response_length
                    weight = (num_tokens / limit).expand(len(item.index))
                chosen = _policy_loss(
                    config, policy, reference, known, experience, item, weight, num_tokens, live_share
                )
                chosen.loss.backward()  # before the critic's forward, to save memory
                policy_totals.add(_averaged(chosen.metrics, "tokens") if alone else chosen.metrics)
                drift += chosen.metrics["approx_kl"].value / num_tokens
            if critic is None:
                continue
            assert experience.value is not None
            assert experience.returns is not None
            valued = value_loss(
                token_values(critic, item.batch),
                experience.value[item.index],
                experience.returns[item.index],
                torch.ones_like(item.index, dtype=torch.bool),
                num_tokens=len(inside) * share,
                clip=config.cliprange_value,
                weight=None if value_shares is None else _with_mean_1(value_shares, item.index, inside, len(inside)),
            )
            (config.vf_coef * valued.loss).backward()
            value_totals.add(_averaged(valued.metrics, "rows") if alone else valued.metrics)
        if config.target_kl is not None and steps and total(drift).item() > config.target_kl:
            num_stopped = config.num_ppo_epochs - epoch
            optimizer.skip(config.num_ppo_epochs * config.num_mini_batches - len(steps))
            break
        steps.append(optimizer.step())
    metrics = _training_metrics(
        {} if critic_only else policy_totals.means("tokens"),
        value_totals.means("rows") if critic else {},
        steps,
        config.dual_clip is not None,
    )
    return metrics if config.target_kl is None else metrics | {"policy/stopped_passes": float(num_stopped)}


def _reference_states(experience: Experience) -> SpreadRows | None:
    if experience.reference_states is None:
        return None
    assert experience.reference_rows is not None
    return SpreadRows(experience.reference_states, experience.reference_rows)


def remaining(
    batches: Iterable[tuple[int, Sequence[Pack]]], opened: OpenUpdate
) -> Iterator[tuple[int, Sequence[Pack]]]:
    """Yields the mini-batches on which an update has not trained yet; between two of them the run can be stopped."""
    for number, batch in enumerate(batches):
        if number < len(opened.steps):
            continue
        if number:
            opened.stop()
        yield batch


def mini_batches(
    config: PPOConfig,
    rollouts: Sequence[Rollout],
    packs: Sequence[Sequence[Pack]],
    seed: tuple[int, int],
    device: torch.device,
) -> Iterator[tuple[int, Sequence[Pack]]]:
    """Yields (number of the pass, packs) for every optimiser step."""
    for epoch in range(config.num_ppo_epochs):
        if epoch > 0 and (config.num_mini_batches > 1 or config.compat == "reference"):
            num_groups = len(rollouts) // config.num_generations
            order = np.random.default_rng([*seed, epoch]).permutation(num_groups).tolist()
            packs = pack_episodes(config, rollouts, order, device)
        for mini in packs:
            yield epoch, mini


def _averaged(metrics: Mapping[str, Metric], count: str) -> dict[str, Metric]:
    """Divides each summed metric by `metrics[count]`, so that a micro-batch contributes its mean and counts once."""
    number = metrics[count].value.clamp(min=1)
    return {name: Sum(x.value / number) if isinstance(x, Sum) else x for name, x in metrics.items()}


def _episode_shares(cu_rows: Tensor, trained: Tensor) -> Tensor:
    """Returns [R], 1 / the number of trained tokens of the row's episode; 0 for rows that are not trained."""
    lengths = cu_rows.diff().long()
    counts = torch.segment_reduce(trained.float(), "sum", lengths=lengths, unsafe=True)
    shares = (1 / counts).repeat_interleave(lengths, output_size=len(trained))
    return torch.where(trained, shares, 0.0)


def _with_mean_1(shares: Tensor, index: Tensor, inside: Tensor, count: Tensor | int) -> Tensor:
    """Returns [R of the pack]: the `shares` of the rows `index`, scaled so that the mean over the `count` rows of the
    mini-batch is 1."""
    return shares[index] * (count / shares[inside].sum())


def _live_share(config: PPOConfig, experience: Experience, finished: StepMetrics) -> float:
    """Returns the share of rows that are expected to have a gradient: the trained rows with an advantage, without the
    share that was clipped in the `finished` mini-batches of the update. With an entropy bonus or a KL in the loss every
    trained row has a gradient."""
    trained = experience.trained
    if config.entropy_coef > 0 or config.kl_placement == "loss":
        return trained.float().mean().item()
    live = (trained & (experience.advantage != 0)).float().mean().item()
    clips = config.loss_type != "cispo"  # in CISPO a clipped ratio is a constant factor of the gradient
    return live * (1 - clips * finished.own_mean("clip_fraction", "tokens"))


def _policy_loss(
    config: PPOConfig,
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
    known: Rows | None,
    experience: Experience,
    item: Pack,
    weight: Tensor | None,
    num_tokens: Tensor,
    live_share: float,
) -> LossOutput:
    """Computes the loss of one pack, divided by `num_tokens`; `weight` [R of the pack] has mean 1 over the mini-batch.
    `known`: the hidden states of the reference, for an exact KL in the loss.
    The metrics are those of `policy_loss`; `kl` is the estimate of `kl_estimator` if the KL is in the loss.
    """
    index, heat = item.index, item.temperature
    mask, states, targets = experience.trained[index], scored_states(policy, item.batch), item.batch.targets
    rows = (experience.sampler_logprob[index], experience.advantage[index], mask)
    sampled = config.kl_placement == "loss" and config.kl_estimator != "exact"
    importance = None if experience.weight is None else experience.weight[index]
    weights = [x for x in (weight, importance) if x is not None]
    entropy, token_weight = config.entropy_coef > 0, reduce(torch.mul, weights) if weights else None
    options: dict[str, Any] = {
        "num_tokens": num_tokens,
        "loss_type": config.loss_type if config.loss_type in LOSS_TYPES else "ppo",
        "clip_low": 1.0 if config.loss_type == "cispo" else config.cliprange,  # CISPO bounds the ratio only from above
        "clip_high": config.cliprange if config.cliprange_high is None else config.cliprange_high,
        "dual_clip": config.dual_clip,
        "reference_logprob": experience.reference_logprob[index] if sampled else None,
        "kl_coef": experience.kl_coef if sampled else 0.0,
        "kl_kind": "k3" if config.kl_estimator == "k3" else "k2",
        "entropy_coef": config.entropy_coef,
    }
    exact = None
    if known is not None:
        assert reference is not None
        theirs = known.at(index)
        scored = state_kl(policy, states, reference, theirs, targets, temperature=heat, entropy=entropy)
        exact = scored.kl
    elif item.kept is not None or config.loss_type == "gspo":
        scored = state_logprobs(policy, states, targets, temperature=heat, kept=item.kept, entropy=entropy)
    else:
        options |= {"temperature": heat, "token_weight": token_weight, "live_share": live_share}
        return state_policy_loss(policy, states, targets, *rows, **options)
    assert scored.logprob is not None
    segments = item.batch.cu_rows if config.loss_type == "gspo" else None
    options |= {"cu_seqlens": segments, "weight": token_weight, "entropy": scored.entropy}
    loss, metrics = policy_loss(scored.logprob, *rows, **options)
    if exact is None:
        return LossOutput(loss, metrics)
    # The KL of a state does not depend on the token drawn there, so it gets no importance weight.
    kl = torch.where(mask, exact, 0.0)
    charged = kl if weight is None else weight * kl
    return LossOutput(loss + experience.kl_coef * charged.sum() / num_tokens, {**metrics, "kl": Sum(kl.detach().sum())})


def _training_metrics(
    policy: Mapping[str, float], value: Mapping[str, float], steps: Sequence[Mapping[str, float]], dual_clip: bool
) -> dict[str, float]:
    """Returns the metrics of an update under TRL's names: means over the tokens of all passes, and gradient norms
    averaged over the optimiser steps. `policy/clipfrac_avg` excludes tokens of the dual clip, which have a separate
    metric. `policy` is empty if the policy was not trained, `value` if there is no critic."""
    metrics = {"learning_rate": steps[-1]["learning_rate"]}
    if policy:
        metrics |= {
            "loss/policy_avg": policy["policy_loss"],
            "policy/approxkl_avg": policy["approx_kl"],
            "policy/clipfrac_avg": policy["clip_fraction"] - policy["dual_clip_fraction"],
            "val/ratio": policy["ratio"],
            "grad_norm": float(np.mean([step["grad_norm"] for step in steps])),
        }
    for name in ("aux_loss", "value_aux_loss"):
        if name in steps[-1]:
            metrics[name] = float(np.mean([step[name] for step in steps]))
    if dual_clip and policy:
        metrics["policy/dual_clipfrac_avg"] = policy["dual_clip_fraction"]
    if "kl" in policy:
        metrics["loss/kl_avg"] = policy["kl"]
    if value:
        metrics |= {
            "loss/value_avg": value["value_loss"],
            "val/clipfrac_avg": value["value_clip_fraction"],
            "value_grad_norm": float(np.mean([step["value_grad_norm"] for step in steps])),
        }
    return metrics
