"""Tests of a model whose embedding has more rows than the tokenizer has ids, and whose head prefers these rows."""

import pytest
import torch

from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.config import PPOConfig
from fastrlhf.data.packing import pack, sequence
from fastrlhf.models.forward import scored_states, state_kl, token_logprobs
from fastrlhf.models.loading import build_policy
from fastrlhf.models.vocabulary import head_of, limit_vocabulary, num_ids
from fastrlhf.rollout.engine import TransformersEngine
from fastrlhf.types import Prefix
from tests import tiny

ROWS = tiny.VOCAB + 8


def padded(seed=0):
    model = build_policy(tiny.model_config(), vocab_size=ROWS, eos_token_id=tiny.EOS, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
        model.lm_head.weight[tiny.VOCAB :] *= 5
    return model


def own_logprobs(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0, :-1, : tiny.VOCAB].log_softmax(-1)


def test_log_probs_entropy_and_kl_are_exact_over_the_ids_of_the_tokenizer():
    model, other = padded(), padded(seed=1)
    batch = pack([sequence([5, 6, 7], [8, 9, 1])])
    whole = token_logprobs(model, batch).logprob
    for one in (model, other):
        limit_vocabulary(one, tiny.tokenizer())
        assert num_ids(one) == tiny.VOCAB
    scored = token_logprobs(model, batch, entropy=True)
    expected = own_logprobs(model, [5, 6, 7, 8, 9, 1])[2:]
    torch.testing.assert_close(scored.logprob, expected.gather(1, batch.targets[:, None])[:, 0])
    torch.testing.assert_close(scored.entropy, -(expected.exp() * expected).sum(-1))
    assert (scored.logprob - whole).min() > 0.1
    with torch.no_grad():
        states, others = scored_states(model, batch), scored_states(other, batch)
        kl = state_kl(model, states, other, others, batch.targets).kl
    theirs = own_logprobs(other, [5, 6, 7, 8, 9, 1])[2:]
    torch.testing.assert_close(kl, (expected.exp() * (expected - theirs)).sum(-1), rtol=1e-5, atol=1e-5)


def test_the_gradient_of_the_rows_that_are_left_out_is_zero():
    model = padded()
    limit_vocabulary(model, tiny.tokenizer())
    token_logprobs(model, pack([sequence([5, 6, 7], [8, 9, 1])])).logprob.sum().backward()
    assert not model.lm_head.weight.grad[tiny.VOCAB :].any()
    assert model.lm_head.weight.grad[: tiny.VOCAB].abs().max() > 0.01


def test_a_model_with_the_size_of_its_tokenizer_is_not_changed():
    model = tiny.policy()
    limit_vocabulary(model, tiny.tokenizer())
    assert num_ids(model) is None
    assert head_of(model)[0] is model.lm_head.weight


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_ids_above_the_tokenizer_are_never_sampled(temperature):
    model = padded()
    settings = {"eos_token_id": tiny.EOS, "response_length": 5, "temperature": temperature, "seed": 3}
    starts = [Prefix(token_ids=[5, 6, 7 + i % 9], num_reset=0, row=i, episode=i) for i in range(40)]

    def largest():
        return max(max(r.completion) for r in TransformersEngine(model=model, **settings).generate(starts))

    assert largest() >= tiny.VOCAB
    limit_vocabulary(model, tiny.tokenizer())
    assert largest() < tiny.VOCAB
    for rollout in TransformersEngine(model=model, **settings).generate(starts[:9]):
        n = len(rollout.prefix.token_ids)
        with torch.no_grad():
            ids = torch.tensor([rollout.prefix.token_ids + rollout.completion])
            logits = model(ids, use_cache=False).logits[0, n - 1 : -1, : tiny.VOCAB]
        told = (logits / (temperature or 1)).log_softmax(-1).gather(1, torch.tensor(rollout.completion)[:, None])
        assert rollout.sampler_logprob == pytest.approx(told[:, 0].tolist(), abs=1e-5)


def test_a_whole_run_samples_and_trains_over_the_ids_of_the_tokenizer(tmp_path):
    padded().save_pretrained(tmp_path / "sft")
    tiny.tokenizer().save_pretrained(tmp_path / "sft")
    config = PPOConfig(
        model_name_or_path=str(tmp_path / "sft"),
        advantage_estimator="rloo",
        num_generations=2,
        per_device_train_batch_size=8,
        max_steps=2,
        response_length=6,
        max_length=32,
        learning_rate=1e-2,
        progress=False,
    )
    seen = []

    def judge(rollouts):
        seen.extend(token for rollout in rollouts for token in rollout.completion)
        return torch.tensor([float(len(rollout.completion)) for rollout in rollouts])

    result = train_ppo(config, tiny.examples(20), judge=judge)
    assert max(seen) < tiny.VOCAB
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-5 for row in result.history)
    start, end = padded().lm_head.weight, result.model.lm_head.weight
    assert torch.equal(start[tiny.VOCAB :], end[tiny.VOCAB :])
    assert not torch.equal(start[: tiny.VOCAB], end[: tiny.VOCAB])
