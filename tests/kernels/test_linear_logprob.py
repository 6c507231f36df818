import math

import pytest
import torch
from torch import Tensor

from bench.measure import peak_bytes
from fastrlhf_kernels import _blocks as blocks
from fastrlhf_kernels import _tiles as tiles
from fastrlhf_kernels import linear_logprob
from fastrlhf_kernels.linear_logprob import linear_logprob_reference
from tests.tolerance import assert_op_matches

# T, D, V just below, at and above the block size (8, 7), tiles of (16, 16, 16), shares of 32 and parts of 16
SHAPES = [(1, 1, 1), (7, 5, 13), (8, 16, 14), (9, 3, 15), (11, 4, 6), (16, 8, 31), (17, 17, 32), (33, 16, 65)]


def inputs(rows: int, size: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + size + vocab)
    hidden = torch.randn(rows, size, generator=generator).to(dtype)
    weight = torch.randn(vocab, size, generator=generator).to(dtype)
    return hidden, weight, torch.randint(0, vocab, (rows,), generator=generator)


EVERYTHING = {"temperature": torch.linspace(0.5, 2, 19), "logit_scale": 1.5, "softcap": 3.0}


def assert_matches_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, leaves: dict | None = None, impl: str = "torch", **options
):
    """Compares outputs and gradients with the reference; logprob, logsumexp and entropy have their own upstream
    gradients."""
    generator = torch.Generator().manual_seed(0)
    upstream = [torch.randn(len(hidden), generator=generator) for _ in range(3)]

    def op(**tensors: Tensor):
        return linear_logprob(targets=targets, entropy=True, stats=True, impl=impl, **tensors, **options)

    def reference(**tensors: Tensor):
        dtype = tensors["hidden"].dtype
        cast = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in options.items()}
        return linear_logprob_reference(targets=targets, **tensors, **cast)

    assert_op_matches(op, reference, {"hidden": hidden, "weight": weight, **(leaves or {})}, upstream)


def test_a_hand_computed_row(impl: str):
    # logits (ln 1, ln 2, ln 5): p = (1, 2, 5) / 8
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [math.log(2)], [math.log(5)]])
    out = linear_logprob(hidden, weight, torch.tensor([1]), entropy=True, stats=True, impl=impl)
    entropy = -(math.log(1 / 8) / 8 + 2 * math.log(2 / 8) / 8 + 5 * math.log(5 / 8) / 8)
    expected = [math.log(2 / 8), math.log(8), entropy, math.log(5 / 8), math.log(10) / 3]
    assert [x.item() for x in out] == pytest.approx(expected, rel=1e-6)


def test_the_hand_computed_gradient_of_that_row(impl: str):
    # d logprob / d z = 1[v = 1] - p; d hidden = sum_v dz_v w_v
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [math.log(2)], [math.log(5)]])
    hidden.requires_grad_(), weight.requires_grad_()
    linear_logprob(hidden, weight, torch.tensor([1]), impl=impl).logprob.sum().backward()
    assert weight.grad.flatten().tolist() == pytest.approx([-1 / 8, 6 / 8, -5 / 8], rel=1e-6)
    assert hidden.grad.item() == pytest.approx(6 / 8 * math.log(2) - 5 / 8 * math.log(5), rel=1e-6)


def test_the_reference_passes_gradcheck():
    hidden, weight, targets = inputs(3, 2, 4)
    targets[1] = -100
    bias, temperature = torch.randn(4).double().requires_grad_(), torch.tensor([0.5, 1.0, 2.0]).double()

    def function(hidden: Tensor, weight: Tensor, bias: Tensor):
        return linear_logprob_reference(hidden, weight, targets, bias=bias, temperature=temperature, softcap=2.0)[:3]

    leaves = (hidden.double().requires_grad_(), weight.double().requires_grad_(), bias)
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("small_blocks")
def test_it_equals_the_reference_across_block_boundaries(shape: tuple[int, int, int], impl: str):
    assert_matches_reference(*inputs(*shape), impl=impl)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES[::3])
