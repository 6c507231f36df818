"""Compares PPO updates of SmolLM2 with an independent loop in plain PyTorch, which shares no code with the trainer. The
loop gets only the prompts and the sampled tokens. It pads sequences, computes full logits, computes advantages and
losses by loops over tokens, and takes steps with torch's AdamW.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from bench.real.rows import short_pairs
from bench.results import RESULTS, append_row, device_name
from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.algorithms.roles import make_engine
from fastrlhf.config import PPOConfig
from fastrlhf.types import Example, Prefix, Rollout

UPDATES, EPISODES, LENGTH = 2, 4, 16
SETTINGS: dict[str, Any] = {
    "max_steps": UPDATES, "per_device_train_batch_size": EPISODES, "response_length": LENGTH, "max_length": 512,
    "temperature": 0.9, "learning_rate": 1e-5, "lr_scheduler_type": "constant", "num_ppo_epochs": 2, "kl_coef": 0.1,
    "gamma": 0.99, "lam": 0.9, "vf_coef": 0.2, "max_grad_norm": 1.0, "adam_epsilon": 1e-8, "missing_eos_penalty": 1.0,
    "micro_batch_tokens": 1024, "device": "cpu", "dtype": "float32", "progress": False,
}  # fmt: skip


def fixed_score(rollouts: Sequence[Rollout]) -> Tensor:
    """An arbitrary judge: a fixed function of the token ids with values between 0 and 1."""
    return torch.tensor([sum(token % 7 for token in r.completion) / (6 * len(r.completion)) for r in rollouts])


def compare_ppo(policy: str, folder: Path = RESULTS) -> str:
    """Runs two updates of PPO with the trainer and with the plain loop on the same samples; appends a result row and
    returns a line of the table of `parity`. The critic starts from the policy, its values at 0."""
    config = PPOConfig(model_name_or_path=policy, **SETTINGS)
    sampled: list[list[Rollout]] = []

    def recorded(settings: PPOConfig, model: Any, eos: Any) -> Any:
        engine = make_engine(settings, model, eos)

        class Recorder:
            def generate(self, prefixes: Sequence[Prefix]) -> Sequence[Rollout]:
                sampled.append(list(engine.generate(prefixes)))
                return sampled[-1]

        return Recorder()

    rows = short_pairs("chat", EPISODES * UPDATES)
    examples = [Example(prompt=row["prompt"], row=i) for i, row in enumerate(rows)]
    result = train_ppo(config, examples, judge=fixed_score, engine=recorded)
    loop = PlainPPO(config, policy)
    losses = [loop.update(batch, fixed_score(batch)) for batch in sampled[:UPDATES]]
    pairs = [
        (row[f"loss/{name}_avg"], loss[name])
        for row, loss in zip(result.history, losses, strict=True)
        for name in ("policy", "value")
    ]
    moved, apart = loop.distance(result.model)
    row = {
        "bench": "real parity", "model": "SmolLM2-135M-Instruct", "task": "ppo", "form": "chat", "steps": UPDATES,
        "rows_per_step": EPISODES, "dtype": "float32", "max_difference": max(abs(a - b) for a, b in pairs),
        "losses": [a for a, _ in pairs], "loop_losses": [b for _, b in pairs], "weights_moved": moved,
        "weights_apart": apart, "device": device_name("cpu"),
    }  # fmt: skip
    append_row(row, folder)
    ends = f"policy {pairs[0][0]:.4f} to {pairs[-2][0]:.4f}, weights {apart / moved:.1e} of the distance trained"
    return f"| ppo | chat | {EPISODES} episodes | {ends} | {row['max_difference']:.1e} |"


class PlainPPO:
    """An independent implementation of PPO with padded batches and full logits."""

    def __init__(self, config: PPOConfig, folder: str) -> None:
        self.config = config
        self.policy, self.reference, critic = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(3)
        )
        self.backbone = critic.base_model
        self.head = torch.zeros(critic.config.hidden_size, requires_grad=True)
        self.start = [weight.detach().clone() for weight in self.policy.parameters()]
        self.groups = [list(self.policy.parameters()), [*self.backbone.parameters(), self.head]]
        self.optimizers = [
            torch.optim.AdamW(group, lr=config.learning_rate, eps=config.adam_epsilon, weight_decay=0.0)
            for group in self.groups
        ]

    def update(self, rollouts: Sequence[Rollout], scores: Tensor) -> dict[str, float]:
        """Takes one optimiser step per epoch; returns the means over the epochs of both losses."""
        config = self.config
        sequences = [[*r.prefix.token_ids, *r.completion] for r in rollouts]
        width = max(map(len, sequences))
        ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in sequences])
        seen = torch.tensor([[1] * len(tokens) + [0] * (width - len(tokens)) for tokens in sequences])
        kept = torch.zeros(len(rollouts), width - 1, dtype=torch.bool)  # True if the next token was sampled
        for i, rollout in enumerate(rollouts):
            kept[i, len(rollout.prefix.token_ids) - 1 : len(sequences[i]) - 1] = True
        with torch.no_grad():
            old, reference = (self._logprobs(model, ids, seen) for model in (self.policy, self.reference))
            old_values = self._values(ids, seen)
        advantages, returns = torch.zeros_like(old), torch.zeros_like(old)
        for i, rollout in enumerate(rollouts):
            steps = kept[i].nonzero()[:, 0].tolist()
            rewards = {t: -config.kl_coef * (old[i, t] - reference[i, t]) for t in steps}
            penalty = 0.0 if rollout.ended else config.missing_eos_penalty or 0.0
            rewards[steps[-1]] = rewards[steps[-1]] + scores[i] - penalty
            running = torch.tensor(0.0)
            for t in reversed(steps):
                following = old_values[i, t + 1] if t < steps[-1] else 0.0
                error = rewards[t] + config.gamma * following - old_values[i, t]
                running = error + config.gamma * config.lam * running
                advantages[i, t], returns[i, t] = running, running + old_values[i, t]
        advantages = (advantages - advantages[kept].mean()) / advantages[kept].std(correction=0)
        sums = {"policy": 0.0, "value": 0.0}
        for _ in range(config.num_ppo_epochs):
            ratio = (self._logprobs(self.policy, ids, seen) - old).exp()
            clipped = ratio.clamp(1 - config.cliprange, 1 + config.cliprange)
            policy_loss = -torch.min(ratio * advantages, clipped * advantages)[kept].mean()
            values = self._values(ids, seen)
            near = old_values + (values - old_values).clamp(-config.cliprange_value, config.cliprange_value)
            value_loss = 0.5 * torch.max((values - returns) ** 2, (near - returns) ** 2)[kept].mean()
            (policy_loss + config.vf_coef * value_loss).backward()
            for group, optimizer in zip(self.groups, self.optimizers, strict=True):
                torch.nn.utils.clip_grad_norm_(group, config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            sums["policy"] += policy_loss.item() / config.num_ppo_epochs
            sums["value"] += value_loss.item() / config.num_ppo_epochs
        return sums

    def distance(self, other: Any) -> tuple[float, float]:
        """Returns two norms over all weights: of the change of this loop's policy in training, and of its difference
        from the policy `other`."""
        pairs = zip(self.policy.parameters(), other.parameters(), self.start, strict=True)
        moved = apart = 0.0
        for weight, theirs, start in pairs:
            moved += (weight.detach() - start).double().square().sum().item()
            apart += (weight.detach() - theirs.detach()).double().square().sum().item()
        return moved**0.5, apart**0.5

    def _logprobs(self, model: Any, ids: Tensor, seen: Tensor) -> Tensor:
        """Returns the log-probs of the next tokens, [N, L - 1]."""
        logits = model(ids, attention_mask=seen).logits[:, :-1] / self.config.temperature
        return logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]

    def _values(self, ids: Tensor, seen: Tensor) -> Tensor:
        """Returns the values of the states before the next tokens, [N, L - 1]."""
        return (self.backbone(ids, attention_mask=seen).last_hidden_state @ self.head)[:, :-1]
