"""Whole updates from the command's configuration to the gradients, compared with a separate computation in float64.

The expected numbers are made from the sampled tokens and the configuration only: full logits of one sequence at a time
from a float64 copy of the model, rewards from the text of the responses, advantages by NumPy, and the losses written as
in their papers. The first step is at ratio 1; between two steps the weights move, so that ratios are clipped.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastrlhf.algorithms import ppo
from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.config import GRPOConfig
from fastrlhf.types import Example, Experience, Rollout
from tests import tiny

SIZE = 4
"""Responses per prompt."""
RATE = 0.3
"""Learning rate of the gradient step between the two steps that are compared."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_policy(tmp_path_factory.mktemp("model"))


def grpo(model: str, **settings) -> GRPOConfig:
    fields: dict[str, Any] = {
        "model_name_or_path": model,
        "num_generations": SIZE,
        "per_device_train_batch_size": 4 * SIZE,
        "response_length": 8,
        "max_length": 48,
        "micro_batch_tokens": 200,
        "max_steps": 1,
        "num_ppo_epochs": 2,
        "progress": False,
        "chat_template": "{% for turn in messages %}{% if turn.role == 'assistant' %}w0 {% endif %}{{ turn.content }} "
        "{% endfor %}{% if add_generation_prompt %}w0 {% endif %}",
    }
    return GRPOConfig(**fields | settings)


def conversations() -> list[Example]:
    """Rows as conversations; every third row has no answer."""
    return [
        replace(row, prompt=[{"role": "user", "content": row.prompt}], columns={"answer": answer})
        for row, answer in zip(tiny.examples(12), ["w1 w2", "w7", None] * 4, strict=True)
    ]


async def shared_words(completions, answer, **_):
    """A reward function: the share of a response's words that are in the answer; None for a row without an answer."""
    await asyncio.sleep(0)
    texts = [completion[-1]["content"].split() for completion in completions]
    return [
        None if right is None else sum(word[-1] == right[-1] for word in words) / max(1, len(words))
        for words, right in zip(texts, answer, strict=True)
    ]


def brevity(completion_ids, **_):
    return [-float(len(ids)) for ids in completion_ids]


FUNCTIONS = {"shared_words": shared_words, "brevity": brevity}
WEIGHTS = {"shared_words": 2.0, "brevity": 0.125}


@dataclass
class Ran:
    config: GRPOConfig
    rollouts: list[Rollout]
    experience: Experience
    gradients: list[list[Tensor]]
    """The gradient of each weight of the policy, for each step of the last update."""
    of_rewards: list[list[Tensor]]
    """The gradient of each weight of the model that gives the token rewards, for each step."""
    before: list[list[Tensor]]
    """The gradients of the policy in the steps before the last update."""
    metrics: dict[str, float]


def run(monkeypatch, config: GRPOConfig, examples: list[Example]) -> Ran:
    """Runs updates of two gradient-descent steps with learning rate RATE, and returns the data and gradients of the
    last update."""
    recorders = tiny.record_gradients(monkeypatch, ppo, RATE)
    kept: list[tuple[list[Rollout], Experience]] = []
    for name in ("update", "update_pairs"):
        train = getattr(ppo, name)
        position = 3 if name == "update_pairs" else 4

        def spied(*arguments, train=train, position=position, **named):
            kept.append((list(arguments[position]), arguments[position + 1]))
            return train(*arguments, **named)

        monkeypatch.setattr(ppo, name, spied)
    functions = [f"{__name__}:{name}" for name in FUNCTIONS]
    config = replace(config, reward_functions=tuple(functions), reward_weights=tuple(WEIGHTS.values()))
    *_, metrics = train_ppo(config, examples).history
    *_, (rollouts, experience) = kept
    steps = {name: [step[0] for step in recorder.steps] for recorder in recorders for name in recorder.models}
    return Ran(config, rollouts, experience, steps[""][-2:], steps.get("dpo_", []), steps[""][:-2], metrics)


def rewards_of(config: GRPOConfig, rollouts: list[Rollout], examples: list[Example]) -> np.ndarray:
    """Returns the reward of each response, [N] float64, computed from its words."""
    found = []
    for rollout in rollouts:
        prefix = rollout.prefix
        ids = [*prefix.token_ids[len(prefix.token_ids) - prefix.num_reset :], *rollout.completion]
        words = [tiny.WORDS[i - 3] for i in ids if i > 2]
        answer = examples[prefix.row].columns["answer"]
        total = 0.0
        if answer is not None:
            total += WEIGHTS["shared_words"] * sum(word[-1] == answer[-1] for word in words) / max(1, len(words))
        total -= WEIGHTS["brevity"] * len(ids)
        if config.missing_eos_penalty is not None and not rollout.ended:
            total -= config.missing_eos_penalty
        if config.overlong_buffer:
            excess = len(ids) - (config.response_length - config.overlong_buffer)
            total -= config.overlong_penalty * min(1.0, max(0.0, excess / config.overlong_buffer))
        found.append(total)
    return np.array(found)


