"""Saves an on-policy update in progress in checkpoints, so that a stopped run continues between two mini-batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrlhf.runtime.step_metrics import StepMetrics
from fastrlhf.types import Experience, Prefix, Rollout

NOT_SAVED = ("reference_states", "reference_rows")
"""Fields of an experience that checkpoints do not hold. Each rank has only its part of them, which it computes again
(`experience.with_reference_states`)."""


@dataclass(kw_only=True)
class OpenUpdate:
    """The input of the update in progress and the results of its finished mini-batches; empty between two updates.

    Checkpoints hold its state. An update that has already changed the weights can therefore be resumed with the
    experience that the earlier weights sampled.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rollouts: Sequence[Rollout] = ()
    experience: Experience | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the episodes."""
    samples: Sequence[dict[str, Any]] = ()
    """Rows for samples.jsonl."""
    steps: list[dict[str, float]] = field(default_factory=list)
    """Metrics that the optimiser returned, one entry per finished mini-batch."""
    totals: dict[str, StepMetrics] = field(default_factory=lambda: defaultdict(StepMetrics))
    """Metrics of the losses of the finished mini-batches, by model."""
    stop: Callable[[], None] = lambda: None
    """Called before every mini-batch except the first; it may raise Interrupted."""

    def begin(
        self,
        rollouts: Sequence[Rollout],
        experience: Experience,
        metrics: Mapping[str, float],
        samples: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.rollouts, self.experience, self.metrics, self.samples = rollouts, experience, metrics, samples
        self.steps, self.totals = [], defaultdict(StepMetrics)

    def end(self) -> None:
        self.rollouts, self.experience, self.metrics, self.samples = (), None, {}, ()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state for a checkpoint. All ranks must call this method."""
        if self.experience is None:
            return {}
        state: dict[str, Any] = {
            "rollouts": [asdict(replace(rollout, kept=None)) for rollout in self.rollouts],
            "metrics": dict(self.metrics),
            "samples": list(self.samples),
            "steps": self.steps,
            "totals": {name: totals.by_rank() for name, totals in self.totals.items()},
            "kl_coef": self.experience.kl_coef,
        }
        # Copies, because a file of safetensors cannot hold two names of one tensor.
        for one in (one for one in fields(self.experience) if one.name not in NOT_SAVED):
            value = getattr(self.experience, one.name)
            named = {f"{one.name}.{name}": x for name, x in value.items()} if isinstance(value, Mapping) else {}
            named |= {one.name: value} if isinstance(value, Tensor) else {}
            state |= {f"experience.{name}": tensor.clone() for name, tensor in named.items()}
        if kept := [ids for rollout in self.rollouts for ids in rollout.kept or ()]:
            state["kept"] = torch.from_numpy(np.concatenate(kept))
            state["kept_lengths"] = torch.tensor([len(ids) for ids in kept])
        return state

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Restores the update. If the state lacks the tensors (`resume_weights_only`), the update is lost and its step
        begins again."""
        tensors = {
            key.removeprefix("experience."): value.to(self.device)
            for key, value in state.items()
            if key.startswith("experience.")
        }
        self.end()
        if not tensors:
            return
        rewards = {
            name.removeprefix("rewards."): tensors.pop(name) for name in [*tensors] if name.startswith("rewards.")
        }
        rollouts = [Rollout(**row | {"prefix": Prefix(**row["prefix"])}) for row in state["rollouts"]]
        if "kept" in state:
            ends = state["kept_lengths"].cumsum(0)[:-1].tolist()
            kept = iter(np.split(state["kept"].cpu().numpy(), ends))
            rollouts = [replace(rollout, kept=[next(kept) for _ in rollout.completion]) for rollout in rollouts]
        experience = Experience(**tensors, rewards=rewards, kl_coef=state["kl_coef"])
        self.begin(rollouts, experience, state["metrics"], state["samples"])
        self.steps = list(state["steps"])
        for name, by_rank in state["totals"].items():
            self.totals[name].load(by_rank, self.device)
