import math

import pytest
import torch
from torch import Tensor

from fastrlhf_kernels import Max, merge, policy_loss
from fastrlhf_kernels.kl_estimate import kl_estimate_reference
from fastrlhf_kernels.policy_loss import _policy_loss, policy_loss_reference
from tests.tolerance import assert_op_matches


def run(impl: str, log_ratio: list[float], advantage: list[float], **options):
    """Computes loss (with num_tokens 1), gradient per row and metrics. The log-probs of the sampler are 0."""
    logprob = torch.tensor(log_ratio, requires_grad=True)
    zeros = torch.zeros(len(log_ratio))
    out = policy_loss(logprob, zeros, torch.tensor(advantage), zeros == 0, num_tokens=1, impl=impl, **options)
    out.loss.backward()
    return out.loss.item(), logprob.grad.tolist(), {name: metric.value.item() for name, metric in out.metrics.items()}


def test_hand_computed_tokens(impl: str):
    # ratios 2, 2, 1/2, 1/2 with clip 0.2: -min(2, 1.2), -min(-2, -1.2), -min(0.5, 0.8), -min(-0.5, -0.8)
    two = math.log(2)
    loss, gradient, metrics = run(impl, [two, two, -two, -two], [1.0, -1.0, 1.0, -1.0])
    assert loss == pytest.approx(-1.2 + 2 - 0.5 + 0.8, rel=1e-6)
    assert gradient == pytest.approx([0.0, 2.0, -0.5, 0.0], rel=1e-6)
    assert metrics["ratio"] == pytest.approx(5)
    assert metrics["ratio_max"] == pytest.approx(2)
    assert metrics["clip_fraction"] == 2
    assert metrics["tokens"] == 4
    # approx_kl sums exp(x) - 1 - x at x = ln 2 and at x = -ln 2, twice each
    assert metrics["approx_kl"] == pytest.approx(2 * (1 - two) + 2 * (-0.5 + two), rel=1e-6)
    assert metrics["policy_loss"] == loss


def test_the_first_step_is_reinforce(impl: str):
    loss, gradient, metrics = run(impl, [0.0, 0.0, 0.0], [0.5, -2.0, 0.0])
    assert loss == 1.5
    assert gradient == [-0.5, 2.0, 0.0]
    assert metrics["ratio"] == 3
    assert metrics["clip_fraction"] == 0
    assert metrics["approx_kl"] == 0


def test_a_ratio_exactly_at_the_clip_still_learns(impl: str):
    # the ratio exp(0) = 1 is exactly the upper bound of the clip for clip_high 0, and the lower one for clip_low 0
    _, gradient, metrics = run(impl, [0.0, 0.0], [1.0, -1.0], clip_low=0.0, clip_high=0.0)
    assert gradient == [-1.0, 1.0]
    assert metrics["clip_fraction"] == 0


@pytest.mark.parametrize(("log_ratio", "advantage"), [(0.3, 1.0), (-0.3, -1.0), (0.9, -1.0)])
def test_a_ratio_equal_to_a_clip_bound_is_not_clipped(log_ratio: float, advantage: float, impl: str):
    ratio = run(impl, [log_ratio], [0.0])[2]["ratio"]
    step = 2.0**-23 if ratio > 1 else 2.0**-24
    for past, gradient, clipped in ((0, -advantage * ratio, 0), (step, 0.0, 1)):
        high, low, dual = ratio - 1 - past, 1 - ratio - past, ratio - past
        bound = {"clip_high": high} if advantage > 0 else {"clip_low": low} if ratio < 1 else {"dual_clip": dual}
        loss, slope, metrics = run(impl, [log_ratio], [advantage], **bound)
        assert slope == [gradient]
        assert metrics["clip_fraction"] == clipped
        assert loss == pytest.approx(-advantage * ratio, rel=1e-6)


@pytest.mark.parametrize("log_ratio", [0.0, 1.0, -1.0, 25.0, -25.0])
def test_without_an_advantage_there_is_neither_loss_nor_gradient(log_ratio: float, impl: str):
    loss, gradient, metrics = run(impl, [log_ratio], [0.0], dual_clip=2.0)
    assert loss == 0
    assert gradient == [0.0]
    assert metrics["clip_fraction"] == (log_ratio > 0)  # advantage 0 is treated as positive


