import math

import pytest
import torch
from torch import Tensor

from fastrlhf_kernels import merge, pair_loss
from fastrlhf_kernels._pair_kernels import KINDS
from fastrlhf_kernels.pair_loss import LENGTH_NORMS, _pair_loss, pair_loss_reference
from tests.tolerance import assert_op_matches

TWO = torch.tensor([0, 2, 3])  # one pair: 2 chosen rows, 1 rejected row
ALL = torch.ones(3, dtype=torch.bool)


# every kind with each length norm that it supports
FORMS = [(kind, norm) for kind in KINDS for norm in (["mean"] if kind == "orpo" else LENGTH_NORMS)]


def run(impl: str, log_ratio: list[float], cu_seqlens: Tensor = TWO, mask: Tensor | None = None, **options):
    """Computes loss, gradient per row and metrics of one pair. The reference log-probs are 0 (None for ORPO)."""
    logprob = torch.tensor(log_ratio, requires_grad=True)
    mask = torch.ones(len(log_ratio), dtype=torch.bool) if mask is None else mask
    reference = None if options.get("kind") == "orpo" else torch.zeros(len(log_ratio))
    out = pair_loss(logprob, reference, cu_seqlens, mask, num_pairs=1, impl=impl, **options)
    out.loss.backward()
    return out.loss.item(), logprob.grad.tolist(), {name: metric.value.item() for name, metric in out.metrics.items()}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def pairs(lengths: list[int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns logprob, reference_logprob, cu_seqlens, mask; the mask excludes the first row of longer sequences."""
    generator = torch.Generator().manual_seed(sum(lengths))
    logprob, reference = -5 * torch.rand(2, sum(lengths), generator=generator).to(dtype)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    mask = torch.cat([torch.arange(length) >= min(1, length - 1) for length in lengths])
    return logprob, reference, cu_seqlens.int(), mask


def test_hand_computed_dpo(impl: str):
    # D = (1 + 2) - 1 = 2, z = 0.5 * 2 = 1, L = softplus(-1), L' = -0.5 sigmoid(-1)
    loss, gradient, metrics = run(impl, [1.0, 2.0, 1.0], beta=0.5)
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


def test_hand_computed_ipo_hinge_and_robust(impl: str):
    # D = 2; ipo at tau 0.125: target 4; hinge at beta 0.25: 1 - 0.5; robust at eps 0.25: kappa -0.5
    assert run(impl, [1.0, 2.0, 1.0], kind="ipo", beta=0.125)[:2] == (4.0, [-4.0, -4.0, 4.0])
    assert run(impl, [1.0, 2.0, 1.0], kind="hinge", beta=0.25)[:2] == (0.5, [-0.25, -0.25, 0.25])
    loss, gradient, _ = run(impl, [1.0, 2.0, 1.0], kind="robust", beta=0.5, label_smoothing=0.25)
    win, lose = math.log1p(math.exp(-1)), math.log1p(math.exp(1))
    assert loss == pytest.approx((0.75 * win - 0.25 * lose) / 0.5, rel=1e-6)
    assert gradient[0] == pytest.approx(0.5 * (-0.5 - sigmoid(-1)), rel=1e-6)


def test_the_hinge_has_no_gradient_beyond_its_margin(impl: str):
    assert run(impl, [1.0, 2.0, 1.0], kind="hinge", beta=0.5)[:2] == (0.0, [0.0, 0.0, 0.0])


def test_losses_of_equal_policy_and_reference(impl: str):
    logprob, _, cu_seqlens, mask = pairs([3, 4, 1, 2])
    for kind, beta, expected in (("dpo", 0.1, math.log(2)), ("ipo", 0.25, (1 / 0.5) ** 2), ("hinge", 0.1, 1.0)):
        out = pair_loss(logprob, logprob.clone(), cu_seqlens, mask, num_pairs=2, kind=kind, beta=beta, impl=impl)
        assert out.loss.item() == pytest.approx(expected, rel=1e-6)
        assert out.metrics["accuracy"].value == 0


def test_smoothed_and_soft_labels_agree_and_so_do_their_textbook_forms(impl: str):
    win, lose = math.log1p(math.exp(-1)), math.log1p(math.exp(1))
    rows = [1.0, 2.0, 1.0]
    assert run(impl, rows, beta=0.5, label_smoothing=0.125)[0] == pytest.approx(0.875 * win + 0.125 * lose, rel=1e-6)
    for kind in ("dpo", "ipo"):
        smoothed = run(impl, rows, kind=kind, beta=0.5, label_smoothing=0.125)
        assert run(impl, rows, kind=kind, beta=0.5, label_prob=torch.tensor([0.875])) == smoothed
    # IPO's target: (1 - 2/8) / (2 tau), with tau 0.5
    assert run(impl, rows, kind="ipo", beta=0.5, label_smoothing=0.125)[0] == (2 - 0.75) ** 2


def test_target_margin_and_weight_are_per_pair(impl: str):
    cu_seqlens = torch.tensor([0, 1, 2, 3, 4])
    rows = [3.0, 1.0, 0.0, 1.0]
    target, weight = torch.tensor([1.0, -1.0]), torch.tensor([2.0, 0.5])
    assert run(impl, rows, cu_seqlens, kind="ipo", target=target, weight=weight)[:2] == (2.0, [4.0, -4.0, 0.0, 0.0])
    loss, _, metrics = run(impl, rows, cu_seqlens, beta=1.0, margin=torch.tensor([2.0, -1.0]), weight=weight)
    assert loss == pytest.approx(2.5 * math.log(2), rel=1e-6)
    assert metrics["loss"] == loss
    assert metrics["accuracy"] == 1


def test_large_margins_neither_overflow_nor_lose_the_gradient(impl: str):
    loss, gradient, _ = run(impl, [1e4, 1e4, -1e4], beta=1.0)
    assert loss == 0
    assert gradient == [0.0, 0.0, 0.0]
    loss, gradient, _ = run(impl, [-1e4, -1e4, 1e4], beta=1.0)
    assert loss == 3e4
    assert gradient == [-1.0, -1.0, 1.0]
    # softplus(-20) is far below the float32 spacing near 1
    assert run(impl, [10.0, 20.0, 10.0], beta=1.0)[0] == pytest.approx(math.log1p(math.exp(-20)), rel=1e-4)


def test_the_reference_may_be_per_token_or_per_sequence_or_none(impl: str):
    logprob, reference, cu_seqlens, mask = pairs([3, 4, 1, 2])
    members = zip(reference.split([3, 4, 1, 2]), mask.split([3, 4, 1, 2]), strict=True)
    sums = torch.stack([rows[keep].sum() for rows, keep in members])

    def loss(reference: Tensor | None) -> Tensor:
        return pair_loss(logprob, reference, cu_seqlens, mask, num_pairs=2, impl=impl).loss

    torch.testing.assert_close(loss(reference), loss(sums))
    assert torch.equal(loss(None), loss(torch.zeros(10)))
    assert torch.equal(loss(None), loss(torch.zeros(4)))


@pytest.mark.parametrize("reference", [[0.5, 0.25, 2.0], [0.75, 2.0]])
def test_rewards_are_relative_to_the_reference_and_logprobs_are_not(reference: list[float], impl: str):
    tensors = torch.tensor([1.0, 2.0, 1.0]), torch.tensor(reference), TWO, ALL
    metrics = pair_loss(*tensors, num_pairs=1, beta=0.5, impl=impl).metrics
    names = ("reward_chosen", "reward_rejected", "margin", "logprob_chosen", "logprob_rejected")
    assert [metrics[name].value.item() for name in names] == [1.125, -0.5, 1.625, 3.0, 1.0]


def test_at_equal_length_the_mean_with_beta_is_the_sum_with_beta_over_length(impl: str):
    logprob, reference, cu_seqlens, _ = pairs([4, 4, 4, 4])
    mask = torch.ones(16, dtype=torch.bool)
    losses, gradients = {}, {}
    for norm, beta in (("mean", 0.5), ("pair_mean", 0.5), ("sum", 0.125)):
        for kind in ("dpo", "ipo"):
            leaf = logprob.clone().requires_grad_()
            scale = 16 if (kind, norm) == ("ipo", "sum") else 1
            options = {"num_pairs": 2 * scale, "kind": kind, "beta": beta, "length_norm": norm, "impl": impl}
            out = pair_loss(leaf, reference, cu_seqlens, mask, **options)
            (gradients[kind, norm],) = torch.autograd.grad(out.loss, leaf)
            losses[kind, norm] = out.loss
    for kind in ("dpo", "ipo"):
        for norm in ("mean", "pair_mean"):
            torch.testing.assert_close(losses[kind, norm], losses[kind, "sum"])
            torch.testing.assert_close(gradients[kind, norm], gradients[kind, "sum"])


def test_hand_computed_length_norms(impl: str):
    # u = (3, 1), n = (2, 1), tau 0.5, target 1: means per response 1.5 - 1; per pair (3 - 1) / 1.5
    loss, gradient, metrics = run(impl, [1.0, 2.0, 1.0], kind="ipo", beta=0.5, length_norm="mean")
    assert loss == 0.25
    assert gradient == [-0.5, -0.5, 1.0]
    assert metrics["reward_chosen"] == 1.5  # beta u, since rewards are sums over whole sequences
    loss, gradient, _ = run(impl, [1.0, 2.0, 1.0], kind="ipo", beta=0.5, length_norm="pair_mean")
    assert loss == pytest.approx((4 / 3 - 1) ** 2, rel=1e-6)
    assert gradient == pytest.approx([4 / 9, 4 / 9, -4 / 9], rel=1e-6)


@pytest.mark.parametrize(("kind", "length_norm"), FORMS)
def test_a_pair_with_an_empty_response_is_ignored(kind: str, length_norm: str, impl: str):
    # four pairs: chosen has no rows; rejected has no row in the mask; both are empty; both have rows
    cu_seqlens = torch.tensor([0, 0, 2, 3, 5, 5, 5, 6, 8])
    logprob = torch.tensor([1.0, 2.0, 3.0, float("nan"), 5.0, 6.0, 7.0, 8.0], requires_grad=True)
    mask = torch.tensor([True, True, True, False, False, True, True, True])
    weight = torch.tensor([float("nan"), 1.0, 1.0, 1.0])
    options = {"num_pairs": 1, "kind": kind, "length_norm": length_norm, "impl": impl}
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
def test_a_pack_without_a_pair_gives_zero_loss_and_zero_gradient(lengths: list[int], impl: str):
    logprob, reference, cu_seqlens, _ = pairs(lengths) if lengths else (*torch.zeros(2, 0), torch.tensor([0]), None)
    logprob.requires_grad_()
    mask = torch.zeros(len(logprob), dtype=torch.bool)
    with torch.autograd.set_detect_anomaly(True):
        out = pair_loss(logprob, reference, cu_seqlens, mask, num_pairs=0, length_norm="mean", impl=impl)
        out.loss.backward()
    assert out.loss.item() == 0
    assert logprob.grad.tolist() == [0.0] * len(logprob)
    assert all(metric.value.item() == 0 for metric in out.metrics.values())


def assert_matches_reference(
    impl: str, kind: str, length_norm: str = "sum", smoothing: float = 0.0, dtype: torch.dtype = torch.float32
):
    logprob, reference, cu_seqlens, mask = pairs([5, 2, 1, 9, 30, 17, 40, 64], dtype)
    options = {"num_pairs": 5, "kind": kind, "length_norm": length_norm, "label_smoothing": smoothing}

    def call(op, **extra):
        def inner(logprob: Tensor):
            given = None if kind == "orpo" else reference.to(logprob.dtype)
            out = op(logprob, given, cu_seqlens, mask, **options, **extra)
            return [out if isinstance(out, Tensor) else out.loss]

        return inner

    assert_op_matches(call(pair_loss, impl=impl), call(pair_loss_reference), {"logprob": logprob})


@pytest.mark.parametrize(("kind", "length_norm"), FORMS)
def test_it_equals_the_reference(kind: str, length_norm: str, impl: str):
    assert_matches_reference(impl, kind, length_norm)
    if kind in ("dpo", "robust", "ipo"):
        assert_matches_reference(impl, kind, length_norm, smoothing=0.2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_as_exact_in_half_precision(kind: str, dtype: torch.dtype):
    assert_matches_reference("torch", kind, "mean", dtype=dtype)


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "dpo", "label_prob": torch.tensor([0.9, 0.4]), "margin": torch.tensor([0.5, -1.0])},
        {"kind": "robust", "label_smoothing": 0.3, "margin": torch.tensor([0.5, -1.0])},
        {"kind": "hinge", "margin": torch.tensor([-2.0, 2.0])},
        {"kind": "ipo", "label_prob": torch.tensor([0.9, 0.4])},
        {"kind": "ipo", "target": torch.tensor([3.0, -1.0])},
    ],
)
def test_every_option_equals_its_definition(options: dict, impl: str):
    # every sequence has one row, so u is the log-ratio of the row
    logprob, reference, cu_seqlens, _ = pairs([1, 1, 1, 1])
    options, weight = options | {"beta": 0.3}, torch.tensor([2.0, 0.5])

    def op(logprob: Tensor):
        mask = torch.ones(4, dtype=torch.bool)
        out = pair_loss(logprob, reference, cu_seqlens, mask, num_pairs=3, weight=weight, impl=impl, **options)
        return [out.loss]

    def definition(logprob: Tensor):
        given = {name: x.to(logprob.dtype) for name, x in options.items() if isinstance(x, Tensor)}
        smoothing = options.get("label_smoothing", 0.0)
        sure = given.get("label_prob", 1 - smoothing)
        log_ratio = logprob - reference.to(logprob.dtype)
        difference = log_ratio[0::2] - log_ratio[1::2]
        z = 0.3 * difference - given.get("margin", 0)
        win, lose = (1 + (-z).exp()).log(), (1 + z.exp()).log()
        loss = {
            "dpo": sure * win + (1 - sure) * lose,
            "robust": (sure * win - (1 - sure) * lose) / (1 - 2 * smoothing),
            "hinge": (1 - z).clamp(min=0),
            "ipo": (difference - given.get("target", (sure - 0.5) / 0.3)) ** 2,
        }[options["kind"]]
        return [(weight.to(logprob.dtype) * loss).sum() / 3]

    assert_op_matches(op, definition, {"logprob": logprob})


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_passes_gradcheck(kind: str):
    logprob, reference, cu_seqlens, mask = pairs([3, 2, 1, 4])
    assert torch.autograd.gradcheck(
        lambda x: pair_loss_reference(
            x,
            None if kind == "orpo" else reference.double(),
            *(cu_seqlens, mask),
            num_pairs=3,
            kind=kind,
            length_norm="mean",
        ),
        (logprob.double().requires_grad_(),),
    )


def test_micro_batches_with_an_outside_count_add_up_to_the_whole(impl: str):
    logprob, reference, cu_seqlens, mask = pairs([7, 40, 33, 20, 5, 18])
    logprob.requires_grad_()
    options = {"num_pairs": torch.tensor(3), "length_norm": "mean", "impl": impl}
    whole, parts = pair_loss(logprob, reference, cu_seqlens, mask, **options), []
    for i in range(0, 6, 2):
        rows, bounds = slice(int(cu_seqlens[i]), int(cu_seqlens[i + 2])), cu_seqlens[i : i + 3] - cu_seqlens[i]
        parts.append(pair_loss(logprob[rows], reference[rows], bounds, mask[rows], **options))
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    (expected,) = torch.autograd.grad(whole.loss, logprob)
    (gradient,) = torch.autograd.grad(sum(part.loss for part in parts), logprob)
    assert torch.equal(gradient, expected)  # the bits of a pair do not depend on the pack
    for name, metric in merge(*(part.metrics for part in parts)).items():
        torch.testing.assert_close(metric.value, whole.metrics[name].value)


def test_rows_outside_the_mask_do_not_matter(impl: str):
    logprob, reference, cu_seqlens, mask = pairs([20, 33, 7, 3])
    results = []
    for poison in (0.0, float("nan"), float("inf")):
        leaf, old = (x.where(mask, poison).requires_grad_() for x in (logprob, reference))
        out = pair_loss(leaf, old, cu_seqlens, mask, num_pairs=2, impl=impl)
        out.loss.backward()
        results.append((out.loss.item(), leaf.grad.tolist(), {k: m.value.item() for k, m in out.metrics.items()}))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_in_the_mask_shows_in_the_loss_and_in_its_gradient(kind: str, impl: str):
    options = {"length_norm": "mean"} if kind == "orpo" else {}
    loss, gradient, metrics = run(impl, [1.0, float("nan"), 1.0], kind=kind, **options)
    assert math.isnan(loss)
    assert math.isnan(metrics["reward_chosen"])
    if kind == "apo_zero":  # the rejected response's gradient does not depend on the chosen response
        assert all(map(math.isnan, gradient[:2]))
    elif kind != "hinge":  # hinge's gradient takes only two values, never NaN
        assert all(map(math.isnan, gradient))


def test_options_and_reference_have_no_gradient(impl: str):
    logprob, *given = (torch.ones(size, requires_grad=True) for size in (3, 3, 1, 1, 1))
    reference, label_prob, margin, weight = given
    options = {"label_prob": label_prob, "margin": margin, "weight": weight, "impl": impl}
    pair_loss(logprob, reference, TWO, ALL, num_pairs=1, **options).loss.backward()
    assert logprob.grad is not None
    assert [x.grad for x in given] == [None] * 4


def test_inputs_need_not_be_contiguous(impl: str):
    tensors = pairs([20, 33, 7, 3])
    strided = [torch.stack([x, x], 1)[:, 0] for x in tensors]
    assert not any(x.is_contiguous() for x in strided)
    out, plain = (pair_loss(*x, num_pairs=2, impl=impl) for x in (strided, tensors))
    assert torch.equal(out.loss, plain.loss)


@pytest.mark.parametrize("kind", KINDS)
def test_the_default_dtype_of_torch_changes_nothing(kind: str, impl: str, request: pytest.FixtureRequest):
    tensors, options = pairs([20, 33, 7, 3]), {"num_pairs": 2, "kind": kind, "beta": 0.3, "impl": impl}
    if kind == "orpo":
        tensors, options["length_norm"] = (tensors[0], None, *tensors[2:]), "mean"
    plain = pair_loss(*tensors, **options).loss
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(torch.bfloat16)
    assert torch.equal(pair_loss(*tensors, **options).loss, plain)


def test_one_compiled_graph_serves_packs_of_every_length(impl: str):
    torch._dynamo.reset()
    compiled = torch.compile(pair_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([3, 2, 4, 1], [5, 9, 7, 1, 3, 2], [20, 2, 3, 6, 8, 3, 1, 1]):
            logprob, reference, cu_seqlens, mask = pairs(lengths)
            options = {"num_pairs": mask.sum(), "weight": torch.ones(len(lengths) // 2), "impl": impl}
            leaves, outs = [logprob.clone().requires_grad_() for _ in range(2)], []
            for op, leaf in zip((pair_loss, compiled), leaves, strict=True):
                outs.append(op(leaf, reference.clone(), cu_seqlens, mask, **options))
                outs[-1].loss.backward()
            assert torch.equal(leaves[0].grad, leaves[1].grad)
            assert outs[0].metrics == outs[1].metrics


@pytest.mark.parametrize("per_row", [True, False])
def test_the_operator_is_registered_as_torch_asks(per_row: bool, impl: str):
    logprob, reference, cu_seqlens, mask = pairs([3, 2])
    options = (torch.ones(1), torch.ones(1), torch.ones(1), None)
    modes = ("dpo", 0.1, 0.2, "mean", per_row, impl == "triton")
    reference = reference if per_row else reference[:2]
    torch.library.opcheck(_pair_loss, (logprob.requires_grad_(), reference, cu_seqlens, mask, *options, *modes))


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
        ({"label_smoothing": 0.1, "label_prob": torch.ones(1)}, "give only one"),
        ({"label_prob": torch.ones(1), "kind": "robust"}, "label_prob is for"),
        ({"label_smoothing": 0.1, "kind": "hinge"}, "label_smoothing is not for"),
        ({"margin": torch.ones(1), "kind": "ipo"}, "margin is not for"),
        ({"target": torch.ones(1)}, "target is only for"),
        ({"weight": torch.ones(2)}, r"weight must have shape \(1,\)"),
        ({"impl": "cuda"}, 'impl must be "auto", "triton" or "torch"'),
    ],
)
def test_bad_arguments_are_named(changes: dict, message: str):
    good = {"logprob": torch.zeros(3), "reference_logprob": None, "cu_seqlens": TWO, "mask": ALL, "num_pairs": 1}
    with pytest.raises(ValueError, match=message):
        pair_loss(**{**good, **changes})
