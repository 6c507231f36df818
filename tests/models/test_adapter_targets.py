"""Tests which weights get an adapter: experts (parameter by parameter), but no routers and no layers that the forward
does not call."""

import copy
import logging
from dataclasses import replace

import pytest
import torch
from peft import PeftConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    MambaConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from bench.models.checks import Family
from fastrlhf.algorithms.dpo import train_dpo
from fastrlhf.algorithms.sft import train_sft
from fastrlhf.config import DPOConfig, SFTConfig
from fastrlhf.models.adapters import add_adapter, frozen_copy, merged_copy, plain_weights, save_adapter
from fastrlhf.models.loading import build_policy, load_policy
from fastrlhf.models.roles import policy_role
from tests import tiny
from tests.resumable import Killed, Watch, left, run

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
    """Returns the last parts of the names of all weights that have an adapter."""
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


def test_layers_that_share_a_weight_get_no_adapter():
    model = build_policy(tiny.model_config(), vocab_size=tiny.VOCAB, eos_token_id=1, seed=0)
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    adapted = copy.deepcopy(model)
    add_adapter(adapted, SFTConfig(use_peft=True, lora_r=2), "")
    names = {name for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert len(names) == 2 * 7 - 2
    assert not any("up_proj" in name for name in names)
    message = r"^lora_target_modules: .*up_proj shares its weight with another layer, .*; name other layers$"
    with pytest.raises(ValueError, match=message):
        add_adapter(model, SFTConfig(use_peft=True, lora_r=2, lora_target_modules=("up_proj",)), "")


def test_named_targets_are_used_unchanged():
    config, _ = FAMILIES["qwen3_moe"]
    settings = {"lora_target_modules": ("q_proj",), "lora_target_parameters": ("mlp.experts.down_proj",)}
    model = model_of(config)
    add_adapter(model, SFTConfig(**LORA, **settings), "base")
    assert adapted(model) == {"self_attn.q_proj", "mlp.experts.down_proj"}


def test_a_layer_that_is_not_called_gets_no_adapter():
    """Mamba's scan reads dt_proj.weight without calling the layer, so an adapter of this layer would never be
    trained."""
    config = MambaConfig(vocab_size=tiny.VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0)
    model = model_of(config)
    add_adapter(model, SFTConfig(**LORA), "base")
    assert {name.rpartition(".")[2] for name in adapted(model)} == {"in_proj"}
    with pytest.raises(
        ValueError, match=r"^lora_target_modules: MambaForCausalLM reads the weight of .*\.dt_proj witho"
    ):
        add_adapter(model_of(config), SFTConfig(**LORA, lora_target_modules=("dt_proj",)), "base")


def policy_folder(folder, *, tied=False) -> str:
    config = tiny.model_config()
    config.tie_word_embeddings = tied
    model = build_policy(config, vocab_size=tiny.VOCAB, eos_token_id=tiny.EOS, seed=3)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def run_dpo(source: str, saved: tuple[str, ...], **settings):
    fields = {"per_device_train_batch_size": 8, "max_steps": 3, "learning_rate": 1e-2, "progress": False, **LORA}
    config = DPOConfig(model_name_or_path=source, lora_modules_to_save=saved, **fields | settings)
    return train_dpo(config, tiny.examples(16))


@pytest.mark.parametrize(
    ("saved", "tied", "names"),
    [
        (("embed_tokens", "lm_head"), False, ["lm_head", "model.embed_tokens"]),
        (("lm_head",), True, ["lm_head", "model.embed_tokens"]),
        (("model.norm", "layers.1.mlp"), False, ["model.layers.1.mlp", "model.norm"]),
    ],
    ids=["heads", "tied", "layers"],
)
def test_modules_to_save_are_fully_trained_and_loaded_by_peft_and_as_roles(saved, tied, names, tmp_path):
    base, folder = policy_folder(tmp_path / "base", tied=tied), tmp_path / "run"
    result = run_dpo(base, saved, precompute_ref_log_probs=False, output_dir=str(folder))
    # A live reference uses the initial copies of the modules, so its log-probs equal the precomputed ones.
    for row, other in zip(result.history, run_dpo(base, saved).history, strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-5)
    plain, moved = load_policy(base), logprobs(result.model)
    start = logprobs(plain)
    for name in names:
        before, after = plain.get_submodule(name), result.model.get_submodule(name)
        assert all((x != y).any() for x, y in zip(before.parameters(), after.parameters(), strict=True))
    untouched = "model.layers.0.input_layernorm.weight"
    assert torch.equal(plain.get_parameter(untouched), result.model.get_parameter(untouched))
    settings = PeftConfig.from_pretrained(str(folder / "adapter"))
    assert settings.modules_to_save == names
    assert torch.equal(logprobs(AutoModelForCausalLM.from_pretrained(folder)), moved)
    read = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder / "adapter"))
    torch.testing.assert_close(logprobs(read), moved, rtol=1e-5, atol=1e-5)
    role = policy_role(str(folder / "adapter"), plain.requires_grad_(False), "dpo_model_path")
    torch.testing.assert_close(logprobs(role), moved, rtol=1e-5, atol=1e-5)
    assert torch.equal(logprobs(plain), start)
    assert (moved - start).abs().max() > 0.01


def test_a_run_with_modules_to_save_resumes_with_the_same_bits(tmp_path, monkeypatch):
    paths = {"policy": policy_folder(tmp_path / "base"), "judge": tiny.save_reward_model(tmp_path / "judge")}
    settings = LORA | {"lora_modules_to_save": ("embed_tokens", "lm_head"), "max_steps": 3}
    watch = Watch("ppo", monkeypatch)
    whole = left(run("ppo", paths, tmp_path / "whole", **settings), watch.made[-1], tmp_path / "whole")
    watch.kill = (2, "after")
    with pytest.raises(Killed):
        run("ppo", paths, tmp_path / "cut", **settings)
    watch.kill = None
    assert left(run("ppo", paths, tmp_path / "cut", **settings), watch.made[-1], tmp_path / "cut") == whole


def test_new_tokens_are_trained_if_modules_to_save_has_their_rows(tmp_path):
    base = policy_folder(tmp_path / "base")
    config = SFTConfig(
        model_name_or_path=base,
        eos_token="<end>",
        lora_modules_to_save=("embed_tokens", "lm_head"),
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=8,
        max_steps=2,
        progress=False,
        **LORA,
    )
    model = train_sft(config, tiny.examples(16)).model
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert len(saved.lm_head.weight) == tiny.VOCAB + 1
    assert torch.equal(logprobs(saved), logprobs(model))
    with pytest.raises(ValueError, match=r"^use_peft: the rows of lm_head for 1 new tokens have to be trained; add lm"):
        train_sft(replace(config, lora_modules_to_save=("embed_tokens",), output_dir=""), tiny.examples(16))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_modules_to_save": ("wte",)}, "'wte' fits no module of LlamaForCausalLM"),
        (
            {"lora_modules_to_save": ("q_proj",), "lora_target_modules": ("q_proj", "v_proj")},
            "'q_proj' is in lora_target_modules too; a module is trained whole or by an adapter, so name it once",
        ),
    ],
)
def test_modules_to_save_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"^lora_modules_to_save: {message}$"):
        add_adapter(tiny.policy(), SFTConfig(**LORA, **settings), "base")


def test_a_vision_tower_gets_no_adapter(tmp_path):
    model = Family("gemma3", tmp_path).policy
    add_adapter(model, SFTConfig(**LORA), "base")
    names = {name for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    assert len(names) == 2 * 7
    assert all(name.startswith("model.language_model.layers.") for name in names)
