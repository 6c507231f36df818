"""Tests FlexAttention over forests against one SDPA call per segment. On a CPU, torch runs its reference implementation
of FlexAttention.
"""

import random

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as torch_flex

from fastrlhf.data.packing import pack
from fastrlhf.models import attention, flex
from fastrlhf.models.forward import token_logprobs
from fastrlhf.types import AttentionPlan, Segment
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(autouse=True)
def with_backward(monkeypatch):
    """Enables the backward of torch's reference implementation. On a CPU torch refuses this backward, because it has no
    compiled one."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)


def forest(seed: int, longest: int = 90) -> list[Segment]:
    """Draws trees of random lengths, which together are longer than a block of 128 rows."""
    draw, segments = random.Random(seed), []
    for _ in range(4):
        trunk, length = len(segments), draw.randint(2, longest)
        segments.append(Segment(token_ids=[3] * length))
        for _ in range(draw.randint(0, 2)):
            cut = draw.randint(1, length)
            segments.append(Segment(token_ids=[4] * draw.randint(1, longest), parent=trunk, cut=cut))
    return segments


def run(attend, plan: AttentionPlan, softcap: float | None, window: int | None) -> list[torch.Tensor]:
    """Returns the output [T, 4, 8] and the gradients of query, key and value of a weighted sum of all outputs."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(sum(plan.query_lengths), 4, 8), *[(sum(plan.query_lengths), 2, 8)] * 2]
    inputs = [torch.randn(size, generator=generator).requires_grad_() for size in sizes]
    q, k, v = inputs if plan.key_index is None else (inputs[0], *(x[plan.key_index] for x in inputs[1:]))
    output = attend(q, k, v, plan, 8**-0.5, softcap, window)
    (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
    return [output.detach(), *(x.grad for x in inputs)]


def assert_close(ours, expected) -> None:
    """Asserts agreement within 1e-6 of the largest entry: sums of a few hundred float32 numbers in different orders."""
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * other.abs().max().item() + 1e-7)


def test_each_query_sees_one_run_of_keys():
    """The pack is: 7 8; a branch 1 0 2 after the 7; and 5. The gathered keys must be 7 8 | 7 1 0 2 | 5."""
    first, last = flex.visible((2, 3, 1), (2, 4, 1), None)
    assert first.tolist() == [0, 0, 2, 2, 2, 6]
    assert last.tolist() == [0, 1, 3, 4, 5, 6]
    first, _ = flex.visible((2, 3, 1), (2, 4, 1), 2)
    assert first.tolist() == [0, 0, 2, 3, 4, 6]


@pytest.mark.parametrize("window", [None, 1, 40])
def test_the_block_mask_has_exactly_the_blocks_with_visible_keys(window):
    plan = pack(forest(0)).plan
    first, last = flex.visible(plan.query_lengths, plan.key_lengths, window)
    rows = torch.arange(sum(plan.key_lengths))
    seen = (first[:, None] <= rows) & (rows <= last[:, None])
    down, across = (-(-size // flex.BLOCK) * flex.BLOCK for size in seen.shape)
    padded = torch.zeros(down, across, dtype=torch.bool)
    padded[: seen.shape[0], : seen.shape[1]] = seen
    expected = padded.view(down // flex.BLOCK, flex.BLOCK, across // flex.BLOCK, flex.BLOCK).any(3).any(1)
    mask = flex.block_mask(plan.query_lengths, plan.key_lengths, window, torch.device("cpu"))
    assert expected.shape[0] > 1
    assert torch.equal(mask.to_dense()[0, 0].bool(), expected)


@pytest.mark.parametrize(("softcap", "window"), [(None, None), (None, 40), (0.7, 3)])
def test_it_gives_what_sdpa_gives_per_segment(softcap, window):
    for segments in (forest(0), [segment for segment in forest(0) if segment.parent < 0]):
        plan = pack(segments).plan
        assert_close(*(run(attend, plan, softcap, window) for attend in (flex.attend, attention._sdpa)))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "mistral"])
def test_a_model_gives_the_numbers_and_gradients_of_sdpa(monkeypatch, name):
    segments = [
        Segment(token_ids=[5, 6, 7, 8, 9, 10, 11]),
        Segment(token_ids=[14, 15], num_scored=2, parent=0, cut=7),
        Segment(token_ids=[16, 17, 18], num_scored=3, parent=0, cut=3),
        Segment(token_ids=[20, 21, 22, 23, 24, 25], num_scored=5),
    ]
    results = []
    for backend in ("flex", "sdpa"):
        model = tiny.policy(name)
        monkeypatch.setattr(attention, "backend", lambda *_, backend=backend: backend)
        logprob = token_logprobs(model, pack(segments)).logprob
        logprob.sum().backward()
        results.append([logprob.detach(), *[p.grad for p in model.parameters() if p.grad is not None]])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=2e-6 * expected.abs().max().item())


def test_packs_of_all_lengths_share_few_compiled_codes(monkeypatch):
    """Compiles with dynamic lengths, as on a GPU, but skips the last stages of the compiler, which need a GPU."""
    compiled = torch.compile(torch_flex.flex_attention, dynamic=True, backend="eager")
    monkeypatch.setattr(flex, "flex_attention", compiled)
    counters.clear()
    for seed in range(8):
        plan = pack(forest(seed, longest=60)).plan
        assert_close(*(run(attend, plan, None, 20 if seed % 2 else None) for attend in (flex.attend, attention._sdpa)))
    assert counters["stats"]["unique_graphs"] <= 4


def test_all_layers_of_a_forward_share_one_mask():
    plan = pack(forest(3)).plan
    flex.block_mask.cache_clear()
    for _ in range(3):
        run(flex.attend, plan, None, None)
    assert flex.block_mask.cache_info().misses == 1
