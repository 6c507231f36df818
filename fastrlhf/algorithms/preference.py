"""Policies from preference pairs, on packs: DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7) and IPO (Azar et al.
2023, arXiv 2310.12036, eq. 17), one scalar derivative per sequence apart.

    once:   log pi_ref of every response
    repeat: draw a batch of pairs; D = log-ratio of chosen - log-ratio of rejected; loss(D) / pairs; step

The reference is the policy before its first step, so it is never a second model: its log-probs are computed once.

`fastrlhf dpo --config FILE`
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import import_module

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrlhf.algorithms.stage import Stage, StepMetrics, TrainResult, check_micro_batch
from fastrlhf.config import DPOConfig, require
from fastrlhf.data.inputs import open_inputs
from fastrlhf.data.packing import forest, micro_batches, num_computed, num_in_sequences, pack, pair
from fastrlhf.models.forward import token_logprobs
from fastrlhf.models.loading import check_same_vocabulary, load_policy, open_policy
from fastrlhf.optim import Optimizer, index_batches, num_steps
from fastrlhf.types import Example, PackedBatch, Segment, TokenizedExample
from fastrlhf_kernels import LossOutput, pair_loss

Tree = Sequence[Segment]
"""Of one pair: its prompt, chosen, rejected; or chosen and rejected with the prompt in each."""
KINDS = {"sigmoid": "dpo", "ipo": "ipo", "hinge": "hinge", "robust": "robust"}


def train_dpo(
    config: DPOConfig, examples: Sequence[Example] | None = None, eval_examples: Sequence[Example] | None = None
) -> TrainResult:
    """Trains `config.model_name_or_path` on pairs; `examples` stand in for the configured dataset.

    Metrics per step, TRL's names: loss, rewards/chosen, rewards/rejected, rewards/margins, rewards/accuracies,
    logps/chosen, logps/rejected (nats per response), grad_norm, learning_rate, num_tokens (of the
    sequences, as TRL counts), num_unique_tokens (computed). Raises ValueError for bad
    input before any time is spent, and where the loss of the untrained policy is not what it must be (ln 2 for DPO).
    """
    smoothed_hinge = config.loss_type == "hinge" and config.label_smoothing > 0
    require(not smoothed_hinge, "label_smoothing", config.label_smoothing, "0 where loss_type is hinge")
    if config.is_psipo:
        return import_module("fastrlhf.algorithms.groups").train_psipo(config, examples, eval_examples)
    tokenizer, data = open_inputs(config, ["chosen", "rejected"], examples, eval_examples)
    pairs = [_tree(example, config) for example in data.train]
    held_out = [_tree(example, config) for example in data.eval]
    check_micro_batch(config, [*data.train, *data.eval], [num_computed(tree) for tree in [*pairs, *held_out]])
    model = open_policy(config, tokenizer)
    steps = num_steps(config, len(pairs))
    reference = _reference_logprobs(config, model, [*pairs, *held_out])  # [pairs, 2], sums over the response
    optimizer = Optimizer({"": model}, config, num_steps=steps)
    evaluation: dict[str, float] = {}

    with Stage(
        "dpo" if config.loss_type == "sigmoid" else config.loss_type, config, steps, (model, tokenizer)
    ) as stage:
        for step, indices in enumerate(index_batches(len(pairs), config.batch_size, steps, config.seed)):
            totals = StepMetrics()
            for micro in _micro_batches([pairs[i] for i in indices], config):
                chosen = [indices[i] for i in micro]
                output = _loss(config, model, [pairs[i] for i in chosen], reference[chosen], num_pairs=len(indices))
                output.loss.backward()
                totals.add(output.metrics)
            metrics = _named(totals.means("pairs"))
            if step == 0 and not config.ref_model_name_or_path:
                check_first_loss(config, metrics)
            metrics |= {**optimizer.step(), "num_tokens": sum(num_in_sequences(pairs[i]) for i in indices)}
            metrics["num_unique_tokens"] = sum(num_computed(pairs[i]) for i in indices)
            if held_out and stage.due(step, config.eval_steps):
                evaluation = _evaluate(config, model, held_out, reference[len(pairs) :])
                metrics |= evaluation
            stage.log(step + 1, metrics)
        return stage.finish(model, tokenizer, evaluation)


def _loss(
    config: DPOConfig, model: PreTrainedModel, pairs: Sequence[Tree], reference: Tensor, *, num_pairs: int
) -> LossOutput:
    """The pairs' share of the loss of a step of `num_pairs`; reference [B, 2] float32."""
    batch = pack(forest(pairs), model.device)
    logprob = token_logprobs(model, batch).logprob
    return pair_loss(
        logprob,
        reference.flatten(),
        batch.cu_rows,
        torch.ones_like(logprob, dtype=torch.bool),
        num_pairs=num_pairs,
        kind=KINDS[config.loss_type],
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        length_norm=length_norm(config),
    )