@pytest.mark.usefixtures("small_blocks")
def test_it_is_as_exact_in_half_precision(shape: tuple[int, int, int], dtype: torch.dtype, impl: str):
    assert_matches_reference(*inputs(*shape, dtype), impl=impl)


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("interpreted", "small_blocks")
def test_half_precision_on_the_triton_path(dtype: torch.dtype, descriptors: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiles, "INTERPRETER", tiles.INTERPRETER._replace(descriptors=descriptors))
    hidden, weight, targets = inputs(33, 40, 65, dtype)
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    out = linear_logprob(*leaves, targets, entropy=True, impl="triton")
    truth_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = linear_logprob_reference(*truth_leaves, targets)
    assert (out.logprob - truth.logprob).abs().max() < 1e-5
    assert (out.entropy - truth.entropy).abs().max() < 1e-5
    grads, truth_grads = (
        torch.autograd.grad(o.logprob.sum() + o.entropy.sum(), x) for o, x in ((out, leaves), (truth, truth_leaves))
    )
    for found, true in zip(grads, truth_grads, strict=True):
        assert (found - true).norm() < torch.finfo(dtype).eps * true.norm()


@pytest.mark.usefixtures("small_blocks")
def test_half_precision_inputs_are_computed_in_float32(impl: str):
    hidden, weight, targets = inputs(9, 64, 40, torch.bfloat16)
    rounded = linear_logprob(hidden.float(), weight.float(), targets, entropy=True, impl=impl)
    out = linear_logprob(hidden.requires_grad_(), weight, targets, entropy=True, impl=impl)
    assert torch.equal(out.logprob, rounded.logprob)
    assert torch.equal(out.entropy, rounded.entropy)
    out.logprob.sum().backward()
    assert hidden.grad.dtype == torch.bfloat16


@pytest.mark.usefixtures("small_blocks")
def test_bias_scale_cap_temperature_and_ignored_rows_together(impl: str):
    hidden, weight, targets = inputs(19, 5, 23)
    targets[[0, 4, 17]] = -100
    assert_matches_reference(hidden, weight, targets, {"bias": torch.randn(23)}, **EVERYTHING, impl=impl)


@pytest.mark.usefixtures("small_blocks")
def test_all_options_together_in_half_precision(impl: str):
    hidden, weight, targets = inputs(19, 5, 23, torch.bfloat16)
    targets[[0, 4, 17]] = -100
    assert_matches_reference(hidden, weight, targets, {"bias": torch.randn(23).bfloat16()}, **EVERYTHING, impl=impl)


@pytest.mark.usefixtures("small_blocks")
def test_if_rows_cannot_be_counted_the_result_is_the_same(monkeypatch: pytest.MonkeyPatch, impl: str):
    monkeypatch.setattr(blocks, "can_select", lambda device, wait: False)
    hidden, weight, targets = inputs(19, 5, 23)
    targets[[0, 4, 17]] = -100
    assert_matches_reference(hidden, weight, targets, {"bias": torch.randn(23)}, **EVERYTHING, impl=impl)


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.usefixtures("small_blocks")
def test_ignored_rows_give_zeros_and_no_gradient_even_if_they_hold_nan(
    counts: bool, monkeypatch: pytest.MonkeyPatch, impl: str
):
    monkeypatch.setattr(blocks, "can_select", lambda device, wait: counts)
    hidden, weight, targets = inputs(10, 4, 9)
    targets[[2, 9]] = -100
    hidden[2], hidden[9] = float("nan"), float("inf")
    temperature = torch.ones(10)
    temperature[2], temperature[9] = float("nan"), 0.0
    hidden.requires_grad_(), weight.requires_grad_()
    out = linear_logprob(hidden, weight, targets, temperature=temperature, entropy=True, stats=True, impl=impl)
    assert all(x[[2, 9]].tolist() == [0.0, 0.0] for x in out)
    upstream = torch.ones(10)
    upstream[2] = float("nan")
    torch.autograd.backward([out.logprob, out.entropy], [upstream, torch.ones(10)])
    assert hidden.grad[[2, 9]].eq(0).all()
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.usefixtures("small_blocks")
def test_an_ignored_row_adds_nothing_even_if_its_exponentials_overflow(
    counts: bool, monkeypatch: pytest.MonkeyPatch, impl: str
):
    """For an ignored row the kernel sets the peak and the hidden state to 0, so the large bias makes exp(z - peak)
    infinite."""
    monkeypatch.setattr(blocks, "can_select", lambda device, wait: counts)
    hidden, weight, targets = inputs(19, 5, 23)
    targets[[0, 4, 17]] = -100
    assert_matches_reference(hidden, weight, targets, {"bias": torch.full((23,), 200.0)}, impl=impl)


