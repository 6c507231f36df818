"""Attention over a pack: sequences never see each other.

No model is patched. transformers calls the attention function registered here under a name of ours and hands it the
plan that the forward was given as the keyword `attention_plan`. Backends, best first:

    flash_attn   the flash-attn package         CUDA, bf16 or fp16
    varlen       torch.nn.attention.varlen      CUDA, bf16 or fp16, no soft-capping
    segments     one SDPA call per segment      any device and dtype

A [T, T] mask is never built: it makes packing slower than padding. No mask function is registered beside the attention
function, for transformers would look for packed sequences in the positions before it calls one, and wait for the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from fastrlhf.types import AttentionPlan

PACKED = "fastrlhf_packed"


@contextmanager
def packed_attention(model: PreTrainedModel, name: str = PACKED) -> Iterator[None]:
    """Within it, the model's forward expects `attention_plan`, or what the attention function registered as `name`
    expects; afterwards it is as before."""
    before = cast(str, model.config._attn_implementation)
    model.config._attn_implementation = name  # its layers read it at every call
    try:
        yield
    finally:
        model.config._attn_implementation = before


def backend(device: torch.device, dtype: torch.dtype, softcap: float | None = None) -> str:
    """The attention that will run: "flash_attn", "varlen" or "segments"."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "segments"
    if _installed("flash_attn"):
        return "flash_attn"
    return "varlen" if softcap is None and _installed("torch.nn.attention.varlen") else "segments"


def _attend(
    module: torch.nn.Module,
    query: Tensor,  # [1, H, T, d]
    key: Tensor,  # [1, H_kv, T, d]
    value: Tensor,  # [1, H_kv, T, d]
    attention_mask: Tensor | None,  # always None: the plan says who sees whom
    *,
    attention_plan: AttentionPlan,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """transformers' attention signature; returns [1, T, H, d]."""
    if dropout or s_aux is not None:
        raise ValueError("packed attention has neither dropout nor attention sinks; set attention_dropout to 0")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, d]
    if attention_plan.key_index is not None:
        # Indexing, not index_select: its backward sorts and adds in one order, where the other adds with atomics.
        k, v = (x[attention_plan.key_index] for x in (k, v))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend = {"flash_attn": _flash_attn, "varlen": _varlen, "segments": _segments}[backend(q.device, q.dtype, softcap)]
    return attend(q, k, v, attention_plan, scale, softcap, sliding_window)[None], None


def _flash_attn(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, softcap: float | None, window: int | None
) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=plan.cu_seqlens,
        cu_seqlens_k=plan.cu_seqlens_k,
        max_seqlen_q=max(plan.query_lengths),
        max_seqlen_k=max(plan.key_lengths),
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
        deterministic=True,
    )


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


def _segments(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, softcap: float | None, window: int | None
) -> Tensor:
    """Per segment, on views of the pack: [H, Lq, d] x [H_kv, Lk, d] -> [H, Lq, d]."""
    parts = zip(
        q.transpose(0, 1).split(plan.query_lengths, 1),
        k.transpose(0, 1).split(plan.key_lengths, 1),
        v.transpose(0, 1).split(plan.key_lengths, 1),
        strict=True,
    )
    return torch.cat([_one(*part, scale, softcap, window) for part in parts], 1).transpose(0, 1)


def _one(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, window: int | None) -> Tensor:
    num_q, num_k = q.shape[1], k.shape[1]
    if softcap is None and (window is None or num_k <= window):
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
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return weights @ v.repeat_interleave(groups, 0)


def _visible(num_q: int, num_k: int, window: int | None, device: torch.device) -> Tensor:
    """[Lq, Lk] bool: causal, aligned at the bottom right; at most `window` keys, the query's own included."""
    distance = torch.arange(num_k - num_q, num_k, device=device)[:, None] - torch.arange(num_k, device=device)
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


@cache
def _installed(module: str) -> bool:
    return find_spec(module) is not None


AttentionInterface.register(PACKED, _attend)
