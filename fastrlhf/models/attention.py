"""Computes attention over a pack, so that its sequences never see each other.

transformers calls the attention function that is registered here and passes on the keyword `attention_plan` of the
forward pass. The function calls one of the kernels in `BACKENDS`, as `attn_implementation` says:

    flash_attention_2   the flash-attn package          CUDA, bf16 or fp16
    flash_attention_3   flash-attn's Hopper package     CUDA, bf16 or fp16, compute capability 9
    flash_attention_4   the flash-attn-4 package        CUDA, bf16 or fp16, compute capability 9 to 11
    varlen              torch.nn.attention.varlen       CUDA, bf16 or fp16, no soft-capping
    flex                torch's FlexAttention           CUDA, any dtype
    sdpa                one SDPA call per segment       any device and dtype, the only one with attention sinks

All of them support sliding windows and branches; the keys and values of branches are gathered before the call. `auto`
takes flash_attention_2, otherwise varlen, otherwise sdpa. The remaining kernels have not been tested on a GPU and are
used only on request.

A [T, T] mask is never built, because it would make packing slower than padding. No mask function is registered with the
attention function, because transformers would then search the positions for packed sequences and wait for the GPU.

If the sequences of a model cannot share a pass (because of a recurrent state, or attention that is not transformers'),
they run one by one with the model's own attention (models/alone.py). models/probe.py finds this out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AttentionInterface, PreTrainedModel

from fastrlhf.models import flex
from fastrlhf.types import AttentionPlan

PACKED = "fastrlhf_packed"
_CHOICE = "fastrlhf_attention"  # attribute of a model with its `attn_implementation`; copies of the model have it too
_ALONE = "fastrlhf_alone"  # attribute of a model with the reason why its sequences run one by one


@contextmanager
def packed_attention(model: PreTrainedModel, name: str = PACKED) -> Iterator[None]:
    """Context in which the forward pass of the model calls the attention function registered as `name`."""
    before = cast(str, model.config._attn_implementation)
    model.config._attn_implementation = name  # the layers read it at every call
    try:
        yield
    finally:
        model.config._attn_implementation = before


def choose_attention(model: PreTrainedModel, implementation: str) -> str:
    """Makes packed forward passes of the model use `implementation`. Returns the name of the chosen backend; for
    "auto", of the best available backend.

    Raises ValueError, with the reason and the fix, if `implementation` cannot run this model on its device in its
    dtype.
    """
    softcap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    check_attention(implementation, model.device, model.dtype, softcap)
    setattr(model, _CHOICE, implementation)
    return backend(model.device, model.dtype, softcap) if implementation == "auto" else implementation


def check_attention(
    implementation: str, device: torch.device, dtype: torch.dtype, softcap: float | None = None
) -> None:
    """Raises ValueError, with the reason and the fix, if `implementation` cannot run on this device in this dtype."""
    if implementation != "auto" and (obstacle := _obstacle(implementation, device, dtype, softcap)):
        raise ValueError(f"attn_implementation: {implementation} {obstacle}, or leave it at auto")


def chosen_attention(model: PreTrainedModel) -> str:
    """Returns the `implementation` of the last `choose_attention`; "auto" if it was never called."""
    return getattr(model, _CHOICE, "auto")


def run_alone(model: PreTrainedModel, reason: str) -> None:
    """Makes the model run the sequences of a pack one by one, with its own attention."""
    setattr(model, _ALONE, reason)


def runs_alone(model: PreTrainedModel) -> str:
    """Returns the reason why the sequences of a pack run through the model one by one; empty if they share a pass."""
    return getattr(model, _ALONE, "")


def run_like(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Makes a model compute packs like another model with the same backbone: by the same backend, or one by one."""
    for name in (_CHOICE, _ALONE):
        if hasattr(other, name):
            setattr(model, name, getattr(other, name))


def backend(device: torch.device, dtype: torch.dtype, softcap: float | None = None, *, sinks: bool = False) -> str:
    """Returns the name of the backend that "auto" takes."""
    return next(name for name in AUTO if not _obstacle(name, device, dtype, softcap, sinks=sinks))


