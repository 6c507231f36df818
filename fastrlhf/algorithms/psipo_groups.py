"""Trains a policy by PsiPO on packs, with K responses per prompt (Azar et al. 2023, arXiv 2310.12036; `psipo.py` has
the equations).

    once:   P of every group from labels or a reward model; targets t of its log-ratios; log pi_ref of every response
    repeat: draw a batch of groups; u = log pi / pi_ref of each response;
            loss = mean over pairs of a group of (u_i - u_j - (t_i - t_j))^2, over groups; step

A group is a tree: its prompt is computed once and K responses are attached to it.

`fastrlhf dpo --loss_type ipo --psi_backend groupwise --config FILE`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.algorithms.pair_labels import group_preferences
from fastrlhf.algorithms.psipo import Psi, check_not_hard, group_loss, group_target, load_psi
from fastrlhf.algorithms.reference import Reference, check_reference, live_models, open_reference
from fastrlhf.algorithms.scoring import Tree, sequence_logprobs
from fastrlhf.config import DPOConfig
from fastrlhf.data.given import Rows
from fastrlhf.data.labels import GROUP_LABELS
from fastrlhf.data.packing import (
    check_micro_batch,
    forest,
    group,
    num_computed,
    num_in_sequences,
    own_micro_batches,
    pack,
)
from fastrlhf.data.token_set import TokenSet
from fastrlhf.models.given import policy_or_given
from fastrlhf.models.router_loss import begin_step
from fastrlhf.models.sharding import own_pace, shard
from fastrlhf.runtime.inputs import open_inputs
from fastrlhf.runtime.mixing import shares_of
from fastrlhf.runtime.optim import Optimizer, index_batches, num_steps
from fastrlhf.runtime.result import TrainResult
from fastrlhf.runtime.run import Run
from fastrlhf.runtime.step_metrics import StepMetrics
from fastrlhf.types import TokenizedExample
from fastrlhf_kernels import LossOutput, Sum


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A prompt, its K responses and the targets of their log-ratios."""

    tree: Tree
    target: Tensor
    """[K] float32 nats, up to a constant"""

    @property
    def best_and_worst(self) -> tuple[int, int]:
        """Returns the indices of the responses with the highest and the lowest target."""
        return int(self.target.argmax()), int(self.target.argmin())


def train_groups(
    config: DPOConfig,
    examples: Rows | None = None,
    eval_examples: Rows | None = None,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    callbacks: Sequence[object] = (),
) -> TrainResult:
    """Trains `config.model_name_or_path` on groups of responses; `examples` replace the configured dataset.

    Metrics per step: loss (nats^2 per pair of a group); over the pairs of responses that differ in g,
    rewards/accuracies (share whose log-ratios have the same order as g), rewards/margins and rewards/target_margins
    (beta times the difference of log-ratios, now and at the optimum); logps/chosen, logps/rejected (nats of the
    response of highest and of lowest g); grad_norm, learning_rate, num_tokens (of the sequences), num_unique_tokens
    (computed). Raises ValueError for bad input before any time is spent on training, and if the first loss is not
    that of a policy equal to its reference.
    """
    psi = load_psi(config.psi, config.psi_clip)
    fields = ["responses", *(GROUP_LABELS if config.label_source == "data" else ())]
    judged = config.label_source == "reward_model"
    tokenizer, data = open_inputs(config, fields, examples, eval_examples, tokenizer=tokenizer, keep_rows=judged)
    check_reference(config, tokenizer, conversations=data.conversations)
    rows = TokenSet.joined(data.train, data.eval)
    trees = [to_tree(rows.arrays(i), config) for i in range(len(rows))]
    check_micro_batch(config, rows, list(map(num_computed, trees)))
    targets = _targets(config, psi, rows, group_preferences(config, rows, trees, tokenizer, data.rules))
    groups = [Group(tree=tree, target=target) for tree, target in zip(trees, targets, strict=True)]
    model = policy_or_given(config, tokenizer, model)
    num_train, held_out = len(data.train), range(len(data.train), len(trees))
    steps = num_steps(config, num_train)
    batches = partial(index_batches, num_train, config.batch_size, steps, config.seed, shares_of(config, data.train))
    reference = open_reference(config, model, trees, chain(chain.from_iterable(batches()), held_out))
    shard(model)
    optimizer = Optimizer({"": model}, config, num_steps=steps)
    evaluate_held_out = partial(_evaluate, config, model, reference, groups, held_out)

    with Run(
        "psipo",
        config,
        steps,
        (model, tokenizer),
        data=data,
        parts={"optimizer": optimizer},
        evaluate=evaluate_held_out if held_out else None,
        callbacks=callbacks,
    ) as run:
        for step, indices in run.remaining(batches()):
            totals, drawn = StepMetrics(), [groups[i] for i in indices]
            begin_step(model, sum(len(group.tree) - len({s.parent for s in group.tree} - {-1}) for group in drawn))
            for micro in run.parts(_micro_batches(drawn, config)):
                output = _loss(model, reference, groups, [indices[i] for i in micro], num_groups=len(drawn))
                output.loss.backward()
                totals.add(output.metrics)
            metrics = _named(totals.means("groups"), config)
            if step == 0 and not config.ref_model_name_or_path:
                _check_first_loss(config, drawn, metrics)
            metrics |= {**optimizer.step(), "num_tokens": sum(num_in_sequences(g.tree) for g in drawn)}
            metrics["num_unique_tokens"] = sum(num_computed(g.tree) for g in drawn)
            run.log(step + 1, metrics)
        return run.finish(model, tokenizer)


