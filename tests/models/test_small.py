import pytest
import torch
from transformers import AutoConfig, PretrainedConfig

from fastrlhf.models.small import VOCAB, small_config, small_model


def logits(config: PretrainedConfig) -> torch.Tensor:
    with torch.no_grad():
        return small_model(config)(input_ids=torch.tensor([[3, 4, 5, 6, 7]]), use_cache=False).logits


def test_every_kind_of_layer_remains_and_windows_are_short():
    small = small_config(AutoConfig.for_model("qwen3_next", num_hidden_layers=8))
    assert small.layer_types == ["linear_attention", "full_attention"]
    assert (small.vocab_size, small.hidden_size, small.num_experts, small.num_hidden_layers) == (VOCAB, 32, 4, 2)
    assert small_config(AutoConfig.for_model("gemma3")).text_config.sliding_window == 4


@pytest.mark.parametrize(
    ("kind", "rope", "name", "expected"),
    [
        # A head has 8 dimensions, of which 4 are rotated, by 2 frequencies
        ("phi3", {"rope_type": "longrope", "short_factor": [1.0] * 24, "long_factor": [2.0] * 24}, "long_factor", 2),
        ("qwen3_5_text", {"rope_type": "default", "mrope_section": [11, 11, 10]}, "mrope_section", 3),
    ],
)
def test_rotary_lists_fit_the_small_heads(kind, rope, name, expected):
    rope = {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 4096} | rope
    config = AutoConfig.for_model(kind, **({"hidden_size": 384, "num_attention_heads": 4} if kind == "phi3" else {}))
    config.rope_parameters = rope
    small = small_config(config)
    assert len(small.rope_parameters[name]) == expected
    if name == "mrope_section":
        assert sum(small.rope_parameters[name]) == 2
    assert logits(small).isfinite().all()


def test_fields_may_be_replaced_also_in_sub_configurations():
    config = small_config(AutoConfig.for_model("gemma3"), {"num_key_value_heads": 4, "vision_config": {"depth": 9}})
    assert config.text_config.num_key_value_heads == 4
    assert config.vision_config.depth == 9
    assert config.vision_config.hidden_size == 32


def test_the_same_weights_are_drawn_again_and_log_probs_differ():
    config = small_config(AutoConfig.for_model("llama"))
    first = logits(config)
    assert torch.equal(first, logits(config))
    assert first.log_softmax(-1).std() > 0.2
