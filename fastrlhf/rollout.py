"""From prefixes to completions.

An engine is anything with `generate(prefixes) -> rollouts`; rollout_vllm.py has another. The one here decodes with the
model in hand and the key-value cache of transformers: every prefix is prefilled (a reset costs no decode step), once
for all the episodes that start there. Rows stop at their EOS or budget and are dropped from the cache as they finish,
and the log-prob of each sampled token is recorded as it is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from fastrlhf.data.resets import uniforms
from fastrlhf.distributed import from_all, share
from fastrlhf.models.sharding import whole
from fastrlhf.types import Prefix, Rollout

SAMPLE_STREAM = 2
"""The sampler's draws; resets.RESET_STREAM is another, so that resets never move a sample."""

CHECK_EVERY = 8
"""Decode steps between two looks at which rows are done: each look waits for the GPU."""


class Engine(Protocol):
    """What a trainer asks of whatever generates: in process, or a server that holds the sampler's weights."""

    def generate(self, prefixes: Sequence[Prefix]) -> list[Rollout]:
        """One rollout per prefix, in the same order."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformersEngine:
    """Samples from `model` as it is at the moment of the call.

    A response has at most `response_length` tokens, those of the reset included. The t-th token of an episode is the
    inverse of the tempered distribution function at a uniform number keyed by (seed, stream, episode, t): which
    episodes are generated side by side does not matter. temperature 0 takes the likeliest token, and its log-probs are
    those at 1.
    """

    model: PreTrainedModel
    eos_token_id: int
    response_length: int
    temperature: float
    seed: int
    batch_size: int = 64
    stop_at_eos: bool = True
    stream: int = SAMPLE_STREAM
    """Engines of one run that must not share their draws differ in this."""

    @torch.no_grad()
    def generate(self, prefixes: Sequence[Prefix]) -> list[Rollout]:
        """One rollout per prefix, in order. Raises ValueError where a prefix leaves no token to sample."""
        check_room(prefixes, self.response_length)
        # Rows of like length side by side waste least on the left of the prefill.
        order = sorted(range(len(prefixes)), key=lambda i: (len(prefixes[i].token_ids), prefixes[i].num_reset, i))
        rollouts: dict[int, Rollout] = {}
        for start in range(0, len(order), self.batch_size):
            indices = order[start : start + self.batch_size]
            rollouts.update(zip(indices, self._decode([prefixes[i] for i in indices]), strict=True))
        return [rollouts[i] for i in range(len(prefixes))]

    def _decode(self, prefixes: list[Prefix]) -> list[Rollout]:
        device, num = self.model.device, len(prefixes)
        budgets = [self.response_length - prefix.num_reset for prefix in prefixes]
        longest = max(budgets)
        noise = np.stack([uniforms(self.seed, self.stream, prefix.episode, longest) for prefix in prefixes])
        uniform = torch.from_numpy(noise).to(device, torch.float32)  # [num, longest]
        budget = torch.tensor(budgets, device=device)
        tokens = torch.zeros(num, longest, dtype=torch.int64, device=device)
        logprobs = torch.zeros(num, longest, device=device)

        distinct = dict.fromkeys(tuple(prefix.token_ids) for prefix in prefixes)
        starts = {start: i for i, start in enumerate(distinct)}  # each with its row of the prefill
        start_of = torch.tensor([starts[tuple(prefix.token_ids)] for prefix in prefixes], device=device)
        width = max(map(len, starts))
        ids = torch.tensor([[0] * (width - len(start)) + list(start) for start in starts], device=device)
        seen = torch.tensor([[0] * (width - len(start)) + [1] * len(start) for start in starts], device=device)
        positions = (seen.cumsum(1) - 1).clamp(min=0)

        rows = torch.arange(num, device=device)  # of the rows still in the cache, which prefix each belongs to
        done = torch.zeros(num, dtype=torch.bool, device=device)  # of the same rows
        cache = DynamicCache(config=self.model.config)
        for step in range(longest):
            output = self.model(
                input_ids=ids, attention_mask=seen, position_ids=positions, past_key_values=cache, logits_to_keep=1
            )
            logits = output.logits[:, -1]
            if step == 0 and len(starts) < num:
                cache.batch_select_indices(start_of)
                logits, positions, seen = logits[start_of], positions[start_of], seen[start_of]
            token, logprob = _draw(logits.float(), self.temperature, uniform[rows, step])
            tokens[rows, step], logprobs[rows, step] = token, logprob
            done = done | (budget[rows] <= step + 1)
            if self.stop_at_eos:
                done = done | (token == self.eos_token_id)
            ids, positions = token[:, None], positions[:, -1:] + 1
            seen = torch.cat([seen, torch.ones_like(token)[:, None]], 1)
            if (step + 1) % CHECK_EVERY == 0 or device.type == "cpu":
                live = (~done).nonzero()[:, 0]
                if len(live) == 0:
                    break
                if 2 * len(live) <= len(done):  # a smaller copy of the cache pays off only now and then
                    cache.batch_select_indices(live)
                    ids, positions, seen, rows, done = ids[live], positions[live], seen[live], rows[live], done[live]

        if not bool(logprobs.isfinite().all()):
            raise ValueError("sampling: the policy's logits are not finite; its weights are broken")
        return [
            self._rollout(prefix, row[:limit], row_logprobs[:limit])
            for prefix, row, row_logprobs, limit in zip(
                prefixes, tokens.tolist(), logprobs.tolist(), budgets, strict=True
            )
        ]

    def _rollout(self, prefix: Prefix, tokens: list[int], logprobs: list[float]) -> Rollout:
        ended = self.eos_token_id in tokens
        num = tokens.index(self.eos_token_id) + 1 if ended and self.stop_at_eos else len(tokens)
        return Rollout(prefix=prefix, completion=tokens[:num], sampler_logprob=logprobs[:num], ended=ended)


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedEngine:
    """The engines of all ranks as one: each answers its part of the prefixes with all the weights of `model`, and every
    rank gets all rollouts. Every rank must ask, for the same prefixes."""

    engine: Engine
    model: PreTrainedModel

    def generate(self, prefixes: Sequence[Prefix]) -> list[Rollout]:
        with whole(self.model):
            own = self.engine.generate(share(prefixes))
        return [rollout for rollouts in from_all(own) for rollout in rollouts]


def check_room(prefixes: Sequence[Prefix], response_length: int) -> None:
    """Raises ValueError, naming the row, where the reset tokens of a prefix leave nothing to sample."""
    for prefix in prefixes:
        if prefix.num_reset >= response_length:
            raise ValueError(
                f"response_length: {response_length} leaves nothing to sample after the {prefix.num_reset} "
                f"reset tokens of row {prefix.row}"
            )


def checked_rollouts(
    rollouts: Sequence[Rollout], prefixes: Sequence[Prefix], *, eos_token_id: int, stops_at_eos: bool
) -> Sequence[Rollout]:
    """What an engine returned, if it keeps the promises of `Engine` and `Rollout`. Raises ValueError naming the first
    that it breaks: an engine of somebody else's would otherwise train on the wrong tokens in silence."""
    if [rollout.prefix.episode for rollout in rollouts] != [prefix.episode for prefix in prefixes]:
        raise ValueError(
            f"engine: must return one rollout per prefix, in order; got {len(rollouts)} of {len(prefixes)}"
        )
    for rollout in rollouts:
        tokens, where = rollout.completion, f"engine: the rollout of row {rollout.prefix.row}"
        if not tokens or len(rollout.sampler_logprob) != len(tokens):
            raise ValueError(f"{where} has {len(tokens)} tokens and {len(rollout.sampler_logprob)} log-probs")
        if not all(map(math.isfinite, rollout.sampler_logprob)):
            raise ValueError(f"{where} has a log-prob that is not finite; the policy's weights are broken")
        if rollout.ended != (eos_token_id in tokens):
            raise ValueError(f"{where} says ended={rollout.ended}, but its tokens say otherwise")
        if stops_at_eos and eos_token_id in tokens[:-1]:
            raise ValueError(f"{where} goes on after its EOS")
    return rollouts


def end_index(rollout: Rollout, eos_token_id: int) -> int:
    """Index in the completion of its first EOS, or of its last token."""
    return rollout.completion.index(eos_token_id) if rollout.ended else len(rollout.completion) - 1


def _draw(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row of logits [N, V] float32 and its log-prob, by inverting the distribution function."""
    logprobs = (logits / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        cumulative = logprobs.exp().cumsum(-1)
        total = cumulative[:, -1:]
        # A product that rounds up to the total would point past the last token of positive probability.
        threshold = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))
        # NaN logits have no place in the order: the clamp leaves them to the check at the end.
        token = torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return token, logprobs.gather(1, token[:, None])[:, 0]
