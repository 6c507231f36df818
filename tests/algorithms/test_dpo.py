"""Tests of DPO and IPO on packs, against a textbook loop on padded tensors."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from fastrlhf.algorithms import dpo, reference
from fastrlhf.algorithms.dpo import train_dpo
from fastrlhf.config import DPOConfig
from tests import tiny


def config(model, **settings):
    fields = {"per_device_train_batch_size": 8, "max_steps": 1, "learning_rate": 1e-3, "progress": False}
    return DPOConfig(model_name_or_path=model, **fields | settings)


def padded_log_ratios(model, reference, examples, mean: bool):
    """Returns the log-ratios (policy to reference) of chosen and rejected responses, [B, 2], computed from full logits
    of a right-padded batch and a mask."""
    rows = [(tiny.ids(e.prompt), [*tiny.ids(y), tiny.EOS]) for e in examples for y in (e.chosen, e.rejected)]
    width = max(len(x) + len(y) for x, y in rows)
    ids = torch.tensor([x + y + [0] * (width - len(x) - len(y)) for x, y in rows])
    mask = torch.tensor([[0] * (len(x) - 1) + [1] * len(y) + [0] * (width - len(x) - len(y)) for x, y in rows])
    attention = torch.tensor([[1] * (len(x) + len(y)) + [0] * (width - len(x) - len(y)) for x, y in rows])

    def logprobs(scored):
        logits = scored(ids, attention_mask=attention).logits[:, :-1]
        return (logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0] * mask).sum(1)

    with torch.no_grad():
        reference_logprobs = 0 if reference is None else logprobs(reference)
    log_ratios = logprobs(model) - reference_logprobs
    return (log_ratios / mask.sum(1) if mean else log_ratios).view(-1, 2)


def textbook_loss(cfg: DPOConfig, log_ratios):
    difference = log_ratios[:, 0] - log_ratios[:, 1]
    if cfg.loss_type == "ipo":
        return ((difference - 1 / (2 * cfg.beta)) ** 2).mean()
    kept, flipped = F.logsigmoid(cfg.beta * difference), F.logsigmoid(-cfg.beta * difference)
    return -((1 - cfg.label_smoothing) * kept + cfg.label_smoothing * flipped).mean()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"label_smoothing": 0.2, "beta": 0.5},
        {"loss_type": "ipo"},
        {"loss_type": "ipo", "length_norm": "sum"},
        {"length_norm": "mean"},
    ],
    ids=str,
)
def test_loss_and_gradient_are_those_of_the_padded_textbook_loop(model, other, monkeypatch, settings):
    made = tiny.record_gradients(monkeypatch, dpo)
    examples = tiny.examples(8)
    cfg = config(model, ref_model_name_or_path=other, micro_batch_tokens=80, **settings)
    [row] = train_dpo(cfg, examples).history
    policy, reference = (AutoModelForCausalLM.from_pretrained(path) for path in (model, other))
    log_ratios = padded_log_ratios(policy, reference, examples, cfg.length_norm_of(cfg.loss_type) == "mean")
    loss = textbook_loss(cfg, log_ratios)
    loss.backward()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    tiny.assert_close_gradients(made[0].steps[0][0], [p.grad for p in policy.parameters()])
    with torch.no_grad():  # rewards are sums over whole responses, for every length_norm
        rewards = cfg.beta * padded_log_ratios(policy, reference, examples, mean=False)
    assert row["rewards/accuracies"] == (rewards[:, 0] > rewards[:, 1]).float().mean().item()
    assert row["rewards/margins"] == pytest.approx((rewards[:, 0] - rewards[:, 1]).mean().item(), rel=1e-4)


def test_micro_batches_of_one_pair_change_no_gradient(model, other, monkeypatch):
    made = tiny.record_gradients(monkeypatch, dpo)
    examples = tiny.examples(8)
    whole, split = (
        train_dpo(config(model, ref_model_name_or_path=other, micro_batch_tokens=budget), examples).history[0]
        for budget in (10_000, 36)
    )
    assert split == pytest.approx(whole, rel=1e-5, abs=1e-7)
    tiny.assert_close_gradients(made[1].steps[0][0], made[0].steps[0][0], 1e-4)


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ({}, math.log(2)),
        ({"label_smoothing": 0.3}, math.log(2)),
        ({"loss_type": "robust", "label_smoothing": 0.3}, math.log(2)),
        ({"loss_type": "hinge"}, 1.0),
        ({"loss_type": "ipo"}, 25.0),  # (1 / (2 * 0.1))^2
        ({"loss_type": "ipo", "length_norm": "sum", "beta": 0.25}, 4.0),
    ],
    ids=str,
)
def test_the_first_loss_when_policy_and_reference_are_equal(model, settings, first):
    [row] = train_dpo(config(model, micro_batch_tokens=80, **settings), tiny.examples(8)).history
    assert row["loss"] == pytest.approx(first, abs=1e-6 * max(1, first))


def test_the_reference_is_the_initial_policy(model):
    """After three steps the logged rewards are log-ratios to the initial model, which is unchanged on disk."""
    held_out = tiny.examples(6, seed=1)
    result = train_dpo(config(model, max_steps=3), tiny.examples(8), held_out)
    start = AutoModelForCausalLM.from_pretrained(model)
    assert any(not torch.equal(a, b) for a, b in zip(start.parameters(), result.model.parameters(), strict=True))
    with torch.no_grad():
        log_ratios = padded_log_ratios(result.model, start, held_out, mean=False)
    cfg = config(model)
    assert result.final["eval_loss"] == pytest.approx(textbook_loss(cfg, log_ratios).item(), rel=1e-5)
    assert result.final["eval_rewards/chosen"] == pytest.approx(0.1 * log_ratios[:, 0].mean().item(), rel=1e-3)
    assert result.final["eval_rewards/rejected"] == pytest.approx(0.1 * log_ratios[:, 1].mean().item(), rel=1e-3)


def test_a_separate_reference_equal_to_the_initial_policy_changes_nothing(model):
    cfg, examples = config(model, max_steps=3), tiny.examples(16)
    assert train_dpo(replace(cfg, ref_model_name_or_path=model), examples).history == train_dpo(cfg, examples).history


@pytest.mark.parametrize("settings", [{}, {"loss_type": "ipo"}], ids=str)
def test_a_reference_with_permuted_rows_is_noticed_at_the_first_step(model, monkeypatch, settings):
    compute = reference._precomputed
    monkeypatch.setattr(reference, "_precomputed", lambda *arguments: compute(*arguments).roll(1, 0))
    with pytest.raises(ValueError, match=r"the first (sigmoid|ipo) loss is .* equals its reference has (0.693147|25):"):
        train_dpo(config(model, **settings), tiny.examples(16))


def with_labels(examples):
    return [replace(e, label_prob=0.3 + 0.1 * (i % 7), margin=0.5 * i) for i, e in enumerate(examples)]


@pytest.mark.parametrize(
    "settings",
    [
        {"label_source": "label_prob"},
        {"label_source": "label_prob", "loss_type": "ipo", "length_norm": "sum"},
        {"label_source": "label_prob", "loss_type": "ipo", "psi": "logit", "beta": 0.5},
        {"margin_scale": 0.2},
        {"margin_scale": 0.2, "label_source": "label_prob", "beta": 0.5},
    ],
    ids=str,
)
def test_soft_labels_and_margins_are_those_of_the_textbook(model, other, monkeypatch, settings):
    made = tiny.record_gradients(monkeypatch, dpo)
    examples = with_labels(tiny.examples(8))
    cfg = config(model, ref_model_name_or_path=other, micro_batch_tokens=80, **settings)
    [row] = train_dpo(cfg, examples).history
    policy, reference = (AutoModelForCausalLM.from_pretrained(path) for path in (model, other))
    log_ratios = padded_log_ratios(policy, reference, examples, mean=False)
    difference = log_ratios[:, 0] - log_ratios[:, 1]
    prob = torch.tensor([e.label_prob if cfg.label_source == "label_prob" else 1.0 for e in examples])
    if cfg.psi == "logit":
        loss = ((difference - prob.logit() / cfg.beta) ** 2).mean()
    elif cfg.loss_type == "ipo":
        target = 1 / (2 * cfg.beta)
        loss = (prob * (difference - target) ** 2 + (1 - prob) * (difference + target) ** 2).mean()
        # pair_loss omits this constant, because it does not depend on the policy
        constant = (4 * prob * (1 - prob) * target**2).mean()
        loss = loss - constant
    else:
        z = cfg.beta * difference - cfg.margin_scale * torch.tensor([e.margin for e in examples])
        loss = -(prob * F.logsigmoid(z) + (1 - prob) * F.logsigmoid(-z)).mean()
    loss.backward()
    assert row["loss"] == pytest.approx(loss.item(), rel=2e-5)
    tiny.assert_close_gradients(made[0].steps[0][0], [p.grad for p in policy.parameters()])


@pytest.mark.parametrize("budget", [1000, 40])
def test_several_losses_are_added_with_their_weights_for_every_micro_batch_size(model, other, monkeypatch, budget):
    made = tiny.record_gradients(monkeypatch, dpo)
    examples = tiny.examples(8)
    losses = {"loss_type": ("ipo", "sigmoid", "sft"), "loss_weights": (0.01, 2.0, 0.5)}
    cfg = config(model, ref_model_name_or_path=other, micro_batch_tokens=budget, **losses)
    [row] = train_dpo(cfg, examples).history
    policy, reference = (AutoModelForCausalLM.from_pretrained(path) for path in (model, other))
    means, sums = (padded_log_ratios(policy, reference, examples, mean=mean) for mean in (True, False))
    terms = {
        "ipo": ((means[:, 0] - means[:, 1] - 5) ** 2).mean(),
        "sigmoid": -F.logsigmoid(0.1 * (sums[:, 0] - sums[:, 1])).mean(),
        "sft": chosen_nll(policy, examples),
    }
    loss = 0.01 * terms["ipo"] + 2 * terms["sigmoid"] + 0.5 * terms["sft"]
    loss.backward()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, term in terms.items():
        assert row[f"loss/{name}"] == pytest.approx(term.item(), rel=1e-5)
    tiny.assert_close_gradients(made[0].steps[0][0], [p.grad for p in policy.parameters()])


def chosen_nll(policy, examples):
    """Mean negative log-likelihood over the tokens of all chosen responses."""
    total, count = 0.0, 0
    for example in examples:
        prompt, response = tiny.ids(example.prompt), [*tiny.ids(example.chosen), tiny.EOS]
        logprobs = policy(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total = total - logprobs[range(len(response)), response].sum()
        count += len(response)
    return total / count


def test_token_metrics_are_those_of_plain_logits(model):
    examples = tiny.examples(8)
    [row] = train_dpo(config(model, micro_batch_tokens=60), examples).history
    policy, sides = AutoModelForCausalLM.from_pretrained(model), {"chosen": [], "rejected": []}
    for example in examples:
        prompt = tiny.ids(example.prompt)
        for side, found in sides.items():
            response = torch.tensor([*tiny.ids(getattr(example, side)), tiny.EOS])
            with torch.no_grad():
                logits = policy(torch.tensor([prompt + response.tolist()])).logits[0, len(prompt) - 1 : -1]
            entropy = torch.distributions.Categorical(logits=logits).entropy()
            found.append(torch.stack([logits.mean(1), (logits.argmax(1) == response).float(), entropy]))
    chosen, rejected = (torch.cat(found, 1) for found in sides.values())
    assert 0 < chosen[1].mean() < 1
    assert row["logits/chosen"] == pytest.approx(chosen[0].mean().item(), rel=1e-4)
    assert row["logits/rejected"] == pytest.approx(rejected[0].mean().item(), rel=1e-4)
    assert row["mean_token_accuracy"] == pytest.approx(chosen[1].mean().item())
    assert row["entropy"] == pytest.approx(torch.cat([chosen, rejected], 1)[2].mean().item(), rel=1e-5)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_an_easy_rule_generalises_to_unseen_pairs(model, loss_type):
    cfg = config(model, max_steps=15, per_device_train_batch_size=16, loss_type=loss_type)
    result = train_dpo(cfg, tiny.easy_pairs(200), tiny.easy_pairs(64, seed=1))
    assert result.history[0]["rewards/accuracies"] < 0.9
    assert result.final["eval_rewards/accuracies"] > 0.95


def test_the_same_seed_gives_the_same_run_bit_for_bit(model):
    cfg, examples = config(model, max_steps=2), tiny.examples(30)
    first = train_dpo(cfg, examples)
    assert train_dpo(cfg, examples).history == first.history
    assert train_dpo(replace(cfg, seed=1), examples).history != first.history


def test_one_loss_may_have_a_weight(model):
    plain, halved = (train_dpo(config(model, loss_weights=w), tiny.examples(8)).history[0] for w in ((), (0.5,)))
    assert halved["loss"] == pytest.approx(0.5 * plain["loss"])
    assert halved["grad_norm"] == pytest.approx(0.5 * plain["grad_norm"], rel=1e-5)
    assert set(halved) == set(plain)


def test_an_invalid_psi_is_refused_before_anything_is_scored(model, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("too late")

    monkeypatch.setattr(dpo, "policy_or_given", refuse)
    monkeypatch.setattr(dpo, "pair_probabilities", refuse)
    square = "tests.algorithms.test_psipo:square"
    for psi, message in (("logits", "is unknown; give identity"), (square, "is not odd about 1/2")):
        with pytest.raises(ValueError, match=message):
            train_dpo(config(model, loss_type="ipo", psi=psi), tiny.examples(8))


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_sharing_the_prompt_changes_only_the_number_of_computed_tokens(model, monkeypatch, loss_type):
    made = tiny.record_gradients(monkeypatch, dpo)
    examples = tiny.examples(8)
    settings = {"loss_type": loss_type, "ref_model_name_or_path": model, "micro_batch_tokens": 60}
    shared, plain = (train_dpo(config(model, share_prompts=on, **settings), examples) for on in (True, False))
    tiny.assert_close_gradients(made[0].steps[0][0], made[1].steps[0][0])
    ours, theirs = shared.history[0], plain.history[0]
    prompts = sum(len(tiny.ids(example.prompt)) for example in examples)
    assert ours.pop("num_unique_tokens") == theirs.pop("num_unique_tokens") - prompts
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
