"""Optimiser steps (clipping, update, schedule), which are computed in float32 for weights of any dtype, and the order
of the data."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Embedding, Module, Parameter

from fastrlhf.config import TrainConfig
from fastrlhf.models.router_loss import router_loss
from fastrlhf.models.sharding import first_entry, full, like, of_parts, part
from fastrlhf.runtime.adamw import make_adamw, moments, moments_in_8_bits, set_moments
from fastrlhf.runtime.mixing import Shares, mixed_epochs
from fastrlhf.runtime.schedule import schedule

BUCKET = 2**26
"""Maximum number of parameters that are updated at once; a larger tensor is updated separately. Float32 gradients and,
without master weights, float32 weights exist for only one such group at a time."""
NOISE = 2**22
"""Number of entries of a tensor whose rounding noise comes from the same generator."""


@dataclass(frozen=True, slots=True)
class _Weight:
    name: str
    index: int
    """Index among all trained tensors, which is a part of the seed of the rounding noise."""
    param: Parameter
    own: Tensor
    """The part of the tensor that this rank holds; in a single process, the whole tensor."""
    updated: Tensor
    """The tensor that AdamW updates: `own`, or its float32 copy, which is empty between updates if no copies are
    kept."""


@dataclass(frozen=True, slots=True)
class _Bucket:
    model: str
    weights: list[_Weight]
    adamw: torch.optim.Optimizer
    peak_rate: float
    share: Callable[[int], float]
    """Number of steps done -> learning rate of the next step, divided by the peak."""


class Optimizer:
    """AdamW over one or more models, with gradient clipping for each model separately and a learning rate schedule.

    Updates are computed in float32. bfloat16 weights are updated through float32 copies, which are either kept
    (`master_weights: float32`) or made for each update and then rounded stochastically. Temporary copies exist for one
    bucket at a time.
    """

    def __init__(
        self,
        models: Mapping[str, Module],
        config: TrainConfig,
        *,
        num_steps: int,
        learning_rates: Mapping[str, float] | None = None,
        head_rates: Mapping[str, float | None] | None = None,
    ) -> None:
        """`models`: prefix of the model's metrics ("" for the policy) -> model. `learning_rates`: the same prefix ->
        learning rate, for models that do not use the learning rate of `config`. `head_rates`: the same prefix ->
        learning rate of the score head, if it has another one than its model."""
        rates = learning_rates or {}
        self._models = models
        self._max_norm = config.max_grad_norm
        self._keeps_copies = config.master_weights == "float32"
        self._seed = config.seed
        self._num_done = 0
        self._buckets: list[_Bucket] = []
        count = itertools.count()
        for prefix, model in models.items():
            rate = rates.get(prefix, config.learning_rate)
            head_rate = (head_rates or {}).get(prefix) or rate
            shares = {peak: schedule(config, num_steps, peak) for peak in (rate, head_rate)}
            for decay, in_8_bits, params in buckets(model, config):
                heads = [(name, param) for name, param in params if head_rate != rate and _is_head(name)]
                others = [(name, param) for name, param in params if head_rate == rate or not _is_head(name)]
                for some, peak in ((others, rate), (heads, head_rate)):
                    if some:
                        weights = [self._weight(prefix + name, next(count), param) for name, param in some]
                        updated = [weight.updated for weight in weights]
                        adamw = make_adamw(config, updated, rate=peak, decay=decay, in_8_bits=in_8_bits)
                        self._buckets.append(_Bucket(prefix, weights, adamw, peak, shares[peak]))

    def _weight(self, name: str, index: int, param: Parameter) -> _Weight:
        own = part(param)
        if param.dtype == torch.float32:
            return _Weight(name, index, param, own, own)
        updated = own.detach().float() if self._keeps_copies else torch.empty(0, device=param.device)
        return _Weight(name, index, param, own, updated)

    @property
    def num_done(self) -> int:
        """Number of steps taken or skipped."""
        return self._num_done

    @torch.no_grad()
    def step(self) -> dict[str, float]:
        """Updates the weights and clears the gradients; returns grad_norm (before clipping) and learning_rate.

        Raises ValueError, before any weight changes, if a gradient is not finite. For this it reads one number per
        model from the GPU, the only time that a step waits for the GPU (bitsandbytes adds one per tensor).
        """
        metrics, scales = {}, {}
        for name, model in self._models.items():
            norm = _grad_norm(model)
            if not norm.isfinite():
                raise ValueError(
                    f"{name}grad_norm is {norm.item()}: a loss or a gradient is not finite; lower learning_rate"
                )
            metrics[f"{name}grad_norm"] = norm.item()
            if (aux := router_loss(model)) is not None:
                metrics[f"{name}aux_loss"] = aux
            scales[name] = ((self._max_norm or math.inf) / (norm + 1e-6)).clamp(max=1.0).item()
        step = self._num_done
        self._num_done += 1  # counted before any weight changes, so that an old `num_steps` always implies old weights
        for bucket in self._buckets:
            self._update(bucket, bucket.peak_rate * bucket.share(step), scales[bucket.model])
        metrics["learning_rate"] = self._buckets[0].peak_rate * self._buckets[0].share(step)
        for model in self._models.values():
            model.zero_grad(set_to_none=True)
        return metrics

    def _update(self, bucket: _Bucket, rate: float, scale: float) -> None:
        copied = _copied(bucket)
        self._borrow(copied)
        for weight in bucket.weights:
            if weight.param.grad is not None:
                weight.updated.grad = part(weight.param.grad).float().mul_(scale)
        bucket.adamw.param_groups[0]["lr"] = rate
        bucket.adamw.step()
        for weight in bucket.weights:
            weight.updated.grad = None
        for weight in copied:
            if self._keeps_copies:
                weight.own.copy_(weight.updated)
            else:
                self._round(weight)
        self._give_back(copied)

    def _round(self, weight: _Weight) -> None:
        """Rounds the new value of a weight stochastically. Noise is drawn in blocks of `NOISE` entries of the whole
        tensor, so that a part of a sharded tensor is rounded like the same part of the whole tensor."""
        new, own = weight.updated.view(-1), weight.own.view(-1)
        first = first_entry(weight.param)
        last = first + len(new)
        for block in range(first // NOISE, -(-last // NOISE)):
            start, end = block * NOISE, min((block + 1) * NOISE, weight.param.numel())
            generator = _generator(new.device, self._seed, self._num_done, weight.index, block)
            noise = torch.randint(0, 2**16, (end - start,), dtype=torch.int32, device=new.device, generator=generator)
            low, high = max(start, first), min(end, last)
            here = slice(low - first, high - first)
            own[here] = stochastic_round(new[here], noise[low - start : high - start])

    def _borrow(self, weights: Iterable[_Weight]) -> None:
        """Makes temporary float32 copies if no copies are kept."""
        for weight in () if self._keeps_copies else weights:
            weight.updated.data = weight.own.float()

    def _give_back(self, weights: Iterable[_Weight]) -> None:
        for weight in () if self._keeps_copies else weights:
            weight.updated.data = weight.updated.new_empty(0)

    def skip(self, steps: int) -> None:
        """Skips steps: clears the gradients and advances the schedule, which thus still ends with the run."""
        for model in self._models.values():
            model.zero_grad(set_to_none=True)
        self._num_done += steps

    def state_dict(self) -> dict[str, Any]:
        """Returns `num_steps`, the number of steps done, and under keys "PARAMETER.WHAT" AdamW's moments and step, and
        the float32 copy (master) if it is kept. Tensors with the shape of a sharded weight are sharded like it. Every
        rank must call it."""
        state: dict[str, Any] = {"num_steps": self._num_done}
        for bucket in self._buckets:
            for weight in bucket.weights:
                saved = moments(bucket.adamw, weight.updated, weight.param)
                state |= {f"{weight.name}.{what}": value for what, value in saved.items()}
            if self._keeps_copies:
                state |= {f"{weight.name}.master": of_parts(weight.param, weight.updated) for weight in _copied(bucket)}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Restores a state. The models must hold the weights of the same step already.

        A state that has only `num_steps` gives an optimiser without moments at that position of the schedule. Raises
        ValueError if the state belongs to other parameters.
        """
        self._num_done = state["num_steps"]
        saved: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for key, value in state.items():
            if key != "num_steps":
                name, _, what = key.rpartition(".")
                saved[name][what] = value
        for bucket in self._buckets:
            copied = _copied(bucket)
            for weight in copied if self._keeps_copies else ():
                weight.updated.copy_(part(like(weight.param, saved[weight.name].pop("master", weight.param))))
            self._borrow(copied)
            for weight in bucket.weights:
                set_moments(bucket.adamw, weight.updated, weight.param, saved.pop(weight.name, {}))
            self._give_back(copied)
        for name in saved:
            raise ValueError(f"optimizer: the checkpoint has moments of {name}, which is not trained here")