def test_beyond_the_clip_only_tokens_that_move_back_have_a_gradient(impl: str):
    _, gradient, metrics = run(impl, [1e-6, -1e-6, 1e-6, -1e-6], [1.0, -1.0, -1.0, 1.0], clip_low=0.0, clip_high=0.0)
    assert gradient[:2] == [0.0, 0.0]
    assert gradient[2:] == pytest.approx([1.0, -1.0], rel=1e-5)
    assert metrics["clip_fraction"] == 2


def test_the_clip_may_be_asymmetric(impl: str):
    # ratios 1.25, 0.75 within (0.7, 1.28) but outside (0.8, 1.2)
    logs = [math.log(1.25), math.log(0.75)]
    assert run(impl, logs, [1.0, -1.0], clip_low=0.3, clip_high=0.28)[1] == pytest.approx([-1.25, 0.75], rel=1e-6)
    assert run(impl, logs, [1.0, -1.0])[1] == [0.0, 0.0]


def test_the_dual_clip_bounds_the_loss_of_negative_advantages(impl: str):
    loss, gradient, metrics = run(impl, [math.log(5), math.log(2), math.log(5)], [-1.0, -1.0, 1.0], dual_clip=3.0)
    assert loss == pytest.approx(3 + 2 - 1.2, rel=1e-6)
    assert gradient == pytest.approx([0.0, 2.0, 0.0], rel=1e-6)
    assert metrics["clip_fraction"] == 2
    # a ratio exactly at the bound is not clipped
    assert run(impl, [math.log(2)], [-1.0], dual_clip=math.exp(math.log(2)))[1] == pytest.approx([2.0], rel=1e-6)


@pytest.mark.parametrize("log_ratio", [25.0, -25.0, 1e30, float("-inf")])
def test_a_log_ratio_beyond_20_is_clamped_without_gradient(log_ratio: float, impl: str):
    for advantage in (1.0, -1.0):
        loss, gradient, _ = run(impl, [log_ratio], [advantage])
        assert math.isfinite(loss)
        assert gradient == [0.0]


def test_at_20_the_gradient_is_still_there(impl: str):
    _, gradient, _ = run(impl, [20.0], [-1.0])
    assert gradient == pytest.approx([math.exp(20)], rel=1e-5)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_a_nan_in_the_mask_shows_in_the_loss_and_in_its_gradient(dual_clip: float | None, impl: str):
    nan = float("nan")
    for log_ratio, advantage in (([nan, 0.0], [1.0, 1.0]), ([nan, 0.0], [-1.0, 1.0]), ([0.0, 0.0], [nan, 1.0])):
        loss, gradient, metrics = run(impl, log_ratio, advantage, dual_clip=dual_clip)
        assert math.isnan(loss)
        assert math.isnan(gradient[0])
        assert gradient[1] == -1
        assert math.isnan(metrics["policy_loss"])
        assert math.isnan(metrics["ratio_max"]) == math.isnan(log_ratio[0])


def test_masked_rows_leak_neither_nan_nor_infinity(impl: str):
    bad = torch.tensor([0.0, float("nan"), float("inf"), float("-inf")])
    leaves = [bad.clone().requires_grad_() for _ in range(2)]
    mask = torch.tensor([True, False, False, False])
    options = {
        "reference_logprob": bad - 1,
        "kl_coef": 1.0,
        "weight": bad + 1,
        "entropy": leaves[1],
        "entropy_coef": 1.0,
    }
    out = policy_loss(leaves[0], bad, bad + 1, mask, num_tokens=1, dual_clip=3.0, impl=impl, **options)
    out.loss.backward()
    # -r A + k2 - H = -1 + 0.5 - 0, with gradient -r A + delta = -1 + 1
    assert out.loss.item() == -0.5
    assert leaves[0].grad.tolist() == [0.0] * 4
    assert leaves[1].grad.tolist() == [-1.0, 0.0, 0.0, 0.0]
    assert all(metric.value.isfinite() for metric in out.metrics.values())


