import math

import pytest
import torch
from torch import Tensor

from fastrlhf_kernels import merge, pair_loss
from fastrlhf_kernels.pair_loss import LENGTH_NORMS, pair_loss_reference
from tests.tolerance import assert_op_matches

TWO = torch.tensor([0, 2, 3])  # one pair: chosen of 2 rows, rejected of 1
ALL = torch.ones(3, dtype=torch.bool)
KINDS = ("dpo", "ipo", "hinge", "robust")


def run(log_ratio: list[float], cu_seqlens: Tensor = TWO, mask: Tensor | None = None, **options):
    """Loss, gradient per row and metrics against a reference of zeros, over 1 pair."""
    logprob = torch.tensor(log_ratio, requires_grad=True)
    mask = torch.ones(len(log_ratio), dtype=torch.bool) if mask is None else mask
    out = pair_loss(logprob, torch.zeros(len(log_ratio)), cu_seqlens, mask, num_pairs=1, **options)
    out.loss.backward()
    return out.loss.item(), logprob.grad.tolist(), {name: metric.value.item() for name, metric in out.metrics.items()}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def pairs(lengths: list[int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprob, reference_logprob, cu_seqlens, mask; the first row of each sequence is out of the mask if it can be."""
    generator = torch.Generator().manual_seed(sum(lengths))
    logprob, reference = -5 * torch.rand(2, sum(lengths), generator=generator).to(dtype)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    mask = torch.cat([torch.arange(length) >= min(1, length - 1) for length in lengths])
    return logprob, reference, cu_seqlens.int(), mask


def test_hand_computed_dpo():
    # D = (1 + 2) - 1 = 2, z = 0.5 * 2 = 1, L = softplus(-1), L' = -0.5 sigmoid(-1)
    loss, gradient, metrics = run([1.0, 2.0, 1.0], beta=0.5)
    slope = -0.5 * sigmoid(-1)
    assert loss == pytest.approx(math.log1p(math.exp(-1)), rel=1e-6)
    assert gradient == pytest.approx([slope, slope, -slope], rel=1e-6)
    assert metrics == pytest.approx(
        {
            "loss": loss,
            "pairs": 1,
            "accuracy": 1,
            "reward_chosen": 1.5,
            "reward_rejected": 0.5,
            "margin": 1.0,
            "logprob_chosen": 3.0,
            "logprob_rejected": 1.0,
        }
    )


def test_hand_computed_ipo_hinge_and_robust():
    # D = 2; ipo at tau 0.125: target 4; hinge at beta 0.25: 1 - 0.5; robust at eps 0.25: kappa -0.5
    assert run([1.0, 2.0, 1.0], kind="ipo", beta=0.125)[:2] == (4.0, [-4.0, -4.0, 4.0])
    assert run([1.0, 2.0, 1.0], kind="hinge", beta=0.25)[:2] == (0.5, [-0.25, -0.25, 0.25])
    loss, gradient, _ = run([1.0, 2.0, 1.0], kind="robust", beta=0.5, label_smoothing=0.25)
    win, lose = math.log1p(math.exp(-1)), math.log1p(math.exp(1))
    assert loss == pytest.approx((0.75 * win - 0.25 * lose) / 0.5, rel=1e-6)
    assert gradient[0] == pytest.approx(0.5 * (-0.5 - sigmoid(-1)), rel=1e-6)


def test_the_hinge_is_flat_from_its_corner_on():
    assert run([1.0, 2.0, 1.0], kind="hinge", beta=0.5)[:2] == (0.0, [0.0, 0.0, 0.0])


def test_before_the_first_step_the_losses_are_known():
    logprob, _, cu_seqlens, mask = pairs([3, 4, 1, 2])
    for kind, beta, expected in (("dpo", 0.1, math.log(2)), ("ipo", 0.25, (1 / 0.5) ** 2), ("hinge", 0.1, 1.0)):
        out = pair_loss(logprob, logprob.clone(), cu_seqlens, mask, num_pairs=2, kind=kind, beta=beta)
        assert out.loss.item() == pytest.approx(expected, rel=1e-6)
        assert out.metrics["accuracy"].value == 0


def test_smoothed_and_soft_labels_agree_and_so_do_their_textbook_forms():
    win, lose = math.log1p(math.exp(-1)), math.log1p(math.exp(1))
    rows = [1.0, 2.0, 1.0]
    assert run(rows, beta=0.5, label_smoothing=0.125)[0] == pytest.approx(0.875 * win + 0.125 * lose, rel=1e-6)
    for kind in ("dpo", "ipo"):
        smoothed = run(rows, kind=kind, beta=0.5, label_smoothing=0.125)
        assert run(rows, kind=kind, beta=0.5, label_prob=torch.tensor([0.875])) == smoothed
    # IPO's target: (1 - 2/8) / (2 tau), with tau 0.5
    assert run(rows, kind="ipo", beta=0.5, label_smoothing=0.125)[0] == (2 - 0.75) ** 2


def test_target_margin_and_weight_are_per_pair():
    cu_seqlens = torch.tensor([0, 1, 2, 3, 4])
    rows = [3.0, 1.0, 0.0, 1.0]
    target, weight = torch.tensor([1.0, -1.0]), torch.tensor([2.0, 0.5])
    assert run(rows, cu_seqlens, kind="ipo", target=target, weight=weight)[:2] == (2.0, [4.0, -4.0, 0.0, 0.0])
    loss, _, metrics = run(rows, cu_seqlens, beta=1.0, margin=torch.tensor([2.0, -1.0]), weight=weight)
    assert loss == pytest.approx(2.5 * math.log(2), rel=1e-6)
    assert metrics["loss"] == loss
    assert metrics["accuracy"] == 1


def test_large_margins_neither_overflow_nor_lose_the_gradient():
    loss, gradient, _ = run([1e4, 1e4, -1e4], beta=1.0)
    assert loss == 0
    assert gradient == [0.0, 0.0, 0.0]
    loss, gradient, _ = run([-1e4, -1e4, 1e4], beta=1.0)
    assert loss == 3e4
    assert gradient == [-1.0, -1.0, 1.0]
    # softplus(-20) is far below the spacing of float32 at 1
    assert run([10.0, 20.0, 10.0], beta=1.0)[0] == pytest.approx(math.log1p(math.exp(-20)), rel=1e-4)


def test_the_reference_may_be_per_token_or_per_sequence_or_none():
    logprob, reference, cu_seqlens, mask = pairs([3, 4, 1, 2])
    members = zip(reference.split([3, 4, 1, 2]), mask.split([3, 4, 1, 2]), strict=True)
    sums = torch.stack([rows[keep].sum() for rows, keep in members])
    per_token = pair_loss(logprob, reference, cu_seqlens, mask, num_pairs=2)
    per_sequence = pair_loss(logprob, sums, cu_seqlens, mask, num_pairs=2)
    torch.testing.assert_close(per_token.loss, per_sequence.loss)
    none = pair_loss(logprob, None, cu_seqlens, mask, num_pairs=2)
    assert torch.equal(none.loss, pair_loss(logprob, torch.zeros(10), cu_seqlens, mask, num_pairs=2).loss)


def test_at_equal_length_the_mean_with_beta_is_the_sum_with_beta_over_length():
    logprob, reference, cu_seqlens, _ = pairs([4, 4, 4, 4])
    mask = torch.ones(16, dtype=torch.bool)
    losses, gradients = {}, {}
    for norm, beta in (("mean", 0.5), ("pair_mean", 0.5), ("sum", 0.125)):
        for kind in ("dpo", "ipo"):
            leaf = logprob.clone().requires_grad_()
            scale = 16 if (kind, norm) == ("ipo", "sum") else 1
            out = pair_loss(
                leaf, reference, cu_seqlens, mask, num_pairs=2 * scale, kind=kind, beta=beta, length_norm=norm
            )
            (gradients[kind, norm],) = torch.autograd.grad(out.loss, leaf)
            losses[kind, norm] = out.loss
    for kind in ("dpo", "ipo"):
        for norm in ("mean", "pair_mean"):
            torch.testing.assert_close(losses[kind, norm], losses[kind, "sum"])
            torch.testing.assert_close(gradients[kind, norm], gradients[kind, "sum"])


def test_hand_computed_length_norms():
    # u = (3, 1), n = (2, 1), tau 0.5, target 1: own means 1.5 - 1; pair means (3 - 1) / 1.5
    loss, gradient, metrics = run([1.0, 2.0, 1.0], kind="ipo", beta=0.5, length_norm="mean")
    assert loss == 0.25
    assert gradient == [-0.5, -0.5, 1.0]
    assert metrics["reward_chosen"] == 1.5  # beta u: rewards are of whole sequences
    loss, gradient, _ = run([1.0, 2.0, 1.0], kind="ipo", beta=0.5, length_norm="pair_mean")
    assert loss == pytest.approx((4 / 3 - 1) ** 2, rel=1e-6)
    assert gradient == pytest.approx([4 / 9, 4 / 9, -4 / 9], rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length_norm", LENGTH_NORMS)
def test_a_pair_with_an_empty_member_counts_for_nothing(kind: str, length_norm: str):
    # chosen without rows; rejected without a row in the mask; both empty; one whole pair
    cu_seqlens = torch.tensor([0, 0, 2, 3, 5, 5, 5, 6, 8])
    logprob = torch.tensor([1.0, 2.0, 3.0, float("nan"), 5.0, 6.0, 7.0, 8.0], requires_grad=True)
    mask = torch.tensor([True, True, True, False, False, True, True, True])
    weight = torch.tensor([float("nan"), 1.0, 1.0, 1.0])
    options = {"num_pairs": 1, "kind": kind, "length_norm": length_norm}
    out = pair_loss(logprob, None, cu_seqlens, mask, weight=weight, **options)
    out.loss.backward()
    alone = logprob.detach()[5:].clone().requires_grad_()
    expected = pair_loss(alone, None, torch.tensor([0, 1, 3]), mask[5:], **options)
    expected.loss.backward()
    assert torch.equal(out.loss, expected.loss)
    assert logprob.grad.tolist() == [0.0] * 5 + alone.grad.tolist()
    assert {k: v.value.item() for k, v in out.metrics.items()} == {
        k: v.value.item() for k, v in expected.metrics.items()
    }


@pytest.mark.parametrize("lengths", [[], [0, 0], [2, 1]])
def test_a_pack_without_a_pair_gives_zero_loss_and_zero_gradient(lengths: list[int]):
    logprob, reference, cu_seqlens, _ = pairs(lengths) if lengths else (*torch.zeros(2, 0), torch.tensor([0]), None)
    logprob.requires_grad_()
    mask = torch.zeros(len(logprob), dtype=torch.bool)
    with torch.autograd.set_detect_anomaly(True):
        out = pair_loss(logprob, reference, cu_seqlens, mask, num_pairs=0, length_norm="mean")
        out.loss.backward()
    assert out.loss.item() == 0
    assert logprob.grad.tolist() == [0.0] * len(logprob)
    assert all(metric.value.item() == 0 for metric in out.metrics.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length_norm", LENGTH_NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_equals_the_reference(kind: str, length_norm: str, dtype: torch.dtype):
    logprob, reference, cu_seqlens, mask = pairs([5, 2, 1, 9, 30, 17], dtype)
    options = {"kind": kind, "length_norm": length_norm, "label_smoothing": 0.0 if kind == "hinge" else 0.2}

    def call(op):
        def inner(logprob: Tensor):
            out = op(logprob, reference.to(logprob.dtype), cu_seqlens, mask, num_pairs=5, **options)
            return [out if isinstance(out, Tensor) else out.loss]

        return inner

    assert_op_matches(call(pair_loss), call(pair_loss_reference), {"logprob": logprob})


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_passes_gradcheck(kind: str):
    logprob, reference, cu_seqlens, mask = pairs([3, 2, 1, 4])
    assert torch.autograd.gradcheck(
        lambda x: pair_loss_reference(
            x, reference.double(), cu_seqlens, mask, num_pairs=3, kind=kind, length_norm="mean"
        ),
        (logprob.double().requires_grad_(),),
    )


def test_micro_batches_with_an_outside_count_add_up_to_the_whole():
    lengths = [3, 2, 1, 4, 6, 5]
    logprob, reference, cu_seqlens, mask = pairs(lengths)
    logprob.requires_grad_()
    count = torch.tensor(3)
    whole = pair_loss(logprob, reference, cu_seqlens, mask, num_pairs=count)
    parts = []
    for i in range(0, 6, 2):
        rows = slice(int(cu_seqlens[i]), int(cu_seqlens[i + 2]))
        cu = cu_seqlens[i : i + 3] - cu_seqlens[i]
        parts.append(pair_loss(logprob[rows], reference[rows], cu, mask[rows], num_pairs=count))
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    (expected,) = torch.autograd.grad(whole.loss, logprob)
    (gradient,) = torch.autograd.grad(sum(part.loss for part in parts), logprob)
    assert torch.equal(gradient, expected)
    for name, metric in merge(*(part.metrics for part in parts)).items():
        torch.testing.assert_close(metric.value, whole.metrics[name].value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": torch.ones(3)}, "mask must be torch.bool"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "chosen and rejected in turn, got 1 sequences"),
        ({"cu_seqlens": torch.tensor([0, 2, 4])}, "cu_seqlens must rise from 0 to the number of rows 3"),
        ({"reference_logprob": torch.zeros(4)}, r"reference_logprob must have shape \(2,\)"),
        ({"kind": "sigmoid"}, "kind must be one of dpo, ipo, hinge, robust"),
        ({"length_norm": "max"}, "length_norm must be one of sum, mean, pair_mean"),
        ({"beta": 0.0}, "beta must be in"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\)"),
        ({"label_smoothing": 0.1, "label_prob": torch.ones(1)}, "give one"),
        ({"label_prob": torch.ones(1), "kind": "robust"}, "label_prob is for"),
        ({"label_smoothing": 0.1, "kind": "hinge"}, "label_smoothing is not for"),
        ({"margin": torch.ones(1), "kind": "ipo"}, "margin is not for"),
        ({"target": torch.ones(1)}, "target is for"),
        ({"weight": torch.ones(2)}, r"weight must have shape \(1,\)"),
        ({"impl": "triton"}, "this version has no Triton kernel"),
    ],
)
def test_bad_arguments_are_named(changes: dict, message: str):
    good = {"logprob": torch.zeros(3), "reference_logprob": None, "cu_seqlens": TWO, "mask": ALL, "num_pairs": 1}
    with pytest.raises(ValueError, match=message):
        pair_loss(**{**good, **changes})
