"""Divides the episodes of a rollout among the ranks, so that no rank waits long for other ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from fastrlhf.data.packing import trunks
from fastrlhf.distributed.ranks import from_all, rank, world_size
from fastrlhf.models.sharding import own_pace
from fastrlhf.rollout.engine import Engine, TransformersEngine
from fastrlhf.types import Prefix, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedEngine:
    """Combines the engines of all ranks: each rank continues its part of the prefixes and gets all rollouts. Every rank
    must call it with the same prefixes; an error on one rank is raised on all."""

    engine: Engine
    model: PreTrainedModel
    response_length: int
    """Maximum number of tokens of a response, including the reset."""

    def generate(self, prefixes: Sequence[Prefix]) -> list[Rollout]:
        dealt = deal(prefixes, self.response_length, world_size())
        with own_pace(self.model, gather=not isinstance(self.engine, TransformersEngine)):
            own = self.engine.generate([prefixes[i] for i in dealt[rank()]])
        order = [i for indices in dealt for i in indices]
        rollouts = [rollout for part in from_all(own) for rollout in part]
        return [rollout for _, rollout in sorted(zip(order, rollouts, strict=True), key=lambda pair: pair[0])]


def deal(prefixes: Sequence[Prefix], response_length: int, num_ranks: int) -> list[list[int]]:
    """Deals episodes to ranks by their expected numbers of tokens. Returns the indices of each rank, in ascending
    order; they depend only on the arguments.

    Each rank gets the same number of episodes, or one more, because this number determines how long it decodes. Every
    response is expected to have its maximum length. Episodes that start in the same text stay together, as far as
    possible, because a rank computes the text once. Groups of such episodes are dealt one by one, the longest first,
    each to the rank with the fewest tokens so far; a group that exceeds the remaining episodes of a rank is divided.
    """
    if num_ranks == 1:
        return [list(range(len(prefixes)))]
    trunk_of = trunks(prefix.token_ids for prefix in prefixes)
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, prefix in enumerate(prefixes):
        groups.setdefault(trunk_of[tuple(prefix.token_ids)], []).append(i)

    def expected(trunk: Sequence[int], members: Sequence[int]) -> int:
        return len(trunk) + sum(response_length - prefixes[i].num_reset for i in members)

    dealt: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    room = [len(prefixes) // num_ranks + (place < len(prefixes) % num_ranks) for place in range(num_ranks)]
    for trunk, members in sorted(groups.items(), key=lambda group: (-expected(*group), group[1])):
        waiting = members
        while waiting:
            place = min((p for p in range(num_ranks) if room[p]), key=lambda p: (loads[p], p))
            taken, waiting = waiting[: room[place]], waiting[room[place] :]
            dealt[place] += taken
            loads[place] += expected(trunk, taken)
            room[place] -= len(taken)
    return [sorted(indices) for indices in dealt]
