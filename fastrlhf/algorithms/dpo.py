"""Trains policies on packed preference pairs: DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7), IPO (Azar et al.
2023, arXiv 2310.12036, eq. 17) and others. The losses differ only in one scalar derivative per sequence.

    repeat: draw a batch of pairs; D = log-ratio of chosen - log-ratio of rejected; loss(D) / pairs; step

The reference is the policy before its first step, unless the configuration names another model. Its log-probs are
computed once, so that no second model stays in memory (algorithms/reference.py).

`fastrlhf dpo --config FILE`
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.algorithms.diagnoses import Diagnoses
from fastrlhf.algorithms.pair_labels import pair_margins, pair_probabilities
from fastrlhf.algorithms.pair_losses import Pairs, check_first_loss, describe_target, loss_of_pairs, pair_function
from fastrlhf.algorithms.psipo import load_psi, pair_target
from fastrlhf.algorithms.psipo_groups import train_groups
from fastrlhf.algorithms.reference import check_reference, live_models, open_reference
from fastrlhf.algorithms.scoring import Tree, Trees, pair_costs, sequence_sums
from fastrlhf.config import DPOConfig
from fastrlhf.data.given import Rows
from fastrlhf.data.labels import COUNTS
from fastrlhf.data.packing import (
    check_micro_batch,
    forest,
    moved,
    num_computed,
    num_in_sequences,
    own_micro_batches,
    pack,
    pair,
)
from fastrlhf.data.token_set import TokenSet
from fastrlhf.data.tokens import TextRules
from fastrlhf.models.architecture import check_head
from fastrlhf.models.forward import token_logprobs
from fastrlhf.models.given import policy_or_given
from fastrlhf.models.loading import read_model_config
from fastrlhf.models.precision import resolved
from fastrlhf.models.router_loss import begin_step
from fastrlhf.models.sharding import own_pace, shard
from fastrlhf.runtime.ahead import Ahead
from fastrlhf.runtime.atomic import check_writable
from fastrlhf.runtime.by_dataset import ByDataset
from fastrlhf.runtime.inputs import open_inputs
from fastrlhf.runtime.mixing import shares_of
from fastrlhf.runtime.optim import Optimizer, index_batches, num_steps
from fastrlhf.runtime.result import TrainResult
from fastrlhf.runtime.run import Run
from fastrlhf.runtime.step_metrics import StepMetrics
from fastrlhf.types import PackedBatch, TokenizedExample
from fastrlhf_kernels import LossOutput, Metric, Sum, TokenLogprobs

log = logging.getLogger(__name__)

Reference = Callable[[PackedBatch, Sequence[int]], Tensor | None]
"""(pack, indices of its pairs) -> log-probs of the reference for its sequences [N], or None if no loss needs them"""


def train_dpo(
    config: DPOConfig,
    examples: Rows | None = None,
    eval_examples: Rows | None = None,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    callbacks: Sequence[object] = (),
) -> TrainResult:
    """Trains `config.model_name_or_path` on pairs. `examples` replace the configured dataset; `model`, which is then
    trained in place, and `tokenizer` replace those that `config` names. `callbacks` are called at fixed points of the
    run (runtime/callbacks.py).

    Metrics per step, TRL's names: loss (with several losses also loss/NAME of each), rewards/chosen,
    rewards/rejected, rewards/margins, rewards/accuracies, logps/chosen, logps/rejected (nats per response),
    logits/chosen, logits/rejected (mean over tokens and vocabulary), entropy (nats per token), mean_token_accuracy (of
    the chosen), grad_norm, learning_rate, num_tokens (of the sequences, as TRL counts), num_unique_tokens (computed);
    with several weighted datasets also dataset/NAME/loss and eval_NAME_loss.
    Raises ValueError for bad input before training starts, and if the first loss is not that of a policy equal to its
    reference (ln 2 for DPO).
    """
    config = resolved(config, DPOConfig, "train_dpo", model)
    if config.reward_model_path:
        found = read_model_config(config.reward_model_path, "reward_model_path", config.trust_remote_code)
        check_head(found, config.reward_model_path, "reward_model_path")
    if config.ref_cache_dir:
        check_writable(config.ref_cache_dir, "ref_cache_dir")
    for name in config.functions:
        pair_function(name)
    if config.psi_backend == "groupwise":
        return train_groups(config, examples, eval_examples, model=model, tokenizer=tokenizer, callbacks=callbacks)
    tokenizer, data = open_inputs(
        config,
        fields_read(config),
        examples,
        eval_examples,
        tokenizer=tokenizer,
        keep_rows=config.label_source == "reward_model",
    )
    check_reference(config, tokenizer, conversations=data.conversations)
    rows = TokenSet.joined(data.train, data.eval)
    trees = Trees(rows, partial(to_tree, config=config))
    check_micro_batch(config, rows, pair_costs(rows, config.share_prompts))
    everything = _pairs(config, rows, trees, tokenizer, data.rules)
    model = policy_or_given(config, tokenizer, model)
    num_train, held_out = len(data.train), range(len(data.train), len(trees))
    steps = num_steps(config, num_train)
    if "ipo" in config.losses and config.psi == "identity" and config.label_source == "data":
        log.info(describe_target(config, everything))
    batches = partial(index_batches, num_train, config.batch_size, steps, config.seed, shares_of(config, data.train))
    needed = chain(chain.from_iterable(batches()), held_out)
    reference = open_reference(config, model, trees, needed) if config.has_reference else _no_reference
    shard(model)
    optimizer, diagnoses = Optimizer({"": model}, config, num_steps=steps), Diagnoses(config.losses)
    by_dataset = ByDataset.of(rows)
    evaluate_held_out = partial(_evaluate, config, model, reference, everything, held_out, by_dataset)

    with (
        Ahead(batches(), partial(_draw, config, everything)) as ahead,
        Run(
            "dpo" if config.losses[0] in ("sigmoid", *config.functions) else config.losses[0],
            config,
            steps,
            (model, tokenizer),
            data=data,
            parts={"optimizer": optimizer},
            evaluate=evaluate_held_out if held_out else None,
            callbacks=callbacks,
        ) as run,
    ):
        for earlier in run.history:  # in a resumed run, marks earlier findings as reported
            diagnoses.look(earlier)
        for step, indices in run.remaining(batches()):
            (drawn, micros), totals = ahead.take(step), StepMetrics()
            begin_step(model, 2 * len(drawn))
            for micro in run.parts(micros):
                output = _loss(config, model, reference, micro, drawn, by_dataset)
                output.loss.backward()
                totals.add(output.metrics)
            means = totals.means("pairs")
            if step == 0 and config.has_reference and not config.ref_model_name_or_path:
                check_first_loss(config, drawn, means)
            metrics = _named(config, means) | _split(by_dataset, means, indices, evaluation=False)
            metrics |= {**optimizer.step(), "num_tokens": sum(map(num_in_sequences, drawn.trees))}
            metrics["num_unique_tokens"] = sum(map(num_computed, drawn.trees))
            run.log(step + 1, metrics)
            for finding in diagnoses.look(metrics):
                log.warning("step %d: %s", step + 1, finding)
        return run.finish(model, tokenizer)


def _no_reference(batch: PackedBatch, indices: Sequence[int]) -> None:
    """Takes the place of the reference in losses that do not need one."""


@dataclass(frozen=True, kw_only=True)
class _Micro:
    """The pairs of a micro-batch."""

    indices: list[int]
    """Indices of the pairs among all pairs of the run."""
    pairs: Pairs
    batch: PackedBatch
    """The pack of the pairs, on the CPU."""


def _draw(config: DPOConfig, pairs: Pairs, indices: Sequence[int]) -> tuple[Pairs, list[_Micro]]:
    """Returns the pairs of a step and the micro-batches of this rank."""
    drawn = pairs[indices]
    return drawn, [_micro(drawn, indices, micro) for micro in _micro_batches(drawn, config)]


def _micro(drawn: Pairs, indices: Sequence[int], places: Sequence[int]) -> _Micro:
    """Packs the pairs at `places` of the pairs `drawn`, whose indices among all pairs are `indices`."""
    own = drawn[places]
    return _Micro(indices=[indices[i] for i in places], pairs=own, batch=pack(forest(own.trees)))


def _loss(
    config: DPOConfig,
    model: PreTrainedModel,
    reference: Reference,
    micro: _Micro,
    step: Pairs,
    by_dataset: ByDataset,
) -> LossOutput:
    """Computes the contribution of a micro-batch to the loss of an optimiser step over the pairs `step`."""
    own, num_pairs, batch = micro.pairs, len(step), moved(micro.batch, model.device)
    scored = token_logprobs(model, batch, entropy=True, stats=True)
    reference_logprob = reference(batch, micro.indices)
    total, metrics = _weighted_losses(config, scored.logprob, reference_logprob, batch.cu_rows, own, step)
    metrics["loss"] = Sum(total.detach() * num_pairs)
    for number, name in enumerate(by_dataset.names):
        places = [i for i, index in enumerate(micro.indices) if by_dataset.numbers[index] == number]
        value = _loss_of(config, places, scored.logprob.detach(), reference_logprob, micro, step)
        metrics[f"dataset/{name}"] = Sum(value * num_pairs)
    return LossOutput(total, metrics | _token_metrics(scored, batch))


def _weighted_losses(
    config: DPOConfig, logprob: Tensor, reference: Tensor | None, cu_rows: Tensor, own: Pairs, step: Pairs
) -> tuple[Tensor, dict[str, Metric]]:
    """Returns the contribution of the pairs `own` to the loss of an optimiser step over the pairs `step`, and its
    metrics. logprob [R], reference [2B], cu_rows [2B + 1] are those of `loss_of_pairs`."""
    metrics: dict[str, Metric] = {}
    total = torch.zeros((), device=logprob.device)
    for name, weight in zip(config.losses, config.loss_weights or [1.0] * len(config.losses), strict=True):
        if name == "sft":
            sums = torch.segment_reduce(logprob, "sum", offsets=cu_rows.long())
            loss = -sums[::2].sum() / step.num_chosen_tokens
        else:
            output = loss_of_pairs(config, name, logprob, reference, cu_rows, own, len(step))
            loss, metrics = output.loss, {**output.metrics, **metrics}
        total = total + weight * loss
        metrics[f"loss/{name}"] = Sum(loss.detach() * len(step))
    return total, metrics


@torch.no_grad()
def _loss_of(
    config: DPOConfig,
    places: Sequence[int],
    logprob: Tensor,
    reference: Tensor | None,
    micro: _Micro,
    step: Pairs,
) -> Tensor:
    """Returns the contribution of the pairs at `places` of a micro-batch to the loss of a step, [] float32."""
    if not places:
        return logprob.new_zeros(())
    sequences = torch.tensor([2 * place + side for place in places for side in (0, 1)])
    starts, lengths = micro.batch.cu_rows[:-1].long()[sequences], micro.batch.cu_rows.diff().long()[sequences]
    rows = torch.cat([torch.arange(length) + start for start, length in zip(starts, lengths.tolist(), strict=True)])
    cu_rows = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    rows, sequences, cu_rows = (x.to(logprob.device, non_blocking=True) for x in (rows, sequences, cu_rows))
    own = None if reference is None else reference[sequences]
    return _weighted_losses(config, logprob[rows], own, cu_rows, micro.pairs[places], step)[0]


def _split(
    by_dataset: ByDataset, means: Mapping[str, float], indices: Sequence[int], *, evaluation: bool
) -> dict[str, float]:
    """Returns the mean loss of the pairs of each dataset."""
    sums = [means[f"dataset/{name}"] * len(indices) for name in by_dataset.names]
    return by_dataset.losses(sums, by_dataset.counts(indices), evaluation=evaluation)


@torch.no_grad()
def _token_metrics(scored: TokenLogprobs, batch: PackedBatch) -> dict[str, Metric]:
    """Returns sums over the tokens of chosen and of rejected responses, and the numbers of these tokens."""
    assert scored.entropy is not None
    assert scored.max_logprob is not None
    assert scored.mean_logit is not None
    greedy = (scored.logprob >= scored.max_logprob).float()
    by_side = [sequence_sums(x, batch).view(-1, 2).sum(0) for x in (scored.mean_logit, greedy)]
    counts = batch.cu_rows.diff().view(-1, 2).sum(0).float()
    names = ("logits_chosen", "logits_rejected", "greedy_chosen", "greedy_rejected", "chosen_tokens", "rejected_tokens")
    sums = dict(zip(names, torch.cat([*by_side, counts]).unbind(), strict=True))
    return {name: Sum(value) for name, value in (sums | {"entropy": scored.entropy.sum()}).items()}


@torch.no_grad()
def _evaluate(
    config: DPOConfig,
    model: PreTrainedModel,
    reference: Reference,
    pairs: Pairs,
    indices: Sequence[int],
    by_dataset: ByDataset,
) -> dict[str, float]:
    totals, held_out = StepMetrics(), pairs[indices]
    with own_pace(model, *live_models(reference)):
        for micro in _micro_batches(held_out, config):
            own = _micro(held_out, indices, micro)
            totals.add(_loss(config, model, reference, own, held_out, by_dataset).metrics)
    means = totals.means("pairs")
    named = {f"eval_{name}": value for name, value in _named(config, means).items()}
    return named | _split(by_dataset, means, indices, evaluation=True)


def _named(config: DPOConfig, means: Mapping[str, float]) -> dict[str, float]:
    """Renames the means over pairs to TRL's metric names."""
    chosen, rejected = means["chosen_tokens"], means["rejected_tokens"]
    several = {f"loss/{name}": means[f"loss/{name}"] for name in config.losses} if len(config.losses) > 1 else {}
    return {
        "loss": means["loss"],
        **several,
        "rewards/chosen": means["reward_chosen"],
        "rewards/rejected": means["reward_rejected"],
        "rewards/margins": means["margin"],
        "rewards/accuracies": means["accuracy"],
        "logps/chosen": means["logprob_chosen"],
        "logps/rejected": means["logprob_rejected"],
        "logits/chosen": means["logits_chosen"] / chosen,
        "logits/rejected": means["logits_rejected"] / rejected,
        "entropy": means["entropy"] / (chosen + rejected),
        "mean_token_accuracy": means["greedy_chosen"] / chosen,
    }