@pytest.mark.parametrize("rows", [0, 3])
def test_a_mask_without_a_row_gives_zero_loss_and_zero_gradient(rows: int, impl: str):
    logprob = torch.ones(rows, requires_grad=True)
    zeros, mask = torch.zeros(rows), torch.zeros(rows, dtype=torch.bool)
    options = {"num_tokens": mask.sum(), "reference_logprob": zeros, "kl_coef": 0.1, "impl": impl}
    out = policy_loss(logprob, zeros, zeros, mask, **options)
    out.loss.backward()
    assert out.loss.item() == 0
    assert logprob.grad.tolist() == [0.0] * rows
    assert all(metric.value.item() == 0 for metric in out.metrics.values())


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_the_kl_term_is_importance_weighted(kind: str, impl: str):
    # ratio 1.1, delta = ln 1.1 + 0.5
    ratio, delta = 1.1, math.log(1.1) + 0.5
    value = delta**2 / 2 if kind == "k2" else math.exp(-delta) - 1 + delta
    options = {"reference_logprob": torch.tensor([-0.5]), "kl_coef": 0.3, "kl_kind": kind}
    loss, gradient, metrics = run(impl, [math.log(1.1)], [2.0], **options)
    assert loss == pytest.approx(-2 * ratio + 0.3 * ratio * value, rel=1e-5)
    assert gradient == pytest.approx([-2 * ratio + 0.3 * ratio * delta], rel=1e-5)
    assert metrics["kl"] == pytest.approx(ratio * value, rel=1e-5)


def test_weights_multiply_all_terms_of_a_token_and_entropy_lowers_the_loss(impl: str):
    logprob, entropy = torch.zeros(2, requires_grad=True), torch.tensor([3.0, 5.0], requires_grad=True)
    ones, options = torch.ones(2), {"weight": torch.tensor([0.5, 2.0]), "entropy": entropy, "entropy_coef": 0.1}
    out = policy_loss(logprob, torch.zeros(2), ones, ones > 0, num_tokens=10, impl=impl, **options)
    out.loss.backward()
    # sum of weight * (-r A - entropy_coef * H), divided by num_tokens: (0.5 * (-1 - 0.3) + 2 * (-1 - 0.5)) / 10
    assert out.loss.item() == pytest.approx(-0.365, rel=1e-6)
    assert logprob.grad.tolist() == pytest.approx([-0.05, -0.2], rel=1e-6)
    assert entropy.grad.tolist() == pytest.approx([-0.005, -0.02], rel=1e-6)
    assert out.metrics["entropy"].value.item() == 8
    assert out.metrics["policy_loss"].value.item() == -2.5


