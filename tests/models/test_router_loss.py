"""Tests of the auxiliary loss of mixtures of experts: it equals transformers' loss on single sequences, for all packs
and in every trainer."""

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from fastrlhf.algorithms.dpo import train_dpo
from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.algorithms.sft import train_sft
from fastrlhf.config import DPOConfig, PPOConfig, SFTConfig
from fastrlhf.data.packing import pack, sequence, tree
from fastrlhf.models.forward import enable_activation_checkpointing, hidden_states, token_logprobs
from fastrlhf.models.router_loss import begin_step, router_loss, set_router_loss
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
    "max_position_embeddings": 128,
    "router_aux_loss_coef": 0.3,
    "eos_token_id": tiny.EOS,
    "pad_token_id": 0,
}
CONFIGS = {
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=16),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
}
FIRST, SECOND = [5, 6, 7, 8, 9, 1], [10, 11, 12, 1]


def model_of(name="qwen3_moe", coef=None):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.data.normal_(std=0.2)
    set_router_loss(model, coef)
    return model


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def loss_of(model, *batches, num_sequences):
    begin_step(model, num_sequences)
    for batch in batches:
        (-token_logprobs(model, batch).logprob.sum()).backward()
    return router_loss(model), gradients(model)


def assert_equal(ours, theirs):
    assert set(ours) == set(theirs)
    for name, gradient in ours.items():
        torch.testing.assert_close(
            gradient, theirs[name], rtol=1e-5, atol=2e-5 * theirs[name].abs().max().item() + 1e-7
        )


@pytest.mark.parametrize("name", CONFIGS)
def test_value_and_gradients_are_those_of_transformers_on_one_sequence(name):
    model = model_of(name)
    aux, ours = loss_of(model, pack([sequence(FIRST[:2], FIRST[2:])]), num_sequences=1)
    output = model(input_ids=torch.tensor([FIRST]), output_router_logits=True, use_cache=False)
    logprobs = output.logits[0, 1:-1].log_softmax(-1).gather(1, torch.tensor(FIRST[2:])[:, None])
    (-logprobs.sum() + 0.3 * output.aux_loss).backward()
    assert aux == pytest.approx(output.aux_loss.item(), rel=1e-6)
    assert aux == pytest.approx(load_balancing_loss_func(output.router_logits, 4, 2).item(), rel=1e-6)
    assert_equal(ours, gradients(model))


def test_packs_micro_batches_and_shared_prompts_change_nothing():
    model = model_of()
    one, other = sequence(FIRST[:2], FIRST[2:]), sequence(SECOND[:2], SECOND[2:])
    packed, together = loss_of(model, pack([one, other]), num_sequences=2)
    apart, parts = loss_of(model, pack([one]), pack([other]), num_sequences=2)
    assert packed == pytest.approx(apart, rel=1e-6)
    assert_equal(together, parts)
    prompt, responses = FIRST[:3], [FIRST[3:], SECOND[1:]]
    shared, trunk = loss_of(model, pack(tree([prompt, prompt], responses)), num_sequences=2)
    plain, whole = loss_of(model, pack([sequence(prompt, response) for response in responses]), num_sequences=2)
    assert shared == pytest.approx(plain, rel=1e-6)
    assert_equal(trunk, whole)


def test_checkpointing_does_not_change_the_gradients():
    model, batch = model_of(), pack([sequence(FIRST[:2], FIRST[2:])])
    aux, plain = loss_of(model, batch, num_sequences=1)
    enable_activation_checkpointing(model)
    again, recomputed = loss_of(model, batch, num_sequences=1)
    assert aux == again
    assert_equal(recomputed, plain)


def test_a_coefficient_of_0_is_off_and_the_hidden_states_never_change():
    batch = pack([sequence(FIRST[:2], FIRST[2:])])
    on, off = model_of(), model_of(coef=0.0)
    begin_step(on, 1)
    assert torch.equal(hidden_states(on, batch), hidden_states(off, batch))
    aux, without = loss_of(off, batch, num_sequences=1)
    assert aux is None
    _, with_it = loss_of(on, batch, num_sequences=1)
    router = "model.layers.0.mlp.gate.weight"
    assert (with_it[router] - without[router]).abs().max() > 1e-3


def test_a_trainer_that_does_not_count_its_sequences_is_stopped():
    with pytest.raises(RuntimeError, match="begin_step must be called"):
        token_logprobs(model_of(), pack([sequence(FIRST[:2], FIRST[2:])]))


def test_a_coefficient_for_a_model_without_routers_is_refused():
    with pytest.raises(ValueError, match=r"^router_aux_loss_coef: LlamaForCausalLM gives no router logits"):
        set_router_loss(tiny.policy(), 0.1)
    set_router_loss(tiny.policy(), None)


def test_every_trainer_logs_the_loss_and_uses_the_configured_weight(tmp_path):
    model_of().save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    fields = {
        "model_name_or_path": str(tmp_path / "base"),
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "max_length": 48,
        "progress": False,
    }
    runs = {
        coef: train_sft(
            SFTConfig(**fields, micro_batch_tokens=size, router_aux_loss_coef=coef), tiny.examples(12)
        ).history
        for coef, size in ((None, 8192), (0.3, 48), (0.0, 8192))
    }
    assert "aux_loss" not in runs[0.0][0]
    for ours, theirs in zip(runs[None], runs[0.3], strict=True):  # packs of up to 8192 and of up to 48 tokens
        assert ours["aux_loss"] == pytest.approx(theirs["aux_loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    assert runs[None][0]["aux_loss"] > 1.9  # with 2 of 4 experts the loss is 2 if they are used evenly
    assert train_dpo(DPOConfig(**fields), tiny.examples(12)).history[0]["aux_loss"] > 1.9
    ppo = {"advantage_estimator": "rloo", "num_generations": 2, "response_length": 5}
    config = PPOConfig(**fields, **ppo)
    result = train_ppo(
        config, tiny.examples(12), judge=lambda rollouts: torch.tensor([1.0 * len(r.completion) for r in rollouts])
    )
    assert result.history[0]["aux_loss"] > 1.9
