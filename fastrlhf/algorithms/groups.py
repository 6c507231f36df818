"""PsiPO on packs, from K responses per prompt or from pairs whose preference is a probability (Azar et al. 2023, arXiv
2310.12036; `psipo.py` has the equations).

    once:   P of every group from labels or a reward model; targets t of its log-ratios; log pi_ref of every response
    repeat: draw a batch of groups; u = log pi / pi_ref of each response;
            loss = mean over pairs of a group of (u_i - u_j - (t_i - t_j))^2, over groups; step

A pair is a group of two. A group is a tree: its prompt is computed once and K responses hang on it.

`fastrlhf dpo --loss_type ipo --psi_backend groupwise --config FILE`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.algorithms.preference import Tree, sequence_sums
from fastrlhf.algorithms.psipo import (
    Psi,
    check_not_hard,
    group_loss,
    group_target,
    label_probability,
    load_psi,
    pair_target,
    reward_preferences,
)
from fastrlhf.algorithms.stage import Stage, StepMetrics, TrainResult, check_micro_batch
from fastrlhf.config import DPOConfig, require
from fastrlhf.data.inputs import open_inputs
from fastrlhf.data.labels import COUNTS, UnusableRow, read_counts, read_group_labels
from fastrlhf.data.packing import forest, group, micro_batches, num_computed, num_in_sequences, pack
from fastrlhf.data.tokens import special_ids
from fastrlhf.models.forward import sequence_scores, token_logprobs
from fastrlhf.models.loading import (
    check_same_vocabulary,
    load_policy,
    load_reward_model,
    open_policy,
    read_model_config,
    resolve_device,
)
from fastrlhf.optim import Optimizer, index_batches, num_steps
from fastrlhf.types import Example, PackedBatch, TokenizedExample
from fastrlhf_kernels import LossOutput
from fastrlhf_kernels.types import Sum


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A prompt, its K responses and where their log-ratios shall go."""

    tree: Tree
    target: Tensor
    """[K] float32 nats, up to a constant"""
    reference: Tensor
    """[K] float32 nats, log pi_ref of each response"""

    @property
    def best_and_worst(self) -> tuple[int, int]:
        """By target."""
        return int(self.target.argmax()), int(self.target.argmin())


def train_psipo(
    config: DPOConfig, examples: Sequence[Example] | None = None, eval_examples: Sequence[Example] | None = None
) -> TrainResult:
    """Trains `config.model_name_or_path` on groups or pairs; `examples` stand in for the configured dataset.

    Metrics per step: loss (nats^2 per pair of a group); over the pairs of responses that differ in g,
    rewards/accuracies (the log-ratios are in their order), rewards/margins and rewards/target_margins (beta times the
    difference of log-ratios, now and at the optimum); logps/chosen, logps/rejected (nats of the response of highest and
    of lowest g); grad_norm, learning_rate, num_tokens (of the sequences), num_unique_tokens (computed). Raises
    ValueError for bad input before any time is spent on training, and where the first loss is not that of a policy that
    equals its reference.
    """
    _check_keys(config)
    psi = load_psi(config.psi, config.psi_clip)
    if config.reward_model_path:
        read_model_config(config.reward_model_path, "reward_model_path", config.trust_remote_code)
    tokenizer, data = open_inputs(config, _fields(config), examples, eval_examples)
    rows = [*data.train, *data.eval]
    trees = [_tree(example, config) for example in rows]
    check_micro_batch(config, rows, list(map(num_computed, trees)))
    targets = _targets(config, psi, rows, _preferences(config, rows, trees, tokenizer))
    model = open_policy(config, tokenizer)
    references = _reference_logprobs(config, model, trees)
    parts = zip(trees, targets, references, strict=True)
    groups = [Group(tree=tree, target=target, reference=reference) for tree, target, reference in parts]
    train, held_out = groups[: len(data.train)], groups[len(data.train) :]
    steps = num_steps(config, len(train))
    optimizer = Optimizer({"": model}, config, num_steps=steps)
    evaluation: dict[str, float] = {}

    with Stage("psipo", config, steps, (model, tokenizer)) as stage:
        for step, indices in enumerate(index_batches(len(train), config.batch_size, steps, config.seed)):
            drawn = [train[i] for i in indices]
            totals = StepMetrics()
            for micro in _micro_batches([g.tree for g in drawn], config):
                output = _loss(model, [drawn[i] for i in micro], num_groups=len(drawn))
                output.loss.backward()
                totals.add(output.metrics)
            metrics = _named(totals.means("groups"), config)
            if step == 0 and not config.ref_model_name_or_path:
                _check_first_loss(config, drawn, metrics["loss"])
            metrics |= {**optimizer.step(), "num_tokens": sum(num_in_sequences(g.tree) for g in drawn)}
            metrics["num_unique_tokens"] = sum(num_computed(g.tree) for g in drawn)
            if held_out and stage.due(step, config.eval_steps):
                evaluation = _evaluate(config, model, held_out)
                metrics |= evaluation
            stage.log(step + 1, metrics)
        return stage.finish(model, tokenizer, evaluation)


