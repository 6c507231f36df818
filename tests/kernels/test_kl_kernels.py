"""Tests of the tiles and launches of the Triton path of `linear_kl`; test_linear_kl.py tests its results."""

import pytest
import torch

from fastrlhf_kernels import _head as head
from fastrlhf_kernels import _kl_kernels as kl_kernels
from fastrlhf_kernels import _tiles as tiles
from fastrlhf_kernels import linear_kl
from tests.kernels.test_linear_kl import assert_matches_reference, everything, inputs, targets_of
from tests.kernels.test_tiles import FakeMatrix


@pytest.mark.usefixtures("small_blocks")
def test_tma_descriptors_load_the_same_tiles(monkeypatch: pytest.MonkeyPatch):
    # No tile divides these sizes; rows have 80 and 96 bytes
    tensors, (leaves, options) = inputs(33, 20, 24, 65), everything(33, 65)
    plain = linear_kl(*tensors, **leaves, **options, entropy=True, impl="triton")
    monkeypatch.setattr(tiles, "INTERPRETER", tiles.INTERPRETER._replace(descriptors=True))
    loaded = linear_kl(*tensors, **leaves, **options, entropy=True, impl="triton")
    assert all(torch.equal(a, b) for a, b in zip(plain, loaded, strict=True))
    assert_matches_reference(tensors, leaves, "triton", **options)


@pytest.mark.usefixtures("small_blocks")
def test_a_row_has_the_same_bits_in_every_pack():
    hidden, weight, reference_hidden, reference_weight = inputs(40, 5, 6, 70)
    targets, some = targets_of(40, 70), slice(17, 23)
    whole = linear_kl(hidden, weight, reference_hidden, reference_weight, targets=targets, entropy=True, impl="triton")
    part = linear_kl(
        hidden[some],
        weight,
        reference_hidden[some],
        reference_weight,
        targets=targets[some],
        entropy=True,
        impl="triton",
    )
    assert all(torch.equal(a[some], b) for a, b in zip(whole, part, strict=True))


@pytest.mark.usefixtures("small_blocks")
def test_the_split_of_the_vocabulary_changes_only_the_last_digits(monkeypatch: pytest.MonkeyPatch):
    results = []
    for share in (16, 48, 256):
        monkeypatch.setattr(head, "SHARE", share)
        results.append(linear_kl(*inputs(20, 4, 5, 130), targets=targets_of(20, 130), entropy=True, impl="triton"))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        (FakeMatrix(32, torch.bfloat16), tiles.KL_FORWARD[9].light),
        (FakeMatrix(60, torch.bfloat16), tiles.KL_FORWARD[8].light),  # TMA cannot load rows of this length
        (FakeMatrix(32, torch.float16), tiles.KL_FORWARD[8].light),
        (FakeMatrix(32, torch.float32), tiles.FLOAT32),
    ],
)
def test_the_tiles_are_chosen_for_the_reference_too(reference: FakeMatrix, expected, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    policy = FakeMatrix(64, torch.bfloat16)
    assert tiles.choose_tiles(tiles.KL_FORWARD, policy, policy, False, [policy, reference]) == expected


@pytest.mark.parametrize("option", ["bias", "reference_bias", "softcap", "temperature"])
def test_bias_or_soft_cap_of_policy_or_reference_need_narrower_tiles(option: str, monkeypatch: pytest.MonkeyPatch):
    tensors, asked = inputs(3, 2, 2, 5), []
    value = {"bias": torch.ones(5), "reference_bias": torch.ones(5), "softcap": 2.0, "temperature": torch.ones(3)}[
        option
    ]

    def choose_tiles(table, hidden, weight, heavy, reference):
        asked.append(heavy)
        return tiles.choose_tiles(table, hidden, weight, heavy, reference)

    monkeypatch.setattr(kl_kernels, "choose_tiles", choose_tiles)
    linear_kl(*tensors, impl="triton")
    linear_kl(*tensors, **{option: value}, impl="triton")
    assert asked == [False, True]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_compiled_at_the_size_of_a_real_head(dtype: torch.dtype):
    tensors = [x.cuda() for x in inputs(300, 896, 1024, 50_257)]
    tensors = [tensors[0].to(dtype), (tensors[1] / 30).to(dtype), tensors[2].to(dtype), (tensors[3] / 30).to(dtype)]
    targets = targets_of(300, 50_257).cuda()
    assert_matches_reference(tensors, impl="triton", targets=targets)
    policy = [x.requires_grad_() for x in tensors[:2]]
    out = linear_kl(*policy, *policy, impl="triton")
    out.kl.sum().backward()
    assert out.kl.eq(0).all()
    assert all(x.grad.eq(0).all() for x in policy)
