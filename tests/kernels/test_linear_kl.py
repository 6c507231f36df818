import math

import pytest
import torch
from torch import Tensor

from bench.measure import peak_bytes
from fastrlhf_kernels import TokenKL, linear_kl, linear_logprob
from fastrlhf_kernels import _blocks as blocks
from fastrlhf_kernels.linear_kl import linear_kl_reference
from tests.tolerance import assert_op_matches

# T, D, Dr, V just below, at and above the block size (8, 7), tiles of (16, 16, 16), shares of 32 and parts of 16
SHAPES = [
    (1, 1, 1, 1),
    (7, 5, 3, 13),
    (8, 16, 17, 14),
    (9, 3, 16, 15),
    (16, 8, 8, 31),
    (17, 17, 1, 32),
    (33, 16, 5, 65),
]


def inputs(rows: int, size: int, reference_size: int, vocab: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Returns hidden, weight, reference_hidden, reference_weight of two independent random distributions, which differ
    by nats."""
    generator = torch.Generator().manual_seed(rows + size + vocab)
    shapes = [(rows, size), (vocab, size), (rows, reference_size), (vocab, reference_size)]
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def targets_of(rows: int, vocab: int) -> Tensor:
    return torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(rows))


def everything(rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[dict, dict]:
    """Returns (leaves, options) with all options set and some rows ignored."""
    torch.manual_seed(0)
    targets = targets_of(rows, vocab)
    targets[[0, 4, 17]] = -100
    options = {"temperature": torch.linspace(0.5, 2, rows), "logit_scale": 1.5, "softcap": 3.0, "targets": targets}
    return {"bias": torch.randn(vocab).to(dtype)}, {**options, "reference_bias": torch.randn(vocab).to(dtype)}


def assert_matches_reference(tensors: list[Tensor], leaves: dict | None = None, impl: str = "torch", **options):
    """Compares outputs and gradients with the reference; each output has its own upstream gradient."""
    hidden, weight, *frozen = tensors
    generator = torch.Generator().manual_seed(0)
    upstream = [torch.randn(len(hidden), generator=generator) for _ in range(4 if "targets" in options else 2)]

    def given(outputs: TokenKL) -> list[Tensor]:
        return [output for output in outputs if output is not None]

    def op(hidden: Tensor, weight: Tensor, **leaves: Tensor):
        return given(linear_kl(hidden, weight, *frozen, entropy=True, impl=impl, **leaves, **options))

    def reference(hidden: Tensor, weight: Tensor, **leaves: Tensor):
        def cast(value):
            return value.to(hidden.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        cast_options = {name: cast(value) for name, value in options.items()}
        return given(linear_kl_reference(hidden, weight, *map(cast, frozen), **leaves, **cast_options))

    assert_op_matches(op, reference, {"hidden": hidden, "weight": weight, **(leaves or {})}, upstream)


def test_a_hand_computed_row(impl: str):
    # p = (1, 2, 5) / 8 and q = (1, 1, 2) / 4
    one = torch.ones(1, 1)
    weight, reference_weight = torch.tensor([[1.0], [2.0], [5.0]]).log(), torch.tensor([[1.0], [1.0], [2.0]]).log()
    out = linear_kl(one, weight, one, reference_weight, targets=torch.tensor([2]), entropy=True, impl=impl)
    kl = math.log(1 / 2) / 8 + math.log(1) * 2 / 8 + math.log(5 / 4) * 5 / 8
    entropy = -(math.log(1 / 8) / 8 + 2 * math.log(2 / 8) / 8 + 5 * math.log(5 / 8) / 8)
    expected = [kl, math.log(5 / 8), math.log(2 / 4), entropy]
    assert [x.item() for x in out] == pytest.approx(
        expected, rel=1e-6, abs=2e-7
    )  # kl is a difference of numbers near 1, so its error is absolute


def test_the_hand_computed_gradient_of_that_row(impl: str):
    # dz = p (log p / q - kl); with hidden 1 the rows of the weight are the logits
    one, weight = torch.ones(1, 1), torch.tensor([[1.0], [2.0], [5.0]]).log().requires_grad_()
    linear_kl(one, weight, one, torch.tensor([[1.0], [1.0], [2.0]]).log(), impl=impl).kl.sum().backward()
    kl = math.log(1 / 2) / 8 + math.log(5 / 4) * 5 / 8
    expected = [(math.log(1 / 2) - kl) / 8, -kl * 2 / 8, (math.log(5 / 4) - kl) * 5 / 8]
    assert weight.grad.flatten().tolist() == pytest.approx(expected, rel=1e-6)


def test_the_reference_passes_gradcheck():
    hidden, weight, *frozen = inputs(3, 2, 3, 4, torch.float64)
    targets, bias = torch.tensor([1, -100, 3]), torch.randn(4).double().requires_grad_()
    temperature = torch.tensor([0.5, 1.0, 2.0]).double()

    def function(hidden: Tensor, weight: Tensor, bias: Tensor):
        out = linear_kl_reference(
            hidden, weight, *frozen, targets=targets, bias=bias, temperature=temperature, softcap=2.0
        )
        return out.kl, out.logprob, out.entropy

    assert torch.autograd.gradcheck(function, (hidden.requires_grad_(), weight.requires_grad_(), bias))


@pytest.mark.parametrize("targeted", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("small_blocks")
def test_it_equals_the_reference_across_block_boundaries(shape: tuple[int, int, int, int], targeted: bool, impl: str):
    options = {"targets": targets_of(shape[0], shape[3])} if targeted else {}
    assert_matches_reference(inputs(*shape), impl=impl, **options)


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3])
@pytest.mark.usefixtures("small_blocks")
def test_close_to_the_reference_it_is_as_exact_as_plain_float32(distance: float, impl: str):
    """Two models whose logits differ by about `distance` have a KL of about distance^2. In the bound, the error of
    plain torch, which comes from cancellation, is much larger than the term with eps.
    """
    hidden, weight, *_ = inputs(40, 8, 8, 65)
    moved = hidden + distance * torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    assert_matches_reference([hidden, weight, moved, weight], impl=impl)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES[::3])
@pytest.mark.usefixtures("small_blocks")
def test_it_is_as_exact_in_half_precision(shape: tuple[int, int, int, int], dtype: torch.dtype, impl: str):
    assert_matches_reference(inputs(*shape, dtype), impl=impl, targets=targets_of(shape[0], shape[3]))


@pytest.mark.usefixtures("small_blocks")
def test_half_precision_inputs_are_computed_in_float32_and_each_side_may_have_its_own(impl: str):
    policy, reference = inputs(9, 64, 32, 40, torch.bfloat16)[:2], inputs(9, 64, 32, 40, torch.float16)[2:]
    rounded = linear_kl(*(x.float() for x in (*policy, *reference)), entropy=True, impl=impl)
    out = linear_kl(policy[0].requires_grad_(), policy[1], *reference, entropy=True, impl=impl)
    assert torch.equal(out.kl, rounded.kl)
    assert torch.equal(out.entropy, rounded.entropy)
    out.kl.sum().backward()
    assert policy[0].grad.dtype == torch.bfloat16


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.usefixtures("small_blocks")
def test_all_options_and_ignored_rows_together(counts: bool, monkeypatch: pytest.MonkeyPatch, impl: str):
    monkeypatch.setattr(blocks, "can_select", lambda device, wait: counts)
    leaves, options = everything(19, 23)
    assert_matches_reference(inputs(19, 5, 7, 23), leaves, impl, **options)


@pytest.mark.usefixtures("small_blocks")
def test_all_options_together_in_half_precision(impl: str):
    leaves, options = everything(19, 23, torch.bfloat16)
    assert_matches_reference(inputs(19, 5, 7, 23, torch.bfloat16), leaves, impl, **options)


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.usefixtures("small_blocks")
def test_ignored_rows_give_zeros_and_no_gradient_even_if_they_hold_nan(
    counts: bool, monkeypatch: pytest.MonkeyPatch, impl: str
):
    monkeypatch.setattr(blocks, "can_select", lambda device, wait: counts)
    hidden, weight, reference_hidden, reference_weight = inputs(10, 4, 3, 9)
    targets, temperature = targets_of(10, 9), torch.ones(10)
    targets[[2, 9]] = -100
    hidden[2], hidden[9], reference_hidden[2], temperature[9] = float("nan"), float("inf"), float("nan"), 0.0
    tensors = (hidden.requires_grad_(), weight.requires_grad_(), reference_hidden, reference_weight)
    options = {"temperature": temperature, "bias": torch.full((9,), 200.0)}  # exp of this bias is infinite
    out = linear_kl(*tensors, targets=targets, **options, entropy=True, impl=impl)
    assert all(x[[2, 9]].tolist() == [0.0, 0.0] for x in out)
    upstream = torch.ones(10)
    upstream[2] = float("nan")
    torch.autograd.backward([out.kl, out.logprob, out.entropy], [upstream] * 3)
    assert hidden.grad[[2, 9]].eq(0).all()
    assert hidden.grad.isfinite().all()
    assert hidden.grad[0].ne(0).all()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("targets", [None, torch.zeros(0, dtype=torch.int64)])
def test_a_pack_without_rows_gives_differentiable_zeros(targets: Tensor | None, impl: str):
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    out = linear_kl(hidden, weight, torch.zeros(0, 3), torch.randn(9, 3), targets=targets, entropy=True, impl=impl)
    (out.kl.sum() + out.entropy.sum()).backward()
    assert hidden.grad.shape == (0, 4)
    assert weight.grad.eq(0).all()


def test_a_pack_of_ignored_rows_gives_zero_gradients(impl: str):
    hidden, weight, *frozen = inputs(3, 4, 5, 9)
    out = linear_kl(
        hidden.requires_grad_(), weight.requires_grad_(), *frozen, targets=torch.full((3,), -100), impl=impl
    )
    out.kl.sum().backward()
    assert hidden.grad.eq(0).all()
    assert weight.grad.eq(0).all()


@pytest.mark.usefixtures("small_blocks")
def test_inputs_need_not_be_contiguous(impl: str):
    hidden, weight, reference_hidden, reference_weight = inputs(9, 4, 5, 11)
    leaves = [hidden.T.contiguous().T, torch.stack([weight, weight], 1)[:, 0]]
    leaves += [reference_hidden.T.contiguous().T, torch.stack([reference_weight, reference_weight], 1)[:, 0]]
    torch.manual_seed(0)  # otherwise the numbers depend on earlier tests
    reference_bias, targets = torch.randn(11, 2)[:, 0], torch.stack([targets_of(9, 11)] * 2, 1)[:, 0]
    assert not any(leaf.is_contiguous() for leaf in (*leaves, reference_bias, targets))
    assert_matches_reference(leaves, impl=impl, reference_bias=reference_bias, targets=targets)


def test_only_tensors_that_need_a_gradient_get_one_and_the_reference_never(impl: str):
    tensors = inputs(5, 4, 3, 9)
    full = [x.clone().requires_grad_() for x in tensors]
    linear_kl(*full, impl=impl).kl.sum().backward()
    assert full[2].grad is None
    assert full[3].grad is None
    assert not linear_kl(*tensors[:2], *full[2:], impl=impl).kl.requires_grad
    assert not linear_kl(*full, targets=targets_of(5, 9), impl=impl).reference_logprob.requires_grad
    for trained in (0, 1):
        leaves = [x.clone().requires_grad_(i == trained) for i, x in enumerate(tensors)]
        linear_kl(*leaves, impl=impl).kl.sum().backward()
        assert torch.equal(leaves[trained].grad, full[trained].grad)
        assert leaves[1 - trained].grad is None


def test_no_tensor_of_rows_by_vocabulary_is_ever_allocated(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(blocks, "CPU_BLOCK", (64, 64))
    hidden, weight, *reference = inputs(512, 8, 4, 4096)
    logits = 4 * 512 * 4096

    def step(op, weight: Tensor):
        op(hidden.requires_grad_(), weight, *reference).kl.sum().backward()

    assert peak_bytes(lambda: step(linear_kl_reference, weight)) > 4 * logits
    assert peak_bytes(lambda: step(linear_kl, weight)) < logits / 20
    trained = weight.clone().requires_grad_()
    assert peak_bytes(lambda: step(linear_kl, trained)) < logits / 20 + 4 * weight.numel()


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Returns a list that receives the shape of every block of logits that is computed."""
    shapes, original = [], blocks.Logits.block

    def block(self, rows, part):
        z = original(self, rows, part)
        shapes.append(tuple(z.shape))
        return z

    monkeypatch.setattr(blocks.Logits, "block", block)
    return shapes


def test_the_backward_skips_rows_without_an_upstream_gradient(computed: list):
    hidden, weight, *reference = inputs(9, 4, 3, 11)
    out = linear_kl(hidden.requires_grad_(), weight, *reference)
    computed.clear()
    upstream = torch.zeros(9)
    upstream[[1, 6]] = 1.0
    out.kl.backward(upstream)
    assert computed == [(2, 11), (2, 11)]
    assert hidden.grad[[0, 2, 3, 4, 5, 7, 8]].eq(0).all()


@pytest.mark.parametrize("targeted", [True, False])
def test_if_kl_has_no_upstream_gradient_the_backward_is_that_of_linear_logprob(
    targeted: bool, computed: list, impl: str
):
    hidden, weight, *reference = inputs(9, 4, 3, 11)
    targets = targets_of(9, 11) if targeted else None
    leaves = [hidden.clone().requires_grad_() for _ in range(2)]
    out = linear_kl(leaves[0], weight, *reference, targets=targets, entropy=True, impl=impl)
    expected = linear_logprob(leaves[1], weight, targets_of(9, 11), entropy=True, impl=impl)
    computed.clear()
    for x in (out, expected):
        (x.entropy.sum() + (x.logprob.sum() if targeted else 0)).backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-5, atol=1e-6)
    assert computed == ([(9, 11)] * 2 if impl == "torch" else [])


