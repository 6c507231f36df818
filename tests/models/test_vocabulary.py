"""Tests of models whose head prefers ids without a token: ids above the largest id of the tokenizer, and ids below
it."""

import copy
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.config import PPOConfig
from fastrlhf.data.packing import pack, sequence
from fastrlhf.models.forward import scored_states, state_kl, token_logprobs
from fastrlhf.models.loading import build_policy
from fastrlhf.models.vocabulary import allowed_ids, head_of, is_limited, limit_vocabulary, rows_of
from fastrlhf.rollout.engine import TransformersEngine
from fastrlhf.rollout.truncation import Truncation, kept_tokens
from fastrlhf.types import Prefix
from tests import tiny

ROWS = tiny.VOCAB + 8
HOLES = {4, 17, 30}
ABOVE = pytest.param((), id="above")
BETWEEN = pytest.param(HOLES, id="between")


def padded(seed=0, name="llama", holes=()):
    model = build_policy(tiny.model_config(name), vocab_size=ROWS, eos_token_id=tiny.EOS, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
        model.get_output_embeddings().weight[sorted(idle(holes))] *= 5
    return model


def idle(holes):
    """Returns the ids (rows of the head) without a token."""
    return {*range(tiny.VOCAB, ROWS), *holes}


def own_logprobs(model, ids, holes=(), temperature=1.0):
    """Log-probs [L - 1, V] float64 over the ids that have a token; -inf for the others."""
    logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1].double() / temperature
    return logits.index_fill(1, torch.tensor(sorted(idle(holes))), -torch.inf).log_softmax(-1)


def entropy_of(logprobs):
    return -(logprobs.exp() * logprobs.where(logprobs.isfinite(), 0.0)).sum(-1)


@pytest.mark.parametrize("holes", [ABOVE, BETWEEN])
@pytest.mark.parametrize("name", ["llama", "gemma2"])  # gemma2 has a soft cap, and its head is tied to the embedding
def test_log_probs_entropy_kl_and_gradients_are_exact_over_the_ids_of_the_tokenizer(name, holes):
    model, other = padded(0, name, holes), padded(1, name, holes)
    exact, exact_other = copy.deepcopy(model).double(), copy.deepcopy(other).double()
    ids = [5, 6, 7, 8, 9, 1]
    batch = pack([sequence(ids[:3], ids[3:])])
    whole = token_logprobs(model, batch).logprob
    for one in (model, other):
        limit_vocabulary(one, tiny.tokenizer(holes))
        assert is_limited(one)
        assert set(allowed_ids(one)) == set(range(ROWS)) - idle(holes)
    heat = torch.tensor([0.5, 1.0, 2.0])
    scored = token_logprobs(model, batch, temperature=heat, entropy=True)
    expected = own_logprobs(exact, ids, holes, heat.new_tensor([1, 1, 0.5, 1, 2])[:, None])[2:]
    assert exact.get_output_embeddings().weight.dtype == expected.dtype == torch.float64
    logprob = expected.gather(1, batch.targets[:, None])[:, 0]
    torch.testing.assert_close(scored.logprob.double(), logprob, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scored.entropy.double(), entropy_of(expected), rtol=1e-5, atol=1e-5)
    assert (token_logprobs(model, batch).logprob - whole).min() > 0.1
    (scored.logprob.sum() + scored.entropy.sum()).backward()
    (logprob.sum() + entropy_of(expected).sum()).backward()
    for (at, ours), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
        scale = theirs.grad.abs().max().item()
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=0, atol=2e-5 * scale, msg=at)
        assert scale > 1e-4

    model.zero_grad()
    exact.zero_grad()
    states, others = scored_states(model, batch), scored_states(other, batch).detach()
    kl = state_kl(model, states, other, others, batch.targets).kl
    expected = own_logprobs(exact, ids, holes)[2:]
    apart = expected - own_logprobs(exact_other, ids, holes)[2:].detach()
    truth = (expected.exp() * apart.where(expected.isfinite(), 0.0)).sum(-1)
    torch.testing.assert_close(kl.double(), truth, rtol=1e-5, atol=1e-5)
    kl.sum().backward()
    truth.sum().backward()
    for (at, ours), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=0, atol=5e-5 * scale, msg=at)


