"""Chooses between the one-shot form and the two-step form of a fused op, and the rows of a chunk of the one-shot form.

    one shot     the forward computes the loss and all gradients (`_one_shot.py`)
    two steps    `linear_logprob`, then the loss; the backward computes the logits again

The two-step form has four matrix products, or three if the head is frozen; the one-shot form has one fewer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrlhf_kernels._blocks import CPU_BLOCK
from fastrlhf_kernels._checks import check_choice
from fastrlhf_kernels._tiles import cdiv

CPU_ROWS, GPU_ROWS = 512, 4096
"""Largest number of rows of a chunk."""
MULTIPLE = 128
CPU_BYTES = 1 << 22
"""On a CPU a chunk may always have as many rows as have logits of this size, because a chunk costs about 1 ms."""
GPU_SHARE = 64
"""On a GPU the logits of a chunk take at most 1 / GPU_SHARE of its memory; a chunk has at least GPU_ROWS / 4 rows."""
ONE_CHUNK_FROM, CHUNKS_FROM = 512, 1536
"""On a GPU, the numbers of rows (of a single chunk, and of each of several chunks) from which the product that is saved
takes longer than the added traffic of a trained head: 2 F / B and 6 F / B rows for F operations and B bytes per second.
On an H100 that is 470 and 1411 rows."""
GPU_LIVE = 2 / 3
"""On a GPU, the share of rows with a gradient from which two products over all rows are no more work than three over
these rows."""
CPU_LIVE = 0.25
"""On a CPU, the share of rows with a gradient from which the saved product takes longer than storing the logits of all
rows (measured at 1024 rows, 512 x 50257: 0.90 of the two steps with a share of 0.4, 1.10 with a share of 0.1)."""

Needs = tuple[bool, bool, bool]
"""Whether hidden, weight and bias need a gradient."""


def find_needs(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Needs:
    """Returns which of these tensors need a gradient in the current grad mode."""
    on = torch.is_grad_enabled()
    return on and hidden.requires_grad, on and weight.requires_grad, on and bias is not None and bias.requires_grad


def takes_one_shot(
    form: str, num_rows: int, weight: Tensor, needs: Needs, triton: bool, live_share: float = 1.0
) -> bool:
    """Returns whether an op with the argument `form` takes the one-shot form; with "auto" the faster form is taken.

    `live_share` is the share of rows with a gradient. Raises ValueError for an unknown form.
    """
    check_choice("form", form, ("auto", "one_shot", "two_steps"))
    if form != "auto":
        return form == "one_shot"
    native = weight.dtype == torch.bfloat16 and triton
    row_bytes = len(weight) * (2 if native else 4)
    return is_faster(num_rows, row_bytes, needs, gpu_memory(weight.device), live_share)


def is_faster(num_rows: int, row_bytes: int, needs: Needs, memory: int | None, live_share: float = 1.0) -> bool:
    """Returns whether the one-shot form is faster for `num_rows` rows whose logits take `row_bytes` each. `memory` is
    the memory of the GPU in bytes, None for a CPU.

    - Without any gradient (evaluation) the form is the one with all gradients, so that the loss has the same bits.
    - On a CPU both forms leave out the rows without a gradient in the backward products, so that few such rows do not
      matter.
    - On a GPU the one-shot form computes two products for all rows, because counting rows would make the host wait;
      the two steps compute three for the rows with a gradient. A trained head also costs memory traffic, which pays
      only from some number of rows on.
    """
    if live_share < (CPU_LIVE if memory is None else GPU_LIVE):
        return False
    if memory is None:
        return True
    if not needs[1] and any(needs):
        return True
    step = chunk_rows(num_rows, row_bytes, memory)
    return num_rows >= ONE_CHUNK_FROM if step >= num_rows else step >= CHUNKS_FROM


def chunk_rows(num_rows: int, row_bytes: int, memory: int | None) -> int:
    """Returns the number of rows of a chunk, for `num_rows` rows whose logits take `row_bytes` bytes each. All chunks
    have about equally many rows, a multiple of MULTIPLE. `memory` is the memory of the GPU in bytes, None for a CPU.

    A CPU takes at most a quarter of the rows, so that the op needs far less memory than all logits, except if there are
    few logits. A GPU takes GPU_ROWS, because every chunk reads the weight twice and its gradient once; a small GPU
    takes fewer. The number depends on the total memory of the GPU and not on its free memory, so that a run always adds
    in the same order.
    """
    if memory is None:
        most = max(min(CPU_ROWS, max(num_rows // 4, MULTIPLE)), CPU_BYTES // row_bytes)
    else:
        most = min(GPU_ROWS, max(memory // GPU_SHARE // row_bytes, GPU_ROWS // 4))
    num_chunks = max(cdiv(num_rows, most), 1)
    return max(cdiv(cdiv(num_rows, num_chunks), MULTIPLE), 1) * MULTIPLE


def gpu_memory(device: torch.device) -> int | None:
    """Returns the whole memory of a GPU in bytes, or None for a CPU."""
    return None if device.type == "cpu" else torch.cuda.get_device_properties(device).total_memory


def workspace_bytes(
    hidden: Tensor, weight: Tensor, needs: Needs, *, softcap: bool = False, memory: int | None = None
) -> int:
    """Returns the bytes that the one-shot form of `linear_nll` holds at its peak beyond its arguments and its results.

    `memory`, the bytes of a GPU, stands for the Triton implementation, None for the implementation in torch on a CPU.
    """
    num_rows, (vocab, size) = len(hidden), weight.shape
    narrow = hidden.dtype == weight.dtype == torch.bfloat16
    width = 2 if narrow and memory is not None else 4
    columns = cdiv(vocab, 16) * 16 if memory is not None else vocab
    step = chunk_rows(num_rows, columns * width, memory)
    rows = min(step, num_rows)
    logits = rows * columns * width
    summed = 4 * vocab * size * (narrow and needs[1] and num_rows > step)  # float32 sum of a bfloat16 gradient
    if memory is not None:
        return logits + summed
    part = min(vocab, CPU_BLOCK[1])
    cast = (hidden.dtype != torch.float32) * num_rows + (weight.dtype != torch.float32) * part
    kept = num_rows * (narrow and needs[0]) + rows  # float32 gradients of hidden: of all rows, of a chunk
    return logits + summed + 4 * size * (cast + kept) + 4 * rows * part * 3 * softcap
