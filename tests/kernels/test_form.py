"""Tests which form of an op (one shot or two steps) is chosen, how many rows a chunk has, and that counted memory
equals measured memory."""

import pytest
import torch

from bench.measure import peak_bytes
from fastrlhf_kernels import linear_nll
from fastrlhf_kernels._form import chunk_rows, find_needs, is_faster, takes_one_shot, workspace_bytes

GB = 10**9
ALL, FROZEN, NONE = (True, True, False), (True, False, False), (False, False, False)


@pytest.mark.parametrize(
    ("rows", "vocab", "expected"),
    [
        (0, 50257, 128),
        (100, 50257, 128),
        (600, 50257, 256),
        (1024, 50257, 256),
        (2048, 50257, 512),
        (8192, 50257, 512),
        (2048, 1000, 1024),  # two chunks, because the logits of 1048 rows take 4 MiB
        (2048, 100, 2048),
    ],
)
def test_a_cpu_takes_a_quarter_of_the_rows_and_at_most_512_or_4_mib(rows, vocab, expected):
    assert chunk_rows(rows, 4 * vocab, None) == expected


@pytest.mark.parametrize(
    ("gigabytes", "rows", "vocab", "expected"),
    [
        (85, 8192, 128256, 4096),
        (85, 16384, 151936, 4096),
        (85, 3000, 151936, 3072),  # one chunk
        (85, 5000, 128256, 2560),  # two equal chunks
        (24, 8192, 128256, 1408),  # 24 GB / 64 are 1461 rows, which makes 6 chunks
        (16, 8192, 151936, 1024),  # never fewer than 1024
    ],
)
def test_a_gpu_takes_4096_rows_or_a_share_of_its_memory(gigabytes, rows, vocab, expected):
    assert chunk_rows(rows, 2 * vocab, gigabytes * GB) == expected


@pytest.mark.parametrize(
    ("rows", "needs", "live_share", "expected"),
    [
        (8192, ALL, 1.0, True),
        (512, ALL, 1.0, True),
        (256, ALL, 1.0, False),  # writing the gradient of the head takes longer than a product
        (256, FROZEN, 1.0, True),
        (8192, ALL, 0.6, False),  # the other form skips rows without a gradient
        (8192, FROZEN, 0.6, False),
        (8192, FROZEN, 0.7, True),
        (256, NONE, 1.0, False),  # like with all gradients, so that the loss has the same bits
        (8192, NONE, 1.0, True),
    ],
)
def test_the_form_on_a_gpu_depends_on_the_shape_and_on_the_share_of_rows_with_a_gradient(
    rows, needs, live_share, expected
):
    assert is_faster(rows, 2 * 128256, needs, 85 * GB, live_share) == expected


@pytest.mark.parametrize("needs", [ALL, FROZEN, NONE])
def test_a_cpu_takes_one_pass_if_a_quarter_of_the_rows_has_a_gradient(needs):
    head = torch.ones(2, 2)
    assert takes_one_shot("auto", 1, head, needs, False)
    assert takes_one_shot("auto", 1, head, needs, False, 0.3)
    assert not takes_one_shot("auto", 1, head, needs, False, 0.2)  # nearly all rows are clipped or have no advantage
    assert takes_one_shot("one_shot", 1, head, needs, False)
    assert not takes_one_shot("two_steps", 1, head, needs, False)


def test_needs_follow_the_tensors_and_the_grad_mode():
    hidden, weight = torch.ones(2, 2, requires_grad=True), torch.ones(2, 2)
    assert find_needs(hidden, weight, None) == (True, False, False)
    assert find_needs(weight, hidden, hidden[0]) == (False, True, True)
    with torch.no_grad():
        assert find_needs(hidden, hidden, hidden) == (False, False, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_counted_bytes_are_those_of_a_measured_step(dtype, trained, softcap):
    rows, size, vocab = 640, 64, 9001
    hidden = torch.randn(rows, size).to(dtype).requires_grad_()
    weight = torch.randn(vocab, size).to(dtype).requires_grad_(trained)
    targets = torch.randint(0, vocab, (rows,))
    held = [linear_nll(hidden, weight, targets, num_tokens=1, softcap=softcap)]  # makes the one-time allocations
    measured = peak_bytes(lambda: held.append(linear_nll(hidden, weight, targets, num_tokens=1, softcap=softcap)))
    results = hidden.nbytes + trained * weight.nbytes
    counted = workspace_bytes(hidden, weight, (True, trained, False), softcap=softcap is not None)
    assert 0.9 * counted < measured - results < 1.05 * counted


@pytest.mark.parametrize(
    ("dtype", "rows", "expected"),
    [
        (torch.bfloat16, 8192, 4096 * 128256 * 2 + 4 * 128256 * 64),  # the sum of two chunks is float32
        (torch.bfloat16, 4096, 4096 * 128256 * 2),
        (torch.float32, 8192, 2048 * 128256 * 4),  # 85 GB / 64 are 2588 rows
    ],
)
def test_the_bytes_on_a_gpu_are_the_logits_of_a_chunk_and_a_float32_sum(dtype, rows, expected):
    hidden, weight = (torch.empty(n, 64, dtype=dtype, device="meta") for n in (rows, 128256))
    assert workspace_bytes(hidden, weight, ALL, memory=85 * GB) == expected