@pytest.mark.parametrize("holes", [ABOVE, BETWEEN])
def test_the_gradient_of_the_rows_that_are_left_out_is_zero(holes):
    model = padded(holes=holes)
    limit_vocabulary(model, tiny.tokenizer(holes))
    token_logprobs(model, pack([sequence([5, 6, 7], [8, 9, 1])])).logprob.sum().backward()
    moved = model.lm_head.weight.grad.abs().amax(1)
    assert set(moved.nonzero()[:, 0].tolist()) == set(range(ROWS)) - idle(holes)


def test_a_model_with_the_size_of_its_tokenizer_is_not_changed():
    model, targets = tiny.policy(), torch.tensor([3, -100])
    limit_vocabulary(model, tiny.tokenizer())
    assert not is_limited(model)
    assert set(allowed_ids(model)) == set(range(tiny.VOCAB))
    assert head_of(model)[0] is model.lm_head.weight
    assert rows_of(model, targets) is targets


def test_ids_without_a_token_are_no_rows_and_are_logged(caplog):
    model = padded()
    with caplog.at_level(logging.INFO):
        limit_vocabulary(model, tiny.tokenizer({4, 17, 18, 30}))
    told = "the tokenizer has no token for 4 ids below its largest (4, 17, 18, ...); they are never sampled"
    assert told in caplog.messages
    rows = rows_of(model, torch.tensor([3, 4, 5, -100, 31, 32]))
    assert rows.tolist() == [3, 28, 4, -100, 27, 32]  # 28 rows
    assert torch.equal(head_of(model)[0][27], model.lm_head.weight[31])
    with pytest.raises(ValueError, match=r"^targets must be in \[0, 27\], got 28$"):
        token_logprobs(model, pack([sequence([5, 6], [4, 1])]))


@pytest.mark.parametrize("holes", [ABOVE, BETWEEN])
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_ids_without_a_token_are_never_sampled(temperature, holes):
    model = padded(holes=holes)
    settings = {"eos_token_id": tiny.EOS, "response_length": 5, "temperature": temperature, "seed": 3}
    starts = [Prefix(token_ids=[5, 6, 7 + i % 9], num_reset=0, row=i, episode=i) for i in range(40)]

    def sampled():
        engine = TransformersEngine(model=model, **settings)
        return {token for rollout in engine.generate(starts) for token in rollout.completion}

    assert sampled() & idle(holes)
    limit_vocabulary(model, tiny.tokenizer(holes))
    assert not sampled() & idle(holes)
    assert max(sampled()) > 17
    for rollout in TransformersEngine(model=model, **settings).generate(starts[:9]):
        n = len(rollout.prefix.token_ids)
        with torch.no_grad():
            logprobs = own_logprobs(model, rollout.prefix.token_ids + rollout.completion, holes, temperature or 1)
        told = logprobs[n - 1 :].gather(1, torch.tensor(rollout.completion)[:, None])
        assert rollout.sampler_logprob == pytest.approx(told[:, 0].tolist(), abs=1e-5)


def test_tokens_are_sampled_as_often_as_the_policy_says():
    model, number = padded(holes=HOLES), 4000
    limit_vocabulary(model, tiny.tokenizer(HOLES))
    engine = TransformersEngine(
        model=model, eos_token_id=tiny.EOS, response_length=1, temperature=2.0, seed=0, batch_size=1000
    )
    starts = [Prefix(token_ids=[5, 6, 7], num_reset=0, row=0, episode=i) for i in range(number)]
    first = torch.tensor([rollout.completion[0] for rollout in engine.generate(starts)])
    with torch.no_grad():
        expected = number * own_logprobs(model, [5, 6, 7, 0], HOLES, 2.0)[2].exp()
    counts = torch.bincount(first, minlength=ROWS).double()
    assert not counts[sorted(idle(HOLES))].any()
    assert ((counts - expected).abs() < 4 * expected.sqrt() + 1).all()


