import pytest
import torch
from torch import Tensor

from fastrlhf_kernels import gae
from fastrlhf_kernels.gae import gae_reference
from tests.tolerance import assert_as_exact


def ragged(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    reward, value = torch.randn(2, sum(lengths), generator=generator)
    return reward, value, cu_seqlens


def test_hand_computed_segment():
    # gamma = lam = 0.5. deltas: 1 + 0.5*2 - 1 = 1;  0 + 0.5*4 - 2 = 0;  2 - 4 = -2
    # A_3 = -2;  A_2 = 0 + 0.25 * -2 = -0.5;  A_1 = 1 + 0.25 * -0.5 = 0.875
    reward, value = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([1.0, 2.0, 4.0])
    advantage, returns = gae(reward, value, torch.tensor([0, 3]), gamma=0.5, lam=0.5)
    assert advantage.tolist() == [0.875, -0.5, -2.0]
    assert returns.tolist() == [1.875, 1.5, 2.0]


def test_hand_computed_segment_that_was_cut():
    # the last delta gains 0.5 * 8: A_3 = 2;  A_2 = 0.5;  A_1 = 1.125
    reward, value = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([1.0, 2.0, 4.0])
    advantage, _ = gae(reward, value, torch.tensor([0, 3]), gamma=0.5, lam=0.5, bootstrap=torch.tensor([8.0]))
    assert advantage.tolist() == [1.125, 0.5, 2.0]


def test_rows_outside_the_mask_pass_the_advantage_through_and_count_for_nothing():
    nan = float("nan")
    reward, value = torch.tensor([1.0, nan, 0.0, nan, nan, 2.0, nan]), torch.tensor([1.0, nan, 2.0, nan, nan, 4.0, nan])
    mask = reward.isfinite()
    advantage, returns = gae(reward, value, torch.tensor([0, 7]), gamma=0.5, lam=0.5, mask=mask)
    assert advantage.tolist() == [0.875, 0.0, -0.5, 0.0, 0.0, -2.0, 0.0]
    assert returns.tolist() == [1.875, 0.0, 1.5, 0.0, 0.0, 2.0, 0.0]


def test_a_masked_tail_does_not_come_between_the_last_row_and_its_bootstrap():
    mask = torch.tensor([True, False])
    out = gae(torch.ones(2), torch.zeros(2), torch.tensor([0, 2]), mask=mask, bootstrap=torch.tensor([5.0]))
    assert out[0].tolist() == [6.0, 0.0]


@pytest.mark.parametrize("lengths", [[], [0], [1], [0, 0, 1, 0], [5, 0, 1, 17, 2, 0], [64], [33, 31, 65]])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 1.0), (0.9, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("with_mask", [True, False])
def test_it_equals_the_textbook_loop(lengths: list[int], gamma: float, lam: float, with_mask: bool):
    reward, value, cu_seqlens = ragged(lengths)
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(len(reward), generator=generator) > 0.4 if with_mask else None
    bootstrap = torch.randn(len(lengths), generator=generator)
    options = {"gamma": gamma, "lam": lam, "mask": mask}
    out = gae(reward, value, cu_seqlens, bootstrap=bootstrap, **options)
    baseline = gae_reference(reward, value, cu_seqlens, bootstrap=bootstrap, **options)
    truth = gae_reference(reward.double(), value.double(), cu_seqlens, bootstrap=bootstrap.double(), **options)
    for name, *numbers in zip(("advantage", "returns"), out, baseline, truth, strict=True):
        assert_as_exact(name, *numbers)


def test_half_precision_inputs_are_computed_in_float32():
    reward, value, cu_seqlens = ragged([40, 3])
    reward, value = reward.bfloat16(), value.bfloat16()
    expected = gae(reward.float(), value.float(), cu_seqlens)
    assert all(torch.equal(a, b) for a, b in zip(gae(reward, value, cu_seqlens), expected, strict=True))


def test_with_lam_and_gamma_one_the_returns_are_the_rewards_to_go():
    reward, value, cu_seqlens = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.randn(4), torch.tensor([0, 3, 4])
    _, returns = gae(reward, value, cu_seqlens, gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns, torch.tensor([6.0, 5.0, 3.0, 4.0]))


def test_a_segment_has_the_same_bits_in_any_pack():
    reward, value, _ = ragged([37])
    alone = gae(reward, value, torch.tensor([0, 37]))
    for before, after in ((1, 0), (3, 90), (64, 7), (200, 1000)):
        pack = [torch.cat([torch.randn(before), x, torch.randn(after)]) for x in (reward, value)]
        inside = gae(*pack, torch.tensor([0, before, before + 37, before + 37 + after]))
        for a, b in zip(alone, inside, strict=True):
            assert torch.equal(a, b[before : before + 37])


def test_a_broken_segment_breaks_no_other():
    reward, value, cu_seqlens = ragged([4, 5, 6])
    expected = gae(reward, value, cu_seqlens)
    for poison in (float("nan"), float("inf")):
        broken = value.clone()
        broken[4:9] = poison
        for a, b in zip(expected, gae(reward, broken, cu_seqlens), strict=True):
            assert torch.equal(a[:4], b[:4])
            assert torch.equal(a[9:], b[9:])


def test_the_result_is_detached():
    reward, value = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    assert not any(x.requires_grad for x in gae(reward, value, torch.tensor([0, 2])))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": torch.zeros(2)}, r"value must have shape \(3,\)"),
        ({"cu_seqlens": torch.tensor([0, 2])}, "cu_seqlens must rise from 0 to the number of rows 3"),
        ({"cu_seqlens": torch.tensor([0.0, 3.0])}, "cu_seqlens must be torch.int32 or torch.int64"),
        ({"mask": torch.ones(3)}, "mask must be torch.bool"),
        ({"bootstrap": torch.zeros(2)}, r"bootstrap must have shape \(1,\)"),
        ({"gamma": 1.1}, r"gamma must be in \[0, 1\]"),
        ({"lam": -0.1}, r"lam must be in \[0, 1\]"),
        ({"impl": "triton"}, "this version has no Triton kernel"),
    ],
)
def test_bad_arguments_are_named(changes: dict, message: str):
    good = {"reward": torch.zeros(3), "value": torch.zeros(3), "cu_seqlens": torch.tensor([0, 3])}
    with pytest.raises(ValueError, match=message):
        gae(**{**good, **changes})