@pytest.mark.parametrize("side", [0, 2])
def test_a_nan_stays_in_its_row_and_is_visible(side: int, impl: str):
    tensors = inputs(5, 4, 3, 9)
    tensors[side][2, 1] = float("nan")
    out = linear_kl(*tensors, targets=targets_of(5, 9), entropy=True, impl=impl)
    in_one_row = [False, False, True, False, False]
    assert out.kl.isnan().tolist() == in_one_row
    assert (out.reference_logprob if side else out.logprob).isnan().tolist() == in_one_row
    assert (out.logprob if side else out.reference_logprob).isfinite().all()


def test_the_operators_are_registered_as_torch_wants_them(impl: str):
    hidden, weight, *reference = inputs(5, 4, 3, 9)
    leaves = (hidden.requires_grad_(), weight.requires_grad_(), torch.zeros(9, requires_grad=True))
    triton = impl == "triton"
    options = (torch.ones(5), 1.0, 1.0, 2.0, True, triton)
    # the interpreter cannot run inside a traced graph
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        torch.ops.fastrlhf.linear_kl.default,
        (*leaves, *reference, torch.zeros(9), targets_of(5, 9), *options),
        test_utils=checks[:3] if triton else checks,
    )


def test_autocast_changes_nothing():
    tensors = inputs(9, 64, 32, 11)
    plain = linear_kl(*tensors).kl
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_kl(*tensors).kl, plain)


