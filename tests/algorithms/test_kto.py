"""Tests of KTO on packs, against a textbook loop on padded tensors."""

import logging
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastrlhf.algorithms import kto
from fastrlhf.algorithms.kto import Trees, class_weights, kto_losses, train_kto
from fastrlhf.config import KTOConfig
from fastrlhf.runtime.optim import index_batches
from fastrlhf.types import Example, TokenizedExample
from tests import tiny

ROWS = [
    Example(prompt=pair.prompt, reference=pair.chosen if row % 3 else pair.rejected, label=row % 3 > 0, row=row)
    for row, pair in enumerate(tiny.examples(8, seed=4))
]


def config(model, **settings):
    fields = {"per_device_train_batch_size": 4, "max_steps": 1, "learning_rate": 1e-3, "progress": False}
    return KTOConfig(model_name_or_path=model, **fields | settings)


def logprob(model, prompt, response):
    ids = torch.tensor([[*prompt, *response]])
    logits = model(ids).logits[:, :-1].log_softmax(-1)
    return logits.gather(2, ids[:, 1:, None])[0, len(prompt) - 1 :, 0].sum()


def textbook_loss(cfg, policy, reference, rows):
    """Returns the loss of one batch and the estimate z of the KL, computed one sequence at a time. `rows` must be in
    the order in which the trainer drew them."""
    texts = [(tiny.ids(row.prompt), [*tiny.ids(row.reference), tiny.EOS]) for row in rows]

    def log_ratio(prompt, response):
        with torch.no_grad():
            base = logprob(reference, prompt, response)
        return logprob(policy, prompt, response) - base

    with torch.no_grad():
        lent = [log_ratio(prompt, texts[i - 1][1]) for i, (prompt, _) in enumerate(texts)]
        kl = torch.stack(lent).mean().clamp(min=0)
    losses = []
    for row, text in zip(rows, texts, strict=True):
        u = log_ratio(*text)
        value = torch.sigmoid(cfg.beta * (u - kl if row.label else kl - u))
        losses.append((cfg.desirable_weight if row.label else cfg.undesirable_weight) * (1 - value))
    return torch.stack(losses).mean(), kl


@pytest.mark.parametrize("precomputed", [True, False])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.2, 0.5)])
def test_loss_and_gradient_are_those_of_the_textbook_loop(model, other, monkeypatch, precomputed, weights):
    made = tiny.record_gradients(monkeypatch, kto)
    settings = {
        "ref_model_name_or_path": other,
        "precompute_ref_log_probs": precomputed,
        "micro_batch_tokens": 24,
    }  # several micro-batches
    cfg = config(model, beta=0.3, desirable_weight=weights[0], undesirable_weight=weights[1], **settings)
    [row] = train_kto(cfg, ROWS).history
    policy, reference = (AutoModelForCausalLM.from_pretrained(path) for path in (model, other))
    drawn = [ROWS[i] for i in next(index_batches(len(ROWS), 4, 1, cfg.seed))]
    loss, kl = textbook_loss(cfg, policy, reference, drawn)
    loss.backward()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["kl"] == pytest.approx(kl.item(), rel=1e-4, abs=1e-5)
    tiny.assert_close_gradients(made[0].steps[0][0], [p.grad for p in policy.parameters()])


