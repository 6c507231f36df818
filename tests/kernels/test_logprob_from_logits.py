import importlib
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.measure import peak_bytes
from fastrlhf_kernels import _blocks as blocks
from fastrlhf_kernels.linear_logprob import linear_logprob_reference
from fastrlhf_kernels.logprob_from_logits import logprob_from_logits, logprob_from_logits_reference
from tests.tolerance import assert_op_matches

# Not a plain import, because the package exports a function with the name of this module
module = importlib.import_module("fastrlhf_kernels.logprob_from_logits")

# (T, V) near the sizes of `small_blocks`: blocks of 400 bytes (CPU) and 16 columns (backward), 32 columns per program
SHAPES = [(1, 1), (7, 15), (3, 16), (9, 17), (2, 32), (5, 33), (3, 64), (4, 79)]
EVERYTHING = {"temperature": torch.linspace(0.5, 2, 19), "logit_scale": 1.5, "softcap": 3.0}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("CPU_BLOCK_BYTES", 400), ("SHARE", 32), ("DEPTH", 2), ("LANES", 8), ("BACKWARD_BLOCK", 16)):
        monkeypatch.setattr(module, name, size)


def inputs(rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + vocab)
    logits = 3 * torch.randn(rows, vocab, generator=generator)
    return logits.to(dtype), torch.randint(0, vocab, (rows,), generator=generator)


def assert_matches_reference(logits: Tensor, targets: Tensor, impl: str = "torch", **options):
    """Compares outputs and gradient with the reference; logprob, logsumexp and entropy have their own upstream
    gradients."""
    upstream = torch.randn(3, len(logits), generator=torch.Generator().manual_seed(0)).unbind()

    def op(logits: Tensor):
        return logprob_from_logits(logits, targets, entropy=True, impl=impl, **options)[:3]

    def reference(logits: Tensor):
        return logprob_from_logits_reference(logits, targets, **options)[:3]

    assert_op_matches(op, reference, {"logits": logits}, upstream)


def test_a_hand_computed_row(impl: str):
    # logits (ln 1, ln 2, ln 5): p = (1, 2, 5) / 8
    logits = torch.tensor([[0.0, math.log(2), math.log(5)]])
    out = logprob_from_logits(logits, torch.tensor([1]), entropy=True, impl=impl)
    entropy = -(math.log(1 / 8) / 8 + 2 * math.log(2 / 8) / 8 + 5 * math.log(5 / 8) / 8)
    assert [x.item() for x in out[:3]] == pytest.approx([math.log(2 / 8), math.log(8), entropy], rel=1e-6)
    assert out[3:] == (None, None)


def test_the_hand_computed_gradient_of_that_row(impl: str):
    # dz for logprob: 1[v = 1] - p; for logsumexp: p; for entropy: -p (log p + entropy)
    p = torch.tensor([1 / 8, 2 / 8, 5 / 8])
    expected = (torch.tensor([0.0, 1.0, 0.0]) - p, p, -p * (p.log() - (p * p.log()).sum()))
    for output, gradient in enumerate(expected):
        logits = (8 * p).log()[None].requires_grad_()
        logprob_from_logits(logits, torch.tensor([1]), entropy=True, impl=impl)[output].sum().backward()
        assert logits.grad.flatten().tolist() == pytest.approx(gradient.tolist(), rel=1e-6, abs=1e-8)


