"""A reward model from preference pairs, on packs (Bradley and Terry 1952; Stiennon et al. 2020, arXiv 2009.01325,
section 3.4).

    repeat: draw a batch of pairs; loss = -sum of log sigmoid(r(x, chosen) - r(x, rejected)) / pairs; step

A margin of the row may be asked of the difference, and scores may be pulled to 0.

`fastrlhf reward --config FILE`
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from fastrlhf.algorithms.stage import Stage, TrainResult, check_micro_batch
from fastrlhf.config import RewardConfig, require
from fastrlhf.data.inputs import open_inputs
from fastrlhf.data.packing import forest, micro_batches, num_computed, num_in_sequences, pack, pair
from fastrlhf.data.tokens import special_ids
from fastrlhf.evaluation.winrates import bootstrap_interval
from fastrlhf.models.forward import sequence_scores
from fastrlhf.models.loading import check_same_vocabulary, load_reward_model, make_trainable, resolve_device
from fastrlhf.optim import Optimizer, index_batches, num_steps
from fastrlhf.types import Example, Segment, TokenizedExample

Tree = Sequence[Segment]
"""Of one pair: its prompt, chosen, rejected; or chosen and rejected with the prompt in each."""


def train_reward_model(
    config: RewardConfig, examples: Sequence[Example] | None = None, eval_examples: Sequence[Example] | None = None
) -> TrainResult:
    """Trains a score head on the trunk of `config.model_name_or_path`; `examples` stand in for the configured dataset.

    The result is a plain `AutoModelForSequenceClassification`. Metrics per step: loss (nats per pair), accuracy,
    margin, min_reward, mean_reward, max_reward, grad_norm, learning_rate, num_tokens (of the sequences, as TRL counts),
    num_unique_tokens (computed). Raises ValueError for bad input before any time is spent.
    """
    require(bool(config.model_name_or_path), "model_name_or_path", "", "the model whose trunk gets the score head")
    require(not config.model_config, "model_config", config.model_config, "empty: a reward model starts from a model")
    fields = ["chosen", "rejected", *["margin"] * (config.margin_scale != 0)]
    tokenizer, data = open_inputs(config, fields, examples, eval_examples)
    model = load_reward_model(
        config.model_name_or_path,
        field="model_name_or_path",
        pad_token_id=special_ids(tokenizer)[1],
        seed=config.seed,
        device=resolve_device(config.device),
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
    )
    check_same_vocabulary({"model_name_or_path": model}, len(tokenizer))
    make_trainable(model, config)
    pairs = [_tree(example, config) for example in data.train]
    held_out = [_tree(example, config) for example in data.eval]
    margins, held_out_margins = (_margins(config, part, model.device) for part in (data.train, data.eval))
    check_micro_batch(config, [*data.train, *data.eval], [num_computed(tree) for tree in [*pairs, *held_out]])
    steps = num_steps(config, len(pairs))
    optimizer = Optimizer({"": model}, config, num_steps=steps)
    evaluation: dict[str, float] = {}

    with Stage("reward", config, steps, (model, tokenizer), data=data, parts={"optimizer": optimizer}) as stage:
        for step, indices in stage.remaining(index_batches(len(pairs), config.batch_size, steps, config.seed)):
            drawn, asked = [pairs[i] for i in indices], margins[indices]
            scores, losses = [], []
            for micro in micro_batches([num_computed(tree) for tree in drawn], config.micro_batch_tokens, "pair"):
                score = score_pairs(model, [drawn[i] for i in micro])
                loss = ranking_losses(config, score, asked[micro])
                (loss.sum() / len(drawn)).backward()
                scores.append(score.detach())
                losses.append(loss.detach())
            metrics = _summary(torch.cat(scores), torch.cat(losses))
            metrics |= {**optimizer.step(), "num_tokens": sum(map(num_in_sequences, drawn))}
            metrics["num_unique_tokens"] = sum(map(num_computed, drawn))
            if held_out and stage.due(step, config.eval_steps):
                evaluation = evaluate(config, model, held_out, held_out_margins)
                metrics |= evaluation
            stage.log(step + 1, metrics)
        return stage.finish(model, tokenizer, evaluation)


def score_pairs(model: PreTrainedModel, pairs: Sequence[Tree]) -> Tensor:
    """[B, 2] float32: the scores of chosen and rejected."""
    batch = pack(forest(pairs), model.device)
    return sequence_scores(model, batch).view(-1, 2)


def ranking_losses(config: RewardConfig, scores: Tensor, margins: Tensor) -> Tensor:
    """[B]: -log sigmoid(difference - margin) + center_rewards_coefficient (sum)^2 of scores [B, 2]."""
    losses = -F.logsigmoid(scores[:, 0] - scores[:, 1] - margins)
    return (
        losses + config.center_rewards_coefficient * scores.sum(1) ** 2 if config.center_rewards_coefficient else losses
    )


@torch.no_grad()
def evaluate(config: RewardConfig, model: PreTrainedModel, pairs: Sequence[Tree], margins: Tensor) -> dict[str, float]:
    """Loss and accuracy on held-out pairs, the accuracy with its 95 % bootstrap interval; ties count one half."""
    micros = micro_batches([num_computed(tree) for tree in pairs], config.micro_batch_tokens, "pair")
    scores = torch.cat([score_pairs(model, [pairs[i] for i in micro]) for micro in micros])
    losses = ranking_losses(config, scores, margins[[i for micro in micros for i in micro]])
    margin = scores[:, 0] - scores[:, 1]
    low, high = bootstrap_interval(((margin > 0) + 0.5 * (margin == 0)).cpu().numpy())
    summary = {f"eval_{name}": value for name, value in _summary(scores, losses).items()}
    return summary | {"eval_accuracy_low": low, "eval_accuracy_high": high}


def _summary(scores: Tensor, losses: Tensor) -> dict[str, float]:
    margin = scores[:, 0] - scores[:, 1]
    values = {
        "loss": losses.mean(),
        "accuracy": ((margin > 0) + 0.5 * (margin == 0)).mean(),
        "margin": margin.mean(),
        "min_reward": scores.min(),
        "mean_reward": scores.mean(),
        "max_reward": scores.max(),
    }
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))


def _margins(config: RewardConfig, examples: Sequence[TokenizedExample], device: torch.device) -> Tensor:
    """[B] float32, what the scores of each pair must differ by."""
    asked = [config.margin_scale * (example.margin or 0.0) for example in examples]
    return torch.tensor(asked, dtype=torch.float32, device=device)


def _tree(example: TokenizedExample, config: RewardConfig) -> Tree:
    assert example.chosen is not None
    assert example.rejected is not None
    responses = (example.chosen, example.rejected)
    return pair(example.prompt, *responses, scored=False, share_prompt=config.share_prompts)
