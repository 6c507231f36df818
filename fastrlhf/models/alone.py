"""Computes packs for models whose sequences cannot share a forward pass: every sequence runs separately, with the
model's own attention.

This is needed for models with recurrent states, short convolutions, chunked attention, sparse indexers, ALiBi and
everything else that does not follow an attention plan. The results are exact, but it is slower than a packed pass: only
sequences of equal length form a batch, without padding, and a prompt that several responses share is computed once per
response.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastrlhf.distributed.ranks import from_all
from fastrlhf.types import AttentionPlan, PackedBatch


def states_one_by_one(
    run: Callable[[Tensor], Sequence[Tensor]], batch: PackedBatch, *, in_step: bool = False
) -> list[Tensor]:
    """Returns the results of `run` for the tokens of a pack, [T, ...] each.

    `run` maps ids [B, L] of B sequences to tensors [B, L, ...], for example their hidden states. With `in_step` every
    process of a run makes equally many calls, which sharded weights require: a process with fewer different lengths
    repeats its last call.
    """
    paths = _paths(batch.plan)
    groups: dict[int, list[list[int]]] = defaultdict(list)
    for path in paths:
        groups[len(path)].append(path)
    calls = list(groups.values())
    if in_step:
        calls += [calls[-1][:1]] * (max(from_all(len(calls))) - len(calls))
    rows = [torch.tensor(call, device=batch.token_ids.device) for call in calls]  # [B, L] each
    results = zip(*(run(batch.token_ids[each]) for each in rows), strict=True)
    flat = [torch.cat([part.flatten(0, 1) for part in parts]) for parts in results]
    # The result for a shared token does not depend on the branch, so its first copy gives value and gradient.
    row = np.concatenate([np.asarray(call).reshape(-1) for call in calls])
    source = np.empty(batch.num_tokens, dtype=np.int64)
    source[row[::-1]] = np.arange(len(row))[::-1]  # if an index occurs several times, the last assignment counts
    index = torch.from_numpy(source).to(batch.token_ids.device)
    return [each[index] for each in flat]


def num_computed_alone(plan: AttentionPlan) -> int:
    """Returns the number of tokens that `states_one_by_one` computes."""
    return sum(map(len, _paths(plan)))


def _paths(plan: AttentionPlan) -> Sequence[list[int]]:
    """Returns the sequences to run, each as a list of rows of the pack from first to last token. They are as few as
    possible and cover every token."""
    keys = np.arange(sum(plan.key_lengths)) if plan.key_index is None else plan.key_index.cpu().numpy()
    paths, reached = [], set[int]()
    segments = list(zip(np.split(keys, np.cumsum(plan.key_lengths)[:-1]), plan.query_lengths, strict=True))
    for seen, num_own in reversed(segments):  # branches before their parents
        path: list[int] = seen.tolist()
        if not reached.issuperset(path[-num_own:]):
            paths.append(path)
            reached.update(path)
    return paths[::-1]
