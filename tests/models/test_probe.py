"""Tests of the probe that examines a model at the start of a run."""

import logging
from pickle import UnpicklingError

import pytest
import torch
import transformers
from transformers import AttentionInterface

from fastrlhf.data.packing import pack
from fastrlhf.models.attention import PACKED, runs_alone
from fastrlhf.models.forward import LogitMap, enable_activation_checkpointing, logit_map, token_logprobs
from fastrlhf.models.layers import LayerOptions
from fastrlhf.models.loading import build_policy
from fastrlhf.models.probe import (
    check_checkpointing,
    check_packed_forward,
    find_logit_map,
    obstacle_to_packs,
    one_line,
    own_forward,
)
from fastrlhf.types import Segment
from tests import tiny

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


def build(config, **layers):
    return build_policy(config, vocab_size=tiny.VOCAB, eos_token_id=tiny.EOS, seed=0, layers=LayerOptions(**layers))


def chunked(**settings):
    sizes = SIZES | {"intermediate_size_mlp": 48, "num_local_experts": 2, "head_dim": 8}
    return transformers.Llama4TextConfig(**sizes | {"attention_chunk_size": 64} | settings)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_that_leaks_between_sequences_is_found(dtype):
    """Uses a freshly initialised model, whose log-probs change by less than the bfloat16 tolerance if attention
    leaks."""

    def leaky(module, query, key, value, attention_mask, *, attention_plan, scaling=None, **kwargs):
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return output.transpose(1, 2), None

    model = build_policy(tiny.model_config(), vocab_size=tiny.VOCAB, eos_token_id=tiny.EOS, seed=0, dtype=dtype)
    ours = AttentionInterface()[PACKED]
    AttentionInterface.register(PACKED, leaky)
    try:
        with pytest.raises(
            ValueError,
            match="the packed forward mixes sequences; training would",
        ):
            check_packed_forward(model)
    finally:
        AttentionInterface.register(PACKED, ours)
    check_packed_forward(model)


@pytest.mark.parametrize(
    "config",
    [
        transformers.PhimoeConfig(**SIZES, sliding_window=64, num_local_experts=2),
        transformers.Qwen2MoeConfig(
            **SIZES, use_sliding_window=True, sliding_window=64, max_window_layers=2, num_experts=4,
            moe_intermediate_size=16, shared_expert_intermediate_size=16,
        ),
        chunked(),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_windows_longer_than_the_probe_are_found_if_attention_does_not_get_them(config, caplog):
    with caplog.at_level(logging.WARNING):
        model = build(config)
    assert runs_alone(model) == "has attention windows or chunks that are not passed to the attention function"
    assert "run one by one with the model's own attention, which is exact and slower" in caplog.text


def test_windows_that_are_passed_to_attention_are_accepted():
    for sizes in ({"sliding_window": 64}, {"sliding_window": None}, {}):
        model = build(transformers.MistralConfig(**SIZES, **sizes))
        assert runs_alone(model) == ""


def test_a_model_with_a_recurrent_state_runs_one_sequence_at_a_time():
    config = transformers.MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=4)
    model = build(config)
    assert "mixes sequences" in runs_alone(model) or "cannot run" in runs_alone(model)
    ids = [3, 4, 5, 6, 7, 8]
    batch = pack([Segment(token_ids=ids[:3]), Segment(token_ids=ids[3:], num_scored=3, parent=0, cut=3)])
    plain = model(torch.tensor([ids])).logits[0, 2:-1].log_softmax(-1)
    expected = plain.gather(1, torch.tensor(ids[3:])[:, None])[:, 0]
    torch.testing.assert_close(token_logprobs(model, batch).logprob, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("key", [{"attn_implementation": "sdpa"}, {"torch_compile": True}])
def test_options_of_packs_are_refused_for_a_model_that_has_none(key):
    with pytest.raises(ValueError, match=rf"^{next(iter(key))}: the packed forward of Llama4ForCausalLM"):
        build(chunked(), **key)


def test_longrope_beyond_the_original_length_runs_one_sequence_at_a_time():
    config = tiny.model_config()
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 12}
    config.rope_parameters = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, **factors}
    assert runs_alone(build(config, max_length=12)) == ""
    model = build(config, max_length=20)
    assert "longrope" in runs_alone(model)
    sequences = [[3, 4, 5], list(range(3, 20))]
    batch = pack([Segment(token_ids=ids, num_scored=len(ids) - 1) for ids in sequences])
    alone = [model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1) for ids in sequences]
    expected = [x.gather(1, torch.tensor(ids[1:])[:, None])[:, 0] for x, ids in zip(alone, sequences, strict=True)]
    torch.testing.assert_close(token_logprobs(model, batch).logprob, torch.cat(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (tiny.model_config("gemma2"), LogitMap(softcap=3.0)),
        (tiny.model_config(), LogitMap()),
        (transformers.GraniteConfig(**SIZES, logits_scaling=8.0), LogitMap(scale=1 / 8.0)),
        (transformers.CohereConfig(**SIZES, logit_scale=0.0625), LogitMap(scale=0.0625)),
        (transformers.HyperCLOVAXConfig(**SIZES, logits_scaling=4.0), LogitMap(scale=4.0)),
    ],
    ids=lambda each: getattr(each, "model_type", ""),
)
def test_the_logit_scale_is_measured_on_the_model(config, expected):
    assert logit_map(build(config)) == expected


