"""Tests attention over forests against a dense reference that only knows which tokens precede which."""

import inspect
import sys
from types import ModuleType
from typing import get_args, get_type_hints

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

from fastrlhf.config import TrainConfig
from fastrlhf.data.packing import pack
from fastrlhf.models import attention
from fastrlhf.models.adapters import frozen_copy
from fastrlhf.models.attention import (
    BACKENDS,
    PACKED,
    Backend,
    backend,
    choose_attention,
    chosen_attention,
    packed_attention,
)
from fastrlhf.models.forward import hidden_states
from fastrlhf.types import AttentionPlan, Segment
from tests import tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PLAIN = [Segment(token_ids=range(7)), Segment(token_ids=range(1)), Segment(token_ids=range(4))]
FOREST = [
    Segment(token_ids=range(7)),
    Segment(token_ids=range(3), parent=0, cut=7),
    Segment(token_ids=range(5), parent=0, cut=2),
    Segment(token_ids=range(4)),
    Segment(token_ids=range(2), parent=2, cut=4),
]
VARIANTS = {
    "plain": {},
    "window": {"sliding_window": 3},
    "window of one": {"sliding_window": 1},
    "window longer than all": {"sliding_window": 99},
    "soft-cap": {"softcap": 0.7},
    "soft-cap and window": {"softcap": 0.7, "sliding_window": 2},
    "own scale": {"scaling": 0.9},
}


