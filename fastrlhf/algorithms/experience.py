"""Turns rollouts into the input of an on-policy update: packs, log-probs, values, rewards, advantages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrlhf.algorithms.advantages import (
    group_normalised,
    leave_one_out,
    length_weighted,
    token_leave_one_out,
    whiten,
    whitening_scale,
)
from fastrlhf.algorithms.episode_metrics import episode_metrics, sum_of_rewards
from fastrlhf.config import PPOConfig
from fastrlhf.data.packing import forest, in_order, num_computed, own_micro_batches, pack, sequence, tree
from fastrlhf.distributed.ranks import total
from fastrlhf.models.forward import hidden_states, read_scores, scored_states, state_kl, state_logprobs
from fastrlhf.models.sharding import give_back
from fastrlhf.rewards.functions import Earned
from fastrlhf.rewards.terms import Episodes, Rewards, Term, own_kl_advantage, sums_to_end
from fastrlhf.rollout.engine import end_index, temperature_of
from fastrlhf.rollout.truncation import kept_tokens
from fastrlhf.types import EndIds, Experience, KeptTokens, PackedBatch, Rollout, Segment
from fastrlhf_kernels import gae


@dataclass(frozen=True, kw_only=True)
class Pack:
    """A micro-batch of episodes: the packed tokens, and the places of their rows in the flat Experience."""

    batch: PackedBatch
    index: Tensor
    """[R of the pack] int64: index of each row of the pack in the flat Experience"""
    temperature: float | Tensor
    """Temperature of the log-probs: a number, or [R of the pack] float32"""
    kept: KeptTokens | None
    """The tokens that truncated sampling kept at each row; None if it kept all"""


def pack_episodes(
    config: PPOConfig, rollouts: Sequence[Rollout], order: Sequence[int], device: torch.device
) -> list[list[Pack]]:
    """Divides rollouts into mini-batches of packs. A mini-batch consists of whole groups of `num_generations` rollouts,
    in the given order of the groups. Each rank has its own packs.

    The rows of an episode are its sampled tokens, and with compat "reference" also the reset tokens before them. With
    `share_trunks` a group is one tree, which is never split between micro-batches. With compat "reference" a
    micro-batch holds consecutive episodes of `order`, as in the authors' code, in which its composition changes the
    loss.
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
                _pack(
                    config,
                    forest(trees[j] for j in micro),
                    [rollout for j in micro for rollout in rollouts[firsts[j] : firsts[j] + together]],
                    np.concatenate([np.arange(offsets[firsts[j]], offsets[firsts[j] + together]) for j in micro]),
                    device,
                )
                for micro in (in_order if config.compat == "reference" else own_micro_batches)(
                    [num_computed(segments) for segments in trees],
                    config.micro_batch_tokens,
                    "episode" if together == 1 else "group of episodes",
                )
            ]
        )
    return packs


def _pack(
    config: PPOConfig,
    segments: Sequence[Segment],
    rollouts: Sequence[Rollout],
    index: np.ndarray,
    device: torch.device,
) -> Pack:
    """Makes the pack of `rollouts` from their segments and their places in the flat rows."""
    heat = temperature_of([rollout.prefix for rollout in rollouts], config.temperature, device)
    if isinstance(heat, Tensor):
        lengths = [_num_given(config, rollout) + len(rollout.completion) for rollout in rollouts]
        heat = heat.repeat_interleave(torch.tensor(lengths, device=device), output_size=len(index))
    return Pack(
        batch=pack(segments, device),
        index=torch.from_numpy(index).to(device),
        temperature=heat,
        kept=kept_tokens(rollouts, device),
    )


