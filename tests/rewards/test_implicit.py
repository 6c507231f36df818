"""Tests of a DPO model's token rewards against transformers' logits, and of models that are refused."""

from dataclasses import replace

import pytest
import torch

from fastrlhf.config import PPOConfig, RTOConfig
from fastrlhf.data.packing import pack, sequence
from fastrlhf.models.loading import build_policy
from fastrlhf.rewards.implicit import ImplicitReward, open_implicit_reward
from tests import tiny

RUN = tiny.policy(seed=3).requires_grad_(False)
PAIRS = [([5, 6, 7], [8, 9, tiny.EOS]), ([4, 20], [21, 3]), ([9], [9, 9, 10, 11])]
BATCH = pack([sequence(prompt, response) for prompt, response in PAIRS])


def own_logprobs(model) -> torch.Tensor:
    """Returns log-probs at temperature 1, computed from the model's logits of one sequence at a time."""
    found = []
    for prompt, response in PAIRS:
        logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0].float().log_softmax(-1)
        found += [logits[len(prompt) + i - 1, token] for i, token in enumerate(response)]
    return torch.stack(found).detach()


def test_the_log_ratio_is_to_the_reference_of_the_models_own_training():
    dpo, own, run = (tiny.policy(seed=seed) for seed in (1, 2, 3))
    separate = ImplicitReward(model=dpo, reference=own).log_ratio(BATCH, run)
    torch.testing.assert_close(separate, own_logprobs(dpo) - own_logprobs(own), rtol=1e-5, atol=1e-5)
    shared = ImplicitReward(model=dpo, reference=None).log_ratio(BATCH, run)
    torch.testing.assert_close(shared, own_logprobs(dpo) - own_logprobs(run), rtol=1e-5, atol=1e-5)
    assert (separate - shared).abs().max() > 0.1
    assert separate.dtype == torch.float32


def test_a_shared_reference_is_computed_once():
    dpo, run = tiny.policy(seed=1), tiny.policy(seed=3)
    known, passes = own_logprobs(run), []
    run.register_forward_hook(lambda *_: passes.append(1))
    run.base_model.register_forward_hook(lambda *_: passes.append(1))
    reward = ImplicitReward(model=dpo, reference=None)
    again = reward.log_ratio(BATCH, run, known)
    assert not passes
    torch.testing.assert_close(reward.log_ratio(BATCH, run), again, rtol=1e-5, atol=1e-5)
    assert passes


def test_models_are_opened_frozen_and_each_with_its_own_weights(tmp_path):
    dpo, own = tiny.save_policy(tmp_path / "dpo", seed=1), tiny.save_policy(tmp_path / "own", seed=2)
    opened = open_implicit_reward(
        RTOConfig(dtype="float32", dpo_model_path=dpo, dpo_ref_model_path=own), tiny.tokenizer(), RUN
    )
    assert opened.reference is not None
    assert not any(p.requires_grad for model in (opened.model, opened.reference) for p in model.parameters())
    expected = own_logprobs(tiny.policy(seed=1)) - own_logprobs(tiny.policy(seed=2))
    torch.testing.assert_close(opened.log_ratio(BATCH, opened.model), expected, rtol=1e-5, atol=1e-5)
    assert open_implicit_reward(RTOConfig(dtype="float32", dpo_model_path=dpo), tiny.tokenizer(), RUN).reference is None


@pytest.mark.parametrize("field", ["dpo_model_path", "dpo_ref_model_path"])
def test_another_tokenizer_is_refused_with_the_token_that_differs(tmp_path, field):
    good, bad = tiny.save_policy(tmp_path / "good"), tiny.save_policy(tmp_path / "bad")
    paths = {"dpo_model_path": good, field: bad}
    other = tiny.tokenizer()
    other.add_tokens(["w29"])
    other.save_pretrained(bad)
    with pytest.raises(
        ValueError, match=rf"^{field}: .*another tokenizer than the run \('w29' has id 32 there and None"
    ):
        open_implicit_reward(RTOConfig(**paths, dtype="float32"), tiny.tokenizer(), RUN)
    endless = tiny.tokenizer()
    endless.eos_token = "<unk>"
    endless.save_pretrained(bad)
    with pytest.raises(
        ValueError, match=f"^{field}: its responses end in '<unk>', those of the run in '<eos>'; set eos_token"
    ):
        open_implicit_reward(RTOConfig(**paths, dtype="float32"), tiny.tokenizer(), RUN)
    open_implicit_reward(RTOConfig(**paths, dtype="float32", eos_token="<eos>"), tiny.tokenizer(), RUN)


def test_a_model_with_no_tokenizer_or_too_few_embeddings_is_refused(tmp_path):
    tiny.policy().save_pretrained(tmp_path / "alone")
    with pytest.raises(
        ValueError,
        match=r"^dpo_model_path: .*no tokenizer found.*; save the tokenizer with which the model was trained",
    ):
        open_implicit_reward(RTOConfig(dtype="float32", dpo_model_path=str(tmp_path / "alone")), tiny.tokenizer(), RUN)
    small = build_policy(tiny.model_config(), vocab_size=tiny.VOCAB - 1, eos_token_id=tiny.EOS, seed=0)
    small.save_pretrained(tmp_path / "small")
    tiny.tokenizer().save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=r"^dpo_model_path: its vocabulary of 31 is smaller than the tokenizer's 32"):
        open_implicit_reward(RTOConfig(dtype="float32", dpo_model_path=str(tmp_path / "small")), tiny.tokenizer(), RUN)


def test_a_dpo_model_without_effect_on_rewards_is_not_loaded():
    config = RTOConfig(dtype="float32", dpo_model_path="nowhere", reward_shaping="none")
    assert open_implicit_reward(config, tiny.tokenizer(), RUN) is None
    assert open_implicit_reward(PPOConfig(), tiny.tokenizer(), RUN) is None
    paid = replace(config, reward_shaping="token", dpo_reward_scale=0.0)
    with pytest.raises(ValueError, match="dpo_model_path: "):
        open_implicit_reward(paid, tiny.tokenizer(), RUN)
