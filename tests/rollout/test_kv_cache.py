"""Tests that decoding in a slot of the cache gives the logits of a plain forward, whatever the slot held before."""

import pytest
import torch
from torch import Tensor

from fastrlhf.rollout.kv_cache import KEY_BLOCK, SlotCache, rounded_up
from tests import tiny

TEXT = [3 + (7 * i * i + 5 * i) % 29 for i in range(21)]
OTHER = [4 + (3 * i * i + i) % 28 for i in range(13)]


@torch.no_grad()
def logits_alone(model, tokens: list[int]) -> Tensor:
    """Returns the logits [V] after the last token, computed by the model's own forward without a cache."""
    return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]


def held(cache: SlotCache, slot: int, num_tokens: int) -> list[Tensor]:
    return [buffer[slot, :, :num_tokens].clone() for layer in cache._layers.values() for buffer in layer]


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Asserts equality up to a few units in the last place of the largest entry, because sums differ in their order."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-6 * max(1.0, theirs.abs().max().item()))


def steps(cache: SlotCache, model, texts: list[list[int]], next_tokens: list[list[int]]) -> Tensor:
    """Feeds `next_tokens` to the first n slots, which hold `texts`; returns the last logits [n, V]."""
    logits = torch.empty(0)
    for i, tokens in enumerate(zip(*next_tokens, strict=True)):
        positions = torch.tensor([len(text) + i for text in texts])
        logits = cache.step(model, torch.tensor(tokens), positions, rounded_up(int(positions.max()) + 1))
    return logits


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_prefixes_of_one_text_are_computed_once_with_the_numbers_of_each_alone(name):
    model = tiny.policy(name)
    texts = [TEXT[:5], OTHER, TEXT, TEXT[:1], TEXT[:5]]
    seen = []
    hook = model.register_forward_pre_hook(lambda _, __, kw: seen.append(kw["input_ids"].numel()), with_kwargs=True)
    cache = SlotCache(6, len(TEXT))
    logits = cache.prefill(model, texts, [4, 1, 0, 3, 2])
    hook.remove()
    assert seen == [len(TEXT) + len(OTHER)]
    for text, slot, found in zip(texts, [4, 1, 0, 3, 2], logits, strict=True):
        assert_close(found, logits_alone(model, text))
        alone = SlotCache(1, len(text))
        alone.prefill(model, [text], [0])
        for ours, theirs in zip(held(cache, slot, len(text)), held(alone, 0, len(text)), strict=True):
            assert_close(ours, theirs)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_steps_give_the_logits_of_the_whole_text_after_any_earlier_content(name):
    model = tiny.policy(name)
    cache = SlotCache(3, 30)
    cache.prefill(model, [OTHER, TEXT, TEXT], [0, 1, 2])
    steps(cache, model, [OTHER, TEXT, TEXT], [[9, 8], [7, 6], [5, 4]])
    cache.prefill(model, [TEXT[:3]], [1])  # shorter than the earlier content of the slot
    cache.move(torch.tensor([2]), torch.tensor([0]))
    texts, following = [[*TEXT, 5, 4], TEXT[:3]], [[11, 12, 13, 14, 15], [16, 17, 18, 19, 20]]
    for text, tokens, found in zip(texts, following, steps(cache, model, texts, following), strict=True):
        assert_close(found, logits_alone(model, [*text, *tokens]))


def test_more_keys_than_needed_change_nothing_and_memory_never_moves():
    model = tiny.policy()
    cache = SlotCache(2, 3 * KEY_BLOCK)
    cache.prefill(model, [TEXT, OTHER], [0, 1])
    before = [buffer.data_ptr() for layer in cache._layers.values() for buffer in layer]
    tokens, positions = torch.tensor([5, 6]), torch.tensor([len(TEXT), len(OTHER)])
    few = cache.step(model, tokens, positions, KEY_BLOCK)
    assert_close(cache.step(model, tokens, positions, 3 * KEY_BLOCK), few)
    cache.prefill(model, [TEXT[:4]], [0])
    cache.move(torch.tensor([0]), torch.tensor([1]))
    assert [buffer.data_ptr() for layer in cache._layers.values() for buffer in layer] == before


def test_the_model_is_restored_afterwards():
    model = tiny.policy()
    before = model.config._attn_implementation
    SlotCache(1, 9).prefill(model, [TEXT[:9]], [0])
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(("num_keys", "rounded"), [(1, KEY_BLOCK), (KEY_BLOCK, KEY_BLOCK), (65, 2 * KEY_BLOCK)])
def test_only_few_capacities_are_used(num_keys, rounded):
    assert rounded_up(num_keys) == rounded
    assert SlotCache(1, num_keys).capacity == rounded