def _micro_batches(pairs: Pairs, config: DPOConfig) -> Sequence[list[int]]:
    return own_micro_batches([num_computed(tree) for tree in pairs.trees], config.micro_batch_tokens, "pair")


def fields_read(config: DPOConfig) -> list[str]:
    """Returns the columns that the configured losses read."""
    labels = {"label_prob": ("label_prob",), "counts": COUNTS}.get(config.label_source, ())
    return ["chosen", "rejected", *labels, *["margin"] * (config.margin_scale != 0)]


def _pairs(
    config: DPOConfig,
    examples: Sequence[TokenizedExample],
    trees: Sequence[Tree],
    tokenizer: PreTrainedTokenizerBase,
    rules: TextRules,
) -> Pairs:
    psi = None
    if config.psi != "identity":
        psi = load_psi(config.psi, config.psi_clip)
        pair_target(psi, torch.full((1,), 0.6), config.beta)  # raises ValueError for an unsuitable psi
    margin = config.margin_scale * pair_margins(examples) if config.margin_scale else None
    prob, target = pair_probabilities(config, examples, trees, tokenizer, rules), None
    if psi:
        hard = torch.ones(len(examples), dtype=torch.float64)
        target = pair_target(psi, hard if prob is None else prob, config.beta)
    return Pairs(trees=trees, label_prob=None if prob is None else prob.float(), target=target, margin=margin)


def to_tree(example: TokenizedExample, config: DPOConfig) -> Tree:
    """Returns the segments of a row: prompt, chosen, rejected."""
    assert example.chosen is not None
    assert example.rejected is not None
    responses = (example.chosen, example.rejected)
    trained = (example.scored("chosen"), example.scored("rejected"))
    return pair(example.prompt, *responses, scored=True, share_prompt=config.share_prompts, trained=trained)
