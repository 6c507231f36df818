"""Evaluates the policy during on-policy runs by full responses to held-out prompts, without resets.

These metrics can be compared between runs with different reset probabilities, unlike the metrics of training:
`objective/kl`, for example, covers only the sampled tokens. A second judge, which training never uses, reveals
over-optimisation: its score falls while the score of the training judge still rises (Gao et al. 2022, arXiv 2210.10760,
Figure 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrlhf.config import PPOConfig
from fastrlhf.evaluation.completions import respond, response_kl
from fastrlhf.evaluation.judges import Judge, checked_scores
from fastrlhf.rewards.functions import Earned, RewardFunctions, mean_rewards
from fastrlhf.rollout.stop import Stops
from fastrlhf.rollout.truncation import Truncation
from fastrlhf.types import EndIds, Rollout, TokenizedExample

NGRAM = 4
"""Length, in tokens, of the n-grams by which repetition is measured."""


@torch.no_grad()
def evaluate(
    config: PPOConfig,
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    judge: Judge | None,
    examples: Sequence[TokenizedExample],
    eos_token_id: EndIds,
    held_out_judge: Judge | None = None,
    present: Callable[[], AbstractContextManager[None]] = nullcontext,
    functions: RewardFunctions | None = None,
    stops: Stops | None = None,
) -> dict[str, float]:
    """Generates two responses per prompt, one sampled as in training and one greedy, and judges both. Reference and
    judges run within the context `present`, after all sampling.

    `eval_objective/scores`, `eval_held_out/scores` (of `held_out_judge`) and `eval_objective/kl` (nats per response)
    describe the sampled responses, and so do `eval_completions/*`; `eval_greedy/*` describes the greedy ones. Each mean
    score also has a metric for its standard error over the prompts. Without a judge the score is the weighted sum of
    the reward functions, neither normalised nor clipped; `eval_rewards/NAME/mean` is the mean of each function over the
    sampled responses that it judges. Raises ValueError, naming the row, for a score that is not finite.
    """
    functions = functions or RewardFunctions()

    def answers(temperature: float) -> list[Rollout]:
        found = respond(
            policy,
            examples,
            eos_token_id=eos_token_id,
            response_length=config.response_length,
            temperature=temperature,
            seed=config.seed,
            batch_size=config.rollout_batch_size,
            micro_batch_tokens=config.micro_batch_tokens,
            decode=config.decode,
            truncation=Truncation.of(config),
        )
        return found if stops is None else list(map(stops.cut, found))

    def scores(name: str, values: Tensor | Sequence[float], rollouts: Sequence[Rollout]) -> dict[str, float]:
        return mean_and_error(f"{name}/scores", checked_scores(values, rollouts, policy.device))

    def judged(name: str, rollouts: Sequence[Rollout], earned: Earned) -> dict[str, float]:
        if judge is not None:
            return scores(name, judge(rollouts), rollouts)
        return scores(name, functions.totals(earned), rollouts) if earned else {}  # nothing gives a score

    sampled, greedy = answers(config.temperature), answers(0.0)
    with present():
        earned = functions(sampled)
        metrics = {f"eval_rewards/{name}/mean": mean for name, mean in mean_rewards(earned).items()}
        metrics |= judged("eval_objective", sampled, earned)
        metrics["eval_objective/kl"] = response_kl(
            policy, reference, sampled, temperature=config.temperature, micro_batch_tokens=config.micro_batch_tokens
        )
        metrics |= {f"eval_completions/{name}": value for name, value in describe(sampled).items()}
        metrics |= judged("eval_greedy", greedy, functions(greedy) if judge is None else {})
        metrics |= {f"eval_greedy/{name}": value for name, value in describe(greedy).items()}
        if held_out_judge is not None:
            metrics |= scores("eval_held_out", held_out_judge(sampled), sampled)
    return metrics


def mean_and_error(name: str, scores: Tensor) -> dict[str, float]:
    """Returns the mean of scores [N] and, as `name`_stderr, its standard error s / sqrt(N), where s is the sample
    standard deviation; NaN for N = 1."""
    values = scores.double().cpu().numpy()
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {name: float(values.mean()), f"{name}_stderr": error}


def describe(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Returns the mean length in tokens and shares of responses: `ended`: with an EOS; `looping`: more than half of the
    4-grams are repetitions; `duplicates`: equal, token by token, to the response to another prompt."""
    prompts_of: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for rollout in rollouts:
        prompts_of.setdefault(tuple(rollout.completion), set()).add(tuple(rollout.prefix.token_ids))
    return {
        "mean_length": float(np.mean([len(rollout.completion) for rollout in rollouts])),
        "ended": float(np.mean([rollout.ended for rollout in rollouts])),
        "looping": float(np.mean([repetition(rollout.completion) > 0.5 for rollout in rollouts])),
        "duplicates": float(np.mean([len(prompts_of[tuple(rollout.completion)]) > 1 for rollout in rollouts])),
    }


def repetition(tokens: Sequence[int]) -> float:
    """Returns seq-rep-4 (Welleck et al. 2019, arXiv 1908.04319): 1 - distinct 4-grams / 4-grams; 0 for fewer than 4
    tokens.

    [1, 2, 1, 2, 1, 2, 1]  ->  1 - 2 / 4
    """
    ngrams = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
