"""Win rates of models against dataset responses, or against each other, judged by a reward model: `fastrlhf eval`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from transformers import PreTrainedModel

from fastrlhf.config import EvalConfig, require
from fastrlhf.data.inputs import open_eval_inputs, with_room
from fastrlhf.data.tokens import special_ids
from fastrlhf.evaluation.judges import reward_model_judge
from fastrlhf.evaluation.responses import respond
from fastrlhf.evaluation.winrates import Comparison, compare
from fastrlhf.models.loading import (
    check_same_vocabulary,
    load_policy,
    load_reward_model,
    read_model_config,
    resolve_device,
)
from fastrlhf.types import Example, Prefix, Rollout, TokenizedExample

COLUMNS = ("reference", "chosen", "rejected")


def evaluate_models(config: EvalConfig, examples: Sequence[Example] | None = None) -> dict[str, Comparison]:
    """Each of `config.models` against `config.opponent`, on the same prompts; `examples` stand in for the dataset.

    The prompts are those that training with the same dataset keys evaluates on, and that leave room for a response.
    Raises ValueError for bad input, a model that is not there included, before anything is generated.
    """
    _check(config)
    against_column = config.opponent in COLUMNS
    source = replace(config, model_name_or_path=config.model_name_or_path or config.models[0])
    tokenizer, rows = open_eval_inputs(source, [config.opponent] if against_column else [], examples)
    rows = with_room(rows, "eval", config.max_length, config.response_length)
    eos, pad = special_ids(tokenizer)
    reward_model = load_reward_model(
        config.reward_model_path,
        pad_token_id=pad,
        must_be_trained=True,
        device=resolve_device(config.device),
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
    )
    check_same_vocabulary({"reward_model_path": reward_model}, len(tokenizer))
    judge = reward_model_judge(reward_model, eos_token_id=eos, micro_batch_tokens=config.micro_batch_tokens)

    def score(rollouts: Sequence[Rollout]) -> np.ndarray:
        return judge(rollouts).cpu().numpy()

    scores = {name: score(_respond(config, name, reward_model, rows, eos)) for name in config.models}
    against = score(_responses_of(rows, config.opponent, eos)) if against_column else scores.pop(config.opponent)
    return {name: compare(own, against, seed=config.seed) for name, own in scores.items()}


def format_table(comparisons: Mapping[str, Comparison]) -> str:
    """One line per model: win rate in per cent and mean difference of scores, each with its 95 % interval."""
    width = max(map(len, ("model", *comparisons)))
    lines = [f"{'model':{width}}  win rate %             score difference           prompts"]
    for name, comparison in comparisons.items():
        low, high = comparison.win_rate_ci
        below, above = comparison.difference_ci
        lines.append(
            f"{name:{width}}  {100 * comparison.win_rate:5.1f} [{100 * low:5.1f}, {100 * high:5.1f}]   "
            f"{comparison.mean_difference:+7.3f} [{below:+7.3f}, {above:+7.3f}]  {comparison.num:6d}"
        )
    return "\n".join(lines)


def _check(config: EvalConfig) -> None:
    require(bool(config.models), "models", config.models, "at least one folder or hub name")
    require(
        bool(config.reward_model_path), "reward_model_path", config.reward_model_path, "the reward model that judges"
    )
    require(
        config.opponent in (*COLUMNS, *config.models),
        "opponent",
        config.opponent,
        f"a column ({', '.join(COLUMNS)}) or one of the models",
    )
    require(set(config.models) != {config.opponent}, "opponent", config.opponent, "another one than the only model")
    for name in config.models:
        read_model_config(name, "models", config.trust_remote_code)


def _respond(
    config: EvalConfig, name: str, reward_model: PreTrainedModel, rows: Sequence[TokenizedExample], eos: int
) -> list[Rollout]:
    policy = load_policy(
        name,
        field="models",
        device=reward_model.device,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
    )
    check_same_vocabulary({name: policy, "reward_model_path": reward_model}, 0)
    return respond(
        policy,
        rows,
        eos_token_id=eos,
        response_length=config.response_length,
        temperature=config.temperature,
        seed=config.seed,
        batch_size=config.rollout_batch_size,
    )


def _responses_of(rows: Sequence[TokenizedExample], column: str, eos: int) -> list[Rollout]:
    """The responses of a dataset, as if they had been sampled; one that was cut has no EOS."""
    return [
        Rollout(
            prefix=Prefix(token_ids=row.prompt, num_reset=0, row=row.row, episode=i),
            completion=getattr(row, column),
            sampler_logprob=[],
            ended=getattr(row, column)[-1] == eos,
        )
        for i, row in enumerate(rows)
    ]
