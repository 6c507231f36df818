"""Model FLOPs utilisation (MFU): necessary operations per second, divided by the peak rate of the device.

Definition: Chowdhery et al. 2022, arXiv 2204.02311, appendix B. An operation is one floating-point multiplication or
addition. A forward pass counts

    2 per weight of the layers' matrix products, for every token
    4 head_dim per attention head and layer, for every query and every key up to its position
    2 per weight of the head, for every row whose output is used: scored tokens, scores, values

and the backward pass twice as many. Not counted are padding, recomputation (checkpointing), unnecessary work (unused
rows of the head, future keys), embeddings, norms, softmax and the optimiser. If a prompt that two responses share is
computed once, it counts once.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn import Linear
from transformers import AutoModel, PretrainedConfig

from fastrlhf.runtime.system_metrics import PEAKS

Span = tuple[int, int]
"""(number of earlier tokens, number of new tokens). The new tokens are computed once and attend to the earlier
tokens."""


def training_operations(config: PretrainedConfig, spans: Iterable[Span], *, rows: int, outputs: int) -> int:
    """Returns the number of operations of a forward and a backward pass over `spans`.

    The head has `outputs` outputs (the vocabulary size, or 1) and is applied to `rows` rows. The count assumes full
    attention in every layer, even if the layer has a sliding window.
    """
    with torch.device("meta"):
        trunk = AutoModel.from_config(config)
    weights = sum(module.weight.numel() for module in trunk.modules() if isinstance(module, Linear))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_pair = 4 * head_dim * config.num_attention_heads * config.num_hidden_layers
    forward = 2 * rows * config.hidden_size * outputs
    for before, new in spans:
        forward += 2 * weights * new + per_pair * (new * before + new * (new + 1) // 2)
    return 3 * forward


def utilisation(operations_per_second: float, device: str) -> float | None:
    """Returns the MFU on the named device, from 0 to 1; None if the device is not in `PEAKS`."""
    peak = PEAKS.get(device)
    return peak and operations_per_second / peak
