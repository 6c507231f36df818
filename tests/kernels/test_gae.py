import pytest
import torch
from torch import Tensor

from fastrlhf_kernels import gae
from fastrlhf_kernels.gae import _gae, gae_reference
from tests.tolerance import assert_as_exact


def ragged(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    reward, value = torch.randn(2, sum(lengths), generator=generator)
    return reward, value, cu_seqlens


def test_hand_computed_segment(impl: str):
    # gamma = lam = 0.5. deltas: 1 + 0.5*2 - 1 = 1;  0 + 0.5*4 - 2 = 0;  2 - 4 = -2
    # A_3 = -2;  A_2 = 0 + 0.25 * -2 = -0.5;  A_1 = 1 + 0.25 * -0.5 = 0.875
    reward, value = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([1.0, 2.0, 4.0])
    advantage, returns = gae(reward, value, torch.tensor([0, 3]), gamma=0.5, lam=0.5, impl=impl)
    assert advantage.tolist() == [0.875, -0.5, -2.0]
    assert returns.tolist() == [1.875, 1.5, 2.0]


def test_hand_computed_truncated_segment(impl: str):
    # bootstrap 8 adds 0.5 * 8 to the last delta: A_3 = 2;  A_2 = 0.5;  A_1 = 1.125
    reward, value = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([1.0, 2.0, 4.0])
    advantage, _ = gae(
        reward, value, torch.tensor([0, 3]), gamma=0.5, lam=0.5, bootstrap=torch.tensor([8.0]), impl=impl
    )
    assert advantage.tolist() == [1.125, 0.5, 2.0]


def test_rows_outside_the_mask_are_skipped(impl: str):
    nan = float("nan")
    reward, value = torch.tensor([1.0, nan, 0.0, nan, nan, 2.0, nan]), torch.tensor([1.0, nan, 2.0, nan, nan, 4.0, nan])
    mask = reward.isfinite()
    advantage, returns = gae(reward, value, torch.tensor([0, 7]), gamma=0.5, lam=0.5, mask=mask, impl=impl)
    assert advantage.tolist() == [0.875, 0.0, -0.5, 0.0, 0.0, -2.0, 0.0]
    assert returns.tolist() == [1.875, 0.0, 1.5, 0.0, 0.0, 2.0, 0.0]


def test_bootstrap_follows_the_last_row_in_the_mask(impl: str):
    mask = torch.tensor([True, False])
    options = {"mask": mask, "bootstrap": torch.tensor([5.0]), "impl": impl}
    out = gae(torch.ones(2), torch.zeros(2), torch.tensor([0, 2]), **options)
    assert out[0].tolist() == [6.0, 0.0]


@pytest.mark.parametrize("lengths", [[], [0], [1], [0, 0, 1, 0], [5, 0, 1, 17, 2, 0], [64], [33, 31, 65]])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 1.0), (0.9, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("with_mask", [True, False])
def test_it_equals_the_textbook_loop(lengths: list[int], gamma: float, lam: float, with_mask: bool, impl: str):
    reward, value, cu_seqlens = ragged(lengths)
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(len(reward), generator=generator) > 0.4 if with_mask else None
    bootstrap = torch.randn(len(lengths), generator=generator)
    options = {"gamma": gamma, "lam": lam, "mask": mask}
    out = gae(reward, value, cu_seqlens, bootstrap=bootstrap, impl=impl, **options)
    baseline = gae_reference(reward, value, cu_seqlens, bootstrap=bootstrap, **options)
    truth = gae_reference(reward.double(), value.double(), cu_seqlens, bootstrap=bootstrap.double(), **options)
    for name, *numbers in zip(("advantage", "returns"), out, baseline, truth, strict=True):
        assert_as_exact(name, *numbers)


def test_half_precision_inputs_are_computed_in_float32():
    reward, value, cu_seqlens = ragged([40, 3])
    reward, value = reward.bfloat16(), value.bfloat16()
    expected = gae(reward.float(), value.float(), cu_seqlens, impl="torch")
    assert all(torch.equal(a, b) for a, b in zip(gae(reward, value, cu_seqlens, impl="torch"), expected, strict=True))


def test_with_lam_and_gamma_one_the_returns_are_the_rewards_to_go(impl: str):
    reward, value, cu_seqlens = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.randn(4), torch.tensor([0, 3, 4])
    _, returns = gae(reward, value, cu_seqlens, gamma=1.0, lam=1.0, impl=impl)
    torch.testing.assert_close(returns, torch.tensor([6.0, 5.0, 3.0, 4.0]))


def test_a_segment_has_the_same_bits_in_any_pack(impl: str):
    reward, value, _ = ragged([37])
    alone = gae(reward, value, torch.tensor([0, 37]), impl=impl)
    for before, after in ((1, 0), (3, 90), (64, 7), (200, 100)):
        pack = [torch.cat([torch.randn(before), x, torch.randn(after)]) for x in (reward, value)]
        inside = gae(*pack, torch.tensor([0, before, before + 37, before + 37 + after]), impl=impl)
        for a, b in zip(alone, inside, strict=True):
            assert torch.equal(a, b[before : before + 37])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy warns in the interpreter
def test_a_nan_stays_in_its_segment(impl: str):
    reward, value, cu_seqlens = ragged([4, 5, 6])
    expected = gae(reward, value, cu_seqlens, impl=impl)
    for poison in (float("nan"), float("inf")):
        broken = value.clone()
        broken[4:9] = poison
        for a, b in zip(expected, gae(reward, broken, cu_seqlens, impl=impl), strict=True):
            assert torch.equal(a[:4], b[:4])
            assert torch.equal(a[9:], b[9:])


def test_the_result_is_detached(impl: str):
    reward, value = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    assert not any(x.requires_grad for x in gae(reward, value, torch.tensor([0, 2]), impl=impl))


@pytest.mark.parametrize("lam", [0.95, 0.99, 1.0])
def test_a_long_segment_is_as_exact_as_the_loop(lam: float, impl: str):
    reward, value, cu_seqlens = ragged([1000])
    out = gae(reward, value, cu_seqlens, lam=lam, impl=impl)
    baseline = gae_reference(reward, value, cu_seqlens, lam=lam)
    truth = gae_reference(reward.double(), value.double(), cu_seqlens, lam=lam)
    for name, *numbers in zip(("advantage", "returns"), out, baseline, truth, strict=True):
        assert_as_exact(name, *numbers)


def test_inputs_need_not_be_contiguous(impl: str):
    reward, value, cu_seqlens = ragged([20, 13])
    rows = torch.stack([reward, value], 1)
    bounds, mask = torch.stack([cu_seqlens, cu_seqlens], 1)[:, 0], torch.ones(33, 2, dtype=torch.bool)[:, 0]
    out = gae(rows[:, 0], rows[:, 1], bounds, mask=mask, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(out, gae(reward, value, cu_seqlens, impl=impl), strict=True))


def test_one_compiled_graph_serves_packs_of_every_length(impl: str):
    torch._dynamo.reset()
    compiled = torch.compile(gae, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([3, 2, 4], [5, 9, 7, 1], [20, 2, 3, 6, 8]):
            pack = ragged(lengths)
            options = {"bootstrap": torch.ones(len(lengths)), "impl": impl}
            out = zip(gae(*pack, **options), compiled(*pack, **options), strict=True)
            assert all(torch.equal(a, b) for a, b in out)


@pytest.mark.parametrize("given", [True, False])
def test_the_operator_is_registered_as_torch_asks(given: bool, impl: str):
    pack = ragged([3, 0, 2])
    options = (torch.ones(5, dtype=torch.bool), torch.ones(3)) if given else (None, None)
    torch.library.opcheck(_gae, (*pack, *options, 1.0, 0.9, impl == "triton"))


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
        ({"impl": "cuda"}, 'impl must be "auto", "triton" or "torch"'),
    ],
)
def test_bad_arguments_are_named(changes: dict, message: str):
    good = {"reward": torch.zeros(3), "value": torch.zeros(3), "cu_seqlens": torch.tensor([0, 3])}
    with pytest.raises(ValueError, match=message):
        gae(**{**good, **changes})