def test_one_compiled_graph_serves_packs_of_every_length():
    torch._dynamo.reset()
    compiled = torch.compile(linear_kl, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 8, 11):
            hidden, weight, *reference = inputs(rows, 4, 3, 9)
            targets = targets_of(rows, 9)
            targets[1] = -100
            leaves = [hidden.clone().requires_grad_() for _ in range(2)]
            for op, leaf in zip((linear_kl, compiled), leaves, strict=True):
                out = op(leaf, weight, *reference, targets=targets, entropy=True)
                (out.kl.sum() + out.logprob.sum()).backward()
            assert torch.equal(leaves[0].grad, leaves[1].grad)


@torch._inductor.config.patch(force_disable_caches=True)  # Inductor's cache ignores an operator's fake
def test_compiled_gradient_of_transposed_hidden_states_has_the_expected_strides():
    hidden, *others = inputs(8, 4, 3, 9)
    targets = targets_of(8, 9)
    targets[1] = -100  # an ignored row, so that the result is scattered back
    hidden = hidden.t().contiguous().t().requires_grad_()
    gradients = [
        torch.autograd.grad(op(hidden, *others, targets=targets).kl.sum(), hidden)[0]
        for op in (linear_kl, torch.compile(linear_kl, fullgraph=True))
    ]
    assert torch.equal(*gradients)