def test_the_reference_equals_that_of_linear_logprob():
    hidden, weight = torch.randn(19, 4), torch.randn(7, 4)
    targets = torch.randint(0, 7, (19,))
    mine = logprob_from_logits_reference(hidden @ weight.T, targets, **EVERYTHING)
    others = linear_logprob_reference(hidden, weight, targets, **EVERYTHING)
    assert all(torch.equal(a, b) for a, b in zip(mine[:3], others[:3], strict=True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("small_blocks")
def test_it_equals_the_reference_across_block_boundaries(shape: tuple[int, int], impl: str):
    assert_matches_reference(*inputs(*shape), impl=impl)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_the_gradient_rounded_once(dtype: torch.dtype, softcap: float | None):
    logits, targets = inputs(9, 40, dtype)
    leaves = [logits.clone().requires_grad_(), logits.float().requires_grad_()]
    out, exact = (logprob_from_logits(leaf, targets, entropy=True, softcap=softcap) for leaf in leaves)
    assert all(torch.equal(a, b) for a, b in zip(out[:3], exact[:3], strict=True))
    for x in (out, exact):
        (x.logprob.sum() + 0.1 * x.entropy.sum()).backward()
    assert leaves[0].grad.dtype == dtype
    assert torch.equal(leaves[0].grad, leaves[1].grad.to(dtype))


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.usefixtures("small_blocks")
def test_scale_cap_temperature_and_ignored_rows_together(counts: bool, monkeypatch: pytest.MonkeyPatch, impl: str):
    monkeypatch.setattr(blocks, "can_select", lambda device, wait: counts)
    logits, targets = inputs(19, 40)
    targets[[0, 4, 17]] = -100
    assert_matches_reference(logits, targets, impl, **EVERYTHING)


def test_a_target_outside_the_vocabulary_gives_nan_if_it_cannot_be_checked(monkeypatch: pytest.MonkeyPatch, impl: str):
    monkeypatch.setattr(blocks, "can_select", lambda device, wait: False)
    logits, _ = inputs(4, 9)
    logprob = logprob_from_logits(logits, torch.tensor([9, 0, -1, 8]), impl=impl).logprob
    assert logprob.isnan().tolist() == [True, False, True, False]


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.usefixtures("small_blocks")
def test_ignored_rows_give_zeros_and_no_gradient_even_if_they_hold_nan(
    counts: bool, monkeypatch: pytest.MonkeyPatch, impl: str
):
    monkeypatch.setattr(blocks, "can_select", lambda device, wait: counts)
    logits, targets = inputs(10, 40)
    targets[[2, 9]] = -100
    logits[2], logits[9] = float("nan"), float("inf")
    temperature, upstream = torch.ones(10), torch.ones(10)
    temperature[9], upstream[2] = 0.0, float("nan")
    out = logprob_from_logits(logits.requires_grad_(), targets, temperature=temperature, entropy=True, impl=impl)
    assert all(x[[2, 9]].tolist() == [0.0, 0.0] for x in out[:3])
    out.logprob.backward(upstream)
    assert logits.grad[[2, 9]].eq(0).all()
    assert logits.grad[[0, 1, 3, 4, 5, 6, 7, 8]].abs().amin(1).gt(0).all()


@pytest.mark.usefixtures("small_blocks")
def test_rows_without_upstream_gradient_are_not_read_again(impl: str):
    logits, targets = inputs(6, 40)
    logits[1], logits[3] = float("inf"), logits[3] - 1000
    out = logprob_from_logits(logits.requires_grad_(), targets, impl=impl)
    logits.data[3] = float("nan")  # autograd does not notice the change
    out.logprob.backward(torch.tensor([1.0, 0, 1, 0, 1, 1]))
    assert logits.grad[[1, 3]].eq(0).all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("rows", [0, 3])
def test_an_empty_pack_or_only_ignored_rows_give_differentiable_zeros(rows: int, impl: str):
    logits, targets = torch.randn(rows, 9, requires_grad=True), torch.full((rows,), -100)
    out = logprob_from_logits(logits, targets, entropy=True, impl=impl)
    (out.logprob.sum() + out.entropy.sum()).backward()
    assert out.logsumexp.tolist() == [0.0] * rows
    assert logits.grad.equal(torch.zeros(rows, 9))


@pytest.mark.usefixtures("small_blocks")
def test_inputs_need_not_be_contiguous(impl: str):
    logits, targets = inputs(9, 40)
    targets, temperature = torch.stack([targets, targets], 1)[:, 0], torch.linspace(0.5, 2, 18)[::2]
    padded, skipping, transposed = torch.zeros(9, 50), torch.zeros(18, 40), logits.T.contiguous().T
    padded[:, 5:45], skipping[::2] = logits, logits
    for strided in (padded[:, 5:45], skipping[::2], transposed):
        assert not strided.is_contiguous()
        gradients = []
        for leaf, *rest in ((strided, targets, temperature), (logits, targets.contiguous(), temperature.contiguous())):
            out = logprob_from_logits(leaf.requires_grad_(), rest[0], temperature=rest[1], impl=impl)
            gradients += torch.autograd.grad(out.logprob.sum(), leaf)
        assert torch.equal(*gradients)


@pytest.mark.usefixtures("small_blocks")
def test_a_constant_added_to_every_logit_changes_nothing(impl: str):
    logits, targets = inputs(9, 79)
    logits = logits.round()  # integers, so that shifted logits are exact
    outputs = []
    for shift in (0.0, 50.0, -4096.0):
        leaf = (logits + shift).requires_grad_()
        out = logprob_from_logits(leaf, targets, temperature=0.7, entropy=True, impl=impl)
        (out.logprob.sum() + out.entropy.sum()).backward()
        outputs.append((out.logprob, out.entropy, leaf.grad))
    for shifted in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], shifted, strict=True))


