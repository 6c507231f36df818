"""Tests of planned bytes: passes are compared with counts by hand, and models that hold no data with real models."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastrlhf.data.packing import pack
from fastrlhf.models import attention
from fastrlhf.tools.plan.memory import Fakes
from fastrlhf.types import Segment
from tests import tiny


def config(**changes):
    found = tiny.model_config()
    found.vocab_size = 512
    for name, value in changes.items():
        setattr(found, name, value)
    return found


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_are_counted_as_on_the_meta_device(tied, dtype):
    fake = Fakes.of(dtype, False).policy(config(tie_word_embeddings=tied))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(tie_word_embeddings=tied))
    assert fake.num_parameters == sum(p.numel() for p in model.parameters())
    assert fake.num_trained == fake.num_parameters
    assert fake.gradient_bytes == (2 if dtype == "bfloat16" else 4) * fake.num_parameters


def test_a_reward_model_has_a_float32_head():
    fake = Fakes.of("bfloat16", False).scorer(config())
    assert fake.gradient_bytes == 2 * fake.num_parameters + 2 * 32


def peak(num_tokens: int, num_packs: int = 1, **changes) -> int:
    fakes = Fakes.of("float32", False)
    batch = pack([Segment(token_ids=[1] * num_tokens, num_scored=1)])
    return fakes.peak({"policy": fakes.policy(config(**changes))}, batch, reference=None, num_packs=num_packs)


def test_activations_grow_by_a_layer_and_by_a_token_in_proportion():
    one, two, four = (peak(1024, num_hidden_layers=n) for n in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=0.02)
    assert peak(2048) - peak(1024) == pytest.approx(peak(3072) - peak(2048), rel=0.01)


def test_from_the_second_pack_on_the_peak_includes_gradients():
    fake = Fakes.of("float32", False).policy(config())
    difference = peak(1024, num_packs=2) - peak(1024)
    assert 0 < difference <= 4 * fake.num_parameters
    assert peak(1024, num_packs=9) == peak(1024, num_packs=2)


def test_a_live_reference_adds_to_the_peak_and_nothing_is_left_behind():
    fakes = Fakes.of("float32", False)
    policy, reference = fakes.policy(config()), fakes.policy(config())
    batch = pack([Segment(token_ids=[1] * 512, num_scored=511)])
    alone = fakes.peak({"policy": policy}, batch, reference=None, num_packs=1)
    assert fakes.peak({"policy": policy}, batch, reference=reference, num_packs=1) >= alone
    assert fakes.peak({"policy": policy}, batch, reference=None, num_packs=1) == alone


def test_a_forward_without_gradient_keeps_no_activations():
    fakes = Fakes.of("float32", False)
    batch = pack([Segment(token_ids=[1] * 1024, num_scored=1)])
    small, large = (fakes.forward_peak({"policy": fakes.policy(config(num_hidden_layers=n))}, batch) for n in (2, 8))
    assert large == small


def test_without_data_segments_that_attend_to_themselves_are_one_operator():
    lengths = [(3, 3), (2, 5), (4, 4)]
    assert attention._merged(lengths, None) == ([(7, 7), (2, 5)], None)
    assert attention._merged(lengths, 5) == ([(7, 7), (2, 5)], None)
    assert attention._merged(lengths, 4) == (lengths, 4)
    assert attention._merged([(2, 5)], None) == ([(2, 5)], None)
