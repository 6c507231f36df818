"""Saves the final model of a run; if it has an adapter, both the adapter and the merged weights.

Merged weights are computed and saved in float32. A bfloat16 weight has only 8 significant bits, which is too coarse for
most of the changes by a low-rank update, so weights saved in bfloat16 would not be the policy that was trained and
evaluated. `merged_dtype: bfloat16` takes effect only if the shift of log-probs, measured on held-out rows, is small.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.config import TrainConfig
from fastrlhf.data.packing import pack, sequence
from fastrlhf.distributed.ranks import on_first
from fastrlhf.models.adapters import (
    has_adapter,
    merge_adapter,
    merged_copy,
    plain_weights,
    save_adapter,
    share_weights,
)
from fastrlhf.models.forward import sequence_scores, token_logprobs
from fastrlhf.models.four_bit import is_four_bit
from fastrlhf.models.sharding import is_sharded, on_first_rank, plain_class
from fastrlhf.publish.card import Card, is_ours
from fastrlhf.runtime.atomic import write_file
from fastrlhf.runtime.checkpoint import Checkpointer, save_model, save_weights
from fastrlhf.runtime.inputs import Data
from fastrlhf.types import TokenizedExample

log = logging.getLogger(__name__)

NUM_ROWS = 32
"""Maximum number of rows on which the shift of log-probs caused by bfloat16 is measured."""


def save_trained(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path | None,
    *,
    apart: bool = False,
    accept: Callable[[PreTrainedModel, PreTrainedModel], bool] | None = None,
    card: Card | None = None,
) -> PreTrainedModel:
    """Saves the final model of a run in `folder`, if it is given, with an adapter merged into its weights; the adapter
    is also saved in `adapter/`. Returns the plain model.

    An adapter over bfloat16 or 4-bit weights is merged into a float32 copy on the CPU. So is every adapter if `apart`
    is true, because other models still need the unmerged weights. `accept(model, copy)` decides whether a merged copy
    in bfloat16 is saved and returned instead. With sharded bfloat16 weights, the model is returned with its adapter.
    The `card` is written before the model, and the adapter's beside the adapter. Every rank must call it.
    """
    if folder and card:
        on_first(lambda: write_card(folder, card.text()))
    if not has_adapter(model):
        if folder:
            save_model(model, tokenizer, folder)
        return model
    if folder:
        save_adapter(model, folder / "adapter")
        on_first(lambda: tokenizer.save_pretrained(folder / "adapter"))
        if card:
            on_first(lambda: write_card(folder / "adapter", card.adapter_text()))
    in_float32 = model.dtype == torch.float32 and not is_four_bit(model)
    if accept and not is_sharded(model):
        merged = merged_copy(model, torch.bfloat16)
        if not accept(model, merged):
            merged = merged_copy(model, torch.float32)
    elif is_sharded(model) or (in_float32 and not apart):
        if folder:  # before the merge: if saving fails, the model is still unmerged
            buffers = {name for name, _ in model.named_buffers()}
            kept = {name: tensor for name, tensor in model.state_dict().items() if name in buffers}
            weights = on_first_rank(dict(plain_weights(model, torch.float32)) | kept)
            save_weights(_without_weights(model), weights, tokenizer, folder)
        if in_float32:
            merge_adapter(model)
        return model
    else:
        merged = merged_copy(model, torch.float32)
    if folder:
        save_model(merged, tokenizer, folder)
    return merged


def card_of(
    config: TrainConfig,
    data: Data | None,
    final: Mapping[str, float],
    last: Mapping[str, float],
    steps: int,
    best_step: int | None = None,
) -> Card | None:
    """Returns the card of a run of `steps` steps, or None if the run has no data. `final` holds the metrics of the last
    evaluation, or those of the evaluation after `best_step` if the model has the weights of that step; `last` holds the
    metrics of the last step."""
    if data is None:
        return None
    return Card(
        config=config,
        datasets=data.origin.sources,
        num_train=len(data.train),
        num_eval=len(data.eval),
        final=final,
        last=last,
        steps=steps,
        best_step=best_step,
    )


def write_card(folder: Path, text: str) -> None:
    """Writes a model card to README.md. If the folder holds a README.md that fastrlhf did not write, the card goes to
    MODEL_CARD.md, with a warning."""
    file = folder / "README.md"
    if file.exists() and not is_ours(file):
        log.warning("%s was not written by fastrlhf and stays; the card of the model is MODEL_CARD.md", file)
        file = folder / "MODEL_CARD.md"
    write_file(file, text)


def save_all(
    models: Mapping[str, PreTrainedModel | None],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path | None,
    saved: dict[str, PreTrainedModel],
    accept: Acceptance | None = None,
    card: Card | None = None,
) -> None:
    """Saves the final models of a run, each in the sub-folder of its name, and adds the plain models to `saved`. The
    policy, whose name is "", is saved last and in `folder` itself, with the measurement of `accept` in config.yaml.
    `card` is the model card of the policy.

    After an error the call can be repeated with the same `saved`, which leaves out models that are saved already.
    Every rank must call it.
    """
    policy = models[""]
    assert policy is not None
    for name, other in models.items():
        if name and other is not None and name not in saved:
            place, apart = folder and folder / name, share_weights(policy, other)
            own = card and dataclasses.replace(card, beside=name)
            saved[name] = save_trained(other, tokenizer, place, apart=apart, card=own)
    saved[""] = save_trained(policy, tokenizer, folder, accept=accept, card=card)
    if accept and folder:
        with (folder / "config.yaml").open("a") as file:
            file.write(f"# {accept.told}\n")


def _without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the plain float32 model of transformers on the meta device."""
    kind: Any = plain_class(model)
    with torch.device("meta"):
        return kind._from_config(model.config, dtype=torch.float32)