def _obstacle(
    name: str, device: torch.device, dtype: torch.dtype, softcap: float | None, *, sinks: bool = False
) -> str:
    """Returns why a backend cannot run, and the fix, as the end of a sentence; empty if it can."""
    able = BACKENDS[name]
    if able.only_cuda and device.type != "cuda":
        return f"needs a CUDA GPU, and the run is on {device.type}; use sdpa"
    if able.only_half and dtype not in (torch.bfloat16, torch.float16):
        return f"does not support {dtype}; set dtype to bfloat16, or use flex or sdpa"
    if softcap is not None and not able.softcap:
        return "has no soft-capping, which this model needs; use flash_attention_2, flex or sdpa"
    if sinks and not able.sinks:
        return "has no attention sinks, which this model needs; use sdpa"
    if able.module and not _installed(able.module):
        return f"needs {able.module}, which is not installed: {able.install}"
    if able.capabilities and (found := torch.cuda.get_device_capability(device)[0]) not in able.capabilities:
        known = " or ".join(map(str, able.capabilities))
        return f"needs a GPU of compute capability {known}, and this one has {found}; use flash_attention_2"
    return ""


def _attend(
    module: torch.nn.Module,
    query: Tensor,  # [1, H, T, d]
    key: Tensor,  # [1, H_kv, T, d]
    value: Tensor,  # [1, H_kv, T, d]
    attention_mask: Tensor | None,  # must be None: the plan decides which keys a query sees
    *,
    attention_plan: AttentionPlan,
    attention_backend: str = "auto",
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,  # [H] logits of sinks: keys without a value that every query sees
    indices: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls; returns [1, T, H, d]."""
    if dropout:
        raise ValueError("packed attention has no dropout")
    if attention_mask is not None or indices is not None:
        raise ValueError("the model masks its attention itself")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, d]
    if attention_plan.key_index is not None:
        # Not index_select, whose backward pass adds with atomics; that of indexing adds in a fixed order.
        k, v = (x[attention_plan.key_index] for x in (k, v))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if s_aux is not None:
        if attention_backend != "auto" and not BACKENDS[attention_backend].sinks:
            raise ValueError(f"{attention_backend} has no attention sinks")
        return _sdpa(q, k, v, attention_plan, scale, softcap, sliding_window, s_aux)[None].contiguous(), None
    name = backend(q.device, q.dtype, softcap) if attention_backend == "auto" else attention_backend
    # Contiguous, because some models view the heads of the result as one dimension.
    return BACKENDS[name].attend(q, k, v, attention_plan, scale, softcap, sliding_window)[None].contiguous(), None


def _flash_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    scale: float,
    softcap: float | None,
    window: int | None,
    *,
    module: str,
    unlimited: int | None = -1,  # window size for an unlimited left side
) -> Tensor:
    output = import_module(module).flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=plan.cu_seqlens,
        cu_seqlens_k=plan.cu_seqlens_k,
        max_seqlen_q=max(plan.query_lengths),
        max_seqlen_k=max(plan.key_lengths),
        softmax_scale=scale,
        causal=True,
        window_size=(unlimited, unlimited) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
        deterministic=True,
    )
    return output[0] if isinstance(output, tuple) else output  # version 4 and early versions of 3 return logsumexp too


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, softcap: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    groups = q.shape[1] // k.shape[1]  # torch 2.11 has no enable_gqa here yet
    output = varlen_attn(
        q,
        k.repeat_interleave(groups, 1) if groups > 1 else k,
        v.repeat_interleave(groups, 1) if groups > 1 else v,
        plan.cu_seqlens,
        plan.cu_seqlens_k,
        max(plan.query_lengths),
        max(plan.key_lengths),
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
    )
    assert isinstance(output, Tensor)
    return output


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Calls SDPA once per segment, on views of the pack: [H, Lq, d] x [H_kv, Lk, d] -> [H, Lq, d]."""
    lengths = list(zip(plan.query_lengths, plan.key_lengths, strict=True))
    if isinstance(q, FakeTensor) and softcap is None and sinks is None:
        lengths, window = _merged(lengths, window)
    parts = zip(
        q.transpose(0, 1).split([num_q for num_q, _ in lengths], 1),
        k.transpose(0, 1).split([num_k for _, num_k in lengths], 1),
        v.transpose(0, 1).split([num_k for _, num_k in lengths], 1),
        strict=True,
    )
    return torch.cat([_one(*part, scale, softcap, window, sinks) for part in parts], 1).transpose(0, 1)


def _merged(lengths: list[tuple[int, int]], window: int | None) -> tuple[list[tuple[int, int]], int | None]:
    """Joins the segments that attend only to themselves, if no window cuts them, for counts of memory on tensors
    without data: the memory of causal attention is proportional to the tokens, and the time is that of one operator."""
    if window is not None and any(num_k > window for _, num_k in lengths):
        return lengths, window
    own = sum(num_q for num_q, num_k in lengths if num_q == num_k)
    return [*[(own, own)] * bool(own), *(each for each in lengths if each[0] != each[1])], None


def _one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: Tensor | None = None,
) -> Tensor:
    num_q, num_k = q.shape[1], k.shape[1]
    if softcap is None and sinks is None and (window is None or num_k <= window):
        mask = None if num_q == num_k else _visible(num_q, num_k, None, q.device)
        attended = F.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
        return attended[0]
    groups = q.shape[0] // k.shape[0]
    scores = q @ k.repeat_interleave(groups, 0).transpose(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_visible(num_q, num_k, window, q.device), float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[:, None, None].expand(-1, num_q, 1)], 2)
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)[..., :num_k]
    return weights @ v.repeat_interleave(groups, 0)


