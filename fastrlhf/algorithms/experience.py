"""From rollouts to what an on-policy update needs: packs, log-probs, values, rewards, advantages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrlhf.advantages import explained_variance, whiten
from fastrlhf.config import PPOConfig
from fastrlhf.data.packing import micro_batches, pack
from fastrlhf.models.forward import token_logprobs, token_values
from fastrlhf.rewards import Episodes, Rewards, Term, reward_metrics
from fastrlhf.rollout import end_index
from fastrlhf.types import Experience, PackedBatch, Rollout, Segment
from fastrlhf_kernels import gae


@dataclass(frozen=True, kw_only=True)
class Pack:
    """A micro-batch of episodes: the packed tokens and where their rows lie in the flat Experience."""

    batch: PackedBatch
    index: Tensor
    """[R of the pack] int64"""


def pack_episodes(
    config: PPOConfig, rollouts: Sequence[Rollout], order: Sequence[int], device: torch.device
) -> list[list[Pack]]:
    """Mini-batches of packs, in the given order of the rollouts.

    The rows of an episode are its sampled tokens; under compat "reference" the reset tokens before them as well.
    """
    segments = [_segment(config, rollout) for rollout in rollouts]
    offsets = np.cumsum([0, *(segment.num_scored for segment in segments)])
    size = len(order) // config.num_mini_batches
    packs = []
    for start in range(0, len(order), size):
        members = order[start : start + size]
        costs = [len(segments[i].token_ids) for i in members]
        packs.append(
            [
                Pack(
                    batch=pack([segments[members[j]] for j in micro], device),
                    index=torch.from_numpy(
                        np.concatenate([np.arange(offsets[members[j]], offsets[members[j] + 1]) for j in micro])
                    ).to(device),
                )
                for micro in micro_batches(costs, config.micro_batch_tokens, "episode")
            ]
        )
    return packs


@torch.no_grad()
def score_episodes(
    config: PPOConfig,
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    critic: PreTrainedModel,
    rollouts: Sequence[Rollout],
    scores: Tensor,
    packs: Sequence[Sequence[Pack]],
    eos_token_id: int,
    rewards: Rewards | None = None,
) -> tuple[Experience, dict[str, float]]:
    """Everything the update needs, frozen before it starts.

    The sampler's log-probs are rescored in the very packs of the first pass, so that the first ratio is exactly 1.
    `rewards` are those of the run; None: those that need neither a model nor a memory.
    """
    rewards = rewards or Rewards(config=config)
    device = policy.device
    num_rows = sum(pack.batch.num_rows for packs_of in packs for pack in packs_of)
    logprob, reference_logprob, value, entropy = (torch.empty(num_rows, device=device) for _ in range(4))
    token = torch.empty(num_rows, dtype=torch.int64, device=device)
    dpo_log_ratio = torch.empty(num_rows, device=device) if rewards.implicit else None
    for item in (item for mini in packs for item in mini):
        scored = token_logprobs(policy, item.batch, temperature=config.temperature, entropy=True)
        assert scored.entropy is not None
        logprob[item.index], entropy[item.index] = scored.logprob, scored.entropy
        reference_logprob[item.index] = token_logprobs(reference, item.batch, temperature=config.temperature).logprob
        value[item.index] = token_values(critic, item.batch)
        token[item.index] = item.batch.targets
        if rewards.implicit:
            assert dpo_log_ratio is not None
            known = reference_logprob[item.index] if config.temperature == 1 else None
            dpo_log_ratio[item.index] = rewards.implicit.log_ratio(item.batch, reference, known)

    rows = _rows(config, rollouts, eos_token_id, device)
    terms = rewards.terms(
        Episodes(
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
        )
    )
    # One after the other, so that an addend of zeros changes no bit.
    reward = reduce(torch.add, (term.reward for term in terms.values()))
    every_row = torch.ones_like(rows.mask)
    if config.whiten_rewards:
        reward = whiten(reward, every_row, shift_mean=False)
    advantage, returns = gae(reward, value, rows.cu_rows, gamma=config.gamma, lam=config.lam)

    experience = Experience(
        cu_rows=rows.cu_rows,
        mask=rows.mask,
        sampler_logprob=logprob,
        reference_logprob=reference_logprob,
        value=value,
        advantage=whiten(advantage, every_row),
        returns=returns,
    )
    metrics = _objective(config, rollouts, scores, terms, experience, entropy)
    rewards.warn(metrics)
    return experience, metrics


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


def _rows(config: PPOConfig, rollouts: Sequence[Rollout], eos_token_id: int, device: torch.device) -> _Rows:
    counts, mask, earns, ends, missing = [0], [], [], [], []
    for rollout in rollouts:
        given = _num_given(config, rollout)
        end = end_index(rollout, eos_token_id)
        ends.append(counts[-1] + given + end)
        # The authors look for padding after the EOS, so that one in the last slot counts as missing.
        missing.append(not rollout.ended or (config.compat == "reference" and end + 1 == len(rollout.completion)))
        mask.extend([False] * given + [True] * len(rollout.completion))
        earns.extend([False] * given + [i <= end for i in range(len(rollout.completion))])
        counts.append(counts[-1] + given + len(rollout.completion))
    return _Rows(
        cu_rows=torch.tensor(counts, dtype=torch.int32, device=device),
        mask=torch.tensor(mask, device=device),
        earns=torch.tensor(earns, device=device),
        end=torch.tensor(ends, device=device),
        missing_eos=torch.tensor(missing, device=device),
    )


def _segment(config: PPOConfig, rollout: Rollout) -> Segment:
    return Segment(
        token_ids=[*rollout.prefix.token_ids, *rollout.completion],
        num_scored=_num_given(config, rollout) + len(rollout.completion),
    )


def _num_given(config: PPOConfig, rollout: Rollout) -> int:
    """Rows of an episode before its first sampled token."""
    return rollout.prefix.num_reset if config.compat == "reference" else 0


def _objective(
    config: PPOConfig,
    rollouts: Sequence[Rollout],
    scores: Tensor,
    terms: Mapping[str, Term],
    experience: Experience,
    entropy: Tensor,
) -> dict[str, float]:
    mask, logprob = experience.mask, experience.sampler_logprob
    drawn = torch.tensor([x for rollout in rollouts for x in rollout.sampler_logprob], device=mask.device)
    difference = (drawn - logprob[mask]).abs()
    num = len(rollouts)
    paid = {name: torch.where(mask, term.reward, 0.0).sum() / num for name, term in terms.items()}
    total = torch.stack(list(paid.values())).sum()
    # TRL counts the penalty for a missing EOS as part of the score.
    by_score = paid["score"] + paid.get("missing_eos", 0.0)
    values = {
        "objective/scores": scores.mean(),
        "objective/kl": (logprob - experience.reference_logprob)[mask].sum() / num,
        "objective/entropy": -logprob[mask].sum() / num,
        "objective/non_score_reward": total - by_score,
        "objective/rlhf_reward": total,
        "policy/entropy_avg": entropy[mask].mean(),
        "critic/explained_var": explained_variance(experience.value, experience.returns, torch.ones_like(mask)),
        "sampling/sampling_logp_difference/mean": difference.mean(),
        "sampling/sampling_logp_difference/max": difference.max(),
        **reward_metrics(terms, experience.cu_rows),
    }
    numbers = torch.stack([value.float() for value in values.values()]).tolist()
    metrics = dict(zip(values, numbers, strict=True))
    resets = np.array([rollout.prefix.num_reset for rollout in rollouts])
    by_episode = scores.cpu().numpy()
    metrics |= {
        "val/num_eos_tokens": float(sum(rollout.ended for rollout in rollouts)),
        "completions/mean_length": float(np.mean([len(rollout.completion) for rollout in rollouts])),
    }
    if config.reset_prob > 0:
        metrics["drpo/reset_fraction"] = float((resets > 0).mean())
        metrics["drpo/prefix_len_mean"] = float(resets.mean())
        for name, members in (("drpo/score_reset", resets > 0), ("drpo/score_scratch", resets == 0)):
            if members.any():
                metrics[name] = float(by_episode[members].mean())
    return metrics
