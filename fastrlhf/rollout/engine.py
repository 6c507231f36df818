"""Samples completions of prefixes with the trainer's own model.

An engine is any object with `generate(prefixes) -> rollouts`; rollout/vllm.py has another one. The engine here decodes
in the slots of a static key-value cache (rollout/kv_cache.py). Prefixes are prefilled, so a reset costs no decode step,
and a text is prefilled once for all episodes that start in it. When an episode ends, at its EOS or length limit, a
waiting episode takes its slot; if no episode waits and half of the slots suffice, the other half is dropped. When a
token is drawn, its log-prob is recorded and, with truncated sampling, the set of tokens that could be drawn. Models
that cannot be decoded in slots are decoded by transformers' `generate` (rollout/generate.py); rollout/probe.py finds
this out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrlhf.config import PPOConfig
from fastrlhf.data.packing import families, micro_batches, trunks
from fastrlhf.data.resets import uniforms
from fastrlhf.models.vocabulary import allowed_logits
from fastrlhf.rollout import generate
from fastrlhf.rollout.cuda_graphs import CapturedSteps
from fastrlhf.rollout.draw import draw_tokens
from fastrlhf.rollout.kv_cache import SlotCache, rounded_up
from fastrlhf.rollout.probe import decoder_of
from fastrlhf.rollout.truncation import KeptRecord, Truncation
from fastrlhf.types import EndIds, Prefix, Rollout

SAMPLE_STREAM = 2
"""Random stream of the sampler. Resets use another stream (resets.RESET_STREAM), so that they do not affect samples."""

CHECK_EVERY = 8
"""Number of decode steps between two checks for ended episodes; each check waits for the GPU."""

REFILL_SHARE = 0.25
"""Share of the slots that must be free before waiting episodes are prefilled, because prefilling few at a time is
slow."""

Decode = Literal["eager", "cuda_graph"]


class Engine(Protocol):
    """Interface of a sampler. It may run in this process or in a separate process."""

    def generate(self, prefixes: Sequence[Prefix]) -> list[Rollout]:
        """Returns one rollout per prefix, in the same order."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformersEngine:
    """Samples from `model` with the weights that it has at the moment of the call. A response has at most
    `response_length` tokens, including those of the reset. The t-th token of an episode is drawn by inverting the
    cumulative distribution at a uniform number that depends only on (seed, stream, episode, t), so a sample does not
    depend on which episodes are generated together. A temperature in a prefix takes precedence over that of the engine.
    Temperature 0 takes the most likely token, which every truncation keeps, and records its log-prob at temperature 1.
    """

    model: PreTrainedModel
    eos_token_id: EndIds
    response_length: int
    temperature: float
    seed: int
    batch_size: int = 64
    """Number of slots, that is, of episodes generated together."""
    micro_batch_tokens: int = 8192
    """Maximum number of tokens of a pack of prefixes, where shared tokens count once; a longer prefix gets its own
    pack."""
    stop_at_eos: bool = True
    stream: int = SAMPLE_STREAM
    """Random stream; different streams give independent draws."""
    decode: Decode = "eager"
    """cuda_graph: a decode step is recorded once as a CUDA graph and replayed."""
    truncation: Truncation = field(default_factory=Truncation)
    """Truncation of the distribution. Log-probs are those of the truncated distribution."""

    @classmethod
    def of(cls, config: PPOConfig, model: PreTrainedModel, eos_token_id: EndIds, **others: Any) -> TransformersEngine:
        """Makes an engine with the settings of an on-policy run; the fields in `others` take precedence."""
        settings = {
            "response_length": config.response_length,
            "temperature": config.temperature,
            "seed": config.seed,
            "batch_size": config.rollout_batch_size,
            "micro_batch_tokens": config.micro_batch_tokens,
            "decode": config.decode,
            "truncation": Truncation.of(config),
        }
        return cls(model=model, eos_token_id=eos_token_id, **settings | others)

    def __post_init__(self) -> None:
        device = self.model.device
        if self.decode == "cuda_graph" and device.type != "cuda":
            raise ValueError(f"decode: cuda_graph needs a CUDA GPU, but the model is on the {device}; set eager")
        if self.decode == "cuda_graph" and self.truncation:
            raise ValueError("decode: cuda_graph cannot record the tokens that truncated sampling keeps; set eager")

    @torch.no_grad()
    def generate(self, prefixes: Sequence[Prefix]) -> list[Rollout]:
        """Returns one rollout per prefix, in order. Raises ValueError if a prefix leaves no token to sample."""
        check_room(prefixes, self.response_length)
        if not prefixes:
            return []
        episodes = self._episodes(prefixes)
        self._decode(prefixes, episodes)
        counts = episodes.count.tolist()
        kept = [None] * len(counts) if episodes.kept is None else episodes.kept.sets(counts)
        sampled = (counts, episodes.tokens.tolist(), episodes.logprobs.tolist(), kept)
        return [
            self._rollout(prefix, tokens[:count], logprobs[:count], sets)
            for prefix, count, tokens, logprobs, sets in zip(prefixes, *sampled, strict=True)
        ]

    def _episodes(self, prefixes: Sequence[Prefix]) -> _Episodes:
        device, num, longest = self.model.device, len(prefixes), self.response_length
        noise = np.zeros((num, longest + 1), dtype=np.float32)
        for row, prefix in zip(noise, prefixes, strict=True):
            row[:-1] = uniforms(self.seed, self.stream, prefix.episode, longest)
        return _Episodes(
            start=torch.tensor([len(prefix.token_ids) for prefix in prefixes], device=device),
            budget=torch.tensor([longest - prefix.num_reset for prefix in prefixes], device=device),
            uniform=torch.from_numpy(noise).to(device),
            tokens=torch.zeros(num, longest + 1, dtype=torch.int64, device=device),
            logprobs=torch.zeros(num, longest + 1, device=device),
            count=torch.zeros(num, dtype=torch.int64, device=device),
            done=torch.zeros(num, dtype=torch.bool, device=device),
            ends=torch.tensor(as_ids(self.eos_token_id), device=device),
            temperature=temperature_of(prefixes, self.temperature, device),
            kept=KeptRecord() if self.truncation and self.temperature > 0 else None,
        )

    def _decode(self, prefixes: Sequence[Prefix], episodes: _Episodes) -> None:
        """Samples every episode to its end."""
        decoder = decoder_of(self.model)
        if decoder == "slots":
            self._decode_in_slots(prefixes, episodes)
        elif self.decode == "cuda_graph":
            raise ValueError(f"decode: {type(self.model).__name__} cannot be decoded by cuda_graph; set eager")
        else:
            self._decode_by_generate(prefixes, episodes, use_cache=decoder == "own cache")

    def _decode_by_generate(self, prefixes: Sequence[Prefix], episodes: _Episodes, *, use_cache: bool) -> None:
        for indices in _equal_lengths(prefixes, self.batch_size, self.micro_batch_tokens):
            texts = torch.tensor([prefixes[i].token_ids for i in indices], device=self.model.device)
            which = torch.tensor(indices, device=self.model.device)
            generate.decode(
                self.model,
                texts,
                self.response_length - min(prefixes[i].num_reset for i in indices),
                partial(self._record, episodes, which),
                lambda which=which: episodes.done[which],
                use_cache=use_cache,
            )

    def _decode_in_slots(self, prefixes: Sequence[Prefix], episodes: _Episodes) -> None:
        device = self.model.device
        waiting = _in_families(prefixes)[::-1]  # the next episode is last
        num = min(self.batch_size, len(prefixes))
        cache = SlotCache(num, max(len(p.token_ids) - p.num_reset for p in prefixes) + self.response_length)
        held = torch.zeros(num, dtype=torch.int64, device=device)  # the episode in each slot
        live, reach = np.zeros(num, dtype=bool), np.zeros(num, dtype=int)  # per slot; reach: bound of its length
        run = CapturedSteps(self.model) if self.decode == "cuda_graph" else _at_once
        num_steps = CHECK_EVERY if device.type == "cuda" else 1
        while waiting or live.any():
            if waiting and (~live).sum() >= REFILL_SHARE * len(live):
                slots = np.flatnonzero(~live)[: len(waiting)]
                new = [waiting.pop() for _ in slots]
                texts = [prefixes[i].token_ids for i in new]
                held[torch.from_numpy(slots).to(device)] = torch.tensor(new, device=device)
                reach[slots] = list(map(len, texts))
                for indices in _packs(texts, self.micro_batch_tokens):
                    logits = cache.prefill(self.model, [texts[i] for i in indices], slots[indices].tolist())
                    self._record(episodes, torch.tensor([new[i] for i in indices], device=device), logits)
            elif not waiting and 2 * live.sum() <= len(live):
                half = len(live) // 2
                source = half + np.flatnonzero(live[half:])
                target = np.flatnonzero(~live[:half])[: len(source)]
                cache.move(*(torch.from_numpy(slots).to(device) for slots in (source, target)))
                held[target], reach[target] = held[source], reach[source]
                held, reach = held[:half], reach[:half]
            else:
                reach += num_steps
                num_keys = min(cache.capacity, rounded_up(reach[live].max()))
                step = partial(self._step, cache, episodes, held, num_keys)
                for _ in range(num_steps):
                    run((len(live), num_keys), step)
            live = ~episodes.done[held].cpu().numpy()

    def _step(self, cache: SlotCache, episodes: _Episodes, held: Tensor, num_keys: int) -> None:
        """Samples one more token for each unfinished episode in a slot; tensors are changed in place."""
        tokens, positions = episodes.last(held)
        self._record(episodes, held, cache.step(self.model, tokens, positions, num_keys))

    def _record(self, episodes: _Episodes, which: Tensor, logits: Tensor) -> Tensor:
        """Draws tokens [n] for the episodes `which` [n] from logits [n, V], and records them. Episodes that have ended
        do not change."""
        count, done = episodes.count[which], episodes.done[which]
        logits, ids = allowed_logits(self.model, logits)
        heat = episodes.temperature
        heat = heat[which, None] if isinstance(heat, Tensor) else heat
        if episodes.kept is not None:
            logits = self.truncation(logits / heat)
            episodes.kept.add(which[~done], count[~done], (logits > -math.inf)[~done], ids)
            heat = 1.0
        token, logprob = draw_tokens(logits, heat, episodes.uniform[which, count], ids)
        episodes.tokens[which, count], episodes.logprobs[which, count] = token, logprob
        episodes.count[which] = count = count + ~done
        done = done | (count >= episodes.budget[which])
        episodes.done[which] = (done | (token[:, None] == episodes.ends).any(-1)) if self.stop_at_eos else done
        return token

    def _rollout(
        self, prefix: Prefix, tokens: list[int], logprobs: list[float], kept: list[np.ndarray] | None
    ) -> Rollout:
        if not all(map(math.isfinite, logprobs)):
            raise ValueError("sampling: the policy's logits are not finite; its weights are broken")
        ended = first_end(tokens, self.eos_token_id) is not None
        return Rollout(prefix=prefix, completion=tokens, sampler_logprob=logprobs, ended=ended, kept=kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Episodes:
    """The N episodes of a call on the device, changed in place; L is the response length."""

    start: Tensor
    """[N] int64, number of tokens of the prefix"""
    budget: Tensor
    """[N] int64, maximum number of tokens to sample"""
    uniform: Tensor
    """[N, L + 1] float32, a uniform number per token; the last column is not used"""
    tokens: Tensor
    """[N, L + 1] int64: the first `count` are sampled tokens, the rest is undefined"""
    logprobs: Tensor
    """[N, L + 1] float32 of the tokens"""
    count: Tensor
    """[N] int64: number of tokens sampled so far"""
    done: Tensor
    """[N] bool: whether the episode has ended"""
    ends: Tensor
    """[E] int64, the tokens that end an episode"""
    temperature: float | Tensor
    """a number, or [N] float32"""
    kept: KeptRecord | None
    """None if all tokens may be drawn"""

    def last(self, which: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the last tokens of the episodes `which` [n] and their positions in the sequence, [n] int64 each."""
        count = self.count[which]
        return self.tokens[which, count - 1], self.start[which] + count - 1


def _in_families(prefixes: Sequence[Prefix]) -> list[int]:
    """Returns the order of decoding, as indices. Prefixes of the same text are adjacent, so that they are prefilled
    together. Short texts come first, so that the slots of a step hold similar numbers of keys."""
    trunk_of = trunks(prefix.token_ids for prefix in prefixes)
    texts = [trunk_of[tuple(prefix.token_ids)] for prefix in prefixes]
    return sorted(range(len(prefixes)), key=lambda i: (len(texts[i]), texts[i], len(prefixes[i].token_ids), i))


def _equal_lengths(prefixes: Sequence[Prefix], at_most: int, budget: int) -> list[list[int]]:
    """Groups prefixes of equal length, as lists of indices. A group has at most `at_most` prefixes and `budget`
    tokens."""
    lengths = [len(prefix.token_ids) for prefix in prefixes]
    groups = []
    for length in sorted(set(lengths)):
        indices = [i for i, own in enumerate(lengths) if own == length]
        size = max(1, min(at_most, budget // length))
        groups += [indices[first : first + size] for first in range(0, len(indices), size)]
    return groups


def _packs(texts: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
    """Divides texts into packs for prefilling, as lists of indices."""
    budget = max(budget, *map(len, texts))
    together = families(texts, [()] * len(texts), budget)
    packs = micro_batches([max(len(texts[i]) for i in family) for family in together], budget)
    return [[i for family in indices for i in together[family]] for indices in packs]


def _at_once(_: tuple[int, int], step: Callable[[], None]) -> None:
    step()


def check_room(prefixes: Sequence[Prefix], response_length: int) -> None:
    """Raises ValueError, naming the row, if the reset tokens of a prefix leave nothing to sample."""
    for prefix in prefixes:
        if prefix.num_reset >= response_length:
            raise ValueError(
                f"response_length: {response_length} leaves nothing to sample after the {prefix.num_reset} "
                f"reset tokens of row {prefix.row}"
            )


def checked_rollouts(
    rollouts: Sequence[Rollout],
    prefixes: Sequence[Prefix],
    *,
    eos_token_id: EndIds,
    stops_at_eos: bool,
    may_stop: bool = False,
    truncated: bool = False,
) -> Sequence[Rollout]:
    """Returns the rollouts of an engine after checking them. Raises ValueError for the first rollout that does not have
    the form that `Engine` and `Rollout` describe, because a faulty user-defined engine could cause training on wrong
    tokens."""
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
        end = first_end(tokens, eos_token_id)
        if rollout.ended != (end is not None) and not (may_stop and rollout.ended):
            raise ValueError(f"{where} has ended={rollout.ended}, which contradicts its tokens")
        if stops_at_eos and end is not None and end + 1 < len(tokens):
            raise ValueError(f"{where} continues after its EOS")
        if truncated != (rollout.kept is not None):
            problem = (
                "lacks `kept`, the tokens that top_k, top_p and min_p left"
                if truncated
                else "has `kept`: it was drawn from a truncated distribution, but top_k, top_p and min_p are off"
            )
            raise ValueError(f"{where} {problem}")
        if rollout.kept is not None and not _holds(rollout.kept, tokens):
            raise ValueError(f"{where} has a token that is not among those that could be drawn (`kept`)")
    return rollouts


def _holds(kept: Sequence[np.ndarray], tokens: Sequence[int]) -> bool:
    return len(kept) == len(tokens) and all(token in own for token, own in zip(tokens, kept, strict=True))


def temperature_of(prefixes: Sequence[Prefix], default: float, device: torch.device) -> float | Tensor:
    """Returns the temperature of each episode, [N] float32, or `default` if no prefix has a temperature."""
    if all(prefix.temperature is None for prefix in prefixes):
        return float(default)
    heats = [default if prefix.temperature is None else prefix.temperature for prefix in prefixes]
    return torch.tensor(heats, dtype=torch.float32, device=device)


def as_ids(eos_token_id: EndIds) -> tuple[int, ...]:
    return (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)


def first_end(tokens: Sequence[int], eos_token_id: EndIds) -> int | None:
    """Returns the index of the first token that ends a response; None if there is none."""
    ends = as_ids(eos_token_id)
    return next((i for i, token in enumerate(tokens) if token in ends), None)


def end_index(rollout: Rollout, eos_token_id: EndIds) -> int:
    """Returns the index of the first end token in the completion, or else of its last token."""
    end = first_end(rollout.completion, eos_token_id)
    return len(rollout.completion) - 1 if end is None else end
