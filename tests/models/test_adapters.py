"""Tests that a new adapter has no effect, only the adapter is trained, the reference shares the base weights, and
merging is exact."""

import gc
import logging
import weakref
from dataclasses import replace

import pytest
import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from fastrlhf.algorithms.dpo import train_dpo
from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.algorithms.reward_model import train_reward_model
from fastrlhf.algorithms.sft import train_sft
from fastrlhf.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from fastrlhf.data.packing import pack
from fastrlhf.models.adapters import add_adapter, frozen_copy, has_adapter, merge_adapter, merged_copy, plain_weights
from fastrlhf.models.forward import CHECKPOINTING, enable_activation_checkpointing, sequence_scores, token_logprobs
from fastrlhf.models.loading import load_reward_model
from fastrlhf.types import Segment
from tests import tiny

BATCH = pack([Segment(token_ids=[3, 4, 5, 6, 1], num_scored=4), Segment(token_ids=[7, 8, 1], num_scored=2)])
LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "progress": False}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return (
        tiny.save_policy(tmp_path_factory.mktemp("policy")),
        tiny.save_reward_model(tmp_path_factory.mktemp("reward")),
    )


def logprobs(model):
    with torch.no_grad():
        return token_logprobs(model, BATCH).logprob


def disturb(model):
    """Adds random numbers to the trained weights."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))


@pytest.mark.parametrize("architecture", list(tiny.ARCHITECTURES))
@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
def test_an_adapter_starts_at_zero_is_the_only_trained_part_and_merges_exactly(architecture, kind):
    model = tiny.policy(architecture)
    start, names = logprobs(model), list(model.state_dict())
    add_adapter(model, SFTConfig(**LORA | kind), "base")
    # Equal up to rounding, because DoRA divides by a norm and multiplies by it again
    torch.testing.assert_close(logprobs(model), start, rtol=1e-6, atol=1e-6)
    assert all(".lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    reference = frozen_copy(model)
    disturb(model)
    moved = logprobs(model)
    assert (moved - start).abs().max() > 0.1
    assert torch.equal(logprobs(reference), start)
    theirs = {parameter.data_ptr() for parameter in model.parameters()}
    assert all(parameter.data_ptr() in theirs for parameter in reference.parameters())
    merge_adapter(model)
    assert not has_adapter(model)
    assert list(model.state_dict()) == names
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(logprobs(model), moved, rtol=1e-5, atol=1e-5)


def test_a_score_head_is_trained_and_the_judge_has_its_own(paths):
    critic = load_reward_model(paths[1], pad_token_id=0)
    add_adapter(critic, SFTConfig(**LORA), "base")
    assert critic.score.weight.requires_grad
    judge = frozen_copy(critic)
    with torch.no_grad():
        before = sequence_scores(judge, BATCH)
        disturb(critic)
        assert torch.equal(sequence_scores(judge, BATCH), before)
        assert (sequence_scores(critic, BATCH) - before).abs().max() > 0.1


@pytest.mark.parametrize(
    "adapter", [None, {}, {"use_rslora": True}, {"use_dora": True}], ids=["none", "lora", "rslora", "dora"]
)
def test_the_plain_weights_are_those_of_the_merged_model(adapter):
    model = tiny.policy("qwen3")
    if adapter is not None:
        add_adapter(model, SFTConfig(**LORA | adapter), "base")
        disturb(model)
    weights = dict(plain_weights(model))
    merge_adapter(model)
    assert list(weights) == [name for name, _ in model.named_parameters()]
    for name, merged in model.named_parameters():
        torch.testing.assert_close(weights[name], merged, rtol=1e-6, atol=1e-6)


def test_an_adapter_over_transposed_weights_merges_exactly():
    """The layers of GPT-2 keep the transpose of the weight of a linear layer."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=2, n_positions=16)).eval()
    add_adapter(model, SFTConfig(**LORA), "base")
    disturb(model)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        expected = model(ids).logits
        weights = dict(plain_weights(model))
        merge_adapter(model)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    for name, merged in model.named_parameters():
        torch.testing.assert_close(weights[name], merged, rtol=1e-6, atol=1e-6)


def test_the_adapter_is_initialised_from_the_seed():
    def weights(seed):
        model = tiny.policy()
        add_adapter(model, SFTConfig(**LORA, seed=seed), "base")
        return model.model.layers[0].self_attn.q_proj.lora_A["default"].weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_only_named_layers_get_an_adapter_and_unknown_layers_are_an_error():
    model = tiny.policy()
    add_adapter(model, SFTConfig(**LORA, lora_target_modules=("q_proj", "v_proj")), "base")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * 2
    assert all("q_proj" in name or "v_proj" in name for name in trained)
    with pytest.raises(ValueError, match="lora_target_modules: query fit no layer of LlamaForCausalLM"):
        add_adapter(tiny.policy(), SFTConfig(**LORA, lora_target_modules=("query",)), "base")
    for name in ("embed_tokens", "lm_head"):
        settings = SFTConfig(**LORA, lora_target_modules=("q_proj", name))
        with pytest.raises(ValueError, match=f"lora_target_modules: {name} is an embedding or a head"):
            add_adapter(tiny.policy(), settings, "base")


def dpo(model, **settings):
    fields = {"per_device_train_batch_size": 8, "max_steps": 3, "learning_rate": 1e-2, **LORA}
    return DPOConfig(model_name_or_path=model, micro_batch_tokens=60, **fields | settings)