def test_a_pack_without_rows_gives_differentiable_zeros(impl: str):
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    out = linear_logprob(hidden, weight, torch.zeros(0, dtype=torch.int64), entropy=True, impl=impl)
    (out.logprob.sum() + out.entropy.sum()).backward()
    assert hidden.grad.shape == (0, 4)
    assert weight.grad.eq(0).all()


def test_a_pack_of_ignored_rows_gives_zero_gradients(impl: str):
    hidden, weight, targets = inputs(3, 4, 9)
    hidden.requires_grad_(), weight.requires_grad_()
    linear_logprob(hidden, weight, targets.fill_(-100), impl=impl).logprob.sum().backward()
    assert hidden.grad.eq(0).all()
    assert weight.grad.eq(0).all()


@pytest.mark.usefixtures("small_blocks")
def test_inputs_need_not_be_contiguous(impl: str):
    hidden, weight, targets = inputs(9, 4, 11)
    leaves = (hidden.T.contiguous().T, torch.stack([weight, weight], 1)[:, 0], torch.stack([targets, targets], 1)[:, 0])
    assert not any(leaf.is_contiguous() for leaf in leaves)
    assert_matches_reference(*leaves, impl=impl)


@pytest.mark.usefixtures("small_blocks")
def test_tokens_forbidden_by_a_bias_of_minus_infinity_do_not_count(impl: str):
    hidden, weight, targets = inputs(6, 4, 20)
    keep = torch.tensor([0, 3, 15, 19])  # all columns of the block 7..13 are forbidden
    targets = keep[targets % 4]
    bias = torch.full((20,), float("-inf"))
    bias[keep] = 0.0
    leaves = [hidden.clone().requires_grad_() for _ in range(2)]
    out = linear_logprob(leaves[0], weight, targets, bias=bias, entropy=True, impl=impl)
    small = linear_logprob(leaves[1], weight[keep], torch.searchsorted(keep, targets), entropy=True, impl=impl)
    for x, leaf in ((out, leaves[0]), (small, leaves[1])):
        (x.logprob.sum() + x.entropy.sum()).backward()
        assert leaf.grad.isfinite().all()
    for a, b in ((out.logprob, small.logprob), (out.entropy, small.entropy), (leaves[0].grad, leaves[1].grad)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_near_certain_token_keeps_its_digits(impl: str):
    # at p = 1 - 4.5e-5, 1 - p in float32 has a relative error above 1e-5
    weight = torch.tensor([[10.0], [0.0]], requires_grad=True)
    out = linear_logprob(torch.ones(1, 1), weight, torch.tensor([0]), impl=impl)
    out.logprob.backward()
    assert weight.grad[0].item() == pytest.approx(-math.expm1(out.logprob.item()), rel=1e-6)
    assert weight.grad[1].item() == pytest.approx(-math.exp(-10) / (1 + math.exp(-10)), rel=1e-6)


def test_if_one_token_is_certain_the_others_keep_their_gradient(impl: str):
    weight = torch.tensor([[40.0], [0.0]], requires_grad=True)
    out = linear_logprob(torch.ones(1, 1), weight, torch.tensor([0]), impl=impl)
    out.logprob.backward()
    assert out.logprob.item() == 0
    assert weight.grad.flatten().tolist() == pytest.approx([0.0, -math.exp(-40)], rel=1e-5, abs=0)


def test_a_logprob_is_never_above_zero(impl: str):
    hidden, weight, _ = inputs(400, 8, 50)
    weight[7] = 40 * weight[7]
    logprob = linear_logprob(hidden, weight, torch.full((400,), 7), impl=impl).logprob
    assert logprob.max() <= 0
    assert (logprob > -1e-6).any()


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_only_tensors_that_need_a_gradient_get_one(frozen: str, impl: str):
    hidden, weight, targets = inputs(5, 4, 9)
    full = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    linear_logprob(*full, targets, impl=impl).logprob.sum().backward()
    leaves = {"hidden": hidden, "weight": weight}
    for name, leaf in leaves.items():
        leaf.requires_grad_(frozen not in (name, "both"))
    out = linear_logprob(hidden, weight, targets, stats=True, impl=impl)
    assert out.logprob.requires_grad == (frozen != "both")
    assert not out.max_logprob.requires_grad
    if frozen != "both":
        out.logprob.sum().backward()
    for leaf, expected in zip(leaves.values(), full, strict=True):
        assert leaf.grad is None if not leaf.requires_grad else torch.equal(leaf.grad, expected.grad)


def test_no_tensor_of_rows_by_vocabulary_is_ever_allocated(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(blocks, "CPU_BLOCK", (64, 64))
    hidden, weight, targets = inputs(512, 8, 4096)
    logits = 4 * 512 * 4096

    def step(op, weight: Tensor):
        op(hidden.requires_grad_(), weight, targets).logprob.sum().backward()

    assert peak_bytes(lambda: step(linear_logprob_reference, weight)) > 2 * logits
    assert peak_bytes(lambda: step(linear_logprob, weight)) < logits / 20
    trained = weight.clone().requires_grad_()
    assert peak_bytes(lambda: step(linear_logprob, trained)) < logits / 20 + 4 * weight.numel()


def test_the_backward_skips_rows_without_an_upstream_gradient(monkeypatch: pytest.MonkeyPatch):
    hidden, weight, targets = inputs(9, 4, 11)
    out = linear_logprob(hidden.requires_grad_(), weight, targets)
    seen = []
    monkeypatch.setattr(blocks.Logits, "block", _spy(blocks.Logits.block, seen))
    upstream = torch.zeros(9)
    upstream[[1, 6]] = 1.0
    out.logprob.backward(upstream)
    assert seen == [(2, 11)]
    assert hidden.grad[[0, 2, 3, 4, 5, 7, 8]].eq(0).all()


def _spy(method, seen: list):
    def block(self, rows, part):
        z = method(self, rows, part)
        seen.append(tuple(z.shape))
        return z

    return block


@pytest.mark.usefixtures("small_blocks")
def test_a_temperature_may_be_an_expanded_number(impl: str):
    hidden, weight, targets = inputs(9, 4, 11)
    expanded = linear_logprob(hidden, weight, targets, temperature=torch.tensor(0.7).expand(9), impl=impl)
    assert torch.equal(
        expanded.logprob, linear_logprob(hidden, weight, targets, temperature=torch.full((9,), 0.7), impl=impl).logprob
    )


@pytest.mark.usefixtures("interpreted", "small_blocks")
def test_tma_descriptors_load_the_same_tiles(monkeypatch: pytest.MonkeyPatch):
    hidden, weight, targets = inputs(33, 20, 65)  # no tile divides these sizes; rows have 80 bytes
    plain = linear_logprob(hidden, weight, targets, entropy=True, stats=True, impl="triton")
    monkeypatch.setattr(tiles, "INTERPRETER", tiles.INTERPRETER._replace(descriptors=True))
    for a, b in zip(
        plain, linear_logprob(hidden, weight, targets, entropy=True, stats=True, impl="triton"), strict=True
    ):
        assert torch.equal(a, b)
    assert_matches_reference(hidden, weight, targets, impl="triton")


def test_a_nan_stays_in_its_row_and_is_visible(impl: str):
    hidden, weight, targets = inputs(5, 4, 9)
    hidden[2, 1] = float("nan")
    out = linear_logprob(hidden, weight, targets, entropy=True, impl=impl)
    for values in (out.logprob, out.logsumexp, out.entropy):
        assert values.isnan().tolist() == [False, False, True, False, False]


def test_the_operators_are_registered_as_torch_wants_them(impl: str):
    hidden, weight, targets = inputs(5, 4, 9)
    leaves = (hidden.requires_grad_(), weight.requires_grad_(), torch.zeros(9, requires_grad=True))
    triton = impl == "triton"
    options = (torch.ones(5), 1.0, 1.0, 2.0, -100, True, True, triton)
    # the interpreter cannot run inside a traced graph
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        torch.ops.fastrlhf.linear_logprob.default,
        (*leaves, targets, *options),
        test_utils=checks[:3] if triton else checks,
    )


def test_autocast_changes_nothing():
    hidden, weight, targets = inputs(9, 64, 11)
    plain = linear_logprob(hidden, weight, targets).logprob
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_logprob(hidden, weight, targets).logprob, plain)


