"""A static key-value cache with slots, in which sequences are prefilled and decoded and then replaced by other
sequences.

Its memory never grows. A slot holds the keys and values of one sequence. A decode step writes the keys and values of
one more token per slot, at positions given by a tensor; later positions, which may hold values of an earlier sequence,
are masked. A step with a given number of slots and keys is therefore always the same work on the same memory, as a CUDA
graph requires.

As in attention.py, models are not patched, and no cache of transformers is used. The attention function registered here
reads and writes the slots, which it gets by the keyword `kv` of the forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module
from transformers import AttentionInterface, PreTrainedModel

from fastrlhf.data.packing import pack, trunks
from fastrlhf.models.attention import PACKED, packed_attention
from fastrlhf.types import Segment

CACHED = "fastrlhf_cached"

KEY_BLOCK = 64
"""The number of keys of a step is rounded up to a multiple of this, so that steps have few different shapes."""


class SlotCache:
    """Keys and values of at most `num_slots` sequences of at most `capacity` tokens.

    `2 * layers * num_slots * H_kv * capacity * d` numbers in the dtype of the keys are allocated at the first prefill.
    """

    def __init__(self, num_slots: int, capacity: int) -> None:
        self.num_slots = num_slots
        self.capacity = rounded_up(capacity)
        self._layers: dict[Module, tuple[Tensor, Tensor]] = {}  # [num_slots, H_kv, capacity, d] each

    @torch.no_grad()
    def prefill(self, model: PreTrainedModel, sequences: Sequence[Sequence[int]], slots: Sequence[int]) -> Tensor:
        """Puts sequence i into slot `slots[i]` and returns the logits [N, V] after the last tokens.

        The sequences are packed without padding. If a sequence is a prefix of another, it is computed only once,
        because keys and values depend only on the tokens before them.
        """
        device, starts = model.device, [tuple(sequence) for sequence in sequences]
        trunk_of = trunks(starts)
        offset: dict[tuple[int, ...], int] = {}  # trunk -> its first row in the pack
        num_tokens = 0
        for trunk in dict.fromkeys(trunk_of[start] for start in starts):
            offset[trunk] = num_tokens
            num_tokens += len(trunk)
        batch = pack([Segment(token_ids=trunk) for trunk in offset], device)

        lengths = torch.tensor([len(start) for start in starts])
        first = torch.tensor([offset[trunk_of[start]] for start in starts])
        ends = lengths.cumsum(0)
        position = torch.arange(int(ends[-1])) - (ends - lengths).repeat_interleave(lengths)
        fill = _Fill(
            cache=self,
            source=(first.repeat_interleave(lengths) + position).to(device),
            slot=torch.tensor(slots).repeat_interleave(lengths).to(device),
            position=position.to(device),
        )
        with packed_attention(model, CACHED):
            output = model(
                input_ids=batch.token_ids[None],
                position_ids=batch.positions[None],
                attention_plan=batch.plan,
                kv=fill,
                logits_to_keep=(first + lengths - 1).to(device),
                use_cache=False,
            )
        return output.logits[0]

    @torch.no_grad()
    def step(self, model: PreTrainedModel, tokens: Tensor, positions: Tensor, num_keys: int) -> Tensor:
        """Continues the sequences of the first n slots by `tokens` [n] at `positions` [n]; returns logits [n, V].

        The positions of all sequences in use must be below `num_keys`; the logits of other slots are undefined.
        """
        kv = _Step(cache=self, positions=positions, num_keys=num_keys)
        with packed_attention(model, CACHED):
            output = model(input_ids=tokens[:, None], position_ids=positions[:, None], kv=kv, use_cache=False)
        return output.logits[:, -1]

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copies the content of the slots `source` to the slots `target`, [n] int64 each. No slot may be in both."""
        for layer in self._layers.values():
            for held in layer:
                held[target] = held[source]

    def of_layer(self, module: Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the keys and values, [num_slots, H_kv, capacity, d] each, of the layer with the attention
        `module`."""
        if module not in self._layers:
            # Zeros, because masked values are multiplied by 0, which must not give NaN.
            held = tuple(x.new_zeros(self.num_slots, x.shape[1], self.capacity, x.shape[3]) for x in (key, value))
            self._layers[module] = (held[0], held[1])
        return self._layers[module]


class _Attend(Protocol):
    def attend(self, module: Module, query: Tensor, key: Tensor, value: Tensor, **keywords: Any) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fill:
    """The keyword `kv` of a prefill: token `source` of the pack goes to `position` of `slot`; [K] int64 each."""

    cache: SlotCache
    source: Tensor
    slot: Tensor
    position: Tensor

    def attend(self, module: Module, query: Tensor, key: Tensor, value: Tensor, **keywords: Any) -> Tensor:
        for held, new in zip(self.cache.of_layer(module, key, value), (key, value), strict=True):
            held[self.slot, :, self.position] = new[0].transpose(0, 1)[self.source]
        return AttentionInterface()[PACKED](module, query, key, value, None, **keywords)[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """The keyword `kv` of a decode step, which adds one token to each of the first n slots."""

    cache: SlotCache
    positions: Tensor
    """[n] int64: position of the new token in each slot"""
    num_keys: int
    masks: dict[int | None, Tensor] = field(default_factory=dict)
    """Sliding window -> the mask [n, 1, 1, num_keys] that is added to the scores, in the dtype of the queries."""

    def attend(
        self,
        module: Module,
        query: Tensor,  # [n, H, 1, d]
        key: Tensor,  # [n, H_kv, 1, d]
        value: Tensor,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        sliding_window: int | None = None,
        **_: Any,
    ) -> Tensor:
        """Returns the attention output, [n, 1, H, d]."""
        num = len(self.positions)
        slots = torch.arange(num, device=query.device)
        held = self.cache.of_layer(module, key, value)
        for buffer, new in zip(held, (key, value), strict=True):
            buffer[slots, :, self.positions] = new[:, :, 0]
        keys, values = (buffer[:num, :, : self.num_keys] for buffer in held)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        grouped = query.reshape(num, keys.shape[1], -1, query.shape[-1])  # queries that share a key are adjacent
        mask = self._mask(sliding_window, query.dtype)
        if softcap is None:
            attended = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
        else:
            scores = softcap * torch.tanh(grouped @ keys.transpose(2, 3) * scale / softcap) + mask
            attended = scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ values
        return attended.reshape(num, 1, query.shape[1], -1)

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        if window not in self.masks:
            distance = self.positions[:, None] - torch.arange(self.num_keys, device=self.positions.device)
            hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, float("-inf"))
            self.masks[window] = mask[:, None, None]
        return self.masks[window]


def rounded_up(num_keys: int) -> int:
    """Rounds up to a multiple of KEY_BLOCK."""
    return -(-num_keys // KEY_BLOCK) * KEY_BLOCK


def _attend(
    module: Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # always None, because positions decide which keys a query sees
    *,
    kv: _Attend,
    dropout: float = 0.0,
    s_aux: Tensor | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls; `kv` writes to and reads from the slots."""
    if dropout or s_aux is not None:
        raise ValueError("cached attention has neither dropout nor attention sinks; set attention_dropout to 0")
    return kv.attend(module, query, key, value, **keywords), None


AttentionInterface.register(CACHED, _attend)
