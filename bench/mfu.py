"""Model FLOPs utilisation: the operations that a model needs for its tokens, over the time taken and the device's peak
(Chowdhery et al. 2022, arXiv 2204.02311, appendix B).

An operation is one floating-point multiplication or addition. A forward pass counts

    2 per weight of the layers' matrix products, for every token
    4 head_dim per head and layer, for every pair of a query and a key that causality lets it see
    2 per weight of the head, for every row that is read from it: scored tokens, scores, values

and the backward pass twice that. Not counted are padding, recomputation (checkpointing), unnecessary work (the head on
rows that are not read, future keys), embeddings, norms, softmax and the optimiser. A prompt that two responses share is
counted once where it is computed once.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn import Linear
from transformers import AutoModel, PretrainedConfig

PEAKS = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
}
"""Operations per second of dense bfloat16 matrix products, by the data sheets; H100 and H200 on SXM."""

Span = tuple[int, int]
"""(number of earlier tokens, number of its tokens): a run of tokens that is computed once and attends to the earlier
ones."""


def training_operations(config: PretrainedConfig, spans: Iterable[Span], *, rows: int, outputs: int) -> int:
    """Operations of a forward and a backward over `spans`; the head has `outputs` (the vocabulary, or 1) and is read at
    `rows`.

    Every layer is taken to attend fully: no sliding windows.
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
    """MFU in 0..1 of the peak of the named device; None if `PEAKS` lacks it."""
    peak = PEAKS.get(device)
    return peak and operations_per_second / peak
