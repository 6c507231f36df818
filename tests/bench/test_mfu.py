import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from bench.mfu import training_operations, utilisation
from fastrlhf.models.loading import build_policy
from tests import tiny


def test_the_operations_of_a_trunk_and_a_branch_by_hand():
    config = LlamaConfig(
        vocab_size=10, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4,
    )  # fmt: skip
    weights = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12)
    pairs = (1 + 2 + 3) + (4 + 5)
    forward = 2 * weights * 5 + 2 * 2 * (4 * 4) * pairs + 2 * (8 * 10) * 4
    assert training_operations(config, [(0, 3), (3, 2)], rows=4, outputs=10) == 3 * forward


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox"])
def test_the_count_equals_torchs_except_for_future_keys(name):
    config, tokens = tiny.model_config(name), 64
    model = build_policy(config, vocab_size=tiny.VOCAB, eos_token_id=tiny.EOS, seed=0)
    # Plain matrix products, because the backward of fused attention recomputes the forward
    model.set_attn_implementation("eager")
    ids = torch.zeros(1, tokens, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    future = tokens * (tokens - 1) // 2
    unseen = 3 * 4 * config.hidden_size * config.num_hidden_layers * future
    counted = training_operations(config, [(0, tokens)], rows=tokens, outputs=tiny.VOCAB) + unseen
    assert counter.get_total_flops() == counted


def test_utilisation_is_none_for_devices_with_unknown_peak():
    assert utilisation(494.5e12, "NVIDIA H100 80GB HBM3") == pytest.approx(0.5)
    assert utilisation(312e12, "NVIDIA A100-SXM4-80GB") == pytest.approx(1.0)
    assert utilisation(1e12, "NVIDIA H100 PCIe") is None
    assert utilisation(1e12, "cpu-x86_64") is None