@pytest.mark.usefixtures("small_blocks")
def test_equal_logits_are_the_uniform_distribution(impl: str):
    logits = torch.full((3, 64), 2.0, requires_grad=True)
    out = logprob_from_logits(logits, torch.tensor([0, 31, 63]), entropy=True, impl=impl)
    assert out.logprob.tolist() == pytest.approx([-math.log(64)] * 3, rel=1e-6)
    assert out.logsumexp.tolist() == pytest.approx([2 + math.log(64)] * 3, rel=1e-6)
    assert out.entropy.tolist() == pytest.approx([math.log(64)] * 3, rel=1e-6)
    (gradient,) = torch.autograd.grad(out.entropy.sum(), logits)
    assert gradient.abs().max() < 1e-8  # log p + entropy is 0 up to the rounding error of log 64, times p = 1/64


@pytest.mark.parametrize("forbidden", [float("-inf"), torch.finfo(torch.float32).min])
@pytest.mark.usefixtures("small_blocks")
def test_forbidden_tokens_do_not_count(forbidden: float, impl: str):
    logits, targets = inputs(6, 79)
    keep = torch.tensor([0, 3, 31, 70, 78])  # all columns of the share 32..63 are forbidden
    targets = keep[targets % 5]
    masked = torch.full_like(logits, forbidden)
    masked[:, keep] = logits[:, keep]
    results = []
    for leaf, index in ((masked, targets), (logits[:, keep], torch.searchsorted(keep, targets))):
        out = logprob_from_logits(leaf.requires_grad_(), index, entropy=True, impl=impl)
        sum(x.sum() for x in out[:3]).backward()
        results.append((*out[:3], leaf.grad[:, keep] if leaf is masked else leaf.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert masked.grad.count_nonzero() == results[1][3].count_nonzero()


def test_a_forbidden_target_has_probability_zero_and_finite_gradients(impl: str):
    logits = torch.tensor([[0.0, float("-inf"), 1.0]], requires_grad=True)
    out = logprob_from_logits(logits, torch.tensor([1]), entropy=True, impl=impl)
    assert out.logprob.item() == float("-inf")
    (out.logprob + out.entropy).sum().backward()
    assert logits.grad[0, 1].item() == 1.0
    assert logits.grad.isfinite().all()


def test_the_gradient_of_a_near_certain_token_keeps_its_digits(impl: str):
    # at p = 1 - 4.5e-5, 1 - p in float32 has a relative error above 1e-5
    logits = torch.tensor([[10.0, 0.0]], requires_grad=True)
    out = logprob_from_logits(logits, torch.tensor([0]), impl=impl)
    out.logprob.sum().backward()
    assert logits.grad[0, 0].item() == pytest.approx(-math.expm1(out.logprob.item()), rel=1e-6)
    assert logits.grad[0, 1].item() == pytest.approx(-math.exp(-10) / (1 + math.exp(-10)), rel=1e-6)


@pytest.mark.usefixtures("small_blocks")
def test_a_logprob_is_never_above_zero(impl: str):
    logits, _ = inputs(80, 50)
    logits[:, 7] = 5 * logits[:, 7].abs()
    logprob = logprob_from_logits(logits, torch.full((80,), 7), temperature=0.3, impl=impl).logprob
    assert logprob.max() <= 0
    assert (logprob > -1e-6).any()


@pytest.mark.usefixtures("small_blocks")
def test_a_row_has_the_same_bits_in_every_pack(impl: str):
    logits, targets = inputs(25, 79)
    whole = logprob_from_logits(logits, targets, entropy=True, impl=impl)
    part = logprob_from_logits(logits[17:23], targets[17:23], entropy=True, impl=impl)
    assert all(torch.equal(a[17:23], b) for a, b in zip(whole[:3], part[:3], strict=True))


@pytest.mark.parametrize("column", [0, 50, 78])
@pytest.mark.usefixtures("small_blocks")
def test_a_nan_stays_in_its_row_and_is_visible(column: int, impl: str):
    logits, targets = inputs(5, 79)
    logits[2, column] = float("nan")
    out = logprob_from_logits(logits.requires_grad_(), targets, entropy=True, impl=impl)
    for values in out[:3]:
        assert values.isnan().tolist() == [False, False, True, False, False]
    out.logprob.sum().backward()
    assert logits.grad.isnan().any(1).tolist() == [False, False, True, False, False]


@pytest.mark.usefixtures("small_blocks")
def test_inplace_backward_writes_the_gradient_over_the_logits(impl: str):
    values, targets = inputs(19, 50)
    targets[[0, 4, 17]] = -100
    gradients, memory = [], []
    for inplace in (False, True):
        leaf = values.clone().requires_grad_()
        logits = (leaf * 1)[:, 5:45]  # rows with gaps between them
        logits.register_hook(lambda gradient: memory.append(gradient.data_ptr()))
        options = {**EVERYTHING, "inplace_backward": inplace}
        out = logprob_from_logits(logits, targets.clamp(max=39), entropy=True, impl=impl, **options)
        (out.logprob.sum() + out.entropy.sum()).backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
    assert memory[1] == logits.data_ptr()
    assert memory[0] != logits.data_ptr()
    assert torch.equal(logits, gradients[1][:, 5:45])


def test_after_an_inplace_backward_other_backwards_through_the_logits_are_refused(impl: str):
    values, targets = inputs(5, 9)
    logits = values.requires_grad_() * 1
    other = logits.square().sum()  # its backward needs the logits
    loss = logprob_from_logits(logits, targets, inplace_backward=True, impl=impl).logprob.sum()
    loss.backward(retain_graph=True)
    for late in (loss, other):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            late.backward()


def test_inplace_backward_refuses_leaves_and_overlapping_rows(impl: str):
    leaf, targets = torch.zeros(3, 4, requires_grad=True), torch.zeros(3, dtype=torch.int64)
    for logits in (leaf, leaf[:, :3], leaf.view(12).view(3, 4)):
        with pytest.raises(ValueError, match="logits must not be a leaf with inplace_backward"):
            logprob_from_logits(logits, targets, inplace_backward=True, impl=impl)
    with pytest.raises(ValueError, match="logits must not overlap"):
        logprob_from_logits((leaf[:1] * 1).expand(3, 4), targets, inplace_backward=True, impl=impl)
    # allowed, because no backward follows
    logprob_from_logits(leaf.detach(), targets, inplace_backward=True, impl=impl)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_second_derivative_is_refused(inplace: bool, impl: str):
    values, targets = inputs(5, 9)
    logits = values.requires_grad_() * 1
    loss = logprob_from_logits(logits, targets, inplace_backward=inplace, impl=impl).logprob.sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, values, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beyond_the_gradient_only_a_few_blocks_of_rows_are_allocated(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    block = 1 << 16
    monkeypatch.setattr(module, "CPU_BLOCK_BYTES", block)
    values, targets = inputs(512, 4096, dtype)
    gradient = values.numel() * values.itemsize

    def step(op, **options):
        logits = values.requires_grad_() + 0
        out = op(logits, targets, softcap=5.0, **options)
        torch.autograd.grad(out.logprob.sum() + out.entropy.sum(), logits)

    assert peak_bytes(lambda: step(logprob_from_logits_reference)) > 5 * gradient
    # Two tensors of the size of the gradient exist: the logits that `step` makes, and the gradient
    assert peak_bytes(lambda: step(logprob_from_logits, entropy=True)) < 2 * gradient + 6 * block
    assert peak_bytes(lambda: step(logprob_from_logits, entropy=True, inplace_backward=True)) < gradient + 6 * block


@pytest.mark.parametrize("inplace", [False, True])
def test_rows_beyond_2_to_the_31_elements_are_addressed(inplace: bool, impl: str, tmp_path: Path):
    apart = 2**30 + 8
    # A sparse file of 8 GiB with 3 written pages
    sparse = torch.from_file(str(tmp_path / "logits"), shared=True, size=2 * apart + 8)
    far = sparse.as_strided((3, 5), (apart, 1))
    values, targets = inputs(3, 5)
    results = []
    for logits in (values.requires_grad_() * 1, far.mul_(0).add_(values)):
        out = logprob_from_logits(logits, targets, inplace_backward=inplace, impl=impl)
        results.append((out.logprob, *torch.autograd.grad(out.logprob.sum(), logits)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("capped", [False, True])
def test_the_operators_are_registered_as_torch_wants_them(capped: bool, impl: str):
    logits, targets = inputs(5, 9)
    triton, bits = impl == "triton", torch.ones(5)
    # the interpreter cannot run inside a traced graph
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    checks = checks[:3] if triton else checks
    torch.library.opcheck(
        torch.ops.fastrlhf.logprob_from_logits.default,
        (logits.requires_grad_(), targets, bits, 0.3, capped, -100, True, False, triton),
        test_utils=checks,
    )
    rest = (targets, bits, torch.ones(5), torch.ones(3, 5), 0.3, capped, True, triton)
    for grad, source in ((torch.zeros(5, 9), logits.detach()), (logits.detach().clone(), None)):
        torch.library.opcheck(
            torch.ops.fastrlhf.logprob_from_logits_backward.default, (grad, source, *rest), test_utils=checks
        )


@pytest.mark.parametrize("inplace", [False, True])
def test_one_compiled_graph_serves_packs_of_every_length(inplace: bool):
    def loss(hidden: Tensor, weight: Tensor, given: Tensor, targets: Tensor):
        options = {"temperature": 0.7, "softcap": 2.0, "inplace_backward": inplace}
        logits = (hidden @ weight.T, given)  # logits computed inside the graph, and given ones
        outs = [logprob_from_logits(each, targets, entropy=True, **options) for each in logits]
        return sum(out.logprob.sum() + out.entropy.sum() for out in outs)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 8, 11):
        hidden, weight = torch.randn(rows, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
        targets = torch.arange(rows) % 9
        targets[1] = -100
        gradients = []
        for function in (loss, compiled):
            logits = hidden.square() @ weight.T
            gradients.append(torch.autograd.grad(function(hidden, weight, logits, targets), (hidden, weight)))
            assert (logits._version > 0) == inplace
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(1, 3, 4)}, "logits must be a tensor with 2 dimensions"),
        ({"logits": torch.zeros(3, 4).double()}, "logits must be .* got torch.float64"),
        ({"logits": torch.zeros(3, 0)}, "logits must have at least one column"),
        ({"targets": torch.zeros(3)}, "targets must be torch.int64, got torch.float32"),
        ({"targets": torch.tensor([0, 4, 0])}, r"targets must be in \[0, 3\], got 4"),
        ({"targets": torch.tensor([0, -1, 0])}, r"targets must be in \[0, 3\], got -1"),
        ({"temperature": 0.0}, "temperature must be in"),
        ({"temperature": torch.tensor([1.0, 0.0, 1.0])}, "temperature must be above 0 in every row"),
        ({"temperature": torch.ones(4)}, r"temperature must have shape \(3,\)"),
        ({"logit_scale": 0.0}, "logit_scale must be in"),
        ({"softcap": -1.0}, "softcap must be in"),
        ({"impl": "cuda"}, "impl must be .* got 'cuda'"),
    ],
)
def test_bad_arguments_are_named(changes: dict, message: str):
    good = {"logits": torch.zeros(3, 4), "targets": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        logprob_from_logits(**{**good, **changes})