def _visible(num_q: int, num_k: int, window: int | None, device: torch.device) -> Tensor:
    """Returns a [Lq, Lk] bool mask: causal, aligned at the bottom right, with at most `window` keys including the
    query's own."""
    distance = torch.arange(num_k - num_q, num_k, device=device)[:, None] - torch.arange(num_k, device=device)
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


@cache
def _installed(module: str) -> bool:
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:  # the enclosing package is missing
        return False
    # flash-attn-4 without flash-attn installs a package `flash_attn` that has no file of its own.
    return spec is not None and spec.origin is not None


Attend = Callable[[Tensor, Tensor, Tensor, AttentionPlan, float, float | None, int | None], Tensor]
"""q [T, H, d], k and v [K, H_kv, d], plan, scale of the scores, their soft-cap, window -> [T, H, d]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """One attention kernel and what it supports."""

    attend: Attend
    module: str = ""
    """Package that the kernel needs in addition to torch."""
    install: str = ""
    only_cuda: bool = True
    only_half: bool = True
    """Whether it supports only bfloat16 and float16."""
    softcap: bool = True
    sinks: bool = False
    capabilities: tuple[int, ...] = ()
    """Major compute capabilities of the GPUs on which the kernel runs; empty: all."""


BACKENDS = {
    "flash_attention_2": Backend(
        attend=partial(_flash_attn, module="flash_attn"),
        module="flash_attn",
        install="pip install flash-attn",
    ),
    "flash_attention_3": Backend(
        attend=partial(_flash_attn, module="flash_attn_interface"),
        module="flash_attn_interface",
        install="build the folder hopper of the flash-attention repository",
        capabilities=(9,),
    ),
    "flash_attention_4": Backend(
        attend=partial(_flash_attn, module="flash_attn.cute", unlimited=None),
        module="flash_attn.cute",
        install="pip install --pre flash-attn-4",
        capabilities=(9, 10, 11),
    ),
    "varlen": Backend(
        attend=_varlen,
        module="torch.nn.attention.varlen",
        install="pip install 'torch>=2.11'",
        softcap=False,
    ),
    "flex": Backend(attend=flex.attend, only_half=False),
    "sdpa": Backend(attend=_sdpa, only_cuda=False, only_half=False, sinks=True),
}
AUTO = ("flash_attention_2", "varlen", "sdpa")
"""Backends that "auto" tries, the best first."""

# Excluded from torch.compile: this causes one graph break per layer, and every backend runs uncompiled.
AttentionInterface.register(PACKED, torch.compiler.disable(_attend))