def _loss(
    model: PreTrainedModel, reference: Reference, groups: Sequence[Group], micro: Sequence[int], *, num_groups: int
) -> LossOutput:
    """Computes the contribution of the groups `micro` (one micro-batch) to the loss of a step of `num_groups`
    groups."""
    own = [groups[i] for i in micro]
    batch = pack(forest(g.tree for g in own), model.device)
    logprob = sequence_logprobs(model, batch)
    starts = [0, *accumulate(len(g.target) for g in own)]
    ends = [[start + i for i in g.best_and_worst] for start, g in zip(starts, own, strict=False)]
    output = group_loss(
        logprob - reference(batch, micro),
        _to(model.device, torch.cat([g.target for g in own])),
        _to(model.device, torch.tensor(starts)),
        num_groups=num_groups,
    )
    best, worst = logprob.detach()[_to(model.device, torch.tensor(ends))].sum(0)
    return LossOutput(output.loss, {**output.metrics, "logprob_best": Sum(best), "logprob_worst": Sum(worst)})


def _to(device: torch.device, values: Tensor) -> Tensor:
    return values.to(device, non_blocking=True)


def _targets(
    config: DPOConfig, psi: Psi, examples: Sequence[TokenizedExample], preferences: Sequence[Tensor]
) -> list[Tensor]:
    """Returns the target log-ratios [K] float32 of every group, from P [K, K]."""
    check_not_hard(psi, torch.cat([p[~torch.eye(len(p), dtype=torch.bool)] for p in preferences]))
    estimator = "self_included" if psi.is_odd else "leave_two_out"
    targets = []
    for example, preference in zip(examples, preferences, strict=True):
        try:
            targets.append(group_target(preference, psi, config.beta, estimator).float())
        except ValueError as error:
            raise ValueError(f"row {example.row}: {error}") from None
    return targets


def _check_first_loss(config: DPOConfig, groups: Sequence[Group], metrics: Mapping[str, float]) -> None:
    """Raises ValueError if the loss differs from the loss of a policy that equals its reference, which depends only on
    the targets.

    The log-ratios of such a policy are 0 except for rounding: 3e-5 of a response's log-prob is allowed, 1e-2 in
    bfloat16.
    """
    expected = sum(2 * g.target.double().var().item() for g in groups) / len(groups)
    size = abs(metrics["logps/chosen"]) + abs(metrics["logps/rejected"])
    rounding = 2 * size * (3e-5 if config.dtype == "float32" else 1e-2)
    if not abs(metrics["loss"] - expected) <= (2 * expected**0.5 + rounding) * rounding + 1e-5 * expected + 1e-6:
        raise ValueError(
            f"the first loss is {metrics['loss']:.6g}, but a policy that equals its reference has {expected:.6g}: "
            "log-probs of the same tokens differ between two passes, so the model is not deterministic"
        )


@torch.no_grad()
def _evaluate(
    config: DPOConfig, model: PreTrainedModel, reference: Reference, groups: Sequence[Group], indices: Sequence[int]
) -> dict[str, float]:
    totals = StepMetrics()
    with own_pace(model, *live_models(reference)):
        for micro in _micro_batches([groups[i] for i in indices], config):
            totals.add(_loss(model, reference, groups, [indices[i] for i in micro], num_groups=len(indices)).metrics)
    return {f"eval_{name}": value for name, value in _named(totals.means("groups"), config).items()}


def _named(means: dict[str, float], config: DPOConfig) -> dict[str, float]:
    """Renames the metrics to TRL's names, if TRL has them. Groups without an ordered pair are left out of accuracies
    and margins."""
    ordered = means["ordered"] or 1.0
    return {
        "loss": means["loss"],
        "rewards/accuracies": means["accuracy"] / ordered,
        "rewards/margins": config.beta * means["margin"] / ordered,
        "rewards/target_margins": config.beta * means["target_margin"] / ordered,
        "logps/chosen": means["logprob_best"],
        "logps/rejected": means["logprob_worst"],
    }


def to_tree(example: TokenizedExample, config: DPOConfig) -> Tree:
    """Returns the segments of a row: the prompt and its responses."""
    if not example.responses or len(example.responses) < 2:
        raise ValueError(f"row {example.row}: a group needs at least two responses")
    trained = [example.scored(f"responses[{i}]") for i in range(len(example.responses))]
    return group(example.prompt, example.responses, scored=True, share_prompt=config.share_prompts, trained=trained)


def _micro_batches(groups: Sequence[Group], config: DPOConfig) -> Sequence[list[int]]:
    return own_micro_batches([num_computed(g.tree) for g in groups], config.micro_batch_tokens, "group")