def length_norm(config: DPOConfig) -> str:
    """What `auto` means: the mean over tokens for ipo, as in TRL; the sum for all else."""
    if config.length_norm != "auto":
        return config.length_norm
    return "mean" if config.loss_type == "ipo" else "sum"


def check_first_loss(config: DPOConfig, metrics: Mapping[str, float]) -> None:
    """Raises ValueError where the loss is not that of a policy which still equals its reference: ln 2, for hinge 1, for
    ipo (1 / (2 tau))^2.

    Every log-ratio is then 0 but for rounding: 3e-5 of a response's log-prob are allowed, 1e-2 in bfloat16.
    """
    size = abs(metrics["logps/chosen"]) + abs(metrics["logps/rejected"])
    rounding = (3e-5 if config.dtype == "float32" else 1e-2) * size
    target = (1 - 2 * config.label_smoothing) / (2 * config.beta)
    expected, slope = math.log(2), config.beta / (1 - 2 * config.label_smoothing)
    if config.loss_type == "hinge":
        expected = 1.0
    elif config.loss_type == "ipo":
        expected, slope = target**2, 2 * target + rounding
    if not abs(metrics["loss"] - expected) <= slope * rounding + 1e-6:
        raise ValueError(
            f"the first {config.loss_type} loss is {metrics['loss']:.6g} where a policy that equals its reference has "
            f"{expected:.6g}: log-probs of the same tokens differ between two passes, so the model is not deterministic"
        )


@torch.no_grad()
def _reference_logprobs(config: DPOConfig, policy: PreTrainedModel, pairs: Sequence[Tree]) -> Tensor:
    """log pi_ref(response | prompt) [pairs, 2] float32, in nats. A reference of its own is loaded, used and freed."""
    model = policy
    if config.ref_model_name_or_path:
        model = load_policy(
            config.ref_model_name_or_path,
            field="ref_model_name_or_path",
            device=policy.device,
            dtype=config.dtype,
            trust_remote_code=config.trust_remote_code,
        )
        check_same_vocabulary({"model_name_or_path": policy, "ref_model_name_or_path": model}, 0)
    sums = torch.empty(len(pairs), 2, device=policy.device)
    for micro in _micro_batches(pairs, config):
        batch = pack(forest(pairs[i] for i in micro), policy.device)
        sums[micro] = sequence_sums(token_logprobs(model, batch).logprob, batch).view(-1, 2)
    if not bool(sums.isfinite().all()):
        bad = int((~sums.isfinite().all(1)).nonzero()[0, 0])
        field = "ref_model_name_or_path" if config.ref_model_name_or_path else "model_name_or_path"
        raise ValueError(f"{field}: the log-probs of pair {bad} are not finite; the model is broken")
    return sums


def sequence_sums(per_row: Tensor, batch: PackedBatch) -> Tensor:
    """[R] -> [N] float32: the sum over the rows of every sequence, in a fixed order."""
    return torch.segment_reduce(per_row, "sum", offsets=batch.cu_rows.long())


@torch.no_grad()
def _evaluate(config: DPOConfig, model: PreTrainedModel, pairs: Sequence[Tree], reference: Tensor) -> dict[str, float]:
    totals = StepMetrics()
    for micro in _micro_batches(pairs, config):
        totals.add(_loss(config, model, [pairs[i] for i in micro], reference[micro], num_pairs=len(pairs)).metrics)
    return {f"eval_{name}": value for name, value in _named(totals.means("pairs")).items()}


def _named(means: dict[str, float]) -> dict[str, float]:
    """TRL's names for the means over pairs."""
    return {
        "loss": means["loss"],
        "rewards/chosen": means["reward_chosen"],
        "rewards/rejected": means["reward_rejected"],
        "rewards/margins": means["margin"],
        "rewards/accuracies": means["accuracy"],
        "logps/chosen": means["logprob_chosen"],
        "logps/rejected": means["logprob_rejected"],
    }


def _micro_batches(pairs: Sequence[Tree], config: DPOConfig) -> list[list[int]]:
    return micro_batches([num_computed(tree) for tree in pairs], config.micro_batch_tokens, "pair")


def _tree(example: TokenizedExample, config: DPOConfig) -> Tree:
    assert example.chosen is not None
    assert example.rejected is not None
    responses = (example.chosen, example.rejected)
    return pair(example.prompt, *responses, scored=True, share_prompt=config.share_prompts)