def test_the_loss_is_half_of_the_weights_if_policy_and_reference_are_equal(model):
    row, *_ = train_kto(config(model, desirable_weight=3.0, per_device_train_batch_size=8), ROWS).history
    assert row["kl"] == pytest.approx(0, abs=1e-5)
    assert row["loss"] == pytest.approx((5 * 3 + 3) / 8 / 2, rel=1e-5)  # 5 of the 8 responses are desirable
    assert row["rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_an_easy_rule_generalises_to_unseen_rows(model):
    def rows(num, seed):
        pairs = tiny.easy_pairs(num, seed=seed)
        return [
            Example(prompt=pair.prompt, reference=pair.chosen if i % 2 else pair.rejected, label=i % 2 == 1, row=i)
            for i, pair in enumerate(pairs)
        ]

    cfg = config(model, max_steps=25, per_device_train_batch_size=16, beta=0.5)
    result = train_kto(cfg, rows(200, 0), rows(64, 1))
    assert result.final["eval_rewards/margins"] > 0.5
    assert result.final["eval_loss"] < 0.45
    assert result.history[0]["loss"] == pytest.approx(0.5, rel=1e-5)


def test_kto_losses_by_hand():
    log_ratio, label = torch.tensor([1.0, 1.0, -2.0]), torch.tensor([True, False, False])
    losses = kto_losses(log_ratio, label, torch.tensor(0.5), 2.0, (1.0, 3.0))
    expected = [1 / (1 + math.exp(1)), 3 / (1 + math.exp(-1)), 3 / (1 + math.exp(5))]
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)


def test_mismatched_pairs_use_the_previous_response_cut_to_the_limit():
    rows = [TokenizedExample(prompt=[i] * i, reference=[10 + i] * 4, label=True, row=i) for i in range(1, 5)]
    trees = Trees(rows, [[2, 0, 1], [3, 2]], limit=6)
    assert len(trees) == 9
    assert [list(trees.mismatched(batch)) for batch in (0, 1)] == [[4, 5, 6], [7, 8]]
    borrowed = [trees[i][0] for i in range(4, 9)]
    assert [segment.token_ids for segment in borrowed] == [
        [3, 3, 3, 12, 12, 12],
        [1, 13, 13, 13, 13],
        [2, 2, 11, 11, 11, 11],
        [4, 4, 4, 4, 13, 13],
        [3, 3, 3, 14, 14, 14],
    ]
    assert [segment.num_scored for segment in borrowed] == [3, 4, 4, 2, 3]


@pytest.mark.parametrize(
    ("settings", "labels", "expected", "level"),
    [
        ({}, [True] * 4 + [False] * 3, (1.0, 1.0), logging.INFO),
        ({}, [True] * 4 + [False], (1.0, 1.0), logging.WARNING),
        ({"balance_weights": True}, [True] * 4 + [False], (1.0, 4.0), logging.INFO),
        ({"balance_weights": True, "desirable_weight": 1.2}, [True] + [False] * 4, (4.8, 1.0), logging.INFO),
        ({}, [True] * 4, (1.0, 1.0), logging.WARNING),
    ],
)
def test_the_ratio_of_both_kinds_is_reported_and_balanced(caplog, settings, labels, expected, level):
    with caplog.at_level(logging.INFO):
        assert class_weights(KTOConfig(**settings), labels) == pytest.approx(expected)
    [record] = caplog.records
    assert record.levelno == level
    assert f"{sum(labels)} desirable" in record.message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per_device_train_batch_size": 1}, "per_device_train_batch_size: must be 2 or more"),
        ({"desirable_weight": 0.0}, "desirable_weight: must be above 0"),
        ({"ref_cache_dir": "x", "precompute_ref_log_probs": False}, "ref_cache_dir: must be empty when"),
    ],
)
def test_incompatible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        KTOConfig(**settings)


def test_a_single_row_to_evaluate_on_is_refused(model):
    with pytest.raises(ValueError, match="num_eval_examples: must be 0, or at least 2"):
        train_kto(config(model), ROWS, ROWS[:1])


def test_rows_without_a_label_are_refused_before_a_model_is_loaded(model, monkeypatch):
    monkeypatch.setattr(kto, "policy_or_given", None)
    with pytest.raises(ValueError, match=r"no label in demonstrations"):
        train_kto(config(model), [{"prompt": "w1", "completion": "w2"}] * 4)
    rows = [{"prompt": "w1 w5", "completion": "w2", "label": "maybe"}] * 4
    with pytest.raises(ValueError, match=r"bad_label.*label is 'maybe', not true or false"):
        train_kto(config(model), rows)
