"""Tests when an op computes the loss and its gradients in one pass, and how it chooses the chunks. test_linear_nll.py
and test_linear_policy_loss.py test the results."""

from types import SimpleNamespace

import pytest
import torch

from fastrlhf_kernels._one_shot import chunk_rows, takes_one_shot

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def memory(monkeypatch):
    """Pretends that there is a GPU; returns a function that sets its memory."""

    def pretend(gigabytes):
        found = SimpleNamespace(total_memory=gigabytes * 10**9)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)

    return pretend


@pytest.mark.parametrize(
    ("rows", "expected"), [(0, 128), (100, 128), (600, 256), (1024, 256), (2048, 512), (8192, 512)]
)
def test_a_cpu_takes_a_quarter_of_the_rows_and_at_most_512(rows, expected):
    assert chunk_rows(rows, 4 * 50257, CPU) == expected


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
def test_a_gpu_takes_4096_rows_or_a_share_of_its_memory(memory, gigabytes, rows, vocab, expected):
    memory(gigabytes)
    assert chunk_rows(rows, 2 * vocab, GPU) == expected


@pytest.mark.parametrize(
    ("rows", "trained", "live_share", "expected"),
    [
        (8192, True, 1.0, True),
        (512, True, 1.0, True),
        (256, True, 1.0, False),  # writing the head's gradient takes longer than a product
        (256, False, 1.0, True),
        (8192, True, 0.6, False),  # the other form skips rows without a gradient
        (8192, False, 0.7, True),
    ],
)
def test_the_form_on_a_gpu_depends_on_the_shape_and_on_the_share_of_rows_with_a_gradient(
    memory, rows, trained, live_share, expected
):
    memory(85)

    class Weight:
        device, dtype = GPU, torch.bfloat16

        def __len__(self):
            return 128256

    assert takes_one_shot("auto", rows, Weight(), trained, True, live_share) == expected  # pyright: ignore[reportArgumentType]
    assert takes_one_shot("one_shot", rows, Weight(), trained, True, live_share)  # pyright: ignore[reportArgumentType]
    assert not takes_one_shot("two_steps", rows, Weight(), trained, True, live_share)  # pyright: ignore[reportArgumentType]


def test_a_cpu_always_takes_one_pass():
    assert takes_one_shot("auto", 1, torch.ones(2, 2), True, False, 0.0)
