"""Packs sequences into flat tensors and distributes them over micro-batches, by pure functions without model, tokenizer
or randomness.

A pack is a forest of segments (types.Segment). Nothing is padded: attention reads the lengths of the segments, and all
other layers see a flat row of tokens. The shift by one token between inputs and targets happens only in `pack`.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from itertools import accumulate, pairwise

import numpy as np
import torch

from fastrlhf.config import TrainConfig, require
from fastrlhf.distributed.ranks import share, world_size
from fastrlhf.types import AttentionPlan, PackedBatch, Segment, TokenizedExample

Device = torch.device | str


def pack(segments: Sequence[Segment], device: Device = "cpu") -> PackedBatch:
    """Makes one pack of the segments, one after the other in the given order.

    Raises ValueError if a segment is empty, scores a token that has no predecessor, or has a parent that does not come
    before it or that is shorter than the cut.
    """
    if not segments:
        raise ValueError("segments: nothing to pack")
    ids = [np.asarray(segment.token_ids, np.int64) for segment in segments]
    lengths = [len(part) for part in ids]
    starts = [0, *accumulate(lengths)]
    keys: list[list[range]] = []  # per segment, the rows it attends to, ancestors' first
    depths: list[int] = []
    scored_at: list[np.ndarray] = []  # positions in the pack of the scored tokens, per segment
    predicted_at: list[np.ndarray] = []  # positions of the tokens before them

    for index, segment in enumerate(segments):
        _check(index, segment, segments)
        start, length = starts[index], lengths[index]
        seen = _seen(segment, starts, keys)
        depths.append(sum(len(span) for span in seen))
        keys.append([*seen, range(start, start + length)])
        if segment.scored is None:
            at = np.arange(start + length - segment.num_scored, start + length)
        else:
            at = np.asarray(segment.scored, np.int64) + start
        before = at - 1
        if len(at) and at[0] == start:  # the first token of a child is predicted from the end of its parent's part
            before[0] = seen[-1].stop - 1
        scored_at.append(at)
        predicted_at.append(before)

    trunks = {segment.parent for segment in segments}
    leaves = [i for i in range(len(segments)) if i not in trunks]
    if any(segments[i].num_scored for i in trunks if i >= 0):
        raise ValueError("segments: a parent of other segments cannot have scored tokens; score its children")

    flat = np.concatenate(ids)
    shifts = np.array(starts[:-1]) - depths
    return PackedBatch(
        token_ids=_int64(flat, device),
        positions=_int64(np.arange(len(flat)) - np.repeat(shifts, lengths), device),
        rows=_int64(np.concatenate(predicted_at), device),
        targets=_int64(flat[np.concatenate(scored_at)], device),
        cu_rows=_offsets([segments[i].num_scored for i in leaves], device),
        last=_int64(np.array([starts[i + 1] - 1 for i in leaves]), device),
        plan=_plan(segments, keys, device),
    )


def moved(batch: PackedBatch, device: Device) -> PackedBatch:
    """Copies the tensors of a pack to a device."""

    def move(part: AttentionPlan | PackedBatch) -> dict[str, torch.Tensor]:
        tensors = {field.name: getattr(part, field.name) for field in fields(part)}
        return {name: x.to(device, non_blocking=True) for name, x in tensors.items() if isinstance(x, torch.Tensor)}

    return replace(batch, plan=replace(batch.plan, **move(batch.plan)), **move(batch))


def joined(prompt: Sequence[int], response: Sequence[int]) -> Sequence[int]:
    """Returns the ids of prompt and response: an array if both are arrays, otherwise a list."""
    if isinstance(prompt, np.ndarray) and isinstance(response, np.ndarray):
        return np.concatenate([prompt, response])  # pyright: ignore[reportReturnType]
    return [*prompt, *response]


def sequence(prompt: Sequence[int], response: Sequence[int], trained: Sequence[int] | None = None) -> Segment:
    """Returns a root segment of prompt and response in which all tokens of the response, or only those at the indices
    `trained`, are scored."""
    if trained is None:
        return Segment(token_ids=joined(prompt, response), num_scored=len(response))
    scored = [len(prompt) + i for i in trained]
    return Segment(token_ids=joined(prompt, response), num_scored=len(scored), scored=scored)


def _response(response: Sequence[int], trained: Sequence[int] | None) -> Segment:
    """Returns a segment of a response, whose tokens at `trained`, or all, are scored."""
    num_scored = len(response) if trained is None else len(trained)
    return Segment(token_ids=response, num_scored=num_scored, scored=trained)


def pair(
    prompt: Sequence[int],
    chosen: Sequence[int],
    rejected: Sequence[int],
    *,
    scored: bool,
    share_prompt: bool,
    trained: Sequence[Sequence[int] | None] = (),
) -> list[Segment]:
    """Returns the tree of a preference pair: a `group` of two responses, chosen before rejected."""
    return group(prompt, (chosen, rejected), scored=scored, share_prompt=share_prompt, trained=trained)


def group(
    prompt: Sequence[int],
    responses: Sequence[Sequence[int]],
    *,
    scored: bool,
    share_prompt: bool,
    trained: Sequence[Sequence[int] | None] = (),
) -> list[Segment]:
    """Returns the tree of several responses to one prompt, in order. With `share_prompt` the prompt is one segment,
    which is computed once, and the responses are its children.

    With `scored`, the tokens of each response are scored: those at the indices in `trained`, or all if that is None.
    """
    each = list(zip(responses, trained or [None] * len(responses), strict=True))
    if not share_prompt or not len(prompt):
        return [
            sequence(prompt, response, some) if scored else Segment(token_ids=joined(prompt, response))
            for response, some in each
        ]
    trunk = Segment(token_ids=prompt)
    branches = (
        replace(_response(response, some) if scored else Segment(token_ids=response), parent=0, cut=len(prompt))
        for response, some in each
    )
    return [trunk, *branches]


def tree(prefixes: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[Segment]:
    """Returns the tree of several responses, where every prefix is a beginning of the longest prefix. The longest
    prefix is computed once, and each response is attached to it at the end of the response's own prefix. All tokens of
    the responses are scored.

        prefixes [7, 8], [7, 8, 1]; responses [5, 0], [2, 0]   ->   7 8 1 | 5 0 (cut 2) | 2 0 (cut 3)
    """
    trunk = max(prefixes, key=len)
    branches = (
        Segment(token_ids=response, num_scored=len(response), parent=0, cut=len(prefix))
        for prefix, response in zip(prefixes, responses, strict=True)
    )
    return [Segment(token_ids=trunk), *branches]


def trunks(sequences: Iterable[Sequence[int]]) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Maps each sequence to its trunk: a sequence that begins with it and that no other sequence extends. A sequence
    that no other sequence extends is its own trunk.

    [7, 8], [7, 8, 1], [7, 9]   ->   (7, 8): (7, 8, 1), (7, 8, 1): (7, 8, 1), (7, 9): (7, 9)
    """
    found: dict[tuple[int, ...], tuple[int, ...]] = {}
    after: tuple[int, ...] = ()
    for each in sorted(set(map(tuple, sequences)), reverse=True):
        # In reverse lexical order, a sequence comes right after its extensions.
        found[each] = found[after] if after and after[: len(each)] == each else each
        after = each
    return found


