"""Trains a model by supervised fine-tuning on packs.

    repeat: draw a batch of examples; loss = -sum of log pi(response | prompt) / response tokens of the batch; step

`fastrlhf sft --config FILE`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.algorithms.scoring import Tree, Trees, sequence_sums
from fastrlhf.config import SFTConfig
from fastrlhf.data.given import Rows
from fastrlhf.data.packing import check_micro_batch, joined, moved, num_computed, own_micro_batches, pack, sequence
from fastrlhf.data.token_set import TokenSet
from fastrlhf.distributed.ranks import total
from fastrlhf.models.forward import token_logprobs, token_nll
from fastrlhf.models.given import policy_or_given
from fastrlhf.models.precision import resolved
from fastrlhf.models.router_loss import begin_step
from fastrlhf.models.sharding import own_pace, shard
from fastrlhf.runtime.ahead import Ahead
from fastrlhf.runtime.by_dataset import ByDataset
from fastrlhf.runtime.inputs import open_inputs
from fastrlhf.runtime.mixing import shares_of
from fastrlhf.runtime.optim import Optimizer, index_batches, num_steps
from fastrlhf.runtime.result import TrainResult
from fastrlhf.runtime.run import Run
from fastrlhf.types import PackedBatch, Segment, TokenizedExample


def train_sft(
    config: SFTConfig,
    examples: Rows | None = None,
    eval_examples: Rows | None = None,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    callbacks: Sequence[object] = (),
) -> TrainResult:
    """Trains `config.model_name_or_path` to write `config.response`. `examples` replace the configured dataset;
    `model`, which is then trained in place, and `tokenizer` replace those that `config` names. `callbacks` are called
    at fixed points of the run (runtime/callbacks.py).

    Metrics per step: loss (nats per trained token), grad_norm, learning_rate, num_tokens (of the packs). With several
    weighted datasets also dataset/NAME/loss and eval_NAME_loss, the mean over the trained tokens of a dataset. Raises
    ValueError for bad input before training starts.
    """
    config = resolved(config, SFTConfig, "train_sft", model)
    tokenizer, data = open_inputs(config, [config.response], examples, eval_examples, tokenizer=tokenizer)
    rows = TokenSet.joined(data.train, data.eval)
    check_micro_batch(config, rows, (rows.lengths("prompt") + rows.lengths(config.response)).tolist())
    trees = Trees(rows, lambda example: [to_segment(example, config)])
    num_train = len(data.train)
    held_out = trees.select(range(num_train, len(rows)))
    model = policy_or_given(config, tokenizer, model)
    shard(model)
    steps = num_steps(config, num_train)
    optimizer = Optimizer({"": model}, config, num_steps=steps)
    by_dataset = ByDataset.of(data.train)
    split = ByDataset.of(data.eval)
    evaluate_held_out = partial(evaluate, model, held_out, config.micro_batch_tokens, split)

    batches = partial(index_batches, num_train, config.batch_size, steps, config.seed, shares_of(config, data.train))
    with (
        Ahead(batches(), partial(_draw, config, trees)) as ahead,
        Run(
            "sft",
            config,
            steps,
            (model, tokenizer),
            data=data,
            parts={"optimizer": optimizer},
            evaluate=evaluate_held_out if held_out else None,
            callbacks=callbacks,
        ) as run,
    ):
        for step, indices in run.remaining(batches()):
            drawn = ahead.take(step)
            begin_step(model, len(indices))
            losses = torch.zeros(1 + len(by_dataset.names), device=model.device)  # of all rows, then of each dataset
            for number, pack_on_cpu in enumerate(run.parts(drawn.packs)):
                batch = moved(pack_on_cpu, model.device)
                if by_dataset:
                    nll = -token_logprobs(model, batch).logprob
                    micro_loss = nll.sum() / drawn.num_trained
                    own = [indices[i] for i in drawn.micros[number]]
                    losses[1:] += by_dataset.sums(sequence_sums(nll.detach(), batch), own)
                else:
                    micro_loss = token_nll(model, batch, num_tokens=drawn.num_trained)
                micro_loss.backward()
                losses[0] += micro_loss.detach()
            loss, *sums = total(losses).tolist()
            metrics = {"loss": loss, **optimizer.step(), "num_tokens": drawn.num_tokens}
            metrics |= by_dataset.losses(sums, by_dataset.counts(indices, drawn.trained), evaluation=False)
            run.log(step + 1, metrics)
        return run.finish(model, tokenizer)


@dataclass(frozen=True, kw_only=True)
class _Drawn:
    """The rows of a step."""

    packs: list[PackedBatch]
    """The packs of this rank, on the CPU."""
    micros: list[list[int]]
    """For each pack, the indices of its rows among the rows of the step."""
    trained: list[int]
    """Number of trained tokens of each row of the step."""
    num_tokens: int

    @property
    def num_trained(self) -> int:
        """Number of trained tokens of all ranks."""
        return sum(self.trained)


def _draw(config: SFTConfig, trees: Trees, indices: Sequence[int]) -> _Drawn:
    segments = [trees[i][0] for i in indices]
    costs = [len(segment.token_ids) for segment in segments]
    micros = own_micro_batches(costs, config.micro_batch_tokens)
    return _Drawn(
        packs=[pack([segments[i] for i in micro]) for micro in micros],
        micros=[list(micro) for micro in micros],
        trained=[segment.num_scored for segment in segments],
        num_tokens=sum(costs),
    )


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, trees: Sequence[Tree], micro_batch_tokens: int, by_dataset: ByDataset | None = None
) -> dict[str, float]:
    """Returns the metric eval_loss, the mean loss in nats per scored token, and eval_NAME_loss of each dataset."""
    by_dataset = by_dataset or ByDataset.single(len(trees))
    losses = torch.zeros(1 + len(by_dataset.names), device=model.device)
    with own_pace(model):
        for micro in own_micro_batches(list(map(num_computed, trees)), micro_batch_tokens):
            batch = pack([trees[i][0] for i in micro], model.device)
            logprob = token_logprobs(model, batch).logprob
            losses[0] -= logprob.sum()
            if by_dataset:
                losses[1:] -= by_dataset.sums(sequence_sums(logprob, batch), micro)
    loss, *sums = total(losses).tolist()
    scored = [segment.num_scored for (segment,) in trees]
    counts = by_dataset.counts(range(len(trees)), scored)
    return {"eval_loss": loss / sum(scored), **by_dataset.losses(sums, counts, evaluation=True)}


def to_segment(example: TokenizedExample, config: SFTConfig) -> Segment:
    """Returns the sequence of a row: prompt and response."""
    response = getattr(example, config.response)
    if config.train_on == "all" or not config.completion_only_loss:
        token_ids = joined(example.prompt, response)
        return Segment(token_ids=token_ids, num_scored=len(token_ids) - 1)
    return sequence(example.prompt, response, example.scored(config.response))