def test_truncated_sampling_keeps_ids_of_the_tokenizer_and_the_trainer_gives_their_log_probs():
    model = padded(holes=HOLES)
    limit_vocabulary(model, tiny.tokenizer(HOLES))
    engine = TransformersEngine(
        model=model,
        eos_token_id=tiny.EOS,
        response_length=5,
        temperature=0.7,
        seed=3,
        truncation=Truncation(top_k=4),
    )
    starts = [Prefix(token_ids=[5, 6, 7 + i], num_reset=0, row=i, episode=i) for i in range(9)]
    for rollout in engine.generate(starts):
        prompt, response = rollout.prefix.token_ids, rollout.completion
        with torch.no_grad():
            logprobs = own_logprobs(model, prompt + response, HOLES, 0.7)[len(prompt) - 1 :]
            best = logprobs.topk(4)
            assert [sorted(own.tolist()) for own in rollout.kept] == [sorted(row) for row in best.indices.tolist()]
            kept = kept_tokens([rollout], model.device)
            batch = pack([sequence(prompt, response)])
            scored = token_logprobs(model, batch, temperature=0.7, kept=kept).logprob.tolist()
        truth = logprobs.gather(1, torch.tensor(response)[:, None])[:, 0] - best.values.logsumexp(-1)
        assert rollout.sampler_logprob == pytest.approx(truth.tolist(), abs=1e-5)
        assert scored == pytest.approx(truth.tolist(), abs=1e-5)


def run(folder, holes, engine=None, **settings):
    padded(holes=holes).save_pretrained(folder / "sft")
    tiny.tokenizer(holes).save_pretrained(folder / "sft")
    config = PPOConfig(
        model_name_or_path=str(folder / "sft"),
        output_dir=str(folder / "run"),
        advantage_estimator="rloo",
        num_generations=2,
        per_device_train_batch_size=8,
        max_steps=2,
        response_length=6,
        max_length=32,
        learning_rate=1e-2,
        progress=False,
        **settings,
    )
    seen = []

    def judge(rollouts):
        seen.extend(token for rollout in rollouts for token in rollout.completion)
        return torch.tensor([float(len(rollout.completion)) for rollout in rollouts])

    return train_ppo(config, tiny.examples(20), judge=judge, engine=engine), seen


SETTINGS = {
    "kl": {"kl_placement": "loss", "kl_estimator": "exact", "num_ppo_epochs": 2},
    "lora": {"use_peft": True, "lora_r": 2},
    "top_k": {"top_k": 5},
}


@pytest.mark.parametrize(
    ("holes", "settings"), [((), {}), *((HOLES, settings) for settings in SETTINGS.values())], ids=["above", *SETTINGS]
)
def test_a_whole_run_samples_and_trains_over_the_ids_of_the_tokenizer(tmp_path, holes, settings):
    result, seen = run(tmp_path, holes, **settings)
    assert not set(seen) & idle(holes)
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-5 for row in result.history)
    start = padded(holes=holes).lm_head.weight
    end = AutoModelForCausalLM.from_pretrained(tmp_path / "run").lm_head.weight
    same = {i for i in range(ROWS) if torch.equal(start[i], end[i])}
    if "top_k" in settings:  # the gradient of tokens that were never kept is zero too
        assert idle(holes) <= same < set(range(ROWS))
    else:
        assert same == (set(range(ROWS)) if "use_peft" in settings else idle(holes))


def test_an_engine_that_samples_an_id_without_a_token_is_refused(tmp_path):
    def unlimited(config, policy, eos):
        return TransformersEngine.of(config, copy.deepcopy(padded(holes=HOLES)), eos)

    with pytest.raises(ValueError, match=r"^engine: it sampled the id \d+, for which the tokenizer has no token"):
        run(tmp_path, HOLES, engine=unlimited, temperature=2.0)