def truncated(config: GRPOConfig, logits: Tensor) -> Tensor:
    """Returns the logits [V], with -inf for every token that top_k, top_p or min_p (applied in this order) excludes."""
    if config.top_k:
        logits = torch.where(logits >= logits.sort(descending=True).values[config.top_k - 1], logits, -torch.inf)
    if config.top_p < 1:
        chance, order = logits.softmax(0).sort(descending=True)
        before = chance.cumsum(0) - chance  # total probability of the more likely tokens
        logits = logits.clone()
        logits[order[before >= config.top_p]] = -torch.inf
    if config.min_p:
        chance = logits.softmax(0)
        logits = torch.where(chance >= config.min_p * chance.max(), logits, -torch.inf)
    return logits


class Sets:
    """The sets of tokens that the sampler could draw, computed at the first call and reused in all later calls."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, int], Tensor] = {}

    def __call__(self, key: tuple[int, int], config: GRPOConfig, logits: Tensor) -> Tensor:
        if key not in self.found:
            self.found[key] = truncated(config, logits.detach()).isfinite()
        return logits.masked_fill(~self.found[key], -torch.inf)


def logprobs(net, config: GRPOConfig, rollouts: list[Rollout], sets: Sets) -> list[Tensor]:
    """Returns for each rollout the log-probs [n] float64 of its sampled tokens."""
    found = []
    for i, rollout in enumerate(rollouts):
        start = len(rollout.prefix.token_ids)
        logits = net(torch.tensor([[*rollout.prefix.token_ids, *rollout.completion]])).logits[0]
        heats = config.temperatures or (config.temperature,)
        rows = logits[start - 1 : -1] / heats[i % SIZE % len(heats)]
        rows = torch.stack([sets((i, j), config, row) for j, row in enumerate(rows)])
        found.append(rows.log_softmax(1)[range(len(rows)), rollout.completion])
    return found


def advantages(config: GRPOConfig, rewards: np.ndarray) -> np.ndarray:
    groups = rewards.reshape(-1, SIZE)
    deviation = groups - groups.mean(1, keepdims=True)
    match config.scale_rewards:
        case "group":
            deviation = deviation / (groups.std(1, ddof=1, keepdims=True) + 1e-4)
        case "batch":
            deviation = deviation / (rewards.std(ddof=1) + 1e-4)
    return deviation.flatten()


def group_loss(config: GRPOConfig, now: list[Tensor], then: list[Tensor], advantage, trained: list[bool]) -> Tensor:
    """Returns the loss of `loss_type` over a batch, given the log-probs of policy and sampler."""
    high = 1 + (config.cliprange if config.cliprange_high is None else config.cliprange_high)
    low = 1 - config.cliprange
    per_token, lengths = [], []
    for p, q, a, counts in zip(now, then, advantage, trained, strict=True):
        if not counts:
            continue
        ratio = (p - q).exp()
        if config.loss_type == "gspo":
            ratio = (p - q).mean().exp().expand(len(p))
        if config.loss_type == "cispo":
            one = -ratio.detach().clamp(max=high) * a * p
        else:
            one = -torch.minimum(ratio * a, ratio.clamp(low, high) * a)
        per_token.append(one)
        lengths.append(len(p))
    match config.loss_type:
        case "grpo" | "gspo":
            return torch.stack([one.mean() for one in per_token]).mean()
        case "dr_grpo":
            return torch.cat(per_token).sum() / (len(now) * config.response_length)
        case _:
            return torch.cat(per_token).sum() / sum(lengths)


def mean_pair_loss(config: GRPOConfig, now: list[Tensor], base: list[Tensor], returns: np.ndarray) -> Tensor:
    """Returns the mean of `pair_loss` over the pairs that `pair_select` chooses."""
    change = [(p - q).sum() for p, q in zip(now, base, strict=True)]
    losses = []
    for first in range(0, len(now), SIZE):
        own = returns[first : first + SIZE]
        best_worst = [(int(own.argmax()), int(own.argmin()))]
        for one, other in best_worst if config.pair_select == "best_worst" else [(0, 1), (2, 3)]:
            i, j = (one, other) if own[one] >= own[other] else (other, one)
            margin, difference = change[first + i] - change[first + j], own[i] - own[j]
            match config.pair_loss:
                case "rebel":
                    losses.append((margin - config.pair_eta * difference) ** 2)
                case "ipo":
                    losses.append((margin - (1 / (1 + np.exp(-difference)) - 0.5) / config.pair_beta) ** 2)
                case _:
                    losses.append(-(config.pair_beta * margin).sigmoid().log())
    return torch.stack(losses).mean()


def load(model: str):
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)


def check_gradient(ours: list[Tensor], loss: Tensor, net) -> None:
    expected = torch.autograd.grad(loss, list(net.parameters()))
    scale = max(one.abs().max() for one in expected).item()
    assert scale > 1e-2
    for one, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(one.double(), right, rtol=0, atol=1e-4 * scale)


@torch.no_grad()
def descend(net, gradient: list[Tensor]) -> None:
    """Takes a gradient-descent step with learning rate RATE, like the trainer."""
    for weight, one in zip(net.parameters(), gradient, strict=True):
        weight -= RATE * one.double()


def sampler_of(ran: Ran, model: str):
    """Returns a float64 copy of the policy that sampled for the last update."""
    net = load(model)
    for gradient in ran.before:
        descend(net, gradient)
    return net


def check_update(ran: Ran, model: str, sets: Sets, then: list[Tensor], loss_of) -> None:
    """Compares the gradients of both steps with the gradients of `loss_of`, a loss as a function of the policy's
    log-probs."""
    net, losses = sampler_of(ran, model), []
    for gradient in ran.gradients:
        loss = loss_of(logprobs(net, ran.config, ran.rollouts, sets))
        check_gradient(gradient, loss, net)
        descend(net, gradient)
        losses.append(loss.item())
    assert len(losses) == 2
    assert abs(losses[1] - losses[0]) > 1e-3  # ratios have moved


def sampled(ran: Ran, model: str, sets: Sets) -> list[Tensor]:
    """Returns the sampler's log-probs, computed in float64. Asserts that the engine's and the trainer's log-probs equal
    them."""
    then = [one.detach() for one in logprobs(sampler_of(ran, model), ran.config, ran.rollouts, sets)]
    drawn = torch.tensor([x for rollout in ran.rollouts for x in rollout.sampler_logprob])
    torch.testing.assert_close(torch.cat(then).float(), drawn, rtol=0, atol=2e-5)
    torch.testing.assert_close(torch.cat(then).float(), ran.experience.sampler_logprob, rtol=0, atol=2e-5)
    return then


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "gspo", "scale_rewards": "batch", "temperatures": (0.7, 1.3), "stop": ("w5",), "cliprange": 0.05},
        {"loss_type": "dr_grpo", "scale_rewards": "none", "top_k": 12, "min_p": 0.05, "overlong_buffer": 4},
        {"loss_type": "cispo", "cliprange_high": 0.28, "kl_coef": 0.1, "mask_truncated_completions": True},
        {"loss_type": "grpo", "top_p": 0.8, "temperature": 1.4, "missing_eos_penalty": 0.5, "cliprange_high": 0.1},
        {"loss_type": "bnpo", "stop": ("w5", "w9 w"), "overlong_buffer": 3, "overlong_penalty": 0.4, "top_p": 0.9},
        {"loss_type": "dapo", "dynamic_sampling_factor": 2.0, "temperatures": (0.5, 1.0, 1.0, 2.0)},
        {"update": "pair", "reset_prob": 0.5, "reset_source": "chosen", "temperature": 1.2},
    ],
    ids=lambda settings: settings.get("loss_type", "pair"),
)
def test_an_update_equals_the_same_update_by_hand(model, monkeypatch, settings):
    examples, sets = conversations(), Sets()
    examples = [replace(x, chosen=[{"role": "assistant", "content": x.chosen}], rejected=None) for x in examples]
    ran = run(monkeypatch, grpo(model, **settings), examples)
    config, rollouts = ran.config, ran.rollouts
    ended = [x.ended for x in rollouts]
    assert {*ended} == {True, False}
    then, rewards = sampled(ran, model, sets), rewards_of(config, rollouts, examples)
    lengths = [len(x.completion) for x in rollouts]
    paid = torch.stack(list(ran.experience.rewards.values())).sum(0).split(lengths)
    np.testing.assert_allclose([x.sum().item() for x in paid], rewards, atol=1e-5)
    if config.update == "pair":
        assert {x.prefix.num_reset > 0 for x in rollouts} == {True, False}
        check_update(ran, model, sets, then, lambda now: mean_pair_loss(config, now, then, rewards))
        return
    advantage = advantages(config, rewards)
    expected = torch.from_numpy(np.repeat(advantage, lengths)).float()
    torch.testing.assert_close(ran.experience.advantage, expected, rtol=1e-4, atol=1e-4)
    trained = [x or not config.mask_truncated_completions for x in ended]
    check_update(ran, model, sets, then, lambda now: group_loss(config, now, then, advantage, trained))


def test_prime_with_resets_into_failures_equals_the_same_update_by_hand(model, monkeypatch):
    """The reward model of PRIME first takes one step on the outcomes; its log-ratios after this step are the token
    rewards. These log-ratios are computed at temperature 1, whatever the temperature of the run. Tokens that a reset
    copied count as prompt."""
    examples, sets = conversations(), Sets()
    settings = {"advantage_estimator": "prime", "dpo_refine": "outcome", "dpo_refine_beta": 0.5, "temperature": 1.3}
    settings |= {"success_threshold": -0.4, "reset_prob": 0.5, "reset_source": "rollout", "dpo_reward_scale": 0.3}
    ran = run(monkeypatch, grpo(model, **settings), examples)
    config, rollouts = ran.config, ran.rollouts
    assert {x.prefix.num_reset > 0 for x in rollouts} == {True, False}
    then, rewards = sampled(ran, model, sets), rewards_of(config, rollouts, examples)
    at_1, phi = replace(config, temperature=1.0), load(model)
    base = [one.detach() for one in logprobs(phi, at_1, rollouts, Sets())]
    sums = [(p - q).sum() for p, q in zip(logprobs(phi, at_1, rollouts, Sets()), base, strict=True)]
    signs = np.where(rewards >= -0.4, 1.0, -1.0)
    assert {*signs} == {1.0, -1.0}
    loss = -torch.stack([(0.5 * sign * x).sigmoid().log() for sign, x in zip(signs, sums, strict=True)]).mean()
    (gradient,) = ran.of_rewards
    check_gradient(gradient, loss, phi)
    descend(phi, gradient)
    with torch.no_grad():
        now = logprobs(phi, at_1, rollouts, Sets())
        ratios = [0.3 * (p - q) for p, q in zip(now, base, strict=True)]
    means, advantage = np.array([x.mean() for x in ratios]).reshape(-1, SIZE), []
    groups = rewards.reshape(-1, SIZE)
    for i, ratio in enumerate(ratios):
        group, member = divmod(i, SIZE)
        baseline = np.delete(means[group], member).mean()
        outcome = rewards[i] - np.delete(groups[group], member).mean()
        token = ratio.numpy() - baseline
        advantage.append(torch.from_numpy(token[::-1].cumsum()[::-1].copy()) + outcome)
    torch.testing.assert_close(ran.experience.advantage, torch.cat(advantage).float(), rtol=1e-4, atol=1e-4)
    check_update(ran, model, sets, then, lambda now: group_loss(config, now, then, advantage, [True] * len(now)))


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "bnpo", "kl_coef": 0.2, "temperatures": (0.8, 1.2), "top_p": 0.9},
        {"loss_type": "bnpo", "kl_coef": 0.2, "kl_placement": "loss", "kl_estimator": "k3"},
        {"update": "pair", "pair_loss": "dpo", "pair_select": "best_worst", "kl_coef": 0.1, "top_k": 20}
        | {"reset_prob": 0.5, "reset_source": "rollout"},
        {"update": "pair", "pair_loss": "ipo", "pair_beta": 0.3, "kl_coef": 0.1},
    ],
    ids=["KL in the reward", "KL in the loss", "dpo", "ipo"],
)
def test_a_second_update_in_which_the_reference_is_not_the_sampler(model, monkeypatch, settings):
    monkeypatch.setattr(f"{__name__}.RATE", 0.05)
    examples, sets = conversations(), Sets()
    ran = run(monkeypatch, grpo(model, **settings | {"max_steps": 2}), examples)
    config, rollouts = ran.config, ran.rollouts
    then = sampled(ran, model, sets)
    base = [one.detach() for one in logprobs(load(model), config, rollouts, sets)]
    kl = np.array([(p - q).sum().item() for p, q in zip(then, base, strict=True)])
    assert ran.metrics["objective/kl"] == pytest.approx(kl.mean(), abs=1e-4)
    assert np.abs(kl).max() > 0.1
    in_reward = config.kl_placement == "reward"
    returns = rewards_of(config, rollouts, examples) - (config.kl_coef * kl if in_reward else 0)

    def loss_of(now: list[Tensor]) -> Tensor:
        if config.update == "pair":
            return mean_pair_loss(config, now, base, returns)
        loss = group_loss(config, now, then, advantages(config, returns), [True] * len(now))
        if in_reward:
            return loss
        ratio = torch.cat([p - q for p, q in zip(now, then, strict=True)]).exp().detach()
        change = torch.cat([p - q for p, q in zip(now, base, strict=True)])
        return loss + config.kl_coef * (ratio * change.square() / 2).mean()  # gradient: ratio times the log-ratio

    check_update(ran, model, sets, then, loss_of)
