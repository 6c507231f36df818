"""One optimiser step (clip, update, schedule), in float32 whatever the weights are; and the order of the data."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from fastrlhf.config import TrainConfig
from fastrlhf.models.sharding import full, like


class Optimizer:
    """AdamW over one or more models, each clipped to its own gradient norm; a schedule that counts optimiser steps."""

    def __init__(
        self,
        models: Mapping[str, torch.nn.Module],
        config: TrainConfig,
        *,
        num_steps: int,
        learning_rates: Mapping[str, float] | None = None,
    ) -> None:
        """`models` by the prefix of their metrics ("" for the policy); `learning_rates` where one differs from the
        config's."""
        rates = learning_rates or {}
        self._models = models
        self._max_norm = config.max_grad_norm
        self._masters: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._num_done = 0
        self._rate = lambda step: _rate(step, num_steps, config.warmup_steps, config.lr_scheduler_type)
        self._adamw = torch.optim.AdamW(
            [
                {
                    "params": [self._master(param) for param in params],
                    "lr": rates.get(name, config.learning_rate),
                    "weight_decay": decay,
                }
                for name, model in models.items()
                for params, decay in _decay_groups(model, config.weight_decay)
            ],
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=True,
        )
        # By name, the parameter and what AdamW updates in its place.
        self._trained = [
            (f"{prefix}{name}", param, self._masters.get(param, param))
            for prefix, model in models.items()
            for name, param in model.named_parameters()
            if param.requires_grad
        ]
        self._peaks = [group["lr"] for group in self._adamw.param_groups]

    def _master(self, param: torch.nn.Parameter) -> torch.Tensor:
        """What AdamW updates: the parameter, or a float32 copy of a bfloat16 one, whose own steps would round to 0."""
        if param.dtype == torch.float32:
            return param
        return self._masters.setdefault(param, param.detach().float())

    @torch.no_grad()
    def step(self) -> dict[str, float]:
        """Updates the weights and clears the gradients; returns grad_norm (before clipping) and learning_rate.

        Raises ValueError, before any weight has moved, where a gradient is not finite. This reads one number per model
        from the GPU: the step's only wait.
        """
        metrics = {}
        for name, model in self._models.items():
            norm = full(torch.nn.utils.clip_grad_norm_(model.parameters(), self._max_norm or math.inf)).item()
            if not math.isfinite(norm):
                raise ValueError(f"{name}grad_norm is {norm}: a loss or a gradient is not finite; lower learning_rate")
            metrics[f"{name}grad_norm"] = norm
        for group, peak in zip(self._adamw.param_groups, self._peaks, strict=True):
            group["lr"] = peak * self._rate(self._num_done)
        metrics["learning_rate"] = self._adamw.param_groups[0]["lr"]
        for param, master in self._masters.items():
            master.grad = None if param.grad is None else param.grad.float()
        self._adamw.step()
        for param, master in self._masters.items():
            param.copy_(master)
        self._num_done += 1
        for model in self._models.values():
            model.zero_grad(set_to_none=True)
        self._adamw.zero_grad(set_to_none=True)
        return metrics

    def skip(self, steps: int) -> None:
        """Steps that are not taken: clears the gradients; the schedule goes on, so that it still ends with the run."""
        for model in self._models.values():
            model.zero_grad(set_to_none=True)
        self._num_done += steps

    def state_dict(self) -> dict[str, Any]:
        """num_steps done, and by "NAME OF THE PARAMETER.what" AdamW's moments and step, and the float32 copy (master)
        where there is one."""
        state: dict[str, Any] = {"num_steps": self._num_done}
        for name, param, master in self._trained:
            state |= {f"{name}.{what}": value for what, value in self._adamw.state.get(master, {}).items()}
            if master is not param:
                state[f"{name}.master"] = master
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Goes on where the state was taken, with the weights that the models hold now.

        A state of `num_steps` alone is that of an optimiser without moments at that place of the schedule. Raises
        ValueError where it is of other parameters.
        """
        self._num_done = state["num_steps"]
        saved: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        for key, value in state.items():
            if key != "num_steps":
                name, _, what = key.rpartition(".")
                saved[name][what] = value
        for name, param, master in self._trained:
            moments = saved.pop(name, {})
            if master is not param:
                master.copy_(like(master, moments.pop("master", param)))
            self._adamw.state[master] = {what: like(master, value) for what, value in moments.items()}
        for name in saved:
            raise ValueError(f"optimizer: the checkpoint has moments of {name}, which is not trained here")


def num_steps(config: TrainConfig, num_items: int) -> int:
    """Optimiser steps of the run: `max_steps`, or whole epochs rounded up. Raises ValueError where there is no data."""
    if num_items == 0:
        raise ValueError("dataset: no usable example to train on")
    if config.max_steps > 0:
        return config.max_steps
    return max(1, math.ceil(config.num_train_epochs * num_items / config.batch_size))


def index_batches(num_items: int, batch_size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """`steps` batches of exactly `batch_size` indices: one permutation after the other, each keyed by (seed, epoch)."""
    pending: list[int] = []
    epoch = 0
    for _ in range(steps):
        while len(pending) < batch_size:
            pending.extend(np.random.default_rng([seed, epoch]).permutation(num_items).tolist())
            epoch += 1
        yield pending[:batch_size]
        del pending[:batch_size]


def _decay_groups(model: torch.nn.Module, decay: float) -> list[tuple[list[torch.nn.Parameter], float]]:
    params = [p for p in model.parameters() if p.requires_grad]
    return [([p for p in params if p.ndim >= 2], decay), ([p for p in params if p.ndim < 2], 0.0)]


def _rate(step: int, num_steps: int, warmup: int, kind: str) -> float:
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, num_steps - warmup)
    if kind == "constant":
        return 1.0
    return max(0.0, 1 - done) if kind == "linear" else 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
