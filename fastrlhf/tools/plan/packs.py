"""Reads the rows of the first steps of a run and makes the packs that the trainer would make.

Rows are read and tokenised as in the run. A hub dataset is not downloaded; its rows are assumed to have `max_length`
tokens. Sampled responses are assumed to have `response_length` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerBase

from fastrlhf.algorithms.experience import pack_episodes
from fastrlhf.config import DPOConfig, PPOConfig, RewardConfig, TrainConfig, require
from fastrlhf.config.sources import dataset_names
from fastrlhf.data.packing import forest, micro_batches, num_computed, num_in_sequences, pack, unpack
from fastrlhf.data.rows import is_local
from fastrlhf.models.alone import num_computed_alone
from fastrlhf.runtime.inputs import open_tokenizer
from fastrlhf.tools.plan.work import open_work, to_tree
from fastrlhf.types import PackedBatch, Prefix, Rollout, Segment, TokenizedExample

MOST_BATCHES = 200
"""Number of first steps whose packs are made to find the largest one; on-policy runs use a tenth of it, because their
packs take longer to make."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a run's first steps. They do not depend on the settings that tools/plan/changes.py varies."""

    tokenizer: PreTrainedTokenizerBase
    examples: Sequence[TokenizedExample]
    batches: list[list[int]]
    steps: int | None
    """Number of steps of the run; None if it depends on the size of the dataset, which is unknown."""
    note: str


@dataclass(frozen=True, kw_only=True)
class Packs:
    largest: PackedBatch
    num_packs: int
    """Largest number of packs in a step."""
    longest: int
    """Number of tokens of the largest item, which must fit one micro-batch."""
    tokens_per_step: float
    """Mean number of tokens that one pass over a batch computes."""


def read_rows(config: TrainConfig) -> Rows:
    sources = dataset_names(config.dataset_name)
    require(all(sources or [""]), "dataset_name", config.dataset_name, "a hub name, or a local file or folder")
    if all(map(is_local, sources)):
        work = open_work(config, most_batches=MOST_BATCHES)
        note = f"rows: {work.report.summary()}"
        return Rows(tokenizer=work.tokenizer, examples=work.examples, batches=work.batches, steps=work.steps, note=note)
    examples = [_assumed(config)] * config.batch_size
    num = config.batch_size
    steps = config.max_steps if config.max_steps > 0 else None
    if isinstance(config, PPOConfig):
        num //= config.num_generations
        if steps is None and config.total_episodes:
            steps = max(1, config.total_episodes // config.batch_size)
    return Rows(
        tokenizer=open_tokenizer(config),
        examples=examples,
        batches=[list(range(num))],
        steps=steps,
        note=f"dataset: {', '.join(sources)} is not on this disk, so not read; "
        f"rows of {config.max_length:,} tokens are assumed",
    )


def _assumed(config: TrainConfig) -> TokenizedExample:
    """Returns a made-up row in place of an unknown one. It has `max_length` tokens; a pair has them in prompt and both
    responses together."""
    if isinstance(config, PPOConfig):
        return TokenizedExample(prompt=[0] * (config.max_length - config.response_length), row=0)
    part = max(1, config.max_length // 4)
    response = [0] * part
    if isinstance(config, DPOConfig | RewardConfig):
        prompt = [0] * max(1, config.max_length - 2 * part)
        return TokenizedExample(prompt=prompt, chosen=response, rejected=response, responses=[response] * 2, row=0)
    return TokenizedExample(prompt=[0] * max(1, config.max_length - part), reference=response, chosen=response, row=0)


def find_packs(config: TrainConfig, rows: Rows, *, alone: bool = False) -> Packs:
    """Finds the packs of the first steps. `alone`: the model runs the sequences of a pack one by one, so a shared
    prompt is computed once per response."""
    on_policy = isinstance(config, PPOConfig)
    packs = _on_policy_packs(config, rows, alone) if on_policy else _offline_packs(config, rows, alone)
    if not alone:
        return packs
    apart = pack([Segment(token_ids=ids) for ids in unpack(packs.largest)])
    kept = {name: getattr(packs.largest, name) for name in ("rows", "targets", "cu_rows")}
    return replace(packs, largest=replace(apart, **kept))


def _offline_packs(config: TrainConfig, rows: Rows, alone: bool) -> Packs:
    tree_of = to_tree(config)
    trees = [tree_of(example) for example in rows.examples]
    costs = [num_computed(tree) for tree in trees]
    computed = [num_in_sequences(tree) for tree in trees] if alone else costs
    split = [
        [[batch[i] for i in micro] for micro in micro_batches([costs[i] for i in batch], config.micro_batch_tokens)]
        for batch in rows.batches
    ]
    largest = max((micro for micros in split for micro in micros), key=lambda micro: sum(costs[i] for i in micro))
    return Packs(
        largest=pack(forest(trees[i] for i in largest)),
        num_packs=max(map(len, split)),
        longest=max(costs),
        tokens_per_step=sum(computed[i] for batch in rows.batches for i in batch) / len(rows.batches),
    )


def _on_policy_packs(config: PPOConfig, rows: Rows, alone: bool) -> Packs:
    updates = []
    for batch in rows.batches[: MOST_BATCHES // 10]:
        prompts = [rows.examples[i] for i in batch for _ in range(config.num_generations)]
        updates.append(
            pack_episodes(config, [_whole(config, p) for p in prompts], range(len(batch)), torch.device("cpu"))
        )
    packs = [item.batch for update in updates for mini in update for item in mini]
    together = config.num_generations if config.share_trunks else 1
    longest = max(len(rows.examples[i].prompt) for batch in rows.batches for i in batch)
    return Packs(
        largest=max(packs, key=lambda batch: batch.num_tokens),
        num_packs=max(len(mini) for update in updates for mini in update),
        longest=longest + together * config.response_length,
        tokens_per_step=sum(num_computed_alone(x.plan) if alone else x.num_tokens for x in packs) / len(updates),
    )


def _whole(config: PPOConfig, example: TokenizedExample) -> Rollout:
    """Returns an episode that starts right after the prompt and has `response_length` tokens. A reset would not make it
    longer and would leave fewer trained tokens."""
    length = config.response_length
    return Rollout(
        prefix=Prefix(token_ids=example.prompt, num_reset=0, row=example.row, episode=0),
        completion=[0] * length,
        sampler_logprob=[0.0] * length,
        ended=False,
    )
