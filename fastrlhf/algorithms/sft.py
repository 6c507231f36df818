"""Trains a model by supervised fine-tuning on packs.

    repeat: draw a batch of examples; loss = -sum of log pi(response | prompt) / response tokens of the batch; step

`fastrlhf sft --config FILE`
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.algorithms.scoring import Tree, Trees
from fastrlhf.config import SFTConfig
from fastrlhf.data.given import Rows
from fastrlhf.data.packing import check_micro_batch, joined, num_computed, own_micro_batches, pack, sequence
from fastrlhf.data.token_set import TokenSet
from fastrlhf.distributed.ranks import total
from fastrlhf.models.forward import token_logprobs
from fastrlhf.models.given import policy_or_given
from fastrlhf.models.precision import resolved
from fastrlhf.models.router_loss import begin_step
from fastrlhf.models.sharding import shard, whole
from fastrlhf.runtime.inputs import open_inputs
from fastrlhf.runtime.optim import Optimizer, index_batches, num_steps
from fastrlhf.runtime.result import TrainResult
from fastrlhf.runtime.run import Run
from fastrlhf.types import Segment, TokenizedExample


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

    Metrics per step: loss (nats per trained token), grad_norm, learning_rate, num_tokens (of the packs). Raises
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
    evaluate_held_out = partial(evaluate, model, held_out, config.micro_batch_tokens)

    with Run(
        "sft",
        config,
        steps,
        (model, tokenizer),
        data=data,
        parts={"optimizer": optimizer},
        evaluate=evaluate_held_out if held_out else None,
        callbacks=callbacks,
    ) as run:
        for step, indices in run.remaining(index_batches(num_train, config.batch_size, steps, config.seed)):
            chosen = [trees[i][0] for i in indices]
            num_trained = sum(segment.num_scored for segment in chosen)
            begin_step(model, len(chosen))
            loss = torch.zeros((), device=model.device)
            for micro in run.parts(own_micro_batches([len(s.token_ids) for s in chosen], config.micro_batch_tokens)):
                batch = pack([chosen[i] for i in micro], model.device)
                micro_loss = -token_logprobs(model, batch).logprob.sum() / num_trained
                micro_loss.backward()
                loss += micro_loss.detach()
            metrics = {"loss": total(loss).item(), **optimizer.step()}
            metrics["num_tokens"] = sum(len(s.token_ids) for s in chosen)
            run.log(step + 1, metrics)
        return run.finish(model, tokenizer)


@torch.no_grad()
def evaluate(model: PreTrainedModel, trees: Sequence[Tree], micro_batch_tokens: int) -> dict[str, float]:
    """Returns the metric eval_loss, the mean loss in nats per scored token."""
    loss = torch.zeros((), device=model.device)
    with whole(model):
        for micro in own_micro_batches(list(map(num_computed, trees)), micro_batch_tokens):
            loss -= token_logprobs(model, pack([trees[i][0] for i in micro], model.device)).logprob.sum()
    return {"eval_loss": total(loss).item() / sum(segment.num_scored for (segment,) in trees)}


def to_segment(example: TokenizedExample, config: SFTConfig) -> Segment:
    """Returns the sequence of a row: prompt and response."""
    response = getattr(example, config.response)
    if config.train_on == "all" or not config.completion_only_loss:
        token_ids = joined(example.prompt, response)
        return Segment(token_ids=token_ids, num_scored=len(token_ids) - 1)
    return sequence(example.prompt, response, example.scored(config.response))
