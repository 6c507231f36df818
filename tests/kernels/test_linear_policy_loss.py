import sys

import pytest
import torch
from torch import Tensor

from bench.measure import peak_bytes
from fastrlhf_kernels import _blocks as blocks
from fastrlhf_kernels import _tiles as tiles
from fastrlhf_kernels.linear_logprob import linear_logprob, linear_logprob_reference
from fastrlhf_kernels.linear_policy_loss import linear_policy_loss, linear_policy_loss_reference
from fastrlhf_kernels.policy_loss import policy_loss, policy_loss_reference
from tests.tolerance import assert_op_matches

module = sys.modules["fastrlhf_kernels._form"]
HEAD_OPTIONS = {"temperature": torch.linspace(0.5, 2, 37), "logit_scale": 1.5, "softcap": 3.0}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPU_ROWS", 16)
    monkeypatch.setattr(module, "CPU_BYTES", 0)
    monkeypatch.setattr(module, "MULTIPLE", 16)
    monkeypatch.setattr(tiles, "INTERPRETER", tiles.Tiles(16, 16, 16, 4, 1, descriptors=False))


def inputs(rows: int = 37, size: int = 24, vocab: int = 70, seed: int = 0) -> dict[str, Tensor]:
    """Returns tensors with ratios on both sides of the clip, and with masked and ignored rows."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, weight, targets = (
        normal(rows, size),
        normal(vocab, size) / 3,
        torch.randint(0, vocab, (rows,), generator=generator),
    )
    sampler_logprob = linear_logprob(hidden, weight, targets, impl="torch").logprob + 0.3 * normal(rows)
    mask = torch.rand(rows, generator=generator) > 0.3
    return {
        "hidden": hidden,
        "weight": weight,
        "targets": targets,
        "sampler_logprob": sampler_logprob,
        "advantage": normal(rows),
        "mask": mask,
    }


def head_leaves(given: dict[str, Tensor], names: tuple[str, ...] = ("hidden", "weight")) -> list[Tensor]:
    for name in names:
        given[name] = given[name].clone().requires_grad_()
    return [given[name] for name in names]


def two_steps(given: dict[str, Tensor], head: dict, loss: dict, entropy: bool):
    rows = linear_logprob(given["hidden"], given["weight"], given["targets"], entropy=entropy, impl="torch", **head)
    fixed = (given["sampler_logprob"], given["advantage"], given["mask"])
    return policy_loss(rows.logprob, *fixed, entropy=rows.entropy, impl="torch", **loss)


def test_it_equals_the_two_definitions_composed(impl: str):
    given = inputs()
    leaves = {name: given.pop(name) for name in ("hidden", "weight")}
    rows = {name: given.pop(name) for name in ("sampler_logprob", "advantage")}

    def op(**tensors: Tensor):
        return (linear_policy_loss(**tensors, **given, **rows, num_tokens=19.0, softcap=3.0, impl=impl).loss,)

    def reference(**tensors: Tensor):
        cast = {name: row.to(tensors["hidden"].dtype) for name, row in rows.items()}
        return (linear_policy_loss_reference(**tensors, **given, **cast, num_tokens=19.0, softcap=3.0),)

    assert_op_matches(op, reference, leaves)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.3])
def test_every_option_gives_what_the_two_steps_give(impl: str, entropy_coef: float):
    given = inputs()
    given["targets"][3] = -100
    given["mask"][3] = True  # both forms give an ignored target in the mask the log-prob 0
    reference_logprob = given["sampler_logprob"] + 0.2
    loss = {"num_tokens": torch.tensor(17.0), "dual_clip": 1.5, "kl_coef": 0.2, "kl_kind": "k3", "clip_high": 0.3}
    loss |= {"reference_logprob": reference_logprob, "entropy_coef": entropy_coef}
    token_weight, bias = torch.linspace(0.1, 1, 37), torch.linspace(-1, 1, 70)
    ours, theirs = head_leaves(given | {"bias": bias}, ("hidden", "weight", "bias")), None
    names = ("hidden", "weight", "bias")
    one = linear_policy_loss(
        **given | dict(zip(names, ours, strict=True)),
        **loss,
        **HEAD_OPTIONS,
        token_weight=token_weight,
        entropy=True,
        impl=impl,
    )
    theirs = [leaf.detach().clone().requires_grad_() for leaf in ours]
    two = two_steps(
        given | dict(zip(names[:2], theirs[:2], strict=True)),
        {"bias": theirs[2], **HEAD_OPTIONS},
        {**loss, "weight": token_weight},
        True,
    )
    torch.testing.assert_close(one.loss, two.loss, rtol=2e-6, atol=1e-6)
    assert one.metrics.keys() == two.metrics.keys()
    for name, metric in two.metrics.items():
        torch.testing.assert_close(one.metrics[name].value, metric.value, rtol=5e-6, atol=1e-5)
    upstream = torch.tensor(2.5)
    gradients = [torch.autograd.grad(upstream * out.loss, leaves) for out, leaves in ((one, ours), (two, theirs))]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6 * b.abs().max().item() + 1e-8)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_only_tensors_that_need_a_gradient_get_one(impl: str, frozen: str):
    given = inputs()
    wanted = [name for name in ("hidden", "weight") if frozen not in (name, "both")]
    full, some = inputs(), inputs()
    linear_policy_loss(
        **full | dict(zip(("hidden", "weight"), head_leaves(full), strict=True)), num_tokens=9, impl=impl
    ).loss.backward()
    leaves = head_leaves(some, tuple(wanted))
    out = linear_policy_loss(**some, num_tokens=9, impl=impl)
    assert out.loss.requires_grad == bool(wanted)
    if wanted:
        out.loss.backward()
        for name, leaf in zip(wanted, leaves, strict=True):
            assert torch.equal(leaf.grad, full[name].grad)
    with torch.no_grad():
        assert torch.equal(linear_policy_loss(**given, num_tokens=9, impl=impl).loss, out.loss)


def test_inputs_need_not_be_contiguous(impl: str):
    results = []
    for strided in (False, True):
        given = inputs()
        given["mask"][:] = True  # processes all rows, so that no step makes a contiguous copy
        temperature = torch.full((37,), 0.7)
        if strided:
            given = {k: torch.stack([v, v], -1)[..., 0] if k != "hidden" else v for k, v in given.items()}
            temperature = torch.tensor(0.7).expand(37)
        leaves = head_leaves(given)
        out = linear_policy_loss(**given, num_tokens=9, temperature=temperature, impl=impl)
        results.append((out.loss, *torch.autograd.grad(out.loss, leaves)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_the_upstream_gradient_is_not_rounded_to_the_dtype_of_the_leaves():
    """Multiplies the loss by 65,536. In float16 the unscaled gradients would underflow, and the factor itself would
    overflow."""
    given = inputs()
    given["hidden"], given["weight"] = given["hidden"].half(), given["weight"].half()
    rounded = {**given, "hidden": given["hidden"].float(), "weight": given["weight"].float()}
    exact = head_leaves(rounded)
    truth = torch.autograd.grad(65536.0 * linear_policy_loss(**rounded, num_tokens=1e6).loss, exact)
    leaves = head_leaves(given)
    found = torch.autograd.grad(65536.0 * linear_policy_loss(**given, num_tokens=1e6).loss, leaves)
    for a, b in zip(found, truth, strict=True):
        assert a.dtype == torch.float16
        assert (a.float() - b).norm() < 1e-3 * b.norm()


@pytest.mark.parametrize("counts", [True, False])
def test_nan_outside_the_mask_does_not_matter(counts: bool, monkeypatch: pytest.MonkeyPatch, impl: str):
    monkeypatch.setattr(blocks, "can_select", lambda device, wait: counts)
    given = inputs()
    clean = {name: tensor.clone() for name, tensor in given.items()}
    outside = ~given["mask"]
    given["hidden"][outside] = float("nan")
    for name in ("sampler_logprob", "advantage"):
        given[name][outside] = float("inf")
    clean["temperature"], given["temperature"] = torch.ones(37), torch.ones(37).masked_fill(outside, 0)
    results = []
    for tensors in (given, clean):
        leaves = head_leaves(tensors)
        out = linear_policy_loss(**tensors, num_tokens=9, impl=impl)
        results.append((out.loss, *torch.autograd.grad(out.loss, leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"entropy_coef": 0.3}, {"softcap": 3.0}], ids=str)
def test_a_tile_of_ignored_rows_is_never_read(impl: str, options: dict, monkeypatch: pytest.MonkeyPatch):
    """If rows cannot be counted, the kernel never writes the masses of a tile of ignored rows. This memory holds NaN in
    the test and must not affect the result."""
    given = inputs()
    given["mask"][:32] = False  # the first two tiles, which are separate chunks
    results = []
    for counts in (False, True):
        monkeypatch.setattr(blocks, "can_select", lambda device, wait, counts=counts: counts)
        leaves = head_leaves(given)
        out = linear_policy_loss(**given, **options, num_tokens=9, impl=impl)
        results.append((out.loss, *torch.autograd.grad(out.loss, leaves)))
    for uncounted, counted in zip(*results, strict=True):
        torch.testing.assert_close(uncounted, counted, rtol=1e-6, atol=1e-7)
    assert results[0][1][:32].eq(0).all()
    assert results[0][1][32:].ne(0).any()


@pytest.mark.parametrize("case", ["no rows", "no trained row"])
def test_an_empty_mask_gives_differentiable_zeros(impl: str, case: str):
    given = inputs(rows=0 if case == "no rows" else 5)
    given["mask"] = torch.zeros(len(given["hidden"]), dtype=torch.bool)
    leaves = head_leaves(given)
    out = linear_policy_loss(**given, num_tokens=0, impl=impl)
    out.loss.backward()
    assert out.loss.item() == 0
    assert all(leaf.grad.eq(0).all() for leaf in leaves)


def test_the_chunk_size_does_not_change_the_result(impl: str, monkeypatch: pytest.MonkeyPatch):
    results = []
    for rows in (16, 32, 48):
        monkeypatch.setattr(module, "CPU_ROWS", rows)
        monkeypatch.setattr(module, "MULTIPLE", rows)
        given = inputs()
        leaves = head_leaves(given)
        out = linear_policy_loss(**given, num_tokens=9, impl=impl)
        results.append((out.loss, *torch.autograd.grad(out.loss, leaves)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_half_precision_is_as_exact_as_in_two_steps(impl: str):
    given = inputs(rows=64, size=96)
    given["hidden"], given["weight"] = given["hidden"].bfloat16(), given["weight"].bfloat16()
    exact = {**given, "hidden": given["hidden"].double(), "weight": given["weight"].double()}
    for name in ("sampler_logprob", "advantage"):
        exact[name] = given[name].double()
    truth_leaves = head_leaves(exact)
    truth = torch.autograd.grad(linear_policy_loss_reference(**exact, num_tokens=30.0), truth_leaves)
    errors = []
    for op in (
        lambda **x: linear_policy_loss(**x, num_tokens=30.0, impl=impl).loss,
        lambda **x: two_steps(x, {}, {"num_tokens": 30.0}, False).loss,
    ):
        tensors = dict(given)
        leaves = head_leaves(tensors)
        gradients = torch.autograd.grad(op(**tensors), leaves)
        errors.append([(a.double() - b).norm() / b.norm() for a, b in zip(gradients, truth, strict=True)])
    for one, two in zip(*errors, strict=True):
        # The Triton path rounds the stored masses and the gradient of the logits to bfloat16, 2^-9 each
        assert one <= (1.1 * two if impl == "torch" else 2**-7)


def test_beyond_the_gradients_only_a_chunk_of_logits_is_allocated():
    rows, vocab = 512, 4096
    given = inputs(rows, 8, vocab)
    given["mask"][:] = True
    leaves = head_leaves(given)
    peak = peak_bytes(lambda: linear_policy_loss(**given, num_tokens=9).loss.backward())
    gradients = sum(4 * leaf.numel() for leaf in leaves)
    # Two copies of the gradients exist: unscaled, and scaled by the upstream gradient
    assert peak - 2 * gradients < 4 * rows * vocab / 10


def test_the_operator_is_registered_as_torch_wants_it():
    given = inputs(rows=9)
    hidden, weight = head_leaves(given)
    fixed = (
        given["targets"],
        given["sampler_logprob"],
        given["advantage"],
        given["mask"],
        None,
        None,
        torch.tensor(3.0),
    )
    options = (None, 1.0, 1.0, None, -100, False, 0.8, 1.2, 3.0, 0.0, "k2", 0.0, "ppo", True, True, False, False)
    torch.library.opcheck(torch.ops.fastrlhf.linear_policy_loss.default, (hidden, weight, None, *fixed, *options))


@pytest.mark.parametrize("transposed", [False, True])
@torch._inductor.config.patch(force_disable_caches=True)  # Inductor's cache ignores an operator's fake
def test_it_compiles_to_one_graph(transposed: bool):
    compiled = torch.compile(linear_policy_loss, fullgraph=True, backend="inductor" if transposed else "aot_eager")
    gradients = []
    for op in (linear_policy_loss, compiled):
        given = inputs()
        if transposed:
            given["hidden"] = given["hidden"].t().contiguous().t()
        leaves = head_leaves(given)
        gradients.append(torch.autograd.grad(op(**given, num_tokens=9).loss, leaves))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_a_count_that_changes_between_steps_does_not_recompile():
    torch._dynamo.reset()
    given = inputs()
    compiled = torch.compile(linear_policy_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    losses = [compiled(**given, num_tokens=count).loss for count in (2.5, 3.5)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses += [compiled(**given, num_tokens=count).loss for count in (4.5, 5.5)]
    for loss, count in zip(losses, (2.5, 3.5, 4.5, 5.5), strict=True):
        assert torch.equal(loss, linear_policy_loss(**given, num_tokens=count).loss)


def test_the_default_dtype_of_torch_changes_nothing(impl: str, request: pytest.FixtureRequest):
    given = inputs()
    results = []
    for dtype in (torch.float32, torch.float64):
        request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
        torch.set_default_dtype(dtype)
        leaves = head_leaves(given)
        out = linear_policy_loss(**given, num_tokens=9, entropy_coef=0.1, impl=impl)
        results.append((out.loss, *torch.autograd.grad(out.loss, leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("entropy_coef", [0.0, 0.3])
def test_with_a_soft_cap_the_gradient_of_a_very_unlikely_target_is_exact(impl: str, entropy_coef: float):
    """The log-probs of the targets go down to -240, where exp(z - top) underflows to 0. The soft cap's derivative must
    therefore not be computed from exp(z - top)."""
    given = inputs()
    given["hidden"] = given["hidden"] * 30
    given["targets"] = (given["hidden"] @ given["weight"].T).argmin(1)
    head = {"softcap": 30.0, "temperature": 0.25}
    given["sampler_logprob"] = linear_logprob(given["hidden"], given["weight"], given["targets"], **head).logprob
    loss = {"num_tokens": 9, "entropy_coef": entropy_coef}
    leaves = {name: given.pop(name) for name in ("hidden", "weight")}

    def one(**tensors: Tensor):
        return (linear_policy_loss(**tensors, **given, **head, **loss, impl=impl).loss,)

    def two(**tensors: Tensor):
        fixed = [given[name].to(tensors["hidden"].dtype) for name in ("sampler_logprob", "advantage")]
        rows = linear_logprob_reference(**tensors, targets=given["targets"], **head)
        gain = policy_loss_reference(rows.logprob, *fixed, given["mask"], num_tokens=9)
        return (gain - entropy_coef * rows.entropy[given["mask"]].sum() / 9,)

    assert_op_matches(one, two, leaves)


def test_a_second_derivative_is_refused():
    given = inputs()
    hidden, _ = head_leaves(given)
    with pytest.raises(RuntimeError, match="linear_policy_loss has no second derivative"):
        torch.autograd.grad(linear_policy_loss(**given, num_tokens=9).loss, hidden, create_graph=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(4, 3)}, r"weight must have shape \(4, 24\)"),
        ({"targets": torch.full((37,), 70)}, r"targets must be in \[0, 69\], got 70"),
        ({"mask": torch.ones(37)}, "mask must be torch.bool"),
        ({"advantage": torch.ones(36)}, r"advantage must have shape \(37,\)"),
        ({"kl_coef": 0.1}, "kl_coef needs reference_logprob"),
        ({"temperature": -1.0}, "temperature must be in"),
        ({"temperature": -torch.ones(37)}, "temperature must be above 0 in every row"),
        ({"num_tokens": -1}, "num_tokens must not be negative"),
        ({"impl": "cuda"}, r"impl must be .* got 'cuda'"),
    ],
)
def test_bad_arguments_are_named(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(**{**inputs(), "num_tokens": 9, **changes})
