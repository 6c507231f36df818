"""From rollouts to what an on-policy update needs: packs, log-probs, values, rewards, advantages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrlhf.algorithms.advantages import (
    explained_variance,
    group_normalised,
    leave_one_out,
    length_weighted,
    whiten,
    whitening_scale,
)
from fastrlhf.algorithms.guards import raise_not_finite
from fastrlhf.config import PPOConfig
from fastrlhf.data.packing import forest, in_order, num_computed, own_micro_batches, pack, sequence, tree
from fastrlhf.distributed.ranks import total
from fastrlhf.models.forward import hidden_states, read_scores, scored_states, state_kl, state_logprobs
from fastrlhf.models.sharding import give_back
from fastrlhf.rewards.terms import Episodes, Rewards, Term, own_kl_advantage, reward_metrics
from fastrlhf.rollout.engine import end_index
from fastrlhf.types import Experience, PackedBatch, Rollout, Segment
from fastrlhf_kernels import gae, kl_estimate

NUM_DEPTHS = 5
"""Bins of equal width in which scores are reported by how much of the response a reset gave away."""


@dataclass(frozen=True, kw_only=True)
class Pack:
    """A micro-batch of episodes: the packed tokens and where their rows lie in the flat Experience."""

    batch: PackedBatch
    index: Tensor
    """[R of the pack] int64"""


def pack_episodes(
    config: PPOConfig, rollouts: Sequence[Rollout], order: Sequence[int], device: torch.device
) -> list[list[Pack]]:
    """Mini-batches of packs, whole groups of `num_generations` rollouts in the given order of the groups; of several
    ranks each has packs of its own.

    The rows of an episode are its sampled tokens; under compat "reference" the reset tokens before them as well. With
    `share_trunks` a group is one tree, never cut by a micro-batch. Under compat "reference" a micro-batch holds
    episodes that follow each other in `order`, as in the authors' code, where its composition changes the loss.
    """
    group = config.num_generations
    together = group if config.share_trunks else 1
    offsets = np.cumsum([0, *(_num_given(config, rollout) + len(rollout.completion) for rollout in rollouts)])
    size = len(order) // config.num_mini_batches
    packs = []
    for start in range(0, len(order), size):
        firsts = [g * group + i for g in order[start : start + size] for i in range(0, group, together)]
        trees = [_tree(config, rollouts[first : first + together]) for first in firsts]
        packs.append(
            [
                Pack(
                    batch=pack(forest(trees[j] for j in micro), device),
                    index=torch.from_numpy(
                        np.concatenate([np.arange(offsets[firsts[j]], offsets[firsts[j] + together]) for j in micro])
                    ).to(device),
                )
                for micro in (in_order if config.compat == "reference" else own_micro_batches)(
                    [num_computed(segments) for segments in trees],
                    config.micro_batch_tokens,
                    "episode" if together == 1 else "group of episodes",
                )
            ]
        )
    return packs


@torch.no_grad()
def score_episodes(
    config: PPOConfig,
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    critic: PreTrainedModel | None,
    rollouts: Sequence[Rollout],
    scores: Tensor | None,
    packs: Sequence[Sequence[Pack]],
    eos_token_id: int,
    rewards: Rewards | None = None,
) -> tuple[Experience, dict[str, float]]:
    """Everything the update needs, frozen before it starts.

    The sampler's log-probs are rescored in the very packs of the first pass, by the op that the loss will use, so that
    the first ratio is exactly 1. `critic` is None where `advantage_estimator` needs none, `scores` where there is no
    judge. `rewards` are those of the run; None: those that need neither a model nor a memory. With `truncation`
    bootstrap the critic's forward gives the value of the state after the last token too: a pack holds that token.
    """
    rewards = rewards or Rewards(config=config)
    device = policy.device
    rows = _rows(config, rollouts, eos_token_id, device)
    num_rows = len(rows.mask)
    # 0 where another rank has the row, so that the sum over ranks is what it computed.
    logprob, reference_logprob, value, entropy = (torch.zeros(num_rows, device=device) for _ in range(4))
    token = torch.zeros(num_rows, dtype=torch.int64, device=device)
    dpo_log_ratio = torch.zeros(num_rows, device=device) if rewards.implicit else None
    exact_kl = torch.zeros(num_rows, device=device) if config.kl_estimator == "exact" else None
    # At the last row of an episode, the value of the state after it.
    value_after = torch.zeros(num_rows, device=device) if config.truncation == "bootstrap" else None
    reference_states = None
    for item in (item for mini in packs for item in mini):
        scored = _scored(config, policy, reference, item.batch)
        logprob[item.index], entropy[item.index] = scored.logprob, scored.entropy
        reference_logprob[item.index] = scored.reference_logprob
        if scored.exact_kl is not None:
            assert exact_kl is not None
            exact_kl[item.index] = scored.exact_kl
        if scored.reference_states is not None:
            if reference_states is None:
                reference_states = scored.reference_states.new_zeros(num_rows, scored.reference_states.shape[1])
            reference_states[item.index] = scored.reference_states
        if critic is not None:
            states = hidden_states(critic, item.batch)
            value[item.index] = read_scores(critic, states[item.batch.rows])
            if value_after is not None:
                last_row = item.index[item.batch.cu_rows[1:] - 1]
                value_after[last_row] = read_scores(critic, states[item.batch.last])
        token[item.index] = item.batch.targets
        if rewards.implicit:
            assert dpo_log_ratio is not None
            known = reference_logprob[item.index] if config.temperature == 1 else None
            dpo_log_ratio[item.index] = rewards.implicit.log_ratio(item.batch, reference, known)
    for model in (reference, *(rewards.implicit.models if rewards.implicit else ())):
        give_back(model)

    logprob, reference_logprob, value, entropy, token = map(total, (logprob, reference_logprob, value, entropy, token))
    dpo_log_ratio, exact_kl, reference_states, value_after = (
        None if x is None else total(x) for x in (dpo_log_ratio, exact_kl, reference_states, value_after)
    )
    episodes = Episodes(
        rollouts=rollouts,
        cu_rows=rows.cu_rows,
        sampled=rows.mask,
        earns=rows.earns,
        end=rows.end,
        missing_eos=rows.missing_eos,
        score=scores,
        token=token,
        logprob=logprob,
        reference_logprob=reference_logprob,
        dpo_log_ratio=dpo_log_ratio,
        exact_kl=exact_kl,
        goes_on=None if value_after is None else rows.missing_eos,
    )
    terms = rewards.terms(episodes)
    # One after the other, so that an addend of zeros changes no bit.
    reward = reduce(torch.add, (term.reward for term in terms.values()))
    own_kl = own_kl_advantage(episodes, rewards.kl.coef) if config.kl_placement == "reward" else None
    every_row = torch.ones_like(rows.mask)
    if config.whiten_rewards:
        own_kl = None if own_kl is None else own_kl * whitening_scale(reward, every_row)
        reward = whiten(reward, every_row, shift_mean=False)
    if critic is None:
        advantage, returns = _group_advantage(config, reward, rows.cu_rows), None
    else:
        after = None if value_after is None else torch.where(rows.missing_eos, value_after[rows.end], 0.0)
        advantage, returns = gae(reward, value, rows.cu_rows, gamma=config.gamma, lam=config.lam, bootstrap=after)
    if own_kl is not None:
        advantage = advantage + own_kl
    if critic is not None:
        advantage = whiten(advantage, every_row)

    drawn = torch.tensor([x for rollout in rollouts for x in rollout.sampler_logprob], device=device)
    experience = Experience(
        cu_rows=rows.cu_rows,
        mask=rows.mask,
        trained=rows.mask & ~rows.cut if config.mask_truncated_completions else rows.mask,
        sampler_logprob=logprob,
        reference_logprob=reference_logprob,
        value=None if critic is None else value,
        advantage=advantage,
        returns=returns,
        kl_coef=rewards.kl.coef,
        rewards={name: term.reward for name, term in terms.items()},
        weight=_importance_weight(config, logprob, drawn, rows.mask),
        reference_states=reference_states,
        scores=_sum_of_rewards(terms, rows.cu_rows) if scores is None else scores,
    )
    metrics = _objective(config, rollouts, terms, experience, entropy, drawn, exact_kl)
    metrics |= rewards.functions.metrics
    rewards.warn(metrics)
    return experience, metrics


class _Scored(NamedTuple):
    """The rows of a pack; [R of the pack] float32, nats."""

    logprob: Tensor
    entropy: Tensor
    reference_logprob: Tensor
    exact_kl: Tensor | None
    reference_states: Tensor | None
    """[R of the pack, D], where the loss will need them"""


def _scored(config: PPOConfig, policy: PreTrainedModel, reference: PreTrainedModel, batch: PackedBatch) -> _Scored:
    states, reference_states = scored_states(policy, batch), scored_states(reference, batch)
    heat, in_loss = config.temperature, config.kl_placement == "loss"
    if config.kl_estimator != "exact":
        ours = state_logprobs(policy, states, batch.targets, temperature=heat, entropy=True)
        theirs = state_logprobs(reference, reference_states, batch.targets, temperature=heat)
        assert ours.entropy is not None
        return _Scored(ours.logprob, ours.entropy, theirs.logprob, None, None)
    both = state_kl(policy, states, reference, reference_states, batch.targets, temperature=heat, entropy=in_loss)
    ours = both if in_loss else state_logprobs(policy, states, batch.targets, temperature=heat, entropy=True)
    assert ours.logprob is not None
    assert ours.entropy is not None
    assert both.reference_logprob is not None
    return _Scored(ours.logprob, ours.entropy, both.reference_logprob, both.kl, reference_states if in_loss else None)


def _importance_weight(config: PPOConfig, logprob: Tensor, drawn: Tensor, mask: Tensor) -> Tensor | None:
    """[R]: min(trainer / engine, cap) of the sampled tokens, 1 elsewhere (Yao et al. 2025, "Your Efficient RL Framework
    Secretly Brings You Off-Policy RL Training"). `drawn` are the log-probs that the engine reports of those tokens."""
    if config.sampler_is_cap is None:
        return None
    return (logprob - logprob.masked_scatter(mask, drawn)).exp().clamp(max=config.sampler_is_cap)


def _group_advantage(config: PPOConfig, reward: Tensor, cu_rows: Tensor) -> Tensor:
    """[R]: each token has the advantage of its episode, whose return is the sum of its rewards, the KL's included."""
    lengths = cu_rows.diff().long()
    episode_return = torch.segment_reduce(reward, "sum", lengths=lengths, unsafe=True)
    size = config.num_generations
    if config.advantage_estimator == "rloo":
        advantage = leave_one_out(episode_return, size)
    elif config.advantage_estimator == "opo":
        advantage = length_weighted(episode_return, lengths, size)
    else:
        advantage = group_normalised(episode_return, size, config.scale_rewards)
    return advantage.repeat_interleave(lengths, output_size=len(reward))


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Where the episodes lie in the flat rows."""

    cu_rows: Tensor
    mask: Tensor
    """[R] bool: sampled tokens"""
    earns: Tensor
    """[R] bool: those up to the first EOS"""
    end: Tensor
    """[N] int64: the row of the last valid token"""
    missing_eos: Tensor
    """[N] bool"""
    cut: Tensor
    """[R] bool: rows of episodes that the length limit cut"""


def _rows(config: PPOConfig, rollouts: Sequence[Rollout], eos_token_id: int, device: torch.device) -> _Rows:
    counts, mask, earns, ends, missing, cut = [0], [], [], [], [], []
    for rollout in rollouts:
        given = _num_given(config, rollout)
        end = end_index(rollout, eos_token_id)
        ends.append(counts[-1] + given + end)
        # The authors look for padding after the EOS, so that one in the last slot counts as missing.
        missing.append(not rollout.ended or (config.compat == "reference" and end + 1 == len(rollout.completion)))
        mask.extend([False] * given + [True] * len(rollout.completion))
        cut.extend([not rollout.ended] * (given + len(rollout.completion)))
        earns.extend([False] * given + [i <= end for i in range(len(rollout.completion))])
        counts.append(counts[-1] + given + len(rollout.completion))
    return _Rows(
        cu_rows=torch.tensor(counts, dtype=torch.int32, device=device),
        mask=torch.tensor(mask, device=device),
        earns=torch.tensor(earns, device=device),
        end=torch.tensor(ends, device=device),
        missing_eos=torch.tensor(missing, device=device),
        cut=torch.tensor(cut, device=device),
    )


def _tree(config: PPOConfig, rollouts: Sequence[Rollout]) -> list[Segment]:
    """The segments of episodes whose prefixes are prefixes of one text; a single one is a plain sequence."""
    cuts = [len(rollout.prefix.token_ids) - _num_given(config, rollout) for rollout in rollouts]
    prefixes = [rollout.prefix.token_ids[:cut] for rollout, cut in zip(rollouts, cuts, strict=True)]
    scored = [
        [*rollout.prefix.token_ids[cut:], *rollout.completion] for rollout, cut in zip(rollouts, cuts, strict=True)
    ]
    return [sequence(prefixes[0], scored[0])] if len(rollouts) == 1 else tree(prefixes, scored)


def _num_given(config: PPOConfig, rollout: Rollout) -> int:
    """Rows of an episode before its first sampled token."""
    return rollout.prefix.num_reset if config.compat == "reference" else 0


def _objective(
    config: PPOConfig,
    rollouts: Sequence[Rollout],
    terms: Mapping[str, Term],
    experience: Experience,
    entropy: Tensor,
    drawn: Tensor,
    exact_kl: Tensor | None,
) -> dict[str, float]:
    """TRL's names. `objective/kl` is over the sampled tokens alone, which are fewer after a reset: across reset
    probabilities only `eval_objective/kl` compares, of full responses from the prompt. It is the mean of k1;
    `objective/kl_k2` and `objective/kl_k3` are those of the other estimates, never negative. `sampling/outside_clip` is
    the share of tokens whose ratio of trainer to engine the clip of the loss would already cut, and
    `completions/clipped_ratio` that of responses that the budget cut; the judge's mean score of these is
    `objective/scores_clipped`, absent where there are none.

    Raises ValueError, naming the row, where an advantage, or what it is made of, is not finite: found in the one wait
    for the GPU that the numbers need anyway.
    """
    mask, logprob, scores = experience.mask, experience.sampler_logprob, experience.scores
    assert scores is not None

    def over_sampled(values: Tensor) -> Tensor:  # an index by the mask would wait for the GPU
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
    by_score = sum(paid[name] for name in _score_names(terms)) + paid.get("missing_eos", 0.0)
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


def _score_names(terms: Mapping[str, Term]) -> list[str]:
    """The rewards that count as the score: the judge's; without a judge what functions or a DPO model give."""
    return ["score"] if "score" in terms else [name for name in terms if name not in ("missing_eos", "kl", "length")]


def _sum_of_rewards(terms: Mapping[str, Term], cu_rows: Tensor) -> Tensor:
    """[N]: what stands for the score where there is no judge."""
    rewards = reduce(torch.add, (terms[name].reward for name in _score_names(terms)))
    return torch.segment_reduce(rewards, "sum", lengths=cu_rows.diff().long(), unsafe=True)


def _numbers(terms: Mapping[str, Term], experience: Experience) -> dict[str, Tensor]:
    """All [R] that go into the advantages, by the names to complain of them, causes before effects."""
    numbers = {"log-prob of the policy": experience.sampler_logprob}
    numbers["log-prob of the reference"] = experience.reference_logprob
    if experience.value is not None:
        numbers["value of the critic"] = experience.value
    numbers |= {f"reward {name!r}": term.reward for name, term in terms.items()}
    return numbers | {"advantage": experience.advantage}


def _reset_metrics(rollouts: Sequence[Rollout], scores: np.ndarray) -> dict[str, float]:
    """Scores by where the episodes started. `drpo/score_depth_i` is the mean over resets whose share of the response
    given away lies in [i / 5, (i + 1) / 5); a name is absent where it has no member."""
    num_reset = np.array([rollout.prefix.num_reset for rollout in rollouts])
    fifth = np.array([int(NUM_DEPTHS * rollout.prefix.reset_depth) for rollout in rollouts])
    members = {"drpo/score_reset": num_reset > 0, "drpo/score_scratch": num_reset == 0}
    members |= {f"drpo/score_depth_{i}": (num_reset > 0) & (fifth == i) for i in range(NUM_DEPTHS)}
    return {
        "drpo/reset_fraction": float((num_reset > 0).mean()),
        "drpo/prefix_len_mean": float(num_reset.mean()),
        **{name: float(scores[inside].mean()) for name, inside in members.items() if inside.any()},
    }