def draw(segments: list[Segment], num_heads: int = 4, num_key_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Draws a random query [1, H, T, 8], and key and value [1, H_kv, T, 8]."""
    generator = torch.Generator().manual_seed(0)
    num_tokens = sum(len(segment.token_ids) for segment in segments)
    shapes = [(1, heads, num_tokens, 8) for heads in (num_heads, num_key_heads, num_key_heads)]
    return tuple(torch.randn(shape, generator=generator).mul_(2).requires_grad_() for shape in shapes)


def attend(segments: list[Segment], query: Tensor, key: Tensor, value: Tensor, **settings) -> Tensor:
    """Calls our attention like transformers does; returns [1, T, H, 8]."""
    output, weights = AttentionInterface()[PACKED](
        None, query, key, value, None, attention_plan=pack(segments).plan, **settings
    )
    assert weights is None
    return output


def paths(segments: list[Segment]) -> list[list[int]]:
    """Returns for every token of the pack the rows of its sequence up to and including the token itself."""
    starts, found = [], []
    for segment in segments:
        starts.append(len(found))
        before = found[starts[segment.parent] + segment.cut - 1] if segment.parent >= 0 else []
        for i in range(len(segment.token_ids)):
            found.append([*before, *range(starts[-1], starts[-1] + i + 1)])
    return found


def dense(
    segments: list[Segment],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float = 8**-0.5,
    softcap: float | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """Computes attention in float64 over all pairs of tokens, with an explicit mask."""
    visible = torch.zeros(query.shape[2], query.shape[2], dtype=torch.bool)
    for row, path in enumerate(paths(segments)):
        visible[row, path if sliding_window is None else path[-sliding_window:]] = True
    groups = query.shape[1] // key.shape[1]
    q, k, v = query[0].double(), key[0].double().repeat_interleave(groups, 0), value[0].double()
    scores = q @ k.transpose(1, 2) * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return (weights @ v.repeat_interleave(groups, 0)).transpose(0, 1)[None].float()


def agree(segments: list[Segment], settings: dict, num_heads: int = 4, num_key_heads: int = 2) -> None:
    """Compares our attention with the dense reference: the output, and the gradients of query, key and value."""
    results = []
    for function in (attend, dense):
        inputs = draw(segments, num_heads, num_key_heads)
        output = function(segments, *inputs, **settings)
        (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
        results.append([output.detach(), *(tensor.grad for tensor in inputs)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("segments", [PLAIN, FOREST], ids=["plain", "forest"])
@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_every_token_sees_its_own_past_and_nothing_else(segments, settings):
    agree(segments, settings)


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("num_key_heads", [4, 1])
def test_heads_share_keys_in_groups(settings, num_key_heads):
    agree(FOREST, settings, num_key_heads=num_key_heads)


def test_dropout_and_masks_of_the_models_own_are_refused():
    for settings, told in (
        ({"dropout": 0.1}, "no dropout"),
        ({"indices": torch.zeros(1)}, "masks its attention itself"),
    ):
        with pytest.raises(ValueError, match=told):
            attend(PLAIN, *draw(PLAIN), **settings)
    with pytest.raises(ValueError, match="masks its attention itself"):
        AttentionInterface()[PACKED](None, *draw(PLAIN), torch.zeros(1), attention_plan=pack(PLAIN).plan)


@pytest.mark.parametrize("settings", [{}, {"sliding_window": 3}], ids=["all", "window"])
def test_a_sink_is_a_key_without_a_value(settings):
    """Compares attention sinks with a softmax over one additional column, whose weight is dropped. Also compares the
    gradients of the sinks."""
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], requires_grad=True)
    results = []
    for ours in (True, False):
        query, key, value = draw(FOREST)
        sinks.grad = None
        if ours:
            output = attend(FOREST, query, key, value, s_aux=sinks, **settings)
        else:
            rows = []
            for row, path in enumerate(paths(FOREST)):
                seen = path[-settings.get("sliding_window", 99) :]
                keys, values = (x[0, :, seen].repeat_interleave(2, 0) for x in (key, value))  # [H, n, d]
                scores = (keys @ query[0, :, row, :, None])[..., 0] * 8**-0.5
                weights = torch.cat([scores, sinks[:, None]], 1).softmax(1)[:, :-1]
                rows.append((weights[..., None] * values).sum(1))
            output = torch.stack(rows)[None]
        (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
        results.append([output.detach(), query.grad, key.grad, value.grad, sinks.grad.clone()])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_backend_without_sinks_is_refused():
    with pytest.raises(ValueError, match="varlen has no attention sinks"):
        attend(PLAIN, *draw(PLAIN), s_aux=torch.zeros(4), attention_backend="varlen")


def test_keywords_of_other_models_are_ignored():
    inputs = draw(PLAIN)
    assert torch.equal(attend(PLAIN, *inputs, position_ids=None, use_cache=False), attend(PLAIN, *inputs))


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_no_tensor_of_quadratic_size_is_ever_allocated(settings):
    segments = [Segment(token_ids=range(16))] * 8

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            output = function(*arguments, **(keywords or {}))
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor):
                    self.numel = max(self.numel, leaf.numel())
            return output

    with Largest() as largest:
        attend(segments, *draw(segments), **settings)
    assert 0 < largest.numel < 128 * 128


# Choice of the backend and its arguments. -----------------------------------


@pytest.mark.parametrize(
    ("device", "dtype", "softcap", "installed", "expected"),
    [
        (CPU, torch.bfloat16, None, {"flash_attn", "torch.nn.attention.varlen"}, "sdpa"),
        (CUDA, torch.float32, None, {"flash_attn", "torch.nn.attention.varlen"}, "sdpa"),
        (CUDA, torch.bfloat16, None, {"flash_attn", "torch.nn.attention.varlen"}, "flash_attention_2"),
        (CUDA, torch.float16, 2.0, {"flash_attn", "torch.nn.attention.varlen"}, "flash_attention_2"),
        (CUDA, torch.bfloat16, None, {"torch.nn.attention.varlen"}, "varlen"),
        (CUDA, torch.bfloat16, 2.0, {"torch.nn.attention.varlen"}, "sdpa"),
        (CUDA, torch.bfloat16, None, set(), "sdpa"),
    ],
)
def test_the_best_backend_that_can_do_it_is_chosen(monkeypatch, device, dtype, softcap, installed, expected):
    monkeypatch.setattr(attention, "_installed", installed.__contains__)
    assert backend(device, dtype, softcap) == expected


def test_what_is_installed_is_found(tmp_path, monkeypatch):
    assert attention._installed("torch.nn.attention.varlen")
    assert not attention._installed("no_such_package")
    assert not attention._installed("no_such_package.within")
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)  # the layout of an installed flash-attn-4
    (tmp_path / "flash_attn" / "cute" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    attention._installed.cache_clear()
    try:
        assert attention._installed("flash_attn.cute")
        assert not attention._installed("flash_attn")
    finally:
        attention._installed.cache_clear()
        sys.modules.pop("flash_attn", None)


@pytest.mark.parametrize(
    ("name", "device", "dtype", "softcap", "installed", "capability", "expected"),
    [
        ("flash_attention_2", CPU, torch.float32, None, True, 9, "needs a CUDA GPU, and the run is on cpu; use sdpa"),
        ("flex", CPU, torch.float32, None, True, 9, "needs a CUDA GPU"),
        ("varlen", CUDA, torch.float32, None, True, 9, "does not support torch.float32; set dtype to bfloat16"),
        ("varlen", CUDA, torch.bfloat16, 2.0, True, 9, "no soft-capping, which this model needs; use flash_attention"),
        ("flash_attention_2", CUDA, torch.bfloat16, None, False, 9, "not installed: pip install flash-attn"),
        ("flash_attention_3", CUDA, torch.bfloat16, None, False, 9, "not installed: build the folder hopper"),
        ("flash_attention_4", CUDA, torch.bfloat16, None, False, 9, "not installed: pip install --pre flash-attn-4"),
        ("flash_attention_3", CUDA, torch.bfloat16, None, True, 10, "compute capability 9, and this one has 10"),
        ("flash_attention_4", CUDA, torch.bfloat16, None, True, 8, "capability 9 or 10 or 11, and this one has 8"),
        ("flash_attention_2", CUDA, torch.bfloat16, 2.0, True, 8, ""),
        ("flash_attention_3", CUDA, torch.float16, 2.0, True, 9, ""),
        ("flash_attention_4", CUDA, torch.bfloat16, 2.0, True, 10, ""),
        ("varlen", CUDA, torch.bfloat16, None, True, 8, ""),
        ("flex", CUDA, torch.float32, 2.0, False, 8, ""),
        ("sdpa", CPU, torch.bfloat16, 2.0, False, 8, ""),
    ],
)
def test_a_backend_that_cannot_run_the_model_is_refused_with_a_fix(
    monkeypatch, name, device, dtype, softcap, installed, capability, expected
):
    monkeypatch.setattr(attention, "_installed", lambda module: installed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    found = attention._obstacle(name, device, dtype, softcap)
    assert expected in found
    assert bool(expected) == bool(found)


def test_only_existing_backends_can_be_chosen_by_name():
    names = get_args(get_type_hints(TrainConfig)["attn_implementation"])
    assert set(names) == {"auto", *BACKENDS}


def test_a_choice_is_refused_by_its_key_and_kept_by_copies():
    model = tiny.policy()
    assert chosen_attention(model) == "auto"
    with pytest.raises(ValueError, match=r"^attn_implementation: varlen needs a CUDA GPU.*sdpa, or leave it at auto$"):
        choose_attention(model, "varlen")
    assert choose_attention(model, "auto") == choose_attention(model, "sdpa") == "sdpa"
    assert chosen_attention(frozen_copy(model)) == "sdpa"


@pytest.mark.parametrize("chosen", ["auto", "sdpa"])
def test_the_chosen_backend_runs(monkeypatch, chosen):
    model, ran = tiny.policy(), []

    def spy(*arguments):
        ran.append(arguments)
        return attention._sdpa(*arguments)

    choose_attention(model, chosen)
    monkeypatch.setitem(BACKENDS, "sdpa", Backend(attend=spy, only_cuda=False, only_half=False))
    monkeypatch.setattr(attention, "backend", lambda *_: pytest.fail("chosen") if chosen == "sdpa" else "sdpa")
    with torch.no_grad():
        hidden_states(model, pack(PLAIN))
    assert len(ran) == 2  # one call per layer


def variable_length(q, k, v, cu_q, cu_k, scale, window: tuple[int, int], softcap: float = 0.0) -> Tensor:
    """Computes FlashAttention token by token, as documented: query i of Lq attends to the keys j of Lk with i + Lk - Lq
    - left <= j <= i + Lk - Lq + right. A limit of -1 means no limit."""
    left, right = (torch.inf if side < 0 else side for side in window)
    groups = q.shape[1] // k.shape[1]
    rows = []
    for (q0, q1), (k0, k1) in zip(cu_q.unfold(0, 2, 1).tolist(), cu_k.unfold(0, 2, 1).tolist(), strict=True):
        for i in range(q1 - q0):
            diagonal = i + (k1 - k0) - (q1 - q0)
            seen = [k0 + j for j in range(k1 - k0) if diagonal - left <= j <= diagonal + right]
            keys, values = (x[seen].repeat_interleave(groups, 1) for x in (k, v))  # [n, H, d]
            scores = (q[q0 + i] * keys).sum(-1) * scale  # [n, H]
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            rows.append((scores.softmax(0)[..., None] * values).sum(0))
    return torch.stack(rows)


def check_lengths(plan: AttentionPlan, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> None:
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert max_q == max(cu_q.diff()) == max(plan.query_lengths)
    assert max_k == max(cu_k.diff()) == max(plan.key_lengths)


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize("segments", [PLAIN, FOREST], ids=["plain", "forest"])
@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_flash_attention_gets_equivalent_arguments(monkeypatch, segments, settings, version):
    """Replaces the function of each FlashAttention version by a fake with the documented signature, which computes
    attention from its arguments. fastrlhf has never been run with the real versions 3 and 4.
    """

    def flash_attn_varlen_func(
        q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size, softcap,
        deterministic,
    ):  # fmt: skip
        assert deterministic
        check_lengths(pack(segments).plan, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        left = window_size[0]
        if version == 4:  # None means no limit, and -1 would exclude the token itself
            assert left is None or left >= 0
            left = -1 if left is None else left
        window = (left, 0) if causal else window_size  # causal attention limits the right side
        output = variable_length(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, window, softcap)
        return (output, None) if version == 4 else output

    modules = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}
    package = ModuleType(modules[version])
    package.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, modules[version], package)
    monkeypatch.setattr(attention, "backend", lambda *_: f"flash_attention_{version}")
    agree(segments, settings)


@pytest.mark.parametrize("segments", [PLAIN, FOREST], ids=["plain", "forest"])
@pytest.mark.parametrize("settings", [s for s in VARIANTS.values() if "softcap" not in s], ids=str)
def test_torch_varlen_gets_equivalent_arguments(monkeypatch, segments, settings):
    signature = inspect.signature(varlen.varlen_attn)

    def varlen_attn(*arguments, **keywords):
        call = signature.bind(*arguments, **keywords)
        call.apply_defaults()
        told = call.arguments
        # torch 2.11's varlen_attn has no enable_gqa, so query, key and value must have equal numbers of heads
        assert told["query"].shape[1] == told["key"].shape[1] == told["value"].shape[1]
        check_lengths(pack(segments).plan, told["cu_seq_q"], told["cu_seq_k"], told["max_q"], told["max_k"])
        return variable_length(
            *(told[name] for name in ("query", "key", "value", "cu_seq_q", "cu_seq_k", "scale", "window_size"))
        )

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(attention, "backend", lambda *_: "varlen")
    agree(segments, settings)


# Effects on the model. ------------------------------------------------------


def test_packed_attention_restores_the_model_even_after_an_error():
    model = tiny.policy()
    before = model.config._attn_implementation
    with packed_attention(model):
        assert model.config._attn_implementation == PACKED

    def fail_within() -> None:
        with packed_attention(model):
            raise KeyError

    with pytest.raises(KeyError):
        fail_within()
    assert model.config._attn_implementation == before != PACKED


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_a_packed_forward_reads_nothing_back_from_the_device(name):
    """Checks that attention reads no tensor on the host, because the host would wait for the GPU. A CPU dispatches the
    same operators as a GPU."""

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            assert "_local_scalar_dense" not in str(function)
            return function(*arguments, **keywords or {})

    model = tiny.policy(name)
    batch = pack([Segment(token_ids=[3, 4, 5], num_scored=2), Segment(token_ids=[6, 7, 1], num_scored=2)])
    with Reads(), torch.no_grad():
        hidden_states(model, batch)
