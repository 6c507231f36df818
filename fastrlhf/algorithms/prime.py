"""Trains the model of the token rewards on outcomes during the run: `dpo_refine: outcome`.

PRIME (process reinforcement through implicit rewards, Cui et al. 2025, arXiv 2502.01456) rewards every token by the
log-ratio of a model phi to its reference, as RTO does, and trains phi online. With o = 1 if a response y succeeded and
o = 0 otherwise,

    r_t = beta log(phi / ref)(y_t),   loss = -o log sigmoid(sum_t r_t) - (1 - o) log sigmoid(-sum_t r_t)

averaged over the responses of a batch. phi is trained on the rollouts of each update before it rewards them and before
the policy is trained. No labels of single steps are needed: if phi can represent it, the sum of r up to a token becomes
the log-odds of success after that token, and the reward of a token is the change of these log-odds. Log-probs are at
temperature 1, as in RTO.

After a reset, the tokens before the cut count as prompt, and the sums start after the cut. The paper's text was not
available, so no equation numbers are given; the loss is that of the authors' released code. Their script scores the
rollouts with phi before phi is trained on them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import PreTrainedModel

from fastrlhf.algorithms.experience import Pack
from fastrlhf.config import PPOConfig
from fastrlhf.models.forward import token_logprobs
from fastrlhf.models.router_loss import begin_step
from fastrlhf.rewards.implicit import ImplicitReward
from fastrlhf.runtime.optim import Optimizer
from fastrlhf.runtime.step_metrics import StepMetrics
from fastrlhf.types import Rollout
from fastrlhf_kernels import LossOutput, Sum


def refine(
    config: PPOConfig,
    implicit: ImplicitReward,
    reference: PreTrainedModel,
    optimizer: Optimizer,
    rollouts: Sequence[Rollout],
    succeeded: Tensor,
    packs: Sequence[Sequence[Pack]],
) -> dict[str, float]:
    """Trains `implicit.model` in one pass over the packs of the batch, with one optimiser step per mini-batch.

    `succeeded` [N] bool, one per rollout. `reference` is the reference model of the run. Metrics, before each step:
    prime/loss in nats per response; prime/accuracy, the share of responses with the right sign of the sum;
    prime/success, the share of successes; prime/grad_norm.
    """
    model, totals, norms = implicit.model, StepMetrics(), []
    # With compat fixed the rows of an episode are its sampled tokens, so their counts delimit the episodes.
    lengths = torch.tensor([len(rollout.completion) for rollout in rollouts])
    label = succeeded.cpu().float().repeat_interleave(lengths).to(model.device)
    num = config.batch_size // config.num_mini_batches
    for mini in packs:
        begin_step(model, num)
        for item in mini:
            batch = item.batch
            base = implicit.reference_logprob(batch, reference)
            ratio = token_logprobs(model, batch).logprob - base
            labels = label[item.index[batch.cu_rows[:-1].long()]]
            loss, metrics = outcome_loss(ratio, batch.cu_rows, labels, beta=config.dpo_refine_beta, num_responses=num)
            loss.backward()
            totals.add(metrics)
        norms.append(optimizer.step()["dpo_grad_norm"])
    means = totals.means("responses")
    named = {f"prime/{name}": means[name] for name in ("loss", "accuracy", "success")}
    return named | {"prime/grad_norm": sum(norms) / len(norms)}


def outcome_loss(log_ratio: Tensor, cu_rows: Tensor, label: Tensor, *, beta: float, num_responses: int) -> LossOutput:
    """Returns the loss of N responses, divided by `num_responses`.

    log_ratio [R] float32 in nats, with gradient; cu_rows (N+1,) int32; label [N] float32, 1 for a success, else 0.
    """
    total = torch.segment_reduce(log_ratio, "sum", lengths=cu_rows.diff().long(), unsafe=True)
    loss = binary_cross_entropy_with_logits(beta * total, label, reduction="sum")
    right = ((total > 0) == (label > 0.5)).float().sum()
    metrics = {
        "loss": Sum(loss.detach()),
        "responses": Sum(torch.ones_like(label).sum()),
        "accuracy": Sum(right),
        "success": Sum(label.sum()),
    }
    return LossOutput(loss / num_responses, metrics)
