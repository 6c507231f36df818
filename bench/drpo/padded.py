"""The padded reference: computes what the authors' released code of DR-PO computes, but contains none of that code.

Prompts are padded on the left to one width, responses always have full length, and every forward computes all logits
and keeps all hidden states. A reset is decoded token by token, with the next token forced. Tokens after the EOS are
sampled, rewarded and trained on, but hidden from the reward model. Otherwise the code is efficient: it uses SDPA and a
key-value cache, does not wait for the GPU and does no work on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from fastrlhf.config import DRPOConfig
from fastrlhf.runtime.optim import Optimizer
from fastrlhf.types import Prefix


@dataclass(frozen=True, kw_only=True)
class Episodes:
    """A batch of N episodes with W prompt tokens and G response tokens each."""

    tokens: Tensor
    """Token ids, [N, W + G] int64."""
    seen: Tensor
    """[N, W + G] bool, False on the padding to the left of a prompt."""
    given: Tensor
    """[N] int64: number of reset tokens at the start of the response."""
    response_length: int
    """The response length G."""

    @property
    def response(self) -> Tensor:
        return self.tokens[:, -self.response_length :]

    @property
    def sampled(self) -> Tensor:
        """[N, G] bool: True for tokens that the policy sampled, False for reset tokens."""
        return torch.arange(self.response_length, device=self.given.device) >= self.given[:, None]


@dataclass(frozen=True, kw_only=True)
class Experience:
    """Log-probs (nats), values, advantages and returns of a batch of episodes, [N, G] float32 each."""

    logprob: Tensor
    reference_logprob: Tensor
    value: Tensor
    advantage: Tensor
    returns: Tensor


class ForceReset(LogitsProcessor):
    """A logits processor that allows only the next token of the reset, as long as the row has not reached the end of
    its reset."""

    def __init__(self, reset: Tensor, given: Tensor, width: int) -> None:
        self.reset, self.given, self.width = reset, given, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        step = input_ids.shape[1] - self.width
        forced = torch.full_like(scores, float("-inf")).scatter_(1, self.reset[:, step : step + 1], 0.0)
        return torch.where((step < self.given)[:, None], forced, scores)


@torch.no_grad()
def rollout(config: DRPOConfig, policy: PreTrainedModel, prefixes: Sequence[Prefix]) -> Episodes:
    """Decodes `response_length` tokens in every row, including reset tokens and tokens after an EOS.

    Works in chunks of `rollout_batch_size` rows and samples with torch's global generator.
    """
    width, length, device = config.max_length - config.response_length, config.response_length, policy.device
    prompts = [prefix.token_ids[: len(prefix.token_ids) - prefix.num_reset] for prefix in prefixes]
    resets = [prefix.token_ids[len(prompt) :] for prefix, prompt in zip(prefixes, prompts, strict=True)]
    queries = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    seen = torch.tensor([[False] * (width - len(p)) + [True] * (len(p) + length) for p in prompts], device=device)
    reset = torch.tensor([tokens + [0] * (length - len(tokens)) for tokens in resets], device=device)
    given = torch.tensor([len(tokens) for tokens in resets], device=device)
    policy.generation_config.eos_token_id = None  # pyright: ignore[reportOptionalMemberAccess]
    chosen = GenerationConfig(
        do_sample=True, temperature=config.temperature, top_k=0, top_p=1.0, pad_token_id=0,
        min_new_tokens=length, max_new_tokens=length,
    )  # fmt: skip
    tokens = [
        policy.generate(  # pyright: ignore[reportCallIssue]
            input_ids=queries[chunk],
            attention_mask=seen[chunk, :width].long(),
            generation_config=chosen,
            logits_processor=LogitsProcessorList([ForceReset(reset[chunk], given[chunk], width)]),
        )
        for chunk in _chunks(len(prefixes), config.rollout_batch_size)
    ]
    return Episodes(tokens=torch.cat(tokens), seen=seen, given=given, response_length=length)


@torch.no_grad()
def score(
    config: DRPOConfig,
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    critic: PreTrainedModel,
    reward_model: PreTrainedModel,
    episodes: Episodes,
    eos_token_id: int,
) -> Experience:
    """Computes log-probs, values, advantages and returns of the episodes.

    Log-probs are recomputed. Scores are read at the first EOS; an EOS in the last position counts as missing.
    """
    is_eos = episodes.response == eos_token_id
    after = is_eos.cumsum(1) - is_eos.long() > 0
    end = (~after).sum(1) - 1
    logprobs, reference_logprobs, values, scores = [], [], [], []
    for chunk in _chunks(len(episodes.tokens), config.rollout_batch_size):
        tokens, seen, response = episodes.tokens[chunk], episodes.seen[chunk], episodes.response[chunk]
        length = response.shape[1]
        logprobs.append(_logprobs(_logits(policy, tokens, seen, length, config.temperature), response))
        reference_logprobs.append(_logprobs(_logits(reference, tokens, seen, length, config.temperature), response))
        values.append(_all_values(critic, tokens, seen)[:, -length - 1 : -1])
        kept = seen.clone()
        kept[:, -length:] &= ~after[chunk]
        judged = _all_values(reward_model, tokens.masked_fill(~kept, 0), kept)[:, -length:]
        scores.append(judged.gather(1, end[chunk, None])[:, 0])
    logprob, reference_logprob, value = map(torch.cat, (logprobs, reference_logprobs, values))

    earned = torch.cat(scores)
    if config.missing_eos_score is not None:
        earned = earned.where(after.any(1), config.missing_eos_score)
    reward = -config.kl_coef * (logprob - reference_logprob)
    reward = reward.scatter_add(1, end[:, None], earned[:, None])
    if config.whiten_rewards:
        mean = reward.mean()
        reward = (reward - mean) / reward.std(correction=0) + mean
    advantage = _gae(reward, value, config.gamma, config.lam)
    return Experience(
        logprob=logprob,
        reference_logprob=reference_logprob,
        value=value,
        advantage=(advantage - advantage.mean()) / advantage.std(correction=0),
        returns=advantage + value,
    )


def update(
    config: DRPOConfig,
    policy: PreTrainedModel,
    critic: PreTrainedModel,
    optimizer: Optimizer,
    episodes: Episodes,
    experience: Experience,
    micro_batch: int,
) -> dict[str, float]:
    """Takes `num_ppo_epochs` optimiser steps over the episodes; returns the means of the metrics.

    The loss is averaged within each micro-batch of `micro_batch` episodes. Reset tokens are excluded from the policy's
    loss only, not from the critic's.
    """
    metrics: list[Tensor] = []
    num = len(episodes.tokens)
    for _ in range(config.num_ppo_epochs):
        micros = torch.randperm(num, device=policy.device).split(micro_batch)
        for micro in micros:
            tokens, seen, sampled = episodes.tokens[micro], episodes.seen[micro], episodes.sampled[micro]
            logits = _logits(policy, tokens, seen, episodes.response_length, config.temperature)
            value = _all_values(critic, tokens, seen)[:, -episodes.response_length - 1 : -1]
            log_ratio = _logprobs(logits, episodes.response[micro]) - experience.logprob[micro]
            ratio, advantage = log_ratio.exp(), experience.advantage[micro]
            clipped = ratio.clamp(1 - config.cliprange, 1 + config.cliprange)
            policy_loss = torch.maximum(-advantage * ratio, -advantage * clipped)
            policy_loss = (policy_loss * sampled).sum() / sampled.sum()
            old, returns = experience.value[micro], experience.returns[micro]
            near = old + (value - old).clamp(-config.cliprange_value, config.cliprange_value)
            value_loss = 0.5 * torch.maximum((value - returns) ** 2, (near - returns) ** 2).mean()
            ((policy_loss + config.vf_coef * value_loss) / len(micros)).backward()
            with torch.no_grad():
                entropy = (logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)).mean()
                metrics.append(torch.stack([policy_loss, value_loss, (log_ratio**2).mean() / 2, entropy]))
        optimizer.step()
    names = ("policy_loss", "value_loss", "approx_kl", "entropy")
    return dict(zip(names, torch.stack(metrics).mean(0).tolist(), strict=True))


def _logits(model: PreTrainedModel, tokens: Tensor, seen: Tensor, length: int, temperature: float) -> Tensor:
    """Computes all logits [N, W + G, V] and returns the logits that predict the response, [N, G, V]."""
    output = model(input_ids=tokens, attention_mask=seen, output_hidden_states=True, use_cache=False)
    return output.logits[:, -length - 1 : -1] / temperature


def _logprobs(logits: Tensor, response: Tensor) -> Tensor:
    """Returns the log-probs of the response tokens, [N, G] float32."""
    return logits.log_softmax(-1, dtype=torch.float32).gather(2, response[..., None])[..., 0]


def _all_values(model: PreTrainedModel, tokens: Tensor, seen: Tensor) -> Tensor:
    """Returns the outputs of a model with a scalar head at every position, [N, W + G] float32."""
    output = model.base_model(input_ids=tokens, attention_mask=seen, output_hidden_states=True, use_cache=False)
    return model.score(output.hidden_states[-1])[..., 0].float()  # pyright: ignore[reportCallIssue]


def _gae(reward: Tensor, value: Tensor, gamma: float, lam: float) -> Tensor:
    """Returns GAE advantages [N, G] over all G tokens. An EOS does not end the episode."""
    advantages, later = [], torch.zeros_like(value[:, 0])
    following = torch.zeros_like(later)
    for t in reversed(range(value.shape[1])):
        later = reward[:, t] + gamma * following - value[:, t] + gamma * lam * later
        following = value[:, t]
        advantages.append(later)
    return torch.stack(advantages[::-1], 1)


def _chunks(num: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, num)) for start in range(0, num, size)]