@torch.no_grad()
def score_episodes(
    config: PPOConfig,
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    critic: PreTrainedModel | None,
    rollouts: Sequence[Rollout],
    scores: Tensor | None,
    packs: Sequence[Sequence[Pack]],
    eos_token_id: EndIds,
    rewards: Rewards | None = None,
    earned: Earned | None = None,
    parts: Callable[[Iterable[Pack]], Iterable[Pack]] = iter,
) -> tuple[Experience, dict[str, float]]:
    """Computes the complete input of an update. The log-probs under the sampling policy are recomputed in the same
    packs as in the first pass and by the op of the loss, so that the first ratio is exactly 1. `critic` is None if
    `advantage_estimator` needs none, and `scores` is None without a judge. `rewards` computes the rewards of the run;
    None: only rewards that need neither a model nor a state. `earned` is the result of the reward functions; None if
    they have not been called yet. With `truncation` bootstrap the critic's forward pass also gives the value of the
    state after the last token. `parts` watches the packs for a request to stop (`Run.parts`).
    """
    rewards = rewards or Rewards(config=config)
    device = policy.device
    rows = _rows(config, rollouts, eos_token_id, device)
    num_rows = len(rows.mask)
    # Rows of other ranks are 0, so that the sum over ranks is the value that one rank computed.
    logprob, reference_logprob, value, entropy = (torch.zeros(num_rows, device=device) for _ in range(4))
    token = torch.zeros(num_rows, dtype=torch.int64, device=device)
    dpo_log_ratio = torch.zeros(num_rows, device=device) if rewards.implicit else None
    exact_kl = torch.zeros(num_rows, device=device) if config.kl_estimator == "exact" else None
    # Holds, in the last row of an episode, the value of the state after it.
    value_after = torch.zeros(num_rows, device=device) if config.truncation == "bootstrap" else None
    kept = _OwnStates(packs) if keeps_reference_states(config) else None
    for item in parts(item for mini in packs for item in mini):
        scored = _scored(config, policy, reference, item)
        logprob[item.index], entropy[item.index] = scored.logprob, scored.entropy
        reference_logprob[item.index] = scored.reference_logprob
        if scored.exact_kl is not None:
            assert exact_kl is not None
            exact_kl[item.index] = scored.exact_kl
        if kept is not None:
            assert scored.reference_states is not None
            kept.add(scored.reference_states)
        if critic is not None:
            states = hidden_states(critic, item.batch)
            value[item.index] = read_scores(critic, states[item.batch.rows])
            if value_after is not None:
                last_row = item.index[item.batch.cu_rows[1:] - 1]
                value_after[last_row] = read_scores(critic, states[item.batch.last])
        token[item.index] = item.batch.targets
        if rewards.implicit:
            assert dpo_log_ratio is not None
            at_1 = item.temperature == 1 if isinstance(item.temperature, float) else False
            known = reference_logprob[item.index] if at_1 and item.kept is None else None
            dpo_log_ratio[item.index] = rewards.implicit.log_ratio(item.batch, reference, known)
    for model in (reference, *(rewards.implicit.models if rewards.implicit else ())):
        give_back(model)

    logprob, reference_logprob, value, entropy, token = map(total, (logprob, reference_logprob, value, entropy, token))
    dpo_log_ratio, exact_kl, value_after = (
        None if x is None else total(x) for x in (dpo_log_ratio, exact_kl, value_after)
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
        earned=earned,
        goes_on=None if value_after is None else rows.missing_eos,
    )
    terms = rewards.terms(episodes)
    # Summed one after the other, so that a term of zeros changes no bit.
    reward = reduce(torch.add, (term.reward for term in terms.values()))
    own_kl = own_kl_advantage(episodes, rewards.kl.coef) if config.kl_placement == "reward" else None
    every_row = torch.ones_like(rows.mask)
    if config.whiten_rewards:
        own_kl = None if own_kl is None else own_kl * whitening_scale(reward, every_row)
        reward = whiten(reward, every_row, shift_mean=False)
    if critic is None:
        advantage, returns = _group_advantage(config, reward, rows.cu_rows, terms), None
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
        reference_states=None if kept is None else kept.states,
        reference_rows=None if kept is None else kept.rows,
        scores=sum_of_rewards(terms, rows.cu_rows) if scores is None else scores,
    )
    metrics = episode_metrics(config, rollouts, terms, experience, entropy, drawn, exact_kl)
    metrics |= rewards.functions.metrics
    rewards.warn(metrics)
    return experience, metrics


def keeps_reference_states(config: PPOConfig) -> bool:
    """Returns whether the loss needs the hidden states of the reference, because an exact KL is in it."""
    return config.kl_estimator == "exact" and config.kl_placement == "loss"


@torch.no_grad()
def with_reference_states(
    experience: Experience, reference: PreTrainedModel, packs: Sequence[Sequence[Pack]]
) -> Experience:
    """Adds the hidden states of the reference to an experience. Checkpoints do not hold them, because they can be
    computed again: from the first packs of the update, in which `score_episodes` has computed them."""
    kept = _OwnStates(packs)
    for item in (item for mini in packs for item in mini):
        kept.add(scored_states(reference, item.batch))
    give_back(reference)
    return replace(experience, reference_states=kept.states, reference_rows=kept.rows)


class _OwnStates:
    """Collects the hidden states of the reference for the packs of this rank, in their order. They stay on the rank
    that computed them, because those of all ranks together may need more memory than a model."""

    def __init__(self, packs: Sequence[Sequence[Pack]]) -> None:
        self.rows = torch.cat([item.index for mini in packs for item in mini])
        """[n] int64, the rows of the states"""
        self.states: Tensor | None = None
        """[n, D]; None before the first pack"""
        self._count = 0

    def add(self, states: Tensor) -> None:
        """Adds the states of the next pack."""
        if self.states is None:
            self.states = states.new_empty(len(self.rows), states.shape[1])
        self.states[self._count : self._count + len(states)] = states
        self._count += len(states)


