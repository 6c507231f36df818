"""Statistics of a whole batch of episodes, on flat per-token tensors. Pure. (GAE itself is a kernel:
fastrlhf_kernels.gae.)"""

from __future__ import annotations

import torch
from torch import Tensor


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """(values - mean) / std over the rows where `mask` is True; elsewhere 0.

    values [R] float32, mask [R] bool. Population variance; `shift_mean=False` keeps the mean (used for rewards). A
    constant gives zeros (or itself, where the mean is kept), and a mask that is False everywhere gives zeros.
    """
    count = mask.sum().clamp(min=1)
    kept = torch.where(mask, values, 0.0)
    mean = kept.sum() / count
    std = torch.where(mask, (values - mean) ** 2, 0.0).sum().div(count).sqrt()
    # A constant has no scale: what rounding leaves of its deviations must not be blown up to 1.
    scale = torch.where(std > 1e-6 * mean.abs(), 1 / std.clamp(min=1e-8), 0.0)
    whitened = (values - mean) * scale + (0.0 if shift_mean else mean)
    return torch.where(mask, whitened, 0.0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over the rows of `mask`, 0-dim float32; 0 where the returns do not
    vary."""
    kept_returns, residual = returns[mask], (returns - values)[mask]
    variance = kept_returns.var(correction=0)
    return torch.where(variance > 0, 1 - residual.var(correction=0) / variance, 0.0)