def test_one_compiled_graph_serves_packs_of_every_length():
    torch._dynamo.reset()
    compiled = torch.compile(linear_logprob, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 8, 11):
            hidden, weight, targets = inputs(rows, 4, 9)
            targets[1] = -100
            leaves = [hidden.clone().requires_grad_() for _ in range(2)]
            for op, leaf in zip((linear_logprob, compiled), leaves, strict=True):
                op(leaf, weight, targets, entropy=True).logprob.sum().backward()
            assert torch.equal(leaves[0].grad, leaves[1].grad)


@torch._inductor.config.patch(force_disable_caches=True)  # Inductor's cache ignores an operator's fake
def test_compiled_gradient_of_transposed_hidden_states_has_the_expected_strides():
    hidden, weight, targets = inputs(8, 4, 9)
    targets[1] = -100  # an ignored row, so that the result is scattered back
    hidden = hidden.t().contiguous().t().requires_grad_()
    gradients = [
        torch.autograd.grad(op(hidden, weight, targets).logprob.sum(), hidden)[0]
        for op in (linear_logprob, torch.compile(linear_logprob, fullgraph=True))
    ]
    assert torch.equal(*gradients)


def test_a_second_derivative_is_refused():
    hidden, weight, targets = inputs(5, 4, 9)
    hidden.requires_grad_()
    with pytest.raises(RuntimeError, match="linear_logprob has no second derivative"):
        torch.autograd.grad(linear_logprob(hidden, weight, targets).logprob.sum(), hidden, create_graph=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(3)}, "hidden must be a tensor with 2 dimensions"),
        ({"hidden": torch.zeros(3, 2).double()}, "hidden must be .* got torch.float64"),
        ({"weight": torch.zeros(4, 3)}, r"weight must have shape \(4, 2\), got \(4, 3\)"),
        ({"weight": torch.zeros(0, 2)}, "weight must have at least one row"),
        ({"targets": torch.zeros(3)}, "targets must be torch.int64, got torch.float32"),
        ({"targets": torch.zeros(3, dtype=torch.int32)}, "targets must be torch.int64, got torch.int32"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, r"targets must have shape \(3,\), got \(2,\)"),
        ({"targets": torch.tensor([0, 4, 0])}, r"targets must be in \[0, 3\], got 4"),
        ({"targets": torch.tensor([0, -1, 0])}, r"targets must be in \[0, 3\], got -1"),
        ({"bias": torch.zeros(3)}, r"bias must have shape \(4,\)"),
        ({"temperature": 0.0}, "temperature must be in"),
        ({"temperature": torch.tensor([1.0, 0.0, 1.0])}, "temperature must be above 0 in every row"),
        ({"temperature": torch.ones(4)}, r"temperature must have shape \(3,\)"),
        ({"softcap": -1.0}, "softcap must be in"),
        ({"impl": "cuda"}, r"impl must be .* got 'cuda'"),
    ],
)
def test_bad_arguments_are_named(changes: dict, message: str):
    good = {"hidden": torch.zeros(3, 2), "weight": torch.zeros(4, 2), "targets": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        linear_logprob(**{**good, **changes})
