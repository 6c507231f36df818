"""Judges, functions that score rollouts. They are made from a reward model or defined by the user."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrlhf.data.packing import families, forest, num_computed, own_micro_batches, pack, tree
from fastrlhf.data.reading import TextReader, Texts
from fastrlhf.distributed.ranks import on_first, total, world_size
from fastrlhf.models.forward import sequence_scores
from fastrlhf.models.sharding import own_pace
from fastrlhf.rollout.engine import end_index
from fastrlhf.types import EndIds, Rollout, Segment

Judge = Callable[[Sequence[Rollout]], Tensor]
"""Rollouts -> scores [N] float32, one per whole response."""


def reward_model_judge(
    model: PreTrainedModel, *, eos_token_id: EndIds, micro_batch_tokens: int, reader: TextReader | None = None
) -> Judge:
    """Makes a judge from a reward model, which reads the prompt and the response up to and including its first EOS. A
    `reader` re-encodes both for a reward model that has a different tokenizer.

    Text that rollouts share, for example the prefix of a group, is computed once.
    """

    def judge(rollouts: Sequence[Rollout]) -> Tensor:
        if reader is not None:
            texts = reader(rollouts)
            return checked_scores(score_texts(model, texts, micro_batch_tokens), rollouts, model.device)
        prefixes = [rollout.prefix.token_ids for rollout in rollouts]
        responses = [rollout.completion[: end_index(rollout, eos_token_id) + 1] for rollout in rollouts]
        scores = _scores(model, prefixes, responses, micro_batch_tokens)
        return checked_scores(scores, rollouts, model.device)

    return judge


def score_texts(model: PreTrainedModel, texts: Texts, micro_batch_tokens: int) -> Tensor:
    """Returns the scores [N] float32 of (prompt, response) pairs given as ids of the model's own tokenizer. A pair with
    more than `micro_batch_tokens` tokens is scored by itself, because its length cannot be checked before the run."""
    prompts, responses = [prompt for prompt, _ in texts], [response for _, response in texts]
    longest = max((len(prompt) + len(response) for prompt, response in texts), default=0)
    return _scores(model, prompts, responses, max(micro_batch_tokens, longest))


@torch.no_grad()
def _scores(
    model: PreTrainedModel,
    prefixes: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    micro_batch_tokens: int,
) -> Tensor:
    groups = families(prefixes, responses, micro_batch_tokens)
    trees = [_tree([prefixes[i] for i in group], [responses[i] for i in group]) for group in groups]
    scores = torch.zeros(len(prefixes), device=model.device)
    with own_pace(model):
        for micro in own_micro_batches(list(map(num_computed, trees)), micro_batch_tokens, "response"):
            batch = pack(forest(trees[j] for j in micro), model.device)
            scores[[i for j in micro for i in groups[j]]] = sequence_scores(model, batch)
    return total(scores)


def asked_once(judge: Judge) -> Judge:
    """Makes a judge that is called only on rank 0 and whose scores are sent to all ranks, because a user-defined judge
    may be expensive or random."""
    return judge if world_size() == 1 else lambda rollouts: on_first(lambda: torch.as_tensor(judge(rollouts)).cpu())


def _tree(prefixes: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[Segment]:
    return tree(prefixes, responses) if len(prefixes) > 1 else [Segment(token_ids=[*prefixes[0], *responses[0]])]


def checked_scores(scores: Tensor | Sequence[float], rollouts: Sequence[Rollout], device: torch.device) -> Tensor:
    """Converts the result of a judge to [N] float32 on `device`.

    Raises ValueError if it is not one finite number per rollout; the message names the row of the prompt.
    """
    values = torch.as_tensor(scores, dtype=torch.float32, device=device)
    if values.shape != (len(rollouts),):
        raise ValueError(f"judge: must return one score per rollout [{len(rollouts)}]; got {tuple(values.shape)}")
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        first = int(bad[0, 0])
        raise ValueError(
            f"judge: the score of a response to row {rollouts[first].prefix.row} is {values[first].item()}"
        )
    return values
