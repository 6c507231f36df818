"""Samples responses of a policy to prompts, and computes its KL to the reference on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from fastrlhf.data.packing import own_micro_batches, pack, sequence
from fastrlhf.distributed.ranks import total
from fastrlhf.models.forward import token_logprobs
from fastrlhf.models.sharding import own_pace
from fastrlhf.rollout.engine import Decode, TransformersEngine
from fastrlhf.rollout.shared import SharedEngine
from fastrlhf.rollout.truncation import Truncation, kept_tokens
from fastrlhf.types import EndIds, Prefix, Rollout, TokenizedExample

EVAL_EPISODES = 1 << 40
"""Number of the first episode of an evaluation, which is so high that evaluation and training never share random
draws."""


def respond(
    model: PreTrainedModel,
    examples: Sequence[TokenizedExample],
    *,
    eos_token_id: EndIds,
    response_length: int,
    temperature: float,
    seed: int,
    batch_size: int,
    micro_batch_tokens: int = 8192,
    decode: Decode = "eager",
    truncation: Truncation | None = None,
) -> list[Rollout]:
    """Samples one full response per prompt, without resets, in order; temperature 0 takes the most probable token."""
    engine = TransformersEngine(
        model=model,
        eos_token_id=eos_token_id,
        response_length=response_length,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
        micro_batch_tokens=micro_batch_tokens,
        decode=decode,
        truncation=truncation or Truncation(),
    )
    return SharedEngine(engine=engine, model=model, response_length=response_length).generate(
        [
            Prefix(token_ids=example.prompt, num_reset=0, row=example.row, episode=EVAL_EPISODES + i)
            for i, example in enumerate(examples)
        ]
    )


@torch.no_grad()
def response_kl(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    rollouts: Sequence[Rollout],
    *,
    temperature: float,
    micro_batch_tokens: int,
) -> float:
    """Estimates the KL in nats per response: log(policy / reference), summed over the tokens of a response and averaged
    over the policy's responses. With truncated sampling both are distributions over the tokens that the sampler
    kept."""
    segments = [sequence(rollout.prefix.token_ids, rollout.completion) for rollout in rollouts]
    log_ratio = torch.zeros((), device=policy.device)
    with own_pace(policy, reference):
        for micro in own_micro_batches([len(s.token_ids) for s in segments], micro_batch_tokens, "response"):
            batch = pack([segments[i] for i in micro], policy.device)
            kept = kept_tokens([rollouts[i] for i in micro], policy.device)
            log_ratio += token_logprobs(policy, batch, temperature=temperature, kept=kept).logprob.sum()
            log_ratio -= token_logprobs(reference, batch, temperature=temperature, kept=kept).logprob.sum()
    return total(log_ratio).item() / len(rollouts)
