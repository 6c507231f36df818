"""Policies from preference pairs, on packs: DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7) and IPO (Azar et al.
2023, arXiv 2310.12036, eq. 17). The losses differ in one scalar derivative per sequence.

    repeat: draw a batch of pairs; D = log-ratio of chosen - log-ratio of rejected; loss(D) / pairs; step

The reference is the policy before its first step unless another is named. Its log-probs are computed once, so that no
second model stays in memory (algorithms/reference.py).

`fastrlhf dpo --config FILE`
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.algorithms.diagnoses import Diagnoses
from fastrlhf.algorithms.pair_labels import pair_margins, pair_probabilities
from fastrlhf.algorithms.psipo import load_psi, pair_target
from fastrlhf.algorithms.psipo_groups import train_groups
from fastrlhf.algorithms.reference import Reference, open_reference
from fastrlhf.algorithms.scoring import Tree, sequence_sums
from fastrlhf.config import DPOConfig
from fastrlhf.config.paths import at_start
from fastrlhf.data.given import Rows
from fastrlhf.data.labels import COUNTS
from fastrlhf.data.packing import forest, num_computed, num_in_sequences, own_micro_batches, pack, pair
from fastrlhf.models.forward import token_logprobs
from fastrlhf.models.given import policy_or_given
from fastrlhf.models.loading import read_model_config
from fastrlhf.models.router_loss import begin_step
from fastrlhf.models.sharding import shard, whole
from fastrlhf.runtime.atomic import check_writable
from fastrlhf.runtime.inputs import open_inputs
from fastrlhf.runtime.optim import Optimizer, index_batches, num_steps
from fastrlhf.runtime.run import Run, StepMetrics, TrainResult, check_micro_batch
from fastrlhf.types import PackedBatch, TokenizedExample
from fastrlhf_kernels import LossOutput, Metric, Sum, TokenLogprobs, pair_loss

log = logging.getLogger(__name__)

KINDS = {"sigmoid": "dpo", "ipo": "ipo", "hinge": "hinge", "robust": "robust"}


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The inputs of the loss for a set of pairs, all in the same order."""

    trees: list[Tree]
    label_prob: Tensor | None
    """[B] float32 on the CPU, like the fields below: P(chosen is better); None where every label is hard"""
    target: Tensor | None
    """[B] float32 nats, PsiPO's target of the difference of log-ratios; None where psi is the identity"""
    margin: Tensor | None
    """[B] float32, in the units of beta times nats"""

    def __getitem__(self, indices: Sequence[int]) -> Pairs:
        rows = list(indices)
        return Pairs(
            trees=[self.trees[i] for i in rows],
            label_prob=None if self.label_prob is None else self.label_prob[rows],
            target=None if self.target is None else self.target[rows],
            margin=None if self.margin is None else self.margin[rows],
        )

    def __len__(self) -> int:
        return len(self.trees)

    @property
    def num_chosen_tokens(self) -> int:
        return sum(tree[-2].num_scored for tree in self.trees)