def test_logits_that_do_not_follow_from_hidden_states_are_refused():
    model = tiny.policy()
    model.lm_head.register_forward_hook(lambda module, inputs, output: output**3)
    with pytest.raises(ValueError, match=r"^LlamaForCausalLM: its logits are not a multiple of the head's weights"):
        find_logit_map(model)
    model = tiny.policy()
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 1.5)
    assert find_logit_map(model).scale == pytest.approx(1.5, rel=1e-5)
    with pytest.raises(ValueError, match=r"the packed forward differs from the model's own by .* nats"):
        check_packed_forward(model)


def test_exceptions_of_a_familys_own_code_are_one_line():
    assert one_line(KeyError("a\n\n  b")) == "KeyError: 'a\\n\\n b'"
    assert len(one_line(RuntimeError("x" * 999))) < 330
    model = tiny.policy()

    def broken(*arguments, **keywords):
        raise KeyError("first\nsecond")

    model.model.layers[0].mlp.forward = broken
    with pytest.raises(ValueError, match=r"^LlamaForCausalLM: its own forward fails \(KeyError: .*\); take"):
        own_forward(model)
    assert obstacle_to_packs(model, torch.zeros(15)).startswith("cannot run: KeyError")


def test_layers_whose_recomputation_differs_are_refused():
    model = tiny.policy()
    calls = []

    def moody(module, arguments, output):
        calls.append(1)
        return output * (1.0 + len(calls) % 7)

    model.model.layers[0].mlp.register_forward_hook(moody)
    with pytest.raises(ValueError, match=r"^LlamaForCausalLM: activation_checkpointing \(.*\); set it to false$"):
        check_checkpointing(model, lambda: enable_activation_checkpointing(model))


def test_a_model_that_attends_to_later_tokens_is_refused():
    config = transformers.XLNetConfig(d_model=16, n_layer=1, n_head=2, d_inner=16)
    with pytest.raises(ValueError, match=r"^XLNetLMHeadModel: the packed forward has hidden states that depend on"):
        build(config)


def test_a_model_without_checkpointing_support_is_refused():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"^activation_checkpointing: Linear does not support it; set it to false$"):
        enable_activation_checkpointing(model)


def test_a_model_whose_layers_are_never_recomputed_is_refused():
    model = tiny.policy()
    model.supports_gradient_checkpointing = False  # JetMoe declares this, although its layers support recomputation
    with pytest.raises(ValueError, match=r"^activation_checkpointing: LlamaForCausalLM does not support it; set it to"):
        enable_activation_checkpointing(model)


def test_a_pickle_of_more_than_tensors_is_told_in_one_sentence():
    assert one_line(UnpicklingError("Weights only load failed. This file can still be loaded, ...")) == (
        "a .bin file is a pickle of more than tensors; save the model as safetensors"
    )


@pytest.mark.parametrize(("scale", "error", "accepted"), [(1, 2e-4, False), (40, 2e-4, True), (40, 1e-2, False)])
def test_the_tolerance_grows_with_the_size_of_the_log_probs(scale, error, accepted):
    """Log-probs of Gemma 3 270M reach 39 nats, where two orders of summation in float32 differ by 1e-4."""
    model = tiny.policy()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(scale)
    expected = own_forward(model)
    assert (expected.abs().max() > 30) == (scale > 1)
    if accepted:
        check_packed_forward(model, expected + error)
    else:
        with pytest.raises(ValueError, match=r"the packed forward differs from the model's own by .* nats"):
            check_packed_forward(model, expected + error)