def _loss(model: PreTrainedModel, groups: Sequence[Group], *, num_groups: int) -> LossOutput:
    """The groups' share of the loss of a step of `num_groups`."""
    batch = pack(forest(g.tree for g in groups), model.device)
    logprob = sequence_sums(token_logprobs(model, batch).logprob, batch)
    starts = [0, *accumulate(len(g.target) for g in groups)]
    ends = [[start + i for i in g.best_and_worst] for start, g in zip(starts, groups, strict=False)]
    output = group_loss(
        logprob - _to(model.device, torch.cat([g.reference for g in groups])),
        _to(model.device, torch.cat([g.target for g in groups])),
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
    """Log-ratios [K] float32 of every group, from P [K, K]."""
    if config.psi_backend == "pairwise":
        half = pair_target(psi, torch.stack([p[0, 1] for p in preferences]), config.beta) / 2
        return list(torch.stack([half, -half], 1))
    check_not_hard(psi, torch.cat([p[~torch.eye(len(p), dtype=torch.bool)] for p in preferences]))
    targets = []
    for example, preference in zip(examples, preferences, strict=True):
        try:
            estimator = "self_included" if psi.is_odd else "leave_two_out"
            targets.append(group_target(preference, psi, config.beta, estimator).float())
        except ValueError as error:
            raise ValueError(f"row {example.row}: {error}") from None
    return targets


def _preferences(
    config: DPOConfig, examples: Sequence[TokenizedExample], trees: Sequence[Tree], tokenizer: PreTrainedTokenizerBase
) -> list[Tensor]:
    """P [K, K] float64 of every group, by `label_source`. Raises ValueError, naming the row, for labels that are
    none."""
    if config.label_source == "reward_model":
        scores = _reward_scores(config, trees, tokenizer)
        return [reward_preferences(config.score_scale * value.double()) for value in scores]
    return [_labelled_preferences(config, example) for example in examples]


def _labelled_preferences(config: DPOConfig, example: TokenizedExample) -> Tensor:
    try:
        if config.psi_backend == "pairwise":
            p = torch.ones((), dtype=torch.float64)
            if config.label_source == "counts":
                wins, labels = read_counts({name: getattr(example, name) for name in COUNTS}).values()
                p = label_probability(torch.tensor(wins), torch.tensor(labels), config.label_prior)
            return torch.tensor([[0.5, p], [1 - p, 0.5]], dtype=torch.float64)
        assert example.responses is not None
        given = {"preferences": example.preferences, "scores": example.scores}
        labels = read_group_labels(given, len(example.responses))
    except (UnusableRow, ValueError) as bad:
        raise ValueError(f"row {example.row}: {bad}") from None
    if not labels:
        raise ValueError(
            f"row {example.row} has neither preferences nor scores of its responses; give one, or a reward model by "
            "label_source"
        )
    if "scores" in labels:
        return reward_preferences(config.score_scale * torch.tensor(labels["scores"], dtype=torch.float64))
    return torch.tensor(labels["preferences"], dtype=torch.float64)


def _reward_scores(config: DPOConfig, trees: Sequence[Tree], tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """[K] of every group, on the CPU. The reward model is loaded, used and freed."""
    model = load_reward_model(
        config.reward_model_path,
        pad_token_id=special_ids(tokenizer)[1],
        must_be_trained=True,
        device=resolve_device(config.device),
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
    )
    check_same_vocabulary({"reward_model_path": model}, len(tokenizer))
    scores = _per_response(config, model, trees, lambda batch: sequence_scores(model, batch))
    return _checked(scores, "reward_model_path", "scores")


def _reference_logprobs(config: DPOConfig, policy: PreTrainedModel, trees: Sequence[Tree]) -> list[Tensor]:
    """log pi_ref [K] of every group, on the CPU, in nats. A reference of its own is loaded, used and freed."""
    model, field = policy, "model_name_or_path"
    if config.ref_model_name_or_path:
        field = "ref_model_name_or_path"
        model = load_policy(
            config.ref_model_name_or_path,
            field=field,
            device=policy.device,
            dtype=config.dtype,
            trust_remote_code=config.trust_remote_code,
        )
        check_same_vocabulary({"model_name_or_path": policy, field: model}, 0)
    logprobs = _per_response(config, model, trees, lambda b: sequence_sums(token_logprobs(model, b).logprob, b))
    return _checked(logprobs, field, "log-probs")


@torch.no_grad()
def _per_response(
    config: DPOConfig, model: PreTrainedModel, trees: Sequence[Tree], read: Callable[[PackedBatch], Tensor]
) -> list[Tensor]:
    """What `read` gives for the responses of every group, [K] on the CPU."""
    values: list[Tensor] = [torch.empty(0)] * len(trees)
    for micro in _micro_batches(trees, config):
        batch = pack(forest(trees[i] for i in micro), model.device)
        sizes = [_num_responses(trees[i]) for i in micro]
        for i, part in zip(micro, read(batch).cpu().split(sizes), strict=True):
            values[i] = part
    return values


def _checked(values: list[Tensor], field: str, what: str) -> list[Tensor]:
    bad = next((i for i, value in enumerate(values) if not bool(value.isfinite().all())), None)
    if bad is not None:
        raise ValueError(f"{field}: the {what} of group {bad} are not finite; the model is broken")
    return values


def _check_first_loss(config: DPOConfig, groups: Sequence[Group], loss: float) -> None:
    """Raises ValueError where the loss is not that of a policy which still equals its reference: the targets' own.

    Every log-ratio is then 0 but for rounding: 3e-5 of a response's log-prob are allowed, 1e-2 in bfloat16.
    """
    expected = sum(2 * g.target.double().var().item() for g in groups) / len(groups)
    size = max(g.reference.abs().max().item() for g in groups)
    rounding = 2 * size * (3e-5 if config.dtype == "float32" else 1e-2)
    if not abs(loss - expected) <= (2 * expected**0.5 + rounding) * rounding + 1e-5 * expected + 1e-6:
        raise ValueError(
            f"the first loss is {loss:.6g} where a policy that equals its reference has {expected:.6g}: log-probs of "
            "the same tokens differ between two passes, so the model is not deterministic"
        )


@torch.no_grad()
def _evaluate(config: DPOConfig, model: PreTrainedModel, groups: Sequence[Group]) -> dict[str, float]:
    totals = StepMetrics()
    for micro in _micro_batches([g.tree for g in groups], config):
        totals.add(_loss(model, [groups[i] for i in micro], num_groups=len(groups)).metrics)
    return {f"eval_{name}": value for name, value in _named(totals.means("groups"), config).items()}


def _named(means: dict[str, float], config: DPOConfig) -> dict[str, float]:
    """TRL's names where it has them. A group whose responses are all alike says nothing about their order."""
    ordered = means["ordered"] or 1.0
    return {
        "loss": means["loss"],
        "rewards/accuracies": means["accuracy"] / ordered,
        "rewards/margins": config.beta * means["margin"] / ordered,
        "rewards/target_margins": config.beta * means["target_margin"] / ordered,
        "logps/chosen": means["logprob_best"],
        "logps/rejected": means["logprob_worst"],
    }


def _check_keys(config: DPOConfig) -> None:
    """Refuses keys that would be ignored."""
    rule = "where psi, psi_backend, label_source or reward_model_path is given"
    require(config.loss_type == "ipo", "loss_type", config.loss_type, f"ipo {rule}")
    require(config.length_norm in ("auto", "sum"), "length_norm", config.length_norm, f"auto or sum {rule}")
    require(config.label_smoothing == 0, "label_smoothing", config.label_smoothing, f"0 {rule}")
    of_pairs = config.psi_backend == "pairwise" or config.label_source != "counts"
    require(of_pairs, "label_source", config.label_source, "data or reward_model where psi_backend is groupwise")
    scored, path = config.label_source == "reward_model", config.reward_model_path
    require(not scored or bool(path), "reward_model_path", path, "given where label_source is reward_model")
    require(scored or not path, "reward_model_path", path, "empty where label_source is not reward_model")


def _fields(config: DPOConfig) -> list[str]:
    if config.psi_backend == "groupwise":
        return ["responses"]
    return ["chosen", "rejected", *(COUNTS if config.label_source == "counts" else ())]


def _tree(example: TokenizedExample, config: DPOConfig) -> Tree:
    responses = example.responses if config.psi_backend == "groupwise" else [example.chosen, example.rejected]
    assert responses is not None
    members = [response for response in responses if response is not None]
    return group(example.prompt, members, scored=True, share_prompt=config.share_prompts)


def _num_responses(tree: Tree) -> int:
    return sum(segment.num_scored > 0 for segment in tree)


def _micro_batches(trees: Sequence[Tree], config: DPOConfig) -> list[list[int]]:
    return micro_batches([num_computed(tree) for tree in trees], config.micro_batch_tokens, "group")
