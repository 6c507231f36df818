"""Which weights get an adapter: experts by parameter, no router, nothing that the forward does not call."""

import logging

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    MambaConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from fastrlhf.config import SFTConfig
from fastrlhf.models.adapters import add_adapter, frozen_copy, merged_copy, plain_weights, save_adapter
from tests import tiny

SIZES = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
EXPERTS = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
SHARED = {f"mlp.shared_expert.{name}_proj.weight" for name in ("gate", "up", "down")}
FAMILIES = {
    "qwen3_moe": (Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=16), ATTENTION | EXPERTS),
    "qwen2_moe": (
        Qwen2MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16),
        ATTENTION | EXPERTS | SHARED,
    ),
    "mixtral": (MixtralConfig(**SIZES, num_local_experts=4), ATTENTION | EXPERTS),
    "gpt_oss": (GptOssConfig(**SIZES, num_local_experts=4), ATTENTION | EXPERTS),
}
LORA = {"use_peft": True, "lora_r": 2, "lora_alpha": 4}
IDS = torch.tensor([[3, 4, 5, 6, 7, 8, 1]])


def model_of(config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.data.normal_(std=0.1)
    return model


def logprobs(model):
    return model(input_ids=IDS, use_cache=False).logits[0].log_softmax(-1)


def adapted(model) -> set[str]:
    """Ends of the names of what has an adapter."""
    names = set()
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            end = ".".join(part for part in name.split(".")[3:] if part != "base_layer")
            names.add(f"{end}.{layer.parameter_name}" if hasattr(layer, "parameter_name") else end)
    return names


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_experts_get_an_adapter_that_is_trained_merged_saved_and_read_by_peft(name, tmp_path):
    config, expected = FAMILIES[name]
    model = model_of(config)
    model.save_pretrained(tmp_path / "base")
    start = logprobs(model)
    add_adapter(model, SFTConfig(**LORA), str(tmp_path / "base"))
    assert adapted(model) == expected
    assert torch.equal(logprobs(model), start)
    with torch.enable_grad():
        logprobs(model)[:, 3].sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)
    generator = torch.Generator().manual_seed(1)
    for parameter in trained:
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    moved = logprobs(model)
    assert (moved - start).abs().max() > 0.1
    torch.testing.assert_close(logprobs(frozen_copy(model)), start, rtol=0, atol=0)
    plain = merged_copy(model)
    torch.testing.assert_close(logprobs(plain), moved, rtol=0, atol=2e-5)
    for own, weight in plain_weights(model):
        torch.testing.assert_close(weight, plain.get_parameter(own), rtol=1e-6, atol=1e-6)
    save_adapter(model, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    torch.testing.assert_close(logprobs(again), moved, rtol=0, atol=2e-5)
    plain.save_pretrained(tmp_path / "merged")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logprobs(saved), moved, rtol=0, atol=2e-5)


def test_the_log_says_which_share_of_the_weights_an_adapter_reaches(caplog):
    config, _ = FAMILIES["qwen3_moe"]
    with caplog.at_level(logging.INFO, "fastrlhf"):
        model, plain = model_of(config), tiny.policy()
        caplog.clear()
        total = sum(parameter.numel() for parameter in model.parameters())
        reached = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 4 * 32 * 32 + 4 * 16 * 32)
        add_adapter(model, SFTConfig(**LORA), "base")
        add_adapter(plain, SFTConfig(**LORA), "base")
        add_adapter(model_of(config), SFTConfig(**LORA, use_dora=True), "base")
    share = f"{100 * reached / total:.0f} %"
    routers = "experts are adapted by parameter, routers are left out"
    assert caplog.messages[0] == f"LoRA: rank 2 on 12 tensors, {share} of the weights of Qwen3MoeForCausalLM; {routers}"
    assert caplog.messages[1].endswith("of the weights of LlamaForCausalLM")
    assert caplog.messages[2].endswith(
        "experts and routers are left out, since peft has no DoRA for experts in fused form"
    )


def test_named_targets_are_taken_as_they_are():
    config, _ = FAMILIES["qwen3_moe"]
    settings = {"lora_target_modules": ("q_proj",), "lora_target_parameters": ("mlp.experts.down_proj",)}
    model = model_of(config)
    add_adapter(model, SFTConfig(**LORA, **settings), "base")
    assert adapted(model) == {"self_attn.q_proj", "mlp.experts.down_proj"}


def test_a_layer_whose_weight_is_read_without_it_gets_no_adapter():
    """Mamba's scan reads dt_proj.weight: an adapter there would be merged at the end without having been trained."""
    config = MambaConfig(vocab_size=tiny.VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0)
    model = model_of(config)
    add_adapter(model, SFTConfig(**LORA), "base")
    assert {name.rpartition(".")[2] for name in adapted(model)} == {"in_proj"}
    with pytest.raises(
        ValueError, match=r"^lora_target_modules: MambaForCausalLM reads the weight of .*\.dt_proj witho"
    ):
        add_adapter(model_of(config), SFTConfig(**LORA, lora_target_modules=("dt_proj",)), "base")