def shift(model: PreTrainedModel, other: PreTrainedModel, rows: Sequence[TokenizedExample]) -> float:
    """Returns the mean absolute difference, in nats, between the log-probs of two models for the tokens of the rows'
    responses (of the prompts, for rows without responses), or between the scores of two reward models, which are
    log-odds."""
    distances = [_distance(model, other, row) for row in rows]
    return torch.cat(distances).mean().item()


@torch.no_grad()
def _distance(model: PreTrainedModel, other: PreTrainedModel, row: TokenizedExample) -> Tensor:
    responses = [one for one in (row.chosen, row.rejected, row.reference, *(row.responses or ())) if one]
    pairs = [(row.prompt, one) for one in responses] or [(row.prompt[:1], row.prompt[1:])]

    def measured(of: PreTrainedModel) -> Tensor:
        batch = pack([sequence(prompt, response) for prompt, response in pairs], of.device)
        return (sequence_scores(of, batch) if hasattr(of, "score") else token_logprobs(of, batch).logprob).cpu()

    return (measured(model) - measured(other)).abs()


class Acceptance:
    """Decides for `save_trained` whether a merged copy in bfloat16 may be saved, and keeps its measurement as a
    text."""

    def __init__(self, rows: Sequence[TokenizedExample], most: float) -> None:
        """`most`: the largest shift that is accepted, in nats per token."""
        self._rows, self._most = rows[:NUM_ROWS], most
        self.told = ""

    def __call__(self, model: PreTrainedModel, merged: PreTrainedModel) -> bool:
        moved = shift(model, merged.to(model.device), self._rows)  # pyright: ignore[reportArgumentType] (as in loading._ready)
        merged.to("cpu")  # pyright: ignore[reportArgumentType]
        accepted = moved <= self._most
        self.told = (
            f"the adapter is merged in {'bfloat16' if accepted else 'float32'}: bfloat16 shifts {len(self._rows)} rows "
            f"by {moved:.2g} nats per token (max_merge_shift {self._most:g})"
        )
        log.log(logging.INFO if accepted else logging.WARNING, "merged_dtype: %s", self.told)
        return accepted


def acceptance_of(config: TrainConfig, data: Data | None) -> Acceptance | None:
    """Returns the rule for `merged_dtype: bfloat16`, or None if merged weights are saved in float32."""
    if config.merged_dtype == "float32":
        return None
    rows = (data.eval or data.train) if data else []
    return Acceptance(rows, config.max_merge_shift)


def rescue(
    error: Exception,
    checkpointer: Checkpointer,
    trained: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    *,
    step: int,
    saved: int,
    save: Callable[[], Path],
) -> None:
    """After an error, saves the last whole step `step` as a checkpoint, by `save`, unless it is `saved` already; if
    weights have changed since, saves the weights in `interrupted/` instead. Notes on the error say what was saved. A
    failure to save is logged, so that it does not hide the error."""
    whole = checkpointer.back_to_mark()
    if step <= saved:
        if step:
            error.add_note(f"the same command continues from {checkpointer.path(step)}")
        return
    if whole:
        try:
            error.add_note(f"saved as {save()}; the same command continues")
            return
        except Exception as another:
            log.warning("step %d cannot be saved: %s", step, another)
    place = checkpointer.folder / "interrupted"
    try:
        save_trained(*trained, place)
        which = "" if whole else f", in the middle of step {step + 1}: some have changed since step {step}"
        error.add_note(f"its last weights are in {place}{which}")
    except Exception as another:
        shutil.rmtree(place, ignore_errors=True)
        log.warning("interrupted: the last weights cannot be saved: %s", another)
