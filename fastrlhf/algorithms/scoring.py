"""Computes one number per response for many trees with a model, in packs, once before training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.config import DPOConfig
from fastrlhf.data.identity import judge_tokenizer
from fastrlhf.data.packing import forest, num_computed, own_micro_batches, pack, tree
from fastrlhf.data.reading import judge_rows
from fastrlhf.data.specials import special_ids
from fastrlhf.data.token_set import TokenSet
from fastrlhf.data.tokens import TextRules
from fastrlhf.distributed.ranks import from_all
from fastrlhf.models.forward import sequence_scores, token_logprobs
from fastrlhf.models.layers import LayerOptions
from fastrlhf.models.loading import check_vocabulary, load_reward_model, resolve_device
from fastrlhf.models.sharding import own_pace, runnable
from fastrlhf.runtime.progress import watched
from fastrlhf.types import PackedBatch, Segment, TokenizedExample

log = logging.getLogger(__name__)

Tree = Sequence[Segment]
"""The segments of one example: either its prompt and the responses attached to it, or full sequences of prompt and
response."""


class Trees(Sequence[Tree]):
    """The trees of tokenised rows. Each is made from the stored tokens when it is read."""

    def __init__(self, rows: TokenSet, make: Callable[[TokenizedExample], Tree]) -> None:
        """`make` gets rows whose ids are arrays."""
        self._rows, self._make = rows, make

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Tree:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._make(self._rows.arrays(index))

    def select(self, indices: Sequence[int]) -> Trees:
        """Returns the trees at these indices, in their order."""
        return Trees(self._rows.select(indices), self._make)


def pair_costs(rows: TokenSet, share_prompt: bool) -> list[int]:
    """Returns the number of tokens of the tree of each pair."""
    prompts = 1 if share_prompt else 2
    return (prompts * rows.lengths("prompt") + rows.lengths("chosen") + rows.lengths("rejected")).tolist()


@torch.no_grad()
def per_response(
    model: PreTrainedModel,
    trees: Sequence[Tree],
    budget: int,
    read: Callable[[PreTrainedModel, PackedBatch], Tensor],
    field: str,
    title: str = "",
    known: Mapping[int, Tensor] | None = None,
    save: Callable[[Mapping[int, Tensor]], None] | None = None,
) -> list[Tensor]:
    """Returns the results of `read` for the responses of every tree, [K] float32 on the CPU. Packs have at most
    `budget` tokens. With a `title` the progress of the pass is shown under this title. Raises ValueError, naming
    `field`, for a number that is not finite.

    `known`: results of an earlier pass by the index of the tree, which are not computed again. If the earlier pass had
    the same packs, the results are the same bit for bit. `save` is called on each rank with the results of each of its
    packs.
    """
    own, known = dict[int, Tensor](), known or {}
    all_micros = own_micro_batches([num_computed(tree) for tree in trees], budget, "example")
    micros = [left for micro in all_micros if (left := [i for i in micro if i not in known])]
    with runnable(model) as able, own_pace(able):
        for micro in watched(micros, map(len, micros), title):
            batch = pack(forest(trees[i] for i in micro), model.device)
            sizes = [num_responses(trees[i]) for i in micro]
            new = dict(zip(micro, read(able, batch).cpu().split(sizes), strict=True))
            own |= new
            if save:
                save(new)
    by_tree = {**known, **{i: value for part in from_all(own) for i, value in part.items()}}
    values = [by_tree[i] for i in range(len(trees))]
    bad = next((i for i, value in enumerate(values) if not bool(value.isfinite().all())), None)
    if bad is not None:
        raise ValueError(f"{field}: its output for example {bad} is not finite; the model is broken")
    return values


def sequence_logprobs(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Returns the log-prob of the scored tokens of every sequence, summed over tokens, [N] float32, in nats."""
    return sequence_sums(token_logprobs(model, batch).logprob, batch)


def sequence_sums(per_row: Tensor, batch: PackedBatch) -> Tensor:
    """Sums the rows of every sequence in a fixed order, [R] -> [N] float32."""
    # unsafe=True skips the check of the offsets, which would make the host wait for the GPU
    return torch.segment_reduce(per_row, "sum", offsets=batch.cu_rows.long(), unsafe=True)


def num_responses(tree: Tree) -> int:
    return len(tree) - len({segment.parent for segment in tree if segment.parent >= 0})


def reward_scores(
    config: DPOConfig,
    examples: Sequence[TokenizedExample],
    trees: Sequence[Tree],
    tokenizer: PreTrainedTokenizerBase,
    rules: TextRules | None = None,
) -> list[Tensor]:
    """Returns the scores [K] of the responses of every example by the model `reward_model_path`. The model reads
    `trees`, or the text of the examples if its tokenizer or chat template differs from that of the run. It is loaded,
    used and freed here."""
    field, budget = "reward_model_path", config.micro_batch_tokens
    sources = [example.source for example in examples if example.source is not None]
    talks = any(isinstance(source.prompt, list) for source in sources)
    found = judge_tokenizer(field, config.reward_model_path, tokenizer, config, conversations=talks)
    if found is not None:
        tokenizer, told = found
        log.info("%s: another tokenizer than that of the run (%s); it reads the text", field, told.told)
        rows = judge_rows(field, sources, tokenizer, ("chosen", "rejected", "responses"), rules or TextRules())
        responses = [row.responses or [row.chosen or [], row.rejected or []] for row in rows]
        trees = [tree([row.prompt] * len(own), own) for row, own in zip(rows, responses, strict=True)]
        budget = max(budget, *map(num_computed, trees))
    model = load_reward_model(
        config.reward_model_path,
        pad_token_id=special_ids(tokenizer)[1],
        must_be_trained=True,
        device=resolve_device(config.device),
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        layers=LayerOptions.of(config),
    )
    check_vocabulary({field: model}, tokenizer)
    title = "scores of label_source reward_model" if config.progress else ""
    return per_response(model, trees, budget, sequence_scores, "reward_model_path", title)
