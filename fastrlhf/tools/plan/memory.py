"""Counts the peak memory of a forward and backward pass without computing or allocating anything.

The trainer's own forward pass runs on fake tensors (torch.FakeTensorMode), which have a shape, a dtype and a storage
size but no data. The storage of every operator's result is counted from its creation until it is freed. The count
therefore includes saved activations, gradients and temporaries, for any architecture. Memory that an operator uses
internally is not visible; the largest such part, the blocks of logits in `linear_logprob` and `linear_nll`, is computed
by a formula (see `_Tally._workspace`).
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from fastrlhf.config import TrainConfig
from fastrlhf.data.packing import pack
from fastrlhf.models.adapters import inject
from fastrlhf.models.forward import (
    enable_activation_checkpointing,
    sequence_scores,
    token_logprobs,
    token_nll,
    token_values,
)
from fastrlhf.models.four_bit import empty_weight, quantize_without_data, state_tensors
from fastrlhf.models.loading import DTYPES, make_trainable
from fastrlhf.models.reward_head import scorer_class
from fastrlhf.models.router_loss import begin_step
from fastrlhf.types import PackedBatch, Segment
from fastrlhf_kernels._blocks import CPU_BLOCK
from fastrlhf_kernels._form import is_faster, workspace_bytes

if TYPE_CHECKING:
    from peft import LoraConfig

TRITON_PART = 128 * 2**20
"""Bytes of the block of logit gradients that linear_logprob stores at a time in its Triton implementation."""

DEVICE = torch.ops.prim.device.default
"""The operator that returns the device of a fake tensor."""

ELSEWHERE = torch.device("meta")
"""Fake device that represents CPU memory; its bytes are not counted."""


@dataclass(frozen=True, kw_only=True)
class FakeModel:
    """A model made of fake tensors, which have no data, together with its sizes."""

    model: PreTrainedModel
    num_parameters: int
    """Number of parameters; tied parameters count once."""
    num_bytes: int
    """Bytes of parameters and buffers."""
    num_trained: int
    """Number of trained parameters."""
    gradient_bytes: int


@dataclass(kw_only=True)
class Fakes:
    """Builds the fake models of a run from their transformers configurations, under one FakeTensorMode.

    Pass `run`, the run's configuration, to `policy` and `scorer` only for a model that the run trains; the model then
    gets the configured adapter. `adapter`: settings of an existing adapter. `four_bit`: the weights under the adapter
    are in 4 bits."""

    dtype: str
    is_cuda: bool
    mode: FakeTensorMode
    memory: int = 0
    """Bytes of the GPU"""

    @staticmethod
    def of(dtype: str, is_cuda: bool, memory: int = 0) -> Fakes:
        return Fakes(dtype=dtype, is_cuda=is_cuda, mode=FakeTensorMode(), memory=memory)

    def policy(
        self,
        model: PretrainedConfig,
        run: TrainConfig | None = None,
        *,
        adapter: LoraConfig | None = None,
        four_bit: bool = False,
    ) -> FakeModel:
        """Builds a fake causal LM."""
        return self._made(
            lambda: AutoModelForCausalLM.from_config(model, dtype=DTYPES[self.dtype]), run, adapter, four_bit
        )

    def scorer(
        self,
        model: PretrainedConfig,
        run: TrainConfig | None = None,
        *,
        adapter: LoraConfig | None = None,
        four_bit: bool = False,
    ) -> FakeModel:
        """Builds a fake sequence classifier with one score and a float32 head."""
        model = copy.deepcopy(model)
        model.num_labels = 1

        def make() -> PreTrainedModel:
            made = cast(Any, scorer_class(model))._from_config(model, dtype=DTYPES[self.dtype])
            if self.dtype != "float32":
                made.score = torch.nn.Linear(cast(torch.nn.Linear, made.score).in_features, 1, bias=False)
            return made

        return self._made(make, run, adapter, four_bit)

    def _made(
        self,
        make: Callable[[], PreTrainedModel],
        run: TrainConfig | None,
        adapter: LoraConfig | None,
        four_bit: bool,
    ) -> FakeModel:
        """Builds a model on the meta device and then replaces its tensors by fake ones. Adapters are added in between,
        because peft moves layers to a device, which fake tensors do not allow."""
        with torch.device("meta"):
            model = make()
            if four_bit:
                quantize_without_data(model, DTYPES[self.dtype])
            if adapter:
                inject(adapter, model, seed=0)
                if hasattr(model, "score"):
                    cast(torch.nn.Linear, model.score).requires_grad_(True)
                if run and run.activation_checkpointing:
                    enable_activation_checkpointing(model)
            elif run:
                make_trainable(model, replace(run, activation_offloading=False), "")
            if run and run.activation_offloading:
                enable_activation_checkpointing(model, offload_to=ELSEWHERE)
        known: dict[int, Tensor] = {}  # keeps tied tensors tied
        with self.mode:
            for module in model.modules():
                for name, x in (*module._parameters.items(), *module._buffers.items()):
                    if x is not None:
                        setattr(module, name, known.setdefault(id(x), _fake(x)))
        return _counted(model)

    def peak(
        self,
        trained: Mapping[str, FakeModel],
        batch: PackedBatch,
        *,
        reference: FakeModel | None,
        num_packs: int,
        by_token: bool = False,
    ) -> int:
        """Returns the peak memory beyond the weights, in bytes, of an optimiser step over `num_packs` packs of the size
        of `batch`, including gradients. For every pack, each model in `trained` (named "policy", "scorer" or "critic")
        runs a forward and a backward pass in turn.

        `reference` runs without gradient between the forward and the backward pass of the policy, as in DPO without
        precomputed reference log-probs. `by_token`: the loss of the policy is a sum over tokens, for which the run may
        compute the gradients of the head in the forward pass.
        """
        models = [fake.model for fake in (*trained.values(), *([reference] if reference else []))]
        # Every pass except the first starts with gradients; those that a short pack leaves have the same sizes.
        short = pack([Segment(token_ids=[0, 0], num_scored=1)])
        with self._counting(models) as tally:
            for each in [self._faked(short)] * (num_packs > 1) + [self._faked(batch)]:
                for name, fake in trained.items():
                    begin_step(fake.model, 1)
                    output = self._loss(name, fake.model, each, by_token)
                    if reference and name == "policy":
                        with torch.no_grad():
                            token_logprobs(reference.model, each)
                    output.backward()
                    del output
        return tally.peak

    def _loss(self, name: str, model: PreTrainedModel, batch: PackedBatch, by_token: bool) -> Tensor:
        if name != "policy" or not by_token:
            return _read(name, model, batch).sum()
        weight = cast(torch.nn.Linear, model.get_output_embeddings()).weight
        needs = (True, weight.requires_grad, False)
        row_bytes = len(weight) * (2 if self.is_cuda and weight.dtype == torch.bfloat16 else 4)
        faster = is_faster(len(batch.rows), row_bytes, needs, self.memory if self.is_cuda else None)
        return token_nll(model, batch, num_tokens=1, form="one_shot" if faster else "two_steps")

    def forward_peak(self, models: Mapping[str, FakeModel], batch: PackedBatch) -> int:
        """Returns the peak memory beyond the weights, in bytes, of a forward pass without gradient of each model in
        turn. The names of `models` are those of `peak`."""
        batch = self._faked(batch)
        with self._counting([fake.model for fake in models.values()]) as tally, torch.no_grad():
            for name, fake in models.items():
                _read(name, fake.model, batch)
        return tally.peak

    def prefill_peak(self, policy: FakeModel, batch: PackedBatch) -> int:
        """Returns the peak memory beyond the weights, in bytes, of prefilling: a forward pass that computes the
        log-prob of a single row."""
        one = torch.zeros(1, dtype=torch.int64)
        return self.forward_peak({"policy": policy}, replace(batch, rows=one, targets=one))

    def _faked(self, batch: PackedBatch) -> PackedBatch:
        def fake(part: Any) -> Any:
            return {name: self.mode.from_tensor(x) for name, x in _tensors(part).items()}

        return replace(batch, **fake(batch), plan=replace(batch.plan, **fake(batch.plan)))

    @contextmanager
    def _counting(self, models: Sequence[PreTrainedModel]) -> Iterator[_Tally]:
        tally = _Tally(models, self.memory if self.is_cuda else None)
        with self.mode, tally:
            yield tally


class _Tally(TorchDispatchMode):
    """Counts the bytes of live storages; the storages of `models` are excluded."""

    def __init__(self, models: Sequence[PreTrainedModel], memory: int | None) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._memory = memory
        """Bytes of the GPU; None for a CPU"""
        self._sizes = {
            x.untyped_storage()._cdata: 0
            for model in models
            for kept in (*model.parameters(), *model.buffers())
            for x in (kept, *state_tensors(kept))
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE:  # torch asks for devices twice as often as it calls operators
            return args[0].device
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype == torch.float32:
            # Without data torch computes the products of experts only in bfloat16.
            narrow = func(args[0].bfloat16(), args[1].bfloat16(), *args[2:], **(kwargs or {}))
            output = torch.empty_like(narrow, dtype=torch.float32)
        elif func is torch.ops.fastrlhf.scaled.default and self._memory is None and args[0].dtype == args[2]:
            output = args[0]  # on a CPU the upstream gradient of a loss is seen to be 1, and nothing is copied
        else:
            output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.device != ELSEWHERE:
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self._now + self._workspace(func, args))
        return output

    def add_gradients(self, models: Sequence[PreTrainedModel]) -> None:
        """Counts the gradients that the models already have."""
        for model in models:
            for param in model.parameters():
                if param.grad is not None:
                    self._add(param.grad.untyped_storage())

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self._now += storage.nbytes()
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self._now -= self._sizes.pop(key)

    def _workspace(self, func: Any, args: Sequence[Any]) -> int:
        """Returns the bytes that an operator uses internally: for linear_logprob and linear_nll the blocks of logits,
        for a product with a 4-bit weight the dequantised weight, and 0 for all other operators."""
        if func.namespace in ("aten", "prim"):
            return 0
        name = str(func)
        if name.startswith("bitsandbytes.gemm_4bit"):
            return args[0].element_size() * math.prod(args[2])
        if name.startswith("fastrlhf.linear_nll"):
            of_hidden, of_weight, of_bias = args[-4:-1]
            needs = (of_hidden, of_weight, of_bias)
            return workspace_bytes(args[0], args[1], needs, softcap=args[9] is not None, memory=self._memory)
        if not name.startswith("fastrlhf.linear_logprob"):
            return 0
        is_backward = "backward" in name
        hidden, weight = args[3:5] if is_backward else args[:2]
        (num_rows, size), vocab = hidden.shape, weight.shape[0]
        if self._memory is not None:
            return is_backward * (max(TRITON_PART, 4096 * num_rows) + 4 * num_rows * size)
        rows, columns = min(num_rows, CPU_BLOCK[0]), min(vocab, CPU_BLOCK[1])
        # The previous block still exists while the next one is computed.
        held = 1 + (num_rows > rows or vocab > columns)
        is_cast, wants_entropy = weight.dtype != torch.float32, args[2] is not None if is_backward else args[9]
        of_weight = is_cast + (is_backward and args[-2])  # args[-2]: the weight needs a gradient
        cast_up = 8 * num_rows * size if hidden.dtype != torch.float32 else 0
        return 4 * columns * (held * of_weight * size + (held + wants_entropy) * rows) + cast_up


def _read(name: str, model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    if name == "critic":
        return token_values(model, batch)
    return sequence_scores(model, batch) if name == "scorer" else token_logprobs(model, batch).logprob


def _counted(model: PreTrainedModel) -> FakeModel:
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    kept = [x for tensor in (*parameters, *model.buffers()) for x in (tensor, *state_tensors(tensor))]
    return FakeModel(
        model=model.eval(),
        num_parameters=sum(map(_num_parameters, parameters)),
        num_bytes=sum(x.numel() * x.element_size() for x in kept),
        num_trained=sum(p.numel() for p in trained),
        gradient_bytes=sum(p.numel() * p.element_size() for p in trained),
    )


def _num_parameters(parameter: Tensor) -> int:
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state else parameter.numel()


def _fake(x: Tensor) -> Tensor:
    """Returns a fake copy of a tensor under the active FakeTensorMode; a 4-bit weight is copied with its scales."""
    if not isinstance(x, torch.nn.Parameter):
        return torch.empty(x.shape, dtype=x.dtype)
    state = getattr(x, "quant_state", None)
    if state is None:
        return torch.nn.Parameter(torch.empty(x.shape, dtype=x.dtype), x.requires_grad)
    packed, state = empty_weight(state.shape, state.dtype)
    fake = cast(Any, torch.nn.Parameter(packed, requires_grad=False))
    fake.quant_state = state
    fake.__class__ = Params4bit
    return fake


class Params4bit(FakeTensor):
    """Fake replacement of bitsandbytes' class `Params4bit`, which cannot hold fake tensors. It has the same name
    because peft recognises 4-bit weights by the name of their class (it dequantises them to compute the norms of DoRA).
    """


def _tensors(part: Any) -> dict[str, Tensor]:
    values = {name: getattr(part, name) for name in part.__slots__}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}