def train_dpo(
    config: DPOConfig,
    examples: Rows | None = None,
    eval_examples: Rows | None = None,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> TrainResult:
    """Trains `config.model_name_or_path` on pairs. `examples` replace the configured dataset; `model`, which is then
    trained in place, and `tokenizer` replace those that `config` names.

    Metrics per step, TRL's names: loss (and loss/NAME of each where there are several), rewards/chosen,
    rewards/rejected, rewards/margins, rewards/accuracies, logps/chosen, logps/rejected (nats per response),
    logits/chosen, logits/rejected (mean over tokens and vocabulary), entropy (nats per token), mean_token_accuracy (of
    the chosen), grad_norm, learning_rate, num_tokens (of the sequences, as TRL counts), num_unique_tokens (computed).
    Raises ValueError for bad input before any time is spent, and where the first loss is not that of an untrained
    policy (ln 2 for DPO).
    """
    config = at_start(config, DPOConfig, "train_dpo")
    if config.reward_model_path:
        read_model_config(config.reward_model_path, "reward_model_path", config.trust_remote_code)
    if config.ref_cache_dir:
        check_writable(config.ref_cache_dir, "ref_cache_dir")
    if config.psi_backend == "groupwise":
        return train_groups(config, examples, eval_examples, model=model, tokenizer=tokenizer)
    tokenizer, data = open_inputs(config, fields_read(config), examples, eval_examples, tokenizer=tokenizer)
    rows = [*data.train, *data.eval]
    trees = [to_tree(example, config) for example in rows]
    check_micro_batch(config, rows, [num_computed(tree) for tree in trees])
    everything = _pairs(config, rows, trees, tokenizer)
    model = policy_or_given(config, tokenizer, model)
    num_train, held_out = len(data.train), range(len(data.train), len(trees))
    steps = num_steps(config, num_train)
    if "ipo" in config.losses and config.psi == "identity" and config.label_source == "data":
        log.info(describe_target(config, everything))
    trained = chain.from_iterable(index_batches(num_train, config.batch_size, steps, config.seed))
    reference = open_reference(config, model, trees, chain(trained, held_out))
    shard(model)
    optimizer, diagnoses = Optimizer({"": model}, config, num_steps=steps), Diagnoses(config.losses)
    evaluate_held_out = partial(_evaluate, config, model, reference, everything, held_out)
    evaluation: dict[str, float] = {}

    with Run(
        config.losses[0].replace("sigmoid", "dpo"),
        config,
        steps,
        (model, tokenizer),
        data=data,
        parts={"optimizer": optimizer},
    ) as run:
        for earlier in run.history:  # findings that a resumed run has already reported
            diagnoses.look(earlier)
        run.on_start(evaluate_held_out)
        for step, indices in run.remaining(index_batches(num_train, config.batch_size, steps, config.seed)):
            drawn, totals = everything[indices], StepMetrics()
            begin_step(model, 2 * len(drawn))
            for micro in _micro_batches(drawn, config):
                output = _loss(config, model, reference, everything, [indices[i] for i in micro], drawn)
                output.loss.backward()
                totals.add(output.metrics)
            means = totals.means("pairs")
            if step == 0 and not config.ref_model_name_or_path:
                check_first_loss(config, drawn, means)
            metrics = _named(config, means)
            metrics |= {**optimizer.step(), "num_tokens": sum(map(num_in_sequences, drawn.trees))}
            metrics["num_unique_tokens"] = sum(map(num_computed, drawn.trees))
            if held_out and run.due(step, config.eval_steps):
                evaluation = evaluate_held_out()
                metrics |= evaluation
            run.log(step + 1, metrics)
            for finding in diagnoses.look(metrics):
                log.warning("step %d: %s", step + 1, finding)
        return run.finish(model, tokenizer, evaluation)


def _loss(
    config: DPOConfig,
    model: PreTrainedModel,
    reference: Reference,
    pairs: Pairs,
    micro: Sequence[int],
    step: Pairs,
) -> LossOutput:
    """The contribution of the pairs `micro` (one micro-batch) to the loss over `step` (all pairs of the optimiser
    step)."""
    own, num_pairs = pairs[micro], len(step)
    batch = pack(forest(own.trees), model.device)
    scored = token_logprobs(model, batch, entropy=True, stats=True)
    reference_logprob = reference(batch, micro)
    metrics: dict[str, Metric] = {}
    total = torch.zeros((), device=model.device)
    for name, weight in zip(config.losses, config.loss_weights or [1.0] * len(config.losses), strict=True):
        if name == "sft":
            loss = -sequence_sums(scored.logprob, batch)[::2].sum() / step.num_chosen_tokens
        else:
            output = _pair_loss(config, name, scored.logprob, reference_logprob, batch.cu_rows, own, num_pairs)
            loss, metrics = output.loss, {**output.metrics, **metrics}
        total = total + weight * loss
        metrics[f"loss/{name}"] = Sum(loss.detach() * num_pairs)
    metrics["loss"] = Sum(total.detach() * num_pairs)
    return LossOutput(total, metrics | _token_metrics(scored, batch))


def _pair_loss(
    config: DPOConfig,
    name: str,
    logprob: Tensor,
    reference_logprob: Tensor | None,
    cu_rows: Tensor,
    pairs: Pairs,
    num_pairs: int,
) -> LossOutput:
    label_prob, target, margin = (
        None if column is None else column.to(logprob.device, non_blocking=True)
        for column in (pairs.label_prob, pairs.target, pairs.margin)
    )
    return pair_loss(
        logprob,
        reference_logprob,
        cu_rows,
        torch.ones_like(logprob, dtype=torch.bool),
        num_pairs=num_pairs,
        kind=KINDS[name],
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        label_prob=label_prob if target is None else None,
        margin=margin,
        target=target,
        length_norm=length_norm(config, name),
    )


@torch.no_grad()
def _token_metrics(scored: TokenLogprobs, batch: PackedBatch) -> dict[str, Metric]:
    """Sums over the tokens of chosen and of rejected responses, and their numbers."""
    assert scored.entropy is not None
    assert scored.max_logprob is not None
    assert scored.mean_logit is not None
    greedy = (scored.logprob >= scored.max_logprob).float()
    by_side = [sequence_sums(x, batch).view(-1, 2).sum(0) for x in (scored.mean_logit, greedy)]
    counts = batch.cu_rows.diff().view(-1, 2).sum(0).float()
    names = ("logits_chosen", "logits_rejected", "greedy_chosen", "greedy_rejected", "chosen_tokens", "rejected_tokens")
    sums = dict(zip(names, torch.cat([*by_side, counts]).unbind(), strict=True))
    return {name: Sum(value) for name, value in (sums | {"entropy": scored.entropy.sum()}).items()}


def length_norm(config: DPOConfig, loss_type: str) -> str:
    """Resolves `auto`: the mean over tokens for ipo with hard labels, as in TRL; otherwise, PsiPO included, the sum."""
    if config.length_norm != "auto":
        return config.length_norm
    plain = config.psi == "identity" and config.label_source == "data"
    return "mean" if loss_type == "ipo" and plain else "sum"


def describe_target(config: DPOConfig, pairs: Pairs) -> str:
    """Describes the margin that IPO aims at, (1 - 2 label_smoothing) / (2 tau), per token and per response."""
    target = (1 - 2 * config.label_smoothing) / (2 * config.beta)
    length = sum(tree[-1].num_scored + tree[-2].num_scored for tree in pairs.trees) / (2 * len(pairs))
    per_response, per_token = (target, target / length)
    if length_norm(config, "ipo") != "sum":
        per_response, per_token = target * length, target
    return (
        f"ipo: beta (tau) {config.beta:g} with length_norm {length_norm(config, 'ipo')} asks for a margin of "
        f"{per_token:.3g} nats per token, {per_response:.3g} per response of {length:.1f} tokens"
    )


def check_first_loss(config: DPOConfig, pairs: Pairs, means: Mapping[str, float]) -> None:
    """Raises ValueError where a loss is not that of a policy equal to its reference: ln 2 for DPO, 1 for hinge, (1 / (2
    tau))^2 for IPO; other values with margins or soft labels.

    Every log-ratio is then 0 except for rounding: 3e-5 of a response's log-prob is allowed, 1e-2 in bfloat16.
    """
    size = abs(means["logprob_chosen"]) + abs(means["logprob_rejected"])
    rounding = (3e-5 if config.dtype == "float32" else 1e-2) * size
    for name in (name for name in config.losses if name != "sft"):
        low, expected, high = (_loss_at(config, name, pairs, x) for x in (-rounding, 0.0, rounding))
        loss = means[f"loss/{name}"]
        if not abs(loss - expected) <= max(abs(low - expected), abs(high - expected)) + 1e-6:
            raise ValueError(
                f"the first {name} loss is {loss:.6g}, but a policy that equals its reference has {expected:.6g}: "
                "log-probs of the same tokens differ between two passes, so the model is not deterministic"
            )


def _loss_at(config: DPOConfig, name: str, pairs: Pairs, difference: float) -> float:
    """The mean loss of the pairs if each had this difference of log-ratios."""
    logprob = torch.tensor([difference, 0.0]).repeat(len(pairs))
    cu_rows = torch.arange(2 * len(pairs) + 1, dtype=torch.int32)
    return _pair_loss(config, name, logprob, None, cu_rows, pairs, len(pairs)).loss.item()


@torch.no_grad()
def _evaluate(
    config: DPOConfig, model: PreTrainedModel, reference: Reference, pairs: Pairs, indices: Sequence[int]
) -> dict[str, float]:
    totals, held_out = StepMetrics(), pairs[indices]
    with whole(model):
        for micro in _micro_batches(held_out, config):
            totals.add(_loss(config, model, reference, pairs, [indices[i] for i in micro], held_out).metrics)
    return {f"eval_{name}": value for name, value in _named(config, totals.means("pairs")).items()}


def _named(config: DPOConfig, means: Mapping[str, float]) -> dict[str, float]:
    """Means over pairs under TRL's names."""
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
    """Columns that the configured losses read."""
    labels = {"label_prob": ("label_prob",), "counts": COUNTS}.get(config.label_source, ())
    return ["chosen", "rejected", *labels, *["margin"] * (config.margin_scale != 0)]


def _pairs(
    config: DPOConfig,
    examples: Sequence[TokenizedExample],
    trees: list[Tree],
    tokenizer: PreTrainedTokenizerBase,
) -> Pairs:
    psi = None
    if config.psi != "identity":
        psi = load_psi(config.psi, config.psi_clip)
        pair_target(psi, torch.full((1,), 0.6), config.beta)  # an unsuitable psi is refused before anything is scored
    margin = config.margin_scale * pair_margins(examples) if config.margin_scale else None
    prob, target = pair_probabilities(config, examples, trees, tokenizer), None
    if psi:
        hard = torch.ones(len(examples), dtype=torch.float64)
        target = pair_target(psi, hard if prob is None else prob, config.beta)
    return Pairs(trees=trees, label_prob=None if prob is None else prob.float(), target=target, margin=margin)


def to_tree(example: TokenizedExample, config: DPOConfig) -> Tree:
    """The segments of a row: prompt, chosen, rejected."""
    assert example.chosen is not None
    assert example.rejected is not None
    responses = (example.chosen, example.rejected)
    trained = (example.scored("chosen"), example.scored("rejected"))
    return pair(example.prompt, *responses, scored=True, share_prompt=config.share_prompts, trained=trained)