def families(prefixes: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
    """Groups sequences whose prefixes have the same trunk (see `trunks`), so that a `tree` computes the trunk once.
    Returns groups of indices, in the order of their first sequences. A group has at most `budget` tokens, unless it is
    a single sequence."""

    def computed(members: Sequence[int]) -> int:
        return max(len(prefixes[i]) for i in members) + sum(len(responses[i]) for i in members)

    trunk_of = trunks(prefixes)
    found: list[list[int]] = []
    newest: dict[tuple[int, ...], list[int]] = {}
    for i, prefix in enumerate(prefixes):
        trunk = trunk_of[tuple(prefix)]
        if trunk not in newest or computed([*newest[trunk], i]) > budget:
            newest[trunk] = []
            found.append(newest[trunk])
        newest[trunk].append(i)
    return found


def forest(trees: Iterable[Sequence[Segment]]) -> list[Segment]:
    """Concatenates the segments of several trees. In each tree given, `parent` is an index into that tree; in the
    result, it is an index into the whole list."""
    segments: list[Segment] = []
    for tree in trees:
        start = len(segments)
        segments += [s if s.parent < 0 else replace(s, parent=s.parent + start) for s in tree]
    return segments


def num_computed(tree: Sequence[Segment]) -> int:
    """Returns the number of tokens of a tree, which is its computing cost."""
    return sum(len(segment.token_ids) for segment in tree)


def num_in_sequences(tree: Sequence[Segment]) -> int:
    """Returns the number of tokens that a tree would have if its sequences did not share segments. Every segment must
    be a root or a child of a root."""
    trunks = {segment.parent for segment in tree}
    return sum(segment.cut + len(segment.token_ids) for i, segment in enumerate(tree) if i not in trunks)


def unpack(batch: PackedBatch) -> list[list[int]]:
    """Returns the token ids of every sequence of the pack, from its root segment to its leaf. It inverts `pack` for
    sequences without a shared segment."""
    plan = batch.plan
    seen = batch.token_ids if plan.key_index is None else batch.token_ids[plan.key_index]
    per_segment = [part.tolist() for part in seen.split(plan.key_lengths)]
    ends = plan.cu_seqlens[1:].long() - 1
    is_leaf = torch.isin(ends, batch.last).tolist()
    return [tokens for tokens, leaf in zip(per_segment, is_leaf, strict=True) if leaf]


def micro_batches(costs: Sequence[int], budget: int, what: str = "item", multiple: int = 1) -> list[list[int]]:
    """Distributes items of `costs` tokens evenly over few micro-batches of at most `budget` tokens.

    Items are placed one by one, the longest first, each into the micro-batch with the fewest tokens so far. If they do
    not fit, the number of micro-batches is increased. Returns the indices of each micro-batch in ascending order; they
    depend only on the costs. The number of micro-batches is a multiple of `multiple`, or the number of items if that is
    smaller. Raises ValueError if an item exceeds the budget.
    """
    if not costs:
        return []
    _check_budget(costs, budget, what)
    # Two items of more than half the budget each cannot share a micro-batch.
    count = max(-(-sum(costs) // budget), sum(2 * cost > budget for cost in costs))
    while (bins := _spread(costs, budget, count + -count % multiple)) is None:
        count += max(1, count // 64)
    return bins


def own_micro_batches(costs: Sequence[int], budget: int, what: str = "item") -> Sequence[list[int]]:
    """Returns the micro-batches of `micro_batches` that belong to this rank.

    If the number of items is a multiple of the number of ranks, every rank has equally many micro-batches and so takes
    part in every gather of the weights. Otherwise the numbers differ by at most one.
    """
    return share(micro_batches(costs, budget, what, multiple=world_size()))


def in_order(costs: Sequence[int], budget: int, what: str = "item") -> list[list[int]]:
    """Fills micro-batches of at most `budget` tokens one after the other, in the order of the items. Returns indices.

    Raises ValueError if an item exceeds the budget.
    """
    if costs:
        _check_budget(costs, budget, what)
    bins: list[list[int]] = []
    room = -1
    for i, cost in enumerate(costs):
        if cost > room:
            bins.append([])
            room = budget
        bins[-1].append(i)
        room -= cost
    return bins


def _check_budget(costs: Sequence[int], budget: int, what: str) -> None:
    longest = max(range(len(costs)), key=costs.__getitem__)
    if costs[longest] > budget:
        raise ValueError(
            f"micro_batch_tokens: {budget} cannot hold {what} {longest} of {costs[longest]} tokens; "
            "raise micro_batch_tokens or lower max_length"
        )


def _spread(costs: Sequence[int], budget: int, count: int) -> list[list[int]] | None:
    """Distributes the items over at most `count` bins; returns None if a bin would overflow."""
    bins: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, index) for index in range(count)]  # a heap of (tokens, bin)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, index = loads[0]
        if load + costs[i] > budget:
            return None
        heapq.heapreplace(loads, (load + costs[i], index))
        bins[index].append(i)
    return [sorted(indices) for indices in bins if indices]


def _check(index: int, segment: Segment, segments: Sequence[Segment]) -> None:
    if not len(segment.token_ids):
        raise ValueError(f"segments[{index}]: no tokens")
    if segment.parent >= index:
        raise ValueError(f"segments[{index}]: parent {segment.parent} must come before it")
    if segment.parent >= 0 and not 1 <= segment.cut <= len(segments[segment.parent].token_ids):
        raise ValueError(
            f"segments[{index}]: cut {segment.cut} must be in 1..{len(segments[segment.parent].token_ids)}, "
            "the tokens of its parent"
        )
    scored, first = segment.scored, int(segment.parent < 0)
    if scored is not None and (
        len(scored) != segment.num_scored
        or any(not first <= i < len(segment.token_ids) for i in scored)
        or any(a >= b for a, b in pairwise(scored))
    ):
        raise ValueError(f"segments[{index}]: scored must be {segment.num_scored} indices of its tokens, in order")
    most = len(segment.token_ids) - (segment.parent < 0)
    if not 0 <= segment.num_scored <= most:
        raise ValueError(
            f"segments[{index}]: num_scored {segment.num_scored} must be in 0..{most}; "
            "the first token of a root has nothing to be predicted from"
        )


def _seen(segment: Segment, starts: list[int], keys: list[list[range]]) -> list[range]:
    if segment.parent < 0:
        return []
    start = starts[segment.parent]
    return [*keys[segment.parent][:-1], range(start, start + segment.cut)]


def _plan(segments: Sequence[Segment], keys: list[list[range]], device: Device) -> AttentionPlan:
    query_lengths = tuple(len(segment.token_ids) for segment in segments)
    key_lengths = tuple(sum(len(span) for span in spans) for spans in keys)
    has_branches = any(segment.parent >= 0 for segment in segments)
    cu_seqlens = _offsets(query_lengths, device)
    return AttentionPlan(
        cu_seqlens=cu_seqlens,
        cu_seqlens_k=_offsets(key_lengths, device) if has_branches else cu_seqlens,
        key_index=_int64(_concatenated(keys), device) if has_branches else None,
        query_lengths=query_lengths,
        key_lengths=key_lengths,
    )


def _concatenated(keys: Sequence[Sequence[range]]) -> np.ndarray:
    return np.concatenate([np.arange(span.start, span.stop) for spans in keys for span in spans])


def _int64(values: np.ndarray, device: Device) -> torch.Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)


def _offsets(lengths: Sequence[int], device: Device) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)


def check_micro_batch(config: TrainConfig, examples: Sequence[TokenizedExample], costs: Sequence[int]) -> None:
    """Raises ValueError, naming the row, if an example does not fit a micro-batch. `costs` are the tokens of each
    example."""
    longest = max(range(len(costs)), key=costs.__getitem__)
    place = getattr(examples, "place", None)  # of a TokenSet, which knows the dataset of a row
    row = place(longest) if place else f"row {examples[longest].row}"
    require(
        costs[longest] <= config.micro_batch_tokens,
        "micro_batch_tokens",
        config.micro_batch_tokens,
        f"at least {costs[longest]}, the tokens of {row}; or lower max_length",
    )
