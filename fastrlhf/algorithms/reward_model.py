"""Trains a reward model on preference pairs, on packs (Bradley and Terry 1952; Stiennon et al. 2020, arXiv 2009.01325,
section 3.4).

    repeat: draw a batch of pairs; loss = -sum of log sigmoid(r(x, chosen) - r(x, rejected)) / pairs; step

Options: a margin per row that the difference must exceed, and a penalty that centres the scores on 0. RLP (`rlp.py`)
also refits reward models by this trainer: on synthetic pairs in addition to those of the dataset, or with a second loss
on views in the packs of the pairs.

`fastrlhf reward --config FILE`
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.algorithms.pair_labels import pair_margins
from fastrlhf.algorithms.rlp_uml import ViewObjective, Views
from fastrlhf.algorithms.scoring import Tree, Trees, pair_costs
from fastrlhf.config import RewardConfig, require
from fastrlhf.data.given import Rows
from fastrlhf.data.packing import (
    check_micro_batch,
    forest,
    micro_batches,
    num_computed,
    num_in_sequences,
    own_micro_batches,
    pack,
    pair,
)
from fastrlhf.data.specials import special_ids
from fastrlhf.data.token_set import TokenSet
from fastrlhf.distributed.ranks import gathered
from fastrlhf.evaluation.winrates import bootstrap_interval
from fastrlhf.models.forward import hidden_states, read_scores, sequence_scores
from fastrlhf.models.given import adopt_reward_model
from fastrlhf.models.layers import LayerOptions
from fastrlhf.models.loading import (
    check_vocabulary,
    load_reward_model,
    make_trainable,
    resolve_device,
)
from fastrlhf.models.precision import resolved
from fastrlhf.models.reward_head import width
from fastrlhf.models.router_loss import begin_step
from fastrlhf.models.sharding import own_pace, shard
from fastrlhf.runtime.by_dataset import ByDataset
from fastrlhf.runtime.inputs import open_inputs
from fastrlhf.runtime.mixing import shares_of
from fastrlhf.runtime.optim import Optimizer, index_batches, num_steps
from fastrlhf.runtime.result import TrainResult
from fastrlhf.runtime.run import Run
from fastrlhf.runtime.step_metrics import StepMetrics
from fastrlhf.types import TokenizedExample
from fastrlhf_kernels import LossOutput, Metric, Sum


def train_reward_model(
    config: RewardConfig,
    examples: Rows | None = None,
    eval_examples: Rows | None = None,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    synthetic: Sequence[TokenizedExample] = (),
    views: Views | None = None,
    callbacks: Sequence[object] = (),
) -> TrainResult:
    """Trains a score head on the backbone of `config.model_name_or_path`. `examples` replace the configured dataset;
    `model`, a sequence classifier with one label that is then trained in place, and `tokenizer` replace those that
    `config` names. `callbacks` are called at fixed points of the run (runtime/callbacks.py).

    `synthetic` pairs are added to the pairs of the dataset, shuffled together with them, and have equal weight. `views`
    add a loss to every step; their trees are in the same packs as the pairs of the step.

    The result is a plain `AutoModelForSequenceClassification`. Metrics per step: loss (nats per pair), accuracy,
    margin, min_reward, mean_reward, max_reward, grad_norm, learning_rate, num_tokens (of the sequences, as TRL counts),
    num_unique_tokens (computed); with views also those of `_view_metrics`; with several weighted datasets also
    dataset/NAME/loss and eval_NAME_loss. Raises ValueError for bad input before any time is spent.
    """
    config = resolved(config, RewardConfig, "train_reward_model", model)
    if model is None:
        told = "the model whose backbone gets the score head"
        require(bool(config.model_name_or_path), "model_name_or_path", "", told)
    require(not config.model_config, "model_config", config.model_config, "empty: a reward model starts from a model")
    tokenizer, data = open_inputs(config, fields_read(config), examples, eval_examples, tokenizer=tokenizer)
    model = _open(config, tokenizer) if model is None else adopt_reward_model(model, config, tokenizer)
    check_vocabulary({"model_name_or_path": model}, tokenizer)
    make_trainable(model, config, config.model_name_or_path)
    rows = TokenSet.joined(data.train, synthetic)
    by_dataset = ByDataset.of(rows)
    pairs, held_out = (Trees(TokenSet.of(some), partial(to_tree, config=config)) for some in (rows, data.eval))
    margins, held_out_margins = (_margins(config, part) for part in (data.train, data.eval))
    margins = torch.cat([margins, torch.zeros(len(synthetic))])
    every = TokenSet.joined(rows, data.eval)
    check_micro_batch(config, every, pair_costs(every, config.share_prompts))
    shard(model)
    steps = num_steps(config, len(pairs))
    batches = index_batches(len(pairs), config.batch_size, steps, config.seed, shares_of(config, rows))
    objective = views.open(width(model.config), model.device, steps) if views else None
    heads, rates = ({"view_": objective.heads}, {"view_": objective.learning_rate}) if objective else ({}, {})
    head_rates = {"": config.head_learning_rate}
    optimizer = Optimizer({"": model, **heads}, config, num_steps=steps, learning_rates=rates, head_rates=head_rates)
    evaluate_held_out = partial(evaluate, config, model, held_out, held_out_margins, ByDataset.of(data.eval))

    parts: dict[str, Any] = {"optimizer": optimizer} | ({"views": objective.heads} if objective else {})
    watch = evaluate_held_out if held_out else None
    with Run(
        "reward", config, steps, (model, tokenizer), data=data, parts=parts, evaluate=watch, callbacks=callbacks
    ) as run:
        for step, indices in run.remaining(batches):
            drawn, seen = [pairs[i] for i in indices], objective.draw(step) if objective else []
            loss_of_views = partial(objective.loss, step=step) if objective else None
            scores, losses, sums, totals = _backward(
                config, model, drawn, margins[indices], seen, loss_of_views, run.parts, by_dataset, indices
            )
            metrics = _summary(scores, losses, by_dataset, sums, by_dataset.counts(indices))
            if objective:
                metrics |= _view_metrics(totals.means("views"), objective, step)
            metrics |= {**optimizer.step(), "num_tokens": sum(map(num_in_sequences, [*drawn, *seen]))}
            metrics["num_unique_tokens"] = sum(map(num_computed, [*drawn, *seen]))
            run.log(step + 1, metrics)
        return run.finish(model, tokenizer)


def _open(config: RewardConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return load_reward_model(
        config.model_name_or_path,
        field="model_name_or_path",
        pad_token_id=special_ids(tokenizer)[1],
        seed=config.seed,
        device=resolve_device(config.device),
        dtype=config.dtype,
        load_in_4bit=config.load_in_4bit,
        trust_remote_code=config.trust_remote_code,
        layers=LayerOptions.of(config),
    )


def _backward(
    config: RewardConfig,
    model: PreTrainedModel,
    pairs: Sequence[Tree],
    margins: Tensor,
    views: Sequence[Tree],
    loss_of_views: Callable[[Tensor], LossOutput] | None,
    parts: Callable[[Sequence[list[int]]], Iterable[list[int]]],
    by_dataset: ByDataset,
    indices: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, StepMetrics]:
    """Adds the gradients of one step: scores [B, 2] and losses [B] of its pairs, sums of its views. `parts` watches
    the micro-batches for a request to stop (`Run.parts`).

    All other views of the step are negatives of a view. With several micro-batches, a first pass without gradient
    computes the last hidden states of all views and the gradient of the loss with respect to them; each micro-batch
    then backpropagates its part (Gao et al. 2021, arXiv 2101.06983). The gradient is that of one large batch.
    """
    trees, totals = [*pairs, *views], StepMetrics()
    begin_step(model, 2 * len(trees))
    micros = own_micro_batches([num_computed(tree) for tree in trees], config.micro_batch_tokens, "pair")
    kept: Tensor | None = None
    if loss_of_views and len(micros) > 1:
        leaf = _last_hidden(model, views, config.micro_batch_tokens).requires_grad_()
        output = loss_of_views(leaf)
        output.loss.backward()
        totals.add(_with_loss(output))
        kept = leaf.grad
    scores, losses = [], []
    for micro in parts(micros):
        batch = pack(forest(trees[i] for i in micro), model.device)
        hidden = hidden_states(model, batch)[batch.last]  # indices are ascending: pairs, then views
        own = [i for i in micro if i < len(pairs)]
        score = read_scores(model, hidden[: 2 * len(own)]).view(-1, 2)
        loss = ranking_losses(config, score, margins[own])
        objective = loss.sum() / len(pairs)
        if loss_of_views:
            hidden.retain_grad()
            of_views = hidden[2 * len(own) :]
            if kept is None:
                output = loss_of_views(of_views)
                totals.add(_with_loss(output))
                objective = objective + output.loss
            else:
                rows = [2 * (i - len(pairs)) + side for i in micro[len(own) :] for side in (0, 1)]
                objective = objective + (of_views * kept[rows]).sum()
        objective.backward()
        if loss_of_views:
            assert hidden.grad is not None
            squares = hidden.grad.float().pow(2).sum(1)
            totals.add({"pairs": Sum(squares[: 2 * len(own)].sum()), "pulls": Sum(squares[2 * len(own) :].sum())})
        scores.append(score.detach())
        losses.append(loss.detach())
    own = [i for micro in micros for i in micro if i < len(pairs)]
    sums = by_dataset.totals(torch.cat(losses), [indices[i] for i in own])
    return gathered(torch.cat(scores)), gathered(torch.cat(losses)), sums, totals


def _with_loss(output: LossOutput) -> dict[str, Metric]:
    views = output.metrics["views"].value
    return {**output.metrics, "loss": Sum(output.loss.detach() * views)}


@torch.no_grad()
def _last_hidden(model: PreTrainedModel, trees: Sequence[Tree], budget: int) -> Tensor:
    """Returns [2B, D], the hidden states of the last tokens of the two responses of every tree, which the score head
    reads."""
    hidden = torch.empty(len(trees), 2, width(model.config), dtype=model.dtype, device=model.device)
    for micro in micro_batches([num_computed(tree) for tree in trees], budget, "view"):
        batch = pack(forest(trees[i] for i in micro), model.device)
        hidden[micro] = hidden_states(model, batch)[batch.last].view(len(micro), 2, -1)
    return hidden.flatten(0, 1)


def _view_metrics(means: dict[str, float], objective: ViewObjective, step: int) -> dict[str, float]:
    """Returns the metrics views/: loss (lambda times L_M), jsd, skl, mutual_information (nats), std and mean_rms (per
    dimension of a latent), beta; hidden_grad/: the norms of the gradients of pairs and views with respect to the hidden
    states that the score head reads."""
    num = objective.config.views_per_step
    named = {name: means[name] for name in ("loss", "jsd", "skl", "mutual_information", "std") if name in means}
    return {
        **{f"views/{name}": value for name, value in named.items()},
        "views/mean_rms": means["mean_square"] ** 0.5,
        "views/beta": objective.beta(step),
        "hidden_grad/pairs": (num * means["pairs"]) ** 0.5,
        "hidden_grad/views": (num * means["pulls"]) ** 0.5,
    }


def score_pairs(model: PreTrainedModel, pairs: Sequence[Tree]) -> Tensor:
    """Returns [B, 2] float32, the scores of chosen and rejected."""
    batch = pack(forest(pairs), model.device)
    return sequence_scores(model, batch).view(-1, 2)


def ranking_losses(config: RewardConfig, scores: Tensor, margins: Tensor) -> Tensor:
    """Returns [B], -log sigmoid(difference - margin) + center_rewards_coefficient (sum)^2 of scores [B, 2]; margins [B]
    on the CPU."""
    losses = -F.logsigmoid(scores[:, 0] - scores[:, 1] - margins.to(scores.device, non_blocking=True))
    return (
        losses + config.center_rewards_coefficient * scores.sum(1) ** 2 if config.center_rewards_coefficient else losses
    )


@torch.no_grad()
def evaluate(
    config: RewardConfig,
    model: PreTrainedModel,
    pairs: Sequence[Tree],
    margins: Tensor,
    by_dataset: ByDataset | None = None,
) -> dict[str, float]:
    """Measures loss and accuracy on held-out pairs, with a 95 % bootstrap interval of the accuracy; ties count one
    half."""
    by_dataset = by_dataset or ByDataset.single(len(pairs))
    micros = own_micro_batches([num_computed(tree) for tree in pairs], config.micro_batch_tokens, "pair")
    with own_pace(model):
        scores = torch.cat([score_pairs(model, [pairs[i] for i in micro]) for micro in micros])
    own = [i for micro in micros for i in micro]
    each = ranking_losses(config, scores, margins[own])
    sums, losses = by_dataset.totals(each, own), gathered(each)
    scores = gathered(scores)
    margin = scores[:, 0] - scores[:, 1]
    low, high = bootstrap_interval(((margin > 0) + 0.5 * (margin == 0)).cpu().numpy())
    found = _summary(scores, losses, by_dataset, sums, by_dataset.counts(range(len(pairs))), evaluation=True)
    summary = {name if name.startswith("eval_") else f"eval_{name}": value for name, value in found.items()}
    return summary | {"eval_accuracy_low": low, "eval_accuracy_high": high}


def held_out_accuracy(config: RewardConfig, model: PreTrainedModel, examples: Sequence[TokenizedExample]) -> float:
    """Returns the share of pairs in which the chosen response has the higher score; ties count one half."""
    pairs = [to_tree(example, config) for example in examples]
    return evaluate(config, model, pairs, _margins(config, examples))["eval_accuracy"]


def _summary(
    scores: Tensor,
    losses: Tensor,
    by_dataset: ByDataset | None = None,
    sums: Tensor | None = None,
    counts: Sequence[float] = (),
    *,
    evaluation: bool = False,
) -> dict[str, float]:
    """Returns the metrics of scores [B, 2] and losses [B]; `sums` and `counts` are those of the losses of each
    dataset. It waits for the GPU once."""
    margin = scores[:, 0] - scores[:, 1]
    values = {
        "loss": losses.mean(),
        "accuracy": ((margin > 0) + 0.5 * (margin == 0)).mean(),
        "margin": margin.mean(),
        "min_reward": scores.min(),
        "mean_reward": scores.mean(),
        "max_reward": scores.max(),
    }
    parts = [torch.stack(list(values.values())), *([sums] if sums is not None else [])]
    numbers = torch.cat(parts).tolist()
    split = by_dataset.losses(numbers[len(values) :], counts, evaluation=evaluation) if by_dataset else {}
    return dict(zip(values, numbers[: len(values)], strict=True)) | split


def _margins(config: RewardConfig, examples: Sequence[TokenizedExample]) -> Tensor:
    """Returns [B] float32 on the CPU, the margin by which the scores of each pair should differ. Raises ValueError,
    naming the row, for a margin that is not finite."""
    return config.margin_scale * (pair_margins(examples) if config.margin_scale else torch.zeros(len(examples)))


def fields_read(config: RewardConfig) -> list[str]:
    """Returns the columns that the loss reads."""
    return ["chosen", "rejected", *["margin"] * (config.margin_scale != 0)]


def to_tree(example: TokenizedExample, config: RewardConfig) -> Tree:
    """Returns the segments of a row: prompt, chosen, rejected."""
    assert example.chosen is not None
    assert example.rejected is not None
    responses = (example.chosen, example.rejected)
    return pair(example.prompt, *responses, scored=False, share_prompt=config.share_prompts)
