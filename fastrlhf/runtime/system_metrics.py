"""Measures what a run does to its machine: the `system/` metrics of each step. They differ between equal runs, so the
log and the services have them, but the history that a trainer returns does not.

    system/tokens_per_second   num_tokens of the step / seconds since the previous row, evaluations and saving included
    system/cpu_memory_gib      peak resident memory of this process since its start
    system/gpu_memory_gib      peak of torch's allocations on this process's GPU since its start
    system/gpu_utilization     per cent of the last second or so in which a kernel ran, as nvidia-smi reports it
    system/mfu                 model FLOPs utilisation, between 0 and 1

All are measured on rank 0, except the tokens, which are counted over all ranks. Measuring them does not wait for the
GPU.
"""

from __future__ import annotations

import resource
import sys
import time
from contextlib import suppress

import torch
from torch.nn import Embedding
from transformers import PreTrainedModel

from fastrlhf.distributed.ranks import world_size

PEAKS = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
}
"""Device name -> peak operations per second of dense bfloat16 products, from the data sheets (H100, H200: SXM)."""

GIB = 1 << 30


class SystemMetrics:
    """Measures the time, memory and utilisation of one step after the other.

    MFU follows Chowdhery et al. 2022 (arXiv 2204.02311, appendix B) without attention: 6 operations per trained weight
    of a matrix product and token, 4 per frozen weight, divided by the seconds of the step and the peak of the GPUs. It
    counts only the trained model's passes over `num_tokens`, so in on-policy runs, whose steps also sample and judge,
    it is a lower bound. It is left out for GPUs that `PEAKS` lacks, mixtures of experts and quantised models.
    """

    def __init__(self, model: PreTrainedModel | None) -> None:
        self._operations = operations_per_token(model) if model is not None else None
        self._gpu = torch.cuda.is_available()
        self._peak = PEAKS.get(torch.cuda.get_device_name()) if self._gpu else None
        self._last = time.monotonic()

    def step(self, num_tokens: float) -> dict[str, float]:
        """Returns the metrics of the step that ends now; `num_tokens` are the tokens of all processes, 0 if unknown."""
        now = time.monotonic()
        rate = num_tokens / max(now - self._last, 1e-9)
        self._last = now
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, kibibytes elsewhere
        metrics = {"system/tokens_per_second": rate} if num_tokens else {}
        metrics["system/cpu_memory_gib"] = peak / (GIB if sys.platform == "darwin" else 1 << 20)
        if self._gpu:
            metrics["system/gpu_memory_gib"] = torch.cuda.max_memory_allocated() / GIB
            with suppress(Exception):  # NVML is missing, or the driver refuses it
                metrics["system/gpu_utilization"] = float(torch.cuda.utilization())
        if self._peak and self._operations and num_tokens:
            metrics["system/mfu"] = self._operations * rate / (self._peak * world_size())
        return metrics


def is_of_machine(name: str) -> bool:
    """Returns whether a column of metrics.jsonl is the step, the time or a metric of the machine."""
    return name in ("step", "time") or name.startswith("system/")


def operations_per_token(model: PreTrainedModel) -> int | None:
    """Returns the floating-point operations of a forward and a backward pass per token: 6 per trained and 4 per frozen
    weight of a matrix product. None for mixtures of experts and quantised models, for which the weights do not
    determine this number."""
    head = model.get_output_embeddings()
    tables = {id(module.weight) for module in model.modules() if isinstance(module, Embedding)}
    operations = 0
    for weight in model.parameters():
        if weight.ndim > 2 or not weight.is_floating_point():
            return None
        if weight.ndim == 2 and (id(weight) not in tables or (head is not None and weight is head.weight)):
            operations += (6 if weight.requires_grad else 4) * weight.numel()
    return operations