def num_steps(config: TrainConfig, num_items: int) -> int:
    """Returns the number of optimiser steps of a run: `max_steps`, or the number for `num_train_epochs`, rounded up.
    Raises ValueError if there is no data."""
    if num_items == 0:
        raise ValueError("dataset: no usable example to train on")
    if config.max_steps > 0:
        return config.max_steps
    return max(1, math.ceil(config.num_train_epochs * num_items / config.batch_size))


def index_batches(num_items: int, batch_size: int, steps: int, seed: int, shares: Shares = ()) -> Iterator[list[int]]:
    """Yields `steps` batches of exactly `batch_size` indices from one permutation after the other, each drawn with
    (seed, epoch). With `shares`, rows are drawn in proportion to the weights of their datasets
    (runtime/mixing.py)."""
    pending: list[int] = []
    permutations = (np.random.default_rng([seed, epoch]).permutation(num_items) for epoch in itertools.count())
    epochs = mixed_epochs(shares, seed) if shares else permutations
    for _ in range(steps):
        while len(pending) < batch_size:
            pending.extend(next(epochs).tolist())
        yield pending[:batch_size]
        del pending[:batch_size]


def buckets(model: Module, config: TrainConfig) -> Iterator[tuple[float, bool, list[tuple[str, Parameter]]]]:
    """Yields groups of trained parameters that AdamW updates together, as (weight decay, whether moments have 8 bits,
    parameters by name). Matrices come first. A group has at most `BUCKET` parameters or a single tensor."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, Embedding)}
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    groups = defaultdict(list)
    for name, param in sorted(named, key=lambda item: item[1].ndim < 2):
        decay = config.weight_decay if param.ndim >= 2 else 0.0
        groups[decay, moments_in_8_bits(config, param, is_embedding=id(param) in embeddings)].append((name, param))
    for (decay, in_8_bits), params in groups.items():
        some, size = [], 0
        for name, param in params:
            if some and size + param.numel() > BUCKET:
                yield decay, in_8_bits, some
                some, size = [], 0
            some.append((name, param))
            size += param.numel()
        yield decay, in_8_bits, some


def stochastic_round(x: Tensor, noise: Tensor) -> Tensor:
    """Rounds float32 to bfloat16 up or down at random, with probabilities that make the mean equal to x. Updates far
    below the spacing of bfloat16 are therefore not lost but take effect now and then.

    A bfloat16 consists of the upper 16 bits of a float32. `noise` (int32, overwritten) holds a uniform 16-bit number
    for each entry. It is added to the lower 16 bits, and carries into the upper bits with probability lower / 2^16.
    """
    return noise.add_(x.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32).bfloat16()


def _grad_norm(model: Module) -> Tensor:
    """Returns the total norm of all gradients, of any dtype: [] float32 on the CPU."""
    gradients = [param.grad for param in model.parameters() if param.grad is not None]
    if not gradients:
        return torch.zeros(())
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    return full(torch.linalg.vector_norm(torch.stack(norms))).cpu()


def _generator(device: torch.device, *key: int) -> torch.Generator:
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64).item()
    return torch.Generator(device).manual_seed(int(seed))


def _is_head(name: str) -> bool:
    """Returns whether a parameter belongs to the score head of a reward model or critic."""
    return "score" in name.split(".")


def _copied(bucket: _Bucket) -> list[_Weight]:
    return [weight for weight in bucket.weights if weight.updated is not weight.own]