class _Scored(NamedTuple):
    """Log-probs and values of the rows of a pack; [R of the pack] float32, log-probs in nats."""

    logprob: Tensor
    entropy: Tensor
    reference_logprob: Tensor
    exact_kl: Tensor | None
    reference_states: Tensor | None
    """[R of the pack, D]; None unless the loss needs them"""


def _scored(config: PPOConfig, policy: PreTrainedModel, reference: PreTrainedModel, item: Pack) -> _Scored:
    batch, heat, kept = item.batch, item.temperature, item.kept
    states, reference_states = scored_states(policy, batch), scored_states(reference, batch)
    in_loss = keeps_reference_states(config)
    if config.kl_estimator != "exact":
        ours = state_logprobs(policy, states, batch.targets, temperature=heat, kept=kept, entropy=True)
        theirs = state_logprobs(reference, reference_states, batch.targets, temperature=heat, kept=kept)
        assert ours.entropy is not None
        return _Scored(ours.logprob, ours.entropy, theirs.logprob, None, None)
    both = state_kl(policy, states, reference, reference_states, batch.targets, temperature=heat, entropy=in_loss)
    ours = both if in_loss else state_logprobs(policy, states, batch.targets, temperature=heat, entropy=True)
    assert ours.logprob is not None
    assert ours.entropy is not None
    assert both.reference_logprob is not None
    return _Scored(ours.logprob, ours.entropy, both.reference_logprob, both.kl, reference_states if in_loss else None)


def _importance_weight(config: PPOConfig, logprob: Tensor, drawn: Tensor, mask: Tensor) -> Tensor | None:
    """Returns [R], min(p_trainer / p_engine, cap) for sampled tokens and 1 elsewhere (Yao et al. 2025, "Your Efficient
    RL Framework Secretly Brings You Off-Policy RL Training"). `drawn` are the engine's log-probs of the sampled
    tokens."""
    if config.sampler_is_cap is None:
        return None
    return (logprob - logprob.masked_scatter(mask, drawn)).exp().clamp(max=config.sampler_is_cap)


def _group_advantage(config: PPOConfig, reward: Tensor, cu_rows: Tensor, terms: Mapping[str, Term]) -> Tensor:
    """Returns [R], for each token the advantage of its episode; the return is the sum of all rewards, including the KL.

    With the estimator prime (Cui et al. 2025, arXiv 2502.01456), where d are the DPO rewards [R] and R^i is the sum of
    all other rewards of episode i,

        A_t = sum over s >= t of (d_s - mean over j of mean d^j) + R - mean over j of R^j,  j the others of the group
    """
    lengths = cu_rows.diff().long()
    if config.advantage_estimator == "prime":
        dpo = terms["dpo"].reward
        process = sums_to_end(token_leave_one_out(dpo, cu_rows, config.num_generations), cu_rows)
        rest = reduce(torch.add, (x.reward for name, x in terms.items() if name != "dpo"), torch.zeros_like(dpo))
        outcome = torch.segment_reduce(rest, "sum", lengths=lengths, unsafe=True)
        advantage = leave_one_out(outcome, config.num_generations)
        return process + advantage.repeat_interleave(lengths, output_size=len(reward))
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
    """Positions of the episodes in the flat rows."""

    cu_rows: Tensor
    mask: Tensor
    """[R] bool: sampled tokens"""
    earns: Tensor
    """[R] bool: sampled tokens up to and including the first EOS"""
    end: Tensor
    """[N] int64: the row of the last valid token"""
    missing_eos: Tensor
    """[N] bool"""
    cut: Tensor
    """[R] bool: rows of episodes that were cut at the length limit"""


def _rows(config: PPOConfig, rollouts: Sequence[Rollout], eos_token_id: EndIds, device: torch.device) -> _Rows:
    counts, mask, earns, ends, missing, cut = [0], [], [], [], [], []
    for rollout in rollouts:
        given = _num_given(config, rollout)
        end = end_index(rollout, eos_token_id)
        ends.append(counts[-1] + given + end)
        # The authors' code looks for padding after the EOS, so an EOS in the last position counts as missing.
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
    """Returns the segments of the tree of several episodes, each of whose prefixes is a beginning of the longest one.
    For a single episode the tree is a plain sequence."""
    cuts = [len(rollout.prefix.token_ids) - _num_given(config, rollout) for rollout in rollouts]
    prefixes = [rollout.prefix.token_ids[:cut] for rollout, cut in zip(rollouts, cuts, strict=True)]
    scored = [
        [*rollout.prefix.token_ids[cut:], *rollout.completion] for rollout, cut in zip(rollouts, cuts, strict=True)
    ]
    return [sequence(prefixes[0], scored[0])] if len(rollouts) == 1 else tree(prefixes, scored)


def _num_given(config: PPOConfig, rollout: Rollout) -> int:
    """Returns the number of rows of an episode before its first sampled token."""
    return rollout.prefix.num_reset if config.compat == "reference" else 0