def test_a_second_derivative_is_refused():
    hidden, *others = inputs(5, 4, 3, 9)
    hidden.requires_grad_()
    with pytest.raises(RuntimeError, match="linear_kl has no second derivative"):
        torch.autograd.grad(linear_kl(hidden, *others).kl.sum(), hidden, create_graph=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(3)}, "hidden must be a tensor with 2 dimensions"),
        ({"weight": torch.zeros(4, 3)}, r"weight must have shape \(4, 2\), got \(4, 3\)"),
        ({"reference_hidden": torch.zeros(5)}, "reference_hidden must be a tensor with 2 dimensions"),
        ({"reference_hidden": torch.zeros(2, 5)}, r"reference_hidden must have shape \(3, 5\), got \(2, 5\)"),
        ({"reference_weight": torch.zeros(4, 2)}, r"reference_weight must have shape \(4, 5\), got \(4, 2\)"),
        ({"reference_weight": torch.zeros(6, 5)}, r"reference_weight must have shape \(4, 5\), got \(6, 5\)"),
        ({"reference_bias": torch.zeros(3)}, r"reference_bias must have shape \(4,\)"),
        ({"bias": torch.zeros(3)}, r"bias must have shape \(4,\)"),
        ({"targets": torch.zeros(3)}, "targets must be torch.int64, got torch.float32"),
        ({"targets": torch.tensor([0, 4, 0])}, r"targets must be in \[0, 3\], got 4"),
        ({"targets": torch.tensor([0, -1, 0])}, r"targets must be in \[0, 3\], got -1"),
        ({"temperature": 0.0}, "temperature must be in"),
        ({"temperature": torch.tensor([1.0, 0.0, 1.0])}, "temperature must be above 0 in every row"),
        ({"softcap": -1.0}, "softcap must be in"),
        ({"impl": "cuda"}, r"impl must be .* got 'cuda'"),
    ],
)
def test_bad_arguments_are_named(changes: dict, message: str):
    good = {"hidden": torch.zeros(3, 2), "weight": torch.zeros(4, 2)}
    good |= {"reference_hidden": torch.zeros(3, 5), "reference_weight": torch.zeros(4, 5)}
    with pytest.raises(ValueError, match=message):
        linear_kl(**{**good, **changes})