def test_with_the_adapter_off_the_policy_is_the_reference(paths):
    """Runs DPO with three references: the base weights without the adapter, precomputed log-probs, and a second copy of
    the model from disk."""
    examples = tiny.examples(16)
    precomputed = train_dpo(dpo(paths[0]), examples).history
    assert precomputed[-1]["rewards/margins"] > 0.05  # the policy has changed
    live = train_dpo(dpo(paths[0], precompute_ref_log_probs=False), examples).history
    copied = train_dpo(dpo(paths[0], precompute_ref_log_probs=False, ref_model_name_or_path=paths[0]), examples).history
    assert live == copied
    for row, other in zip(live, precomputed, strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_activation_checkpointing_changes_no_number_of_a_run_with_an_adapter(paths):
    examples = tiny.examples(16)
    plain, checkpointed = (
        train_dpo(dpo(paths[0], activation_checkpointing=on), examples).history for on in (False, True)
    )
    assert checkpointed == plain


@pytest.mark.parametrize("make", [frozen_copy, merged_copy])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_copy_recomputes_nothing_and_does_not_keep_the_model_alive(make, adapted):
    model = tiny.policy()
    if adapted:
        add_adapter(model, SFTConfig(**LORA), "base")
    enable_activation_checkpointing(model)
    copied, original = make(model), weakref.ref(model)
    assert getattr(model, f"is_{CHECKPOINTING}")
    assert not getattr(copied, f"is_{CHECKPOINTING}")
    del model
    gc.collect()
    assert original() is None


def test_a_run_saves_the_merged_model_and_the_adapter(paths, tmp_path):
    folder = tmp_path / "run"
    result = train_dpo(dpo(paths[0], output_dir=str(folder)), tiny.examples(16))
    assert not has_adapter(result.model)
    expected = logprobs(result.model)
    merged = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logprobs(merged), expected)
    base = AutoModelForCausalLM.from_pretrained(paths[0])
    assert (logprobs(base) - expected).abs().max() > 0.01
    adapted = PeftModel.from_pretrained(base, str(folder / "adapter"))
    assert adapted.peft_config["default"].base_model_name_or_path == paths[0]
    torch.testing.assert_close(logprobs(adapted.get_base_model()), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"model_name_or_path: '.*adapter' holds only an adapter; give the folder"):
        train_dpo(dpo(str(folder / "adapter"), tokenizer_name_or_path=paths[0]), tiny.examples(8))


def test_a_reward_model_keeps_its_trained_head(paths, tmp_path):
    folder = tmp_path / "run"
    cfg = RewardConfig(model_name_or_path=paths[0], output_dir=str(folder), max_steps=3, learning_rate=1e-2, **LORA)
    result = train_reward_model(cfg, tiny.examples(16))
    saved = AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.equal(saved.score.weight, result.model.score.weight)
    start = load_reward_model(paths[0], pad_token_id=0, seed=cfg.seed, field="model_name_or_path")
    assert not torch.equal(saved.score.weight, start.score.weight)
    with torch.random.fork_rng():  # peft draws random numbers for a head before it loads the saved one
        base = AutoModelForSequenceClassification.from_pretrained(paths[0], num_labels=1, pad_token_id=0)
    adapted = PeftModel.from_pretrained(base, str(folder / "adapter"))
    with torch.no_grad():
        ids = torch.tensor([[3, 4, 5, 6, 7]])
        torch.testing.assert_close(adapted(ids).logits, saved(ids).logits, rtol=1e-5, atol=1e-5)


def test_an_on_policy_run_shares_its_weights_and_starts_at_no_kl(paths, tmp_path):
    cfg = PPOConfig(
        model_name_or_path=paths[0],
        reward_model_path=paths[1],
        per_device_train_batch_size=8,
        max_steps=2,
        response_length=6,
        learning_rate=1e-2,
        output_dir=str(tmp_path / "run"),
        **LORA,
    )
    history = train_ppo(cfg, tiny.examples(12), tiny.examples(4, seed=1)).history
    for folder, base in (("adapter", paths[0]), ("value_model/adapter", paths[1])):
        assert PeftConfig.from_pretrained(tmp_path / "run" / folder).base_model_name_or_path == base
    checkpointed = replace(cfg, activation_checkpointing=True, output_dir="")
    again = train_ppo(checkpointed, tiny.examples(12), tiny.examples(4, seed=1)).history
    for row, other in zip(history, again, strict=True):
        assert {k: v for k, v in row.items() if "timing" not in k} == {
            k: v for k, v in other.items() if "timing" not in k
        }
    assert history[0]["objective/kl"] == 0
    assert history[1]["objective/kl"] != 0
    assert history[1]["eval_objective/kl"] > 0


def test_options_that_adapters_do_not_support_are_refused(paths, caplog):
    with pytest.raises(ValueError, match="use_peft: must be false with model_config: random weights need no adapter"):
        train_sft(
            SFTConfig(model_config='{"model_type": "llama"}', tokenizer_name_or_path=paths[0], **LORA), tiny.examples(8)
        )
    cfg = SFTConfig(model_name_or_path=paths[0], eos_token="<end>", **LORA)
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(ValueError, match=r"^use_peft: the rows of embed_tokens for 1 new tokens have to be trained; a"),
    ):
        train_sft(cfg, tiny.examples(8))
    with pytest.raises(ValueError, match="lora_r: must be at least 1"):
        replace(cfg, lora_r=0)
