"""Tests which tiles `_head.py` chooses.

The results of `_head.py` are tested in test_linear_logprob.py and test_linear_policy_loss.py.
"""

import torch

from fastrlhf_kernels import _head as head


def test_bias_soft_cap_or_row_temperature_need_narrower_tiles():
    assert not head.is_heavy(None, None, None)
    assert head.is_heavy(torch.zeros(3), None, None)
    assert head.is_heavy(None, torch.ones(3), None)
    assert head.is_heavy(None, None, 30.0)
