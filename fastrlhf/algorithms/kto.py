"""Trains a policy by KTO on packs, with responses that are labelled as desirable or not (Ethayarajh et al. 2024, arXiv
2402.01306).

    u_i   = log pi(y_i | x_i) / pi_ref(y_i | x_i)
    z     = max(0, mean over the batch of log pi(y_j | x_i) / pi_ref(y_j | x_i)),   y_j: the response of another row
    loss  = mean of  weight_D (1 - sigmoid(beta (u_i - z)))   desirable responses
                     weight_U (1 - sigmoid(beta (z - u_i)))   undesirable responses

z estimates the KL from the reference and has no gradient. As in TRL, y_j is the response of row i - 1 of the batch. z
is the mean over all rows of an optimiser step; micro-batches and processes do not change it.

`fastrlhf kto --config FILE`
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.algorithms.reference import Reference, check_reference, live_models, open_reference
from fastrlhf.algorithms.scoring import Tree, sequence_logprobs
from fastrlhf.config import KTOConfig, require
from fastrlhf.data.given import Rows
from fastrlhf.data.packing import check_micro_batch, forest, num_computed, own_micro_batches, pack, sequence
from fastrlhf.data.token_set import TokenSet
from fastrlhf.distributed.ranks import total
from fastrlhf.models.given import policy_or_given
from fastrlhf.models.precision import resolved
from fastrlhf.models.router_loss import begin_step
from fastrlhf.models.sharding import own_pace, shard
from fastrlhf.runtime.atomic import check_writable
from fastrlhf.runtime.inputs import open_inputs
from fastrlhf.runtime.mixing import shares_of
from fastrlhf.runtime.optim import Optimizer, index_batches, num_steps
from fastrlhf.runtime.result import TrainResult
from fastrlhf.runtime.run import Run
from fastrlhf.runtime.step_metrics import StepMetrics
from fastrlhf.types import TokenizedExample
from fastrlhf_kernels import Metric, Sum

log = logging.getLogger(__name__)

FIELDS = ("reference", "label")
"""Fields that a row must have in addition to its prompt."""

ADVISED = (1.0, 4 / 3)
"""Range that the paper advises for (weight_D number_D) / (weight_U number_U)."""


def train_kto(
    config: KTOConfig,
    examples: Rows | None = None,
    eval_examples: Rows | None = None,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    callbacks: Sequence[object] = (),
) -> TrainResult:
    """Trains `config.model_name_or_path` on rows with a `reference` (or completion) and a `label`. `examples` replace
    the configured dataset; `model`, which is then trained in place, and `tokenizer` replace those that `config` names.
    `callbacks` are called at fixed points of the run (runtime/callbacks.py).

    Metrics per step, TRL's names: loss, kl (z, nats per response), rewards/chosen and rewards/rejected (beta u of the
    desirable and of the undesirable responses), rewards/margins, logps/chosen, logps/rejected (nats per response),
    count/chosen, count/rejected, grad_norm, learning_rate, num_tokens (of the sequences). Means over a kind of response
    are missing from a step that has none. Raises ValueError for bad input before any time is spent.
    """
    config = resolved(config, KTOConfig, "train_kto", model)
    if config.ref_cache_dir:
        check_writable(config.ref_cache_dir, "ref_cache_dir")
    tokenizer, data = open_inputs(config, FIELDS, examples, eval_examples, tokenizer=tokenizer)
    check_reference(config, tokenizer, conversations=data.conversations)
    require(len(data.eval) != 1, "num_eval_examples", 1, "0, or at least 2: z of a single row is its own log-ratio")
    rows = TokenSet.joined(data.train, data.eval)
    check_micro_batch(config, rows, (rows.lengths("prompt") + rows.lengths("reference")).tolist())
    weights = class_weights(config, list(map(bool, rows.labels("label")[: len(data.train)])))
    model = policy_or_given(config, tokenizer, model)
    num_train, steps = len(data.train), num_steps(config, len(data.train))
    batches = list(index_batches(num_train, config.batch_size, steps, config.seed, shares_of(config, data.train)))
    held_out = list(range(num_train, len(rows)))
    trees = Trees(
        rows, [*batches, *[held_out] * bool(held_out)], limit=min(config.max_length, config.micro_batch_tokens)
    )
    needed = chain(chain.from_iterable(batches), held_out, range(len(rows), len(trees)))
    reference = open_reference(config, model, trees, needed)
    shard(model)
    optimizer = Optimizer({"": model}, config, num_steps=steps)
    step_of = partial(_losses, config, model, reference, trees, weights)
    evaluate_held_out = partial(_evaluate, step_of, held_out, len(batches))

    with Run(
        "kto",
        config,
        steps,
        (model, tokenizer),
        data=data,
        parts={"optimizer": optimizer},
        evaluate=evaluate_held_out if held_out else None,
        callbacks=callbacks,
    ) as run:
        for step, indices in run.remaining(batches):
            begin_step(model, len(indices))
            metrics = {**step_of(indices, step, run), **optimizer.step()}
            metrics["num_tokens"] = sum(num_computed(trees[i]) for i in indices)
            run.log(step + 1, metrics)
        return run.finish(model, tokenizer)


class Trees(Sequence[Tree]):
    """The sequences that a run reads, built when they are read. First come all rows, then the mismatched sequences of
    each batch: every prompt with the response of the preceding row of the batch."""

    def __init__(self, rows: Sequence[TokenizedExample], batches: Sequence[Sequence[int]], limit: int) -> None:
        """`limit`: maximum number of tokens of a mismatched sequence; its response is cut to fit."""
        self._num_rows, self._limit, self._labels = len(rows), limit, TokenSet.of(rows).labels("label")
        self._row = rows.arrays if isinstance(rows, TokenSet) else rows.__getitem__
        self._mismatched = [pair for batch in batches for pair in zip(batch, [batch[-1], *batch[:-1]], strict=True)]
        self._starts = [len(rows)]
        for batch in batches:
            self._starts.append(self._starts[-1] + len(batch))

    def __len__(self) -> int:
        return self._num_rows + len(self._mismatched)

    def __getitem__(self, index):  # pyright: ignore[reportIncompatibleMethodOverride]
        if index < self._num_rows:
            return to_tree(self._row(index))
        own, other = (self._row(i) for i in self._mismatched[index - self._num_rows])
        assert other.reference is not None
        response = other.reference[: self._limit - len(own.prompt)]
        trained = other.scored("reference")
        trained = trained and [i for i in trained if i < len(response)]
        return [sequence(own.prompt, response, trained)]

    def mismatched(self, batch: int) -> range:
        """Returns the indices of the mismatched sequences of a batch."""
        return range(self._starts[batch], self._starts[batch + 1])

    def labels(self, indices: Sequence[int]) -> Tensor:
        return torch.tensor([bool(self._labels[i]) for i in indices])


def to_tree(example: TokenizedExample) -> Tree:
    """Returns the sequence of a row: prompt and response."""
    assert example.reference is not None
    return [sequence(example.prompt, example.reference, example.scored("reference"))]


def class_weights(config: KTOConfig, labels: Sequence[bool]) -> tuple[float, float]:
    """Returns the weights of desirable and of undesirable responses. Logs the number of responses of each kind, and
    warns if their weighted ratio is outside the range that the paper advises."""
    desirable = sum(labels)
    undesirable, weights = len(labels) - desirable, [config.desirable_weight, config.undesirable_weight]
    counts = f"kto: {desirable:,} desirable and {undesirable:,} undesirable responses"
    if not desirable or not undesirable:
        log.warning("%s; KTO needs both kinds to know what to prefer", counts)
        return weights[0], weights[1]
    if config.balance_weights:
        most = max(desirable, undesirable)
        weights = [weights[0] * most / desirable, weights[1] * most / undesirable]
    ratio = weights[0] * desirable / (weights[1] * undesirable)
    told = f"{counts}, weighted {weights[0]:.4g} and {weights[1]:.4g}"
    if ADVISED[0] - 1e-9 <= ratio <= ADVISED[1] + 1e-9:
        log.info("%s", told)
    else:
        log.warning(
            "%s: their ratio is %.3g, and the paper advises 1 to 1.33; set desirable_weight %.3g, or balance_weights",
            told,
            ratio,
            weights[1] * undesirable / desirable,
        )
    return weights[0], weights[1]


def kto_losses(log_ratio: Tensor, label: Tensor, kl: Tensor, beta: float, weights: tuple[float, float]) -> Tensor:
    """Returns the loss of every response, [N] float32.

    log_ratio [N] float32 in nats; label [N] bool, True for a desirable response; kl [] float32, the z of the module
    docstring, without gradient; weights: (of desirable, of undesirable responses).
    """
    sign = torch.where(label, 1.0, -1.0)
    weight = torch.where(label, *(log_ratio.new_tensor(value) for value in weights))
    return weight * torch.sigmoid(beta * sign * (kl.detach() - log_ratio))


def _losses(
    config: KTOConfig,
    model: PreTrainedModel,
    reference: Reference,
    trees: Trees,
    weights: tuple[float, float],
    indices: Sequence[int],
    batch: int,
    run: Run | None = None,
) -> dict[str, float]:
    """Returns the metrics of batch number `batch`, whose rows are `indices`. If a `run` is given, also adds up the
    gradients."""
    # In training all ranks make equally many passes; held-out rows may not divide evenly.
    pace = partial(nullcontext) if run else partial(own_pace, model, *live_models(reference))
    with pace():
        kl = _kl(config, model, reference, trees, trees.mismatched(batch))
    kl = (total(kl) / len(trees.mismatched(batch))).clamp(min=0)
    totals = StepMetrics()
    micros = own_micro_batches([num_computed(trees[i]) for i in indices], config.micro_batch_tokens, "row")
    with pace():
        for micro in run.parts(micros) if run else micros:
            own = [indices[i] for i in micro]
            packed = pack(forest(trees[i] for i in own), model.device)
            with torch.set_grad_enabled(run is not None):
                logprob = sequence_logprobs(model, packed)
            log_ratio, label = logprob - reference(packed, own), trees.labels(own).to(logprob.device)
            losses = kto_losses(log_ratio, label, kl, config.beta, weights)
            if run:
                (losses.sum() / len(indices)).backward()
            totals.add(_metrics(losses.detach(), config.beta * log_ratio.detach(), logprob.detach(), label))
    return {**_named(totals.means("rows")), "kl": kl.item()}


@torch.no_grad()
def _kl(
    config: KTOConfig, model: PreTrainedModel, reference: Reference, trees: Trees, indices: Sequence[int]
) -> Tensor:
    """Returns this rank's part of the sum, [] float32, of which z is the mean; `indices` are the mismatched sequences
    of the batch."""
    summed = torch.zeros((), device=model.device)
    for micro in own_micro_batches([num_computed(trees[i]) for i in indices], config.micro_batch_tokens, "row"):
        own = [indices[i] for i in micro]
        packed = pack(forest(trees[i] for i in own), model.device)
        summed += (sequence_logprobs(model, packed) - reference(packed, own)).sum()
    return summed


def _metrics(losses: Tensor, rewards: Tensor, logprob: Tensor, label: Tensor) -> dict[str, Metric]:
    sums = {"rows": torch.ones_like(losses), "loss": losses}
    for name, kind in (("chosen", label), ("rejected", ~label)):
        count = kind.float()
        sums |= {f"count/{name}": count, f"rewards/{name}": rewards * count, f"logps/{name}": logprob * count}
    return {name: Sum(values.sum()) for name, values in sums.items()}


def _named(means: Mapping[str, float]) -> dict[str, float]:
    """Returns the means over desirable and over undesirable rows; a kind without rows is left out."""
    named = {"loss": means["loss"]}
    for kind in ("chosen", "rejected"):
        share = means[f"count/{kind}"]
        if share:
            named |= {f"{name}/{kind}": means[f"{name}/{kind}"] / share for name in ("rewards", "logps")}
    if len(named) == 5:
        named["rewards/margins"] = named["rewards/chosen"] - named["rewards/rejected"]
    return named


@torch.no_grad()
def _evaluate(step_of: partial, indices: Sequence[int], batch: int) -> dict[str, float]:
    return {f"eval_{name}": value for name, value in step_of(indices, batch).items()}