def rows(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    logprob, sampler = -torch.rand(2, count, generator=generator).to(dtype)
    advantage = torch.randn(count, generator=generator).to(dtype)
    return logprob, sampler, advantage, torch.rand(count, generator=generator) > 0.3


def assert_matches_reference(impl: str, dual_clip: float | None, dtype: torch.dtype):
    logprob, sampler, advantage, mask = rows(200, dtype)
    extra = {} if dual_clip is None else {"dual_clip": dual_clip}

    def call(op, **options):
        def inner(logprob: Tensor):
            cast = (x.to(logprob.dtype) for x in (sampler, advantage))
            out = op(logprob, *cast, mask, num_tokens=9, clip_high=0.3, **extra, **options)
            return [out if isinstance(out, Tensor) else out.loss]

        return inner

    assert_op_matches(call(policy_loss, impl=impl), call(policy_loss_reference), {"logprob": logprob})


@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_it_equals_the_reference(dual_clip: float | None, impl: str):
    assert_matches_reference(impl, dual_clip, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_as_exact_in_half_precision(dtype: torch.dtype):
    assert_matches_reference("torch", 1.5, dtype)


@pytest.mark.parametrize("kind", ["k2", "k3"])
@pytest.mark.parametrize("weighted", [True, False])
def test_all_options_together_equal_the_references_of_their_terms(kind: str, weighted: bool, impl: str):
    logprob, sampler, advantage, mask = rows(100)
    advantage += 1  # otherwise the sum of the terms is as small as its rounding error
    reference, weight, entropy = torch.rand(3, 100, generator=torch.Generator().manual_seed(1))
    weight = weight if weighted else torch.ones(100)

    def op(logprob: Tensor, entropy: Tensor):
        options = {"weight": weight if weighted else None, "entropy": entropy, "entropy_coef": 0.2}
        pull = {"reference_logprob": reference - 1, "kl_coef": 0.3, "kl_kind": kind}
        out = policy_loss(logprob, sampler, advantage, mask, num_tokens=9, dual_clip=1.5, impl=impl, **options, **pull)
        return [out.loss, out.metrics["kl"].value, out.metrics["entropy"].value, out.metrics["policy_loss"].value]

    def definition(logprob: Tensor, entropy: Tensor):
        old, w, gain = (x.to(logprob.dtype) for x in (sampler, weight, advantage * weight))
        first = policy_loss_reference(logprob, old, gain, mask, num_tokens=1, dual_clip=1.5)
        kl = kl_estimate_reference(logprob, (reference - 1).to(w.dtype), kind=kind, sampler_logprob=old)
        loss = (first + ((0.3 * kl - 0.2 * entropy) * w)[mask].sum()) / 9
        return [loss, *(x.detach() for x in (kl[mask].sum(), entropy[mask].sum(), first))]

    assert_op_matches(op, definition, {"logprob": logprob, "entropy": entropy}, [torch.ones(())])


def test_the_reference_passes_gradcheck():
    logprob, sampler, advantage, mask = (x.double() if x.is_floating_point() else x for x in rows(30))
    assert torch.autograd.gradcheck(
        lambda x: policy_loss_reference(x, sampler, advantage, mask, num_tokens=9, dual_clip=1.5),
        (logprob.requires_grad_(),),
    )


def test_losses_of_micro_batches_add_up_to_the_whole_batch(impl: str):
    logprob, sampler, advantage, mask = rows(40)
    logprob.requires_grad_()

    def loss(part: slice):
        tensors = (x[part] for x in (logprob, sampler, advantage, mask))
        options = {"num_tokens": mask.sum(), "reference_logprob": sampler[part] - 1, "kl_coef": 0.1, "impl": impl}
        return policy_loss(*tensors, **options)

    whole, parts = loss(slice(0, 40)), [loss(slice(i, i + 8)) for i in range(0, 40, 8)]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    (expected,) = torch.autograd.grad(whole.loss, logprob)
    (gradient,) = torch.autograd.grad(sum(part.loss for part in parts), logprob)
    assert torch.equal(gradient, expected)
    for name, metric in merge(*(part.metrics for part in parts)).items():
        torch.testing.assert_close(metric.value, whole.metrics[name].value)


def test_metrics_are_detached_scalars_and_only_the_largest_ratio_is_a_maximum(impl: str):
    logprob, sampler, advantage, mask = rows(10)
    options = {"entropy": torch.ones(10, requires_grad=True), "reference_logprob": sampler, "impl": impl}
    out = policy_loss(logprob.requires_grad_(), sampler, advantage, mask, num_tokens=9, **options)
    for metric in out.metrics.values():
        assert metric.value.shape == ()
        assert metric.value.dtype == torch.float32
        assert not metric.value.requires_grad
    assert {name for name, metric in out.metrics.items() if isinstance(metric, Max)} == {"ratio_max"}
    bare = policy_loss(logprob, sampler, advantage, mask, num_tokens=9, impl=impl)
    assert out.metrics.keys() - bare.metrics.keys() == {"kl", "entropy"}


def test_only_logprob_and_entropy_have_a_gradient(impl: str):
    logprob, *given = (torch.ones(2, requires_grad=True) for _ in range(5))
    sampler, advantage, reference, weight = given
    options = {"reference_logprob": reference, "kl_coef": 0.1, "weight": weight, "impl": impl}
    policy_loss(logprob, sampler, advantage, logprob > 0, num_tokens=1, **options).loss.backward()
    assert logprob.grad is not None
    assert [x.grad for x in given] == [None] * 4


def test_inputs_need_not_be_contiguous(impl: str):
    tensors = [torch.stack([x, x], 1)[:, 0] for x in rows(40)]
    assert not any(x.is_contiguous() for x in tensors)
    out, plain = (policy_loss(*x, num_tokens=9, impl=impl) for x in (tensors, rows(40)))
    assert torch.equal(out.loss, plain.loss)
    assert out.metrics == plain.metrics


def test_the_default_dtype_of_torch_changes_nothing(impl: str, request: pytest.FixtureRequest):
    tensors, options = rows(40), {"num_tokens": 9, "dual_clip": 1.3, "impl": impl}
    plain = policy_loss(*tensors, **options).loss
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(torch.bfloat16)
    assert torch.equal(policy_loss(*tensors, **options).loss, plain)


def test_one_compiled_graph_serves_packs_of_every_length(impl: str):
    torch._dynamo.reset()
    compiled = torch.compile(policy_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (5, 8, 37):
            logprob, sampler, advantage, mask = rows(count)
            options = {"num_tokens": mask.sum(), "reference_logprob": advantage, "kl_coef": 0.1, "impl": impl}
            leaves, outs = [logprob.clone().requires_grad_() for _ in range(2)], []
            for op, leaf in zip((policy_loss, compiled), leaves, strict=True):
                outs.append(op(leaf, sampler, advantage, mask, **options))
                outs[-1].loss.backward()
            assert torch.equal(leaves[0].grad, leaves[1].grad)
            assert outs[0].metrics == outs[1].metrics


@pytest.mark.parametrize("everything", [True, False])
def test_the_operator_is_registered_as_torch_asks(everything: bool, impl: str):
    logprob, sampler, advantage, mask = rows(5)
    entropy = torch.ones(5, requires_grad=True)
    options = (sampler - 1, advantage, entropy, sampler) if everything else (None, None, None, None)
    scalars = (0.8, 1.2, 3.0, 0.1, "k3", 0.2, "gspo" if everything else "ppo", impl == "triton")
    torch.library.opcheck(_policy_loss, (logprob.requires_grad_(), sampler, advantage, mask, *options, *scalars))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": torch.ones(2)}, "mask must be torch.bool"),
        ({"sampler_logprob": torch.zeros(3)}, r"sampler_logprob must have shape \(2,\)"),
        ({"advantage": torch.zeros(2, 1)}, r"advantage must have shape \(2,\)"),
        ({"clip_low": -0.1}, "clip_low must be in"),
        ({"dual_clip": 1.0}, r"dual_clip must be in \(1"),
        ({"kl_coef": 0.1}, "kl_coef needs reference_logprob"),
        ({"kl_kind": "k1"}, "kl_kind must be one of k2, k3"),
        ({"loss_type": "grpo"}, "loss_type must be one of ppo, gspo, cispo"),
        ({"loss_type": "gspo"}, "cu_seqlens: pass it with loss_type gspo"),
        ({"cu_seqlens": torch.tensor([0, 2])}, "cu_seqlens: pass it with loss_type gspo, and only then"),
        ({"loss_type": "cispo", "dual_clip": 3.0}, "dual_clip: must be None with loss_type cispo"),
        ({"entropy_coef": 0.1}, "entropy_coef needs entropy"),
        ({"weight": torch.ones(2, dtype=torch.int64)}, "weight must be torch.float32"),
        ({"num_tokens": torch.ones(1)}, "num_tokens must be a number or a 0-dim tensor"),
        ({"impl": "cuda"}, 'impl must be "auto", "triton" or "torch"'),
    ],
)
def test_bad_arguments_are_named(changes: dict, message: str):
    zeros = torch.zeros(2)
    good = {"logprob": zeros, "sampler_logprob": zeros, "advantage": zeros, "mask": zeros == 0, "num_tokens": 2}
    with pytest.raises(ValueError, match=message):
        policy_loss(**{**good, **changes})
