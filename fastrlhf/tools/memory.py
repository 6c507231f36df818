"""How many bytes a forward and backward hold at their peak, counted without computing or allocating anything.

The trainer's own forward runs on fake tensors (torch.FakeTensorMode): they have shapes, dtypes and storages of a size,
and no data. Every storage that an operator returns is counted from its birth to its death, so saved activations,
gradients and temporaries are those of the real pass, of any architecture. What an operator holds inside itself is not
seen; for the blocks of logits of `linear_logprob`, the largest of these, the file of that op has a formula.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from fastrlhf.config import TrainConfig
from fastrlhf.models.forward import enable_activation_checkpointing, sequence_scores, token_logprobs, token_values
from fastrlhf.models.loading import DTYPES, make_trainable
from fastrlhf.types import PackedBatch
from fastrlhf_kernels._blocks import CPU_BLOCK

TRITON_PART = 128 * 2**20
"""Bytes of the part of the logits' gradient that the Triton path of linear_logprob stores."""

ELSEWHERE = torch.device("meta")
"""Where what a run keeps in the CPU's memory is here: not on the device whose bytes are counted."""


@dataclass(frozen=True, kw_only=True)
class FakeModel:
    """A model without data."""

    model: PreTrainedModel
    num_parameters: int
    """Tied ones once."""
    num_bytes: int
    """Of parameters and buffers."""
    num_trained: int
    """Parameters that have gradients."""
    gradient_bytes: int


@dataclass(kw_only=True)
class Fakes:
    """Fake models of one run, all of one mode. `fakes.policy(model)` and `fakes.scorer(model)` make them of the models'
    configurations; where they are given the run's as well, they are as it trains them: with its adapter."""

    dtype: str
    is_cuda: bool
    mode: FakeTensorMode

    @staticmethod
    def of(dtype: str, is_cuda: bool) -> Fakes:
        return Fakes(dtype=dtype, is_cuda=is_cuda, mode=FakeTensorMode())

    def policy(self, model: PretrainedConfig, run: TrainConfig | None = None) -> FakeModel:
        """A causal LM."""
        return self._made(lambda: AutoModelForCausalLM.from_config(model, dtype=DTYPES[self.dtype]), run)

    def scorer(self, model: PretrainedConfig, run: TrainConfig | None = None) -> FakeModel:
        """The same trunk with one score, whose head is float32."""
        model = copy.deepcopy(model)
        model.num_labels = 1

        def make() -> PreTrainedModel:
            made = AutoModelForSequenceClassification.from_config(model, dtype=DTYPES[self.dtype])
            if self.dtype != "float32":
                made.score = torch.nn.Linear(cast(torch.nn.Linear, made.score).in_features, 1, bias=False)
            return made

        return self._made(make, run)

    def _made(self, make: Callable[[], PreTrainedModel], run: TrainConfig | None) -> FakeModel:
        """On the meta device first, where peft can move its layers; fake tensors cannot be moved."""
        with torch.device("meta"):
            model = make()
            if run:
                make_trainable(model, replace(run, activation_offloading=False), "")
                if run.activation_offloading:
                    enable_activation_checkpointing(model, offload_to=ELSEWHERE)
        known: dict[int, Tensor] = {}  # tied tensors stay tied
        with self.mode:
            for module in model.modules():
                for name, x in (*module._parameters.items(), *module._buffers.items()):
                    if x is not None:
                        fake = torch.empty(x.shape, dtype=x.dtype)
                        if isinstance(x, torch.nn.Parameter):
                            fake = torch.nn.Parameter(fake, x.requires_grad)
                        setattr(module, name, known.setdefault(id(x), fake))
        return _counted(model)

    def peak(
        self, trained: Mapping[str, FakeModel], batch: PackedBatch, *, reference: FakeModel | None, num_packs: int
    ) -> int:
        """Bytes beyond the weights, gradients included, at the worst moment of an optimiser step of `num_packs` packs
        like this one: a forward and backward of each model in turn, by name "policy", "scorer" or "critic".

        `reference` runs without gradient between the forward and the backward of the policy, as live DPO does.
        """
        batch = self._faked(batch)
        models = [fake.model for fake in (*trained.values(), *([reference] if reference else []))]
        with self._counting(models) as tally:
            for _ in range(min(num_packs, 2)):  # from the second on gradients are there; a third is like it
                for name, fake in trained.items():
                    output = _read(name, fake.model, batch)
                    if reference and name == "policy":
                        with torch.no_grad():
                            token_logprobs(reference.model, batch)
                    output.sum().backward()
                    del output
        return tally.peak

    def forward_peak(self, fake: FakeModel, batch: PackedBatch) -> int:
        """Bytes beyond the weights of a trunk's forward without gradient: of a prefill."""
        batch = replace(self._faked(batch), rows=self._one(), targets=self._one())
        with self._counting([fake.model]) as tally, torch.no_grad():
            _read("policy", fake.model, batch)
        return tally.peak

    def _one(self) -> Tensor:
        with self.mode:
            return torch.zeros(1, dtype=torch.int64)

    def _faked(self, batch: PackedBatch) -> PackedBatch:
        def fake(part: Any) -> Any:
            return {name: self.mode.from_tensor(x) for name, x in _tensors(part).items()}

        return replace(batch, **fake(batch), plan=replace(batch.plan, **fake(batch.plan)))

    @contextmanager
    def _counting(self, models: Sequence[PreTrainedModel]) -> Iterator[_Tally]:
        tally = _Tally(models, self.is_cuda)
        with self.mode, tally:
            yield tally
        for model in models:
            model.zero_grad()


class _Tally(TorchDispatchMode):
    """Counts the bytes of storages that live; those of `models` are known and count nothing."""

    def __init__(self, models: Sequence[PreTrainedModel], is_cuda: bool) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._is_cuda = is_cuda
        self._sizes = {
            x.untyped_storage()._cdata: 0 for model in models for x in (*model.parameters(), *model.buffers())
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.device != ELSEWHERE:
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self._now + self._workspace(str(func), args))
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self._now += storage.nbytes()
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self._now -= self._sizes.pop(key)

    def _workspace(self, name: str, args: Sequence[Any]) -> int:
        """What linear_logprob holds beyond its results: the formula of its file, with blocks no larger than the op."""
        if not name.startswith("fastrlhf.linear_logprob"):
            return 0
        is_backward = "backward" in name
        hidden, weight = args[3:5] if is_backward else args[:2]
        (num_rows, size), vocab = hidden.shape, weight.shape[0]
        if self._is_cuda:
            return is_backward * (max(TRITON_PART, 4096 * num_rows) + 4 * num_rows * size)
        rows, columns = min(num_rows, CPU_BLOCK[0]), min(vocab, CPU_BLOCK[1])
        cast_up = 8 * num_rows * size if hidden.dtype != torch.float32 else 0
        return 4 * (2 * columns * size + 3 * rows * columns) + cast_up


def _read(name: str, model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    if name == "critic":
        return token_values(model, batch)
    return sequence_scores(model, batch) if name == "scorer" else token_logprobs(model, batch).logprob


def _counted(model: PreTrainedModel) -> FakeModel:
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return FakeModel(
        model=model.eval(),
        num_parameters=sum(p.numel() for p in parameters),
        num_bytes=sum(x.numel() * x.element_size() for x in (*parameters, *model.buffers())),
        num_trained=sum(p.numel() for p in trained),
        gradient_bytes=sum(p.numel() * p.element_size() for p in trained),
    )


def _tensors(part: Any) -> dict[str, Tensor]:
    values = {name: getattr(part, name) for name in part.__slots__}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}
