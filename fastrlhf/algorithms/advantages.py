"""Pure functions that compute advantages without a critic, and statistics over a batch of episodes. GAE is a kernel
(fastrlhf_kernels.gae)."""

from __future__ import annotations

import torch
from torch import Tensor


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Returns (values - mean) / std over the rows at which `mask` is True, and 0 in the other rows.

    values [R] float32, mask [R] bool. Population variance; `shift_mean=False` keeps the mean (used for rewards).
    Constant values give zeros (or are unchanged if the mean is kept), and a mask that is False everywhere gives zeros.
    """
    mean, scale = _mean_and_scale(values, mask)
    whitened = (values - mean) * scale + (0.0 if shift_mean else mean)
    return torch.where(mask, whitened, 0.0)


def whitening_scale(values: Tensor, mask: Tensor) -> Tensor:
    """Returns the factor by which `whiten` multiplies deviations from the mean: 1 / std, 0-dim; 0 for constant
    values."""
    return _mean_and_scale(values, mask)[1]


def _mean_and_scale(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    count = mask.sum().clamp(min=1)
    kept = torch.where(mask, values, 0.0)
    mean = kept.sum() / count
    std = torch.where(mask, (values - mean) ** 2, 0.0).sum().div(count).sqrt()
    # Deviations of constant values are rounding errors, which must not be scaled up to 1.
    return mean, torch.where(std > 1e-6 * mean.abs(), 1 / std.clamp(min=1e-8), 0.0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Returns 1 - Var(returns - values) / Var(returns) over the rows of `mask`, 0-dim float32; 0 if the returns do not
    vary."""
    count = mask.sum().clamp(min=1)

    def variance(x: Tensor) -> Tensor:
        mean = torch.where(mask, x, 0.0).sum() / count
        return torch.where(mask, (x - mean) ** 2, 0.0).sum() / count

    of_returns = variance(returns)
    return torch.where(of_returns > 0, 1 - variance(returns - values) / of_returns, 0.0)


def leave_one_out(episode_return: Tensor, group_size: int) -> Tensor:
    """Advantages of RLOO (Ahmadian et al. 2024, arXiv 2402.14740, eq. 8): A_i = R_i - mean of R_j over the other
    episodes of the group.

    episode_return [N] float32: the sum of the rewards of each episode. Each `group_size` >= 2 consecutive episodes are
    a group that started in the same state. Returns [N]. The other episodes do not depend on the tokens of episode i, so
    the policy gradient is unbiased.
    """
    groups = episode_return.view(-1, group_size)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).flatten()


def token_leave_one_out(token_reward: Tensor, cu_rows: Tensor, group_size: int) -> Tensor:
    """Returns [R], each token reward minus the average, over the other episodes of the group, of their mean reward per
    token.

    token_reward [R] float32; cu_rows (N+1,) int32, groups as in `leave_one_out`. It is the process part of PRIME's
    advantage (Cui et al. 2025, arXiv 2502.01456) before the sum from each token to the end of its episode.
    """
    lengths = cu_rows.diff().long()
    mean = torch.segment_reduce(token_reward, "mean", lengths=lengths, unsafe=True).view(-1, group_size)
    others = (mean.sum(1, keepdim=True) - mean) / (group_size - 1)
    return token_reward - others.flatten().repeat_interleave(lengths, output_size=len(token_reward))


def group_normalised(episode_return: Tensor, group_size: int, scale: str = "group") -> Tensor:
    """Advantages of GRPO (Shao et al. 2024, arXiv 2402.03300, section 4.1.2): A_i = (R_i - mean R) / (std R + 1e-4)
    over the group.

    Shapes as in `leave_one_out`; sample standard deviations (n - 1). `scale` "batch" divides by the standard deviation
    of all returns, and "none" does not divide (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783). A group whose returns are
    equal gives zeros.
    """
    groups = episode_return.view(-1, group_size)
    deviation = groups - groups.mean(1, keepdim=True)
    if scale == "none":
        return deviation.flatten()
    std = groups.std(1, keepdim=True) if scale == "group" else episode_return.std()
    return (deviation / (std + 1e-4)).flatten()


def length_weighted(episode_return: Tensor, lengths: Tensor, group_size: int) -> Tensor:
    """Advantages of OPO (Hao et al. 2025, arXiv 2505.23585): A_i = R_i - sum_j l_j R_j / sum_j l_j over the group.

    Shapes as in `leave_one_out`; lengths [N] int64 in tokens. This equals R_i minus the leave-one-out mean with weights
    l_j, times 1 - l_i / sum_j l_j.
    """
    groups, weights = episode_return.view(-1, group_size), lengths.view(-1, group_size).to(episode_return.dtype)
    baseline = (weights * groups).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
    return (groups - baseline).flatten()
