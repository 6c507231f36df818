"""DPO and IPO on packs against a padded textbook loop."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from fastrlhf.algorithms import preference
from fastrlhf.algorithms.preference import length_norm, train_dpo
from fastrlhf.config import DPOConfig
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return tiny.save_policy(tmp_path_factory.mktemp("other"), seed=3)


def config(model, **settings):
    fields = {"per_device_train_batch_size": 8, "max_steps": 1, "learning_rate": 1e-3, "progress": False}
    return DPOConfig(model_name_or_path=model, **fields | settings)


def padded_log_ratios(model, reference, examples, mean: bool):
    """[B, 2] log pi(y|x) / pi_ref(y|x) of chosen and rejected: right padding, full logits, a 0/1 mask."""
    rows = [(tiny.ids(e.prompt), [*tiny.ids(y), tiny.EOS]) for e in examples for y in (e.chosen, e.rejected)]
    width = max(len(x) + len(y) for x, y in rows)
    ids = torch.tensor([x + y + [0] * (width - len(x) - len(y)) for x, y in rows])
    mask = torch.tensor([[0] * (len(x) - 1) + [1] * len(y) + [0] * (width - len(x) - len(y)) for x, y in rows])
    attention = torch.tensor([[1] * (len(x) + len(y)) + [0] * (width - len(x) - len(y)) for x, y in rows])

    def logprobs(scored):
        logits = scored(ids, attention_mask=attention).logits[:, :-1]
        return (logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0] * mask).sum(1)

    with torch.no_grad():
        reference_logprobs = logprobs(reference)
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
    made = tiny.record_gradients(monkeypatch, preference)
    examples = tiny.examples(8)
    cfg = config(model, ref_model_name_or_path=other, micro_batch_tokens=80, **settings)
    [row] = train_dpo(cfg, examples).history
    policy, reference = (AutoModelForCausalLM.from_pretrained(path) for path in (model, other))
    log_ratios = padded_log_ratios(policy, reference, examples, length_norm(cfg) == "mean")
    loss = textbook_loss(cfg, log_ratios)
    loss.backward()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    tiny.assert_close_gradients(made[0].steps[0][0], [p.grad for p in policy.parameters()])
    with torch.no_grad():  # rewards are of whole responses, however the loss divides them
        rewards = cfg.beta * padded_log_ratios(policy, reference, examples, mean=False)
    assert row["rewards/accuracies"] == (rewards[:, 0] > rewards[:, 1]).float().mean().item()
    assert row["rewards/margins"] == pytest.approx((rewards[:, 0] - rewards[:, 1]).mean().item(), rel=1e-4)


def test_micro_batches_of_one_pair_change_no_gradient(model, other, monkeypatch):
    made = tiny.record_gradients(monkeypatch, preference)
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
def test_the_first_loss_of_a_policy_that_is_its_reference(model, settings, first):
    [row] = train_dpo(config(model, micro_batch_tokens=80, **settings), tiny.examples(8)).history
    assert row["loss"] == pytest.approx(first, abs=1e-6 * max(1, first))


def test_the_reference_stays_what_the_policy_was_at_the_start(model):
    """After three steps, the logged rewards are log-ratios to the start, which is on disk as it was."""
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


def test_smoothing_a_hinge_is_refused_before_the_run_starts(model, tmp_path):
    cfg = config(model, loss_type="hinge", label_smoothing=0.1, output_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"label_smoothing: must be 0 where loss_type is hinge; got 0.1"):
        train_dpo(cfg, tiny.examples(8))
    assert not (tmp_path / "run").exists()


def test_a_reference_of_its_own_that_equals_the_start_changes_nothing(model):
    cfg, examples = config(model, max_steps=3), tiny.examples(16)
    assert train_dpo(replace(cfg, ref_model_name_or_path=model), examples).history == train_dpo(cfg, examples).history


@pytest.mark.parametrize("settings", [{}, {"loss_type": "ipo"}], ids=str)
def test_a_reference_whose_rows_are_mixed_up_is_noticed_at_the_first_step(model, monkeypatch, settings):
    compute = preference._reference_logprobs
    monkeypatch.setattr(preference, "_reference_logprobs", lambda *arguments: compute(*arguments).roll(1, 0))
    with pytest.raises(ValueError, match=r"the first (sigmoid|ipo) loss is .* equals its reference has (0.693147|25):"):
        train_dpo(config(model, **settings), tiny.examples(16))


def test_the_first_loss_may_differ_by_rounding_and_by_no_more():
    metrics = {"loss": math.log(2), "logps/chosen": -150.0, "logps/rejected": -250.0}
    cfg = DPOConfig(beta=0.1)
    preference.check_first_loss(cfg, metrics | {"loss": math.log(2) + 0.1 * 3e-5 * 400})
    with pytest.raises(ValueError, match=r"the first sigmoid loss is 0.695147"):
        preference.check_first_loss(cfg, metrics | {"loss": math.log(2) + 2e-3})
    with pytest.raises(ValueError, match="the first sigmoid loss is nan"):
        preference.check_first_loss(cfg, metrics | {"loss": math.nan})


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_an_easy_rule_is_learnt_for_pairs_never_seen(model, loss_type):
    cfg = config(model, max_steps=15, per_device_train_batch_size=16, loss_type=loss_type)
    result = train_dpo(cfg, tiny.easy_pairs(200), tiny.easy_pairs(64, seed=1))
    assert result.history[0]["rewards/accuracies"] < 0.9
    assert result.final["eval_rewards/accuracies"] > 0.95


def test_the_same_seed_gives_the_same_run_bit_for_bit(model):
    cfg, examples = config(model, max_steps=2), tiny.examples(30)
    first = train_dpo(cfg, examples)
    assert train_dpo(cfg, examples).history == first.history
    assert train_dpo(replace(cfg, seed=1), examples).history != first.history


def test_auto_is_the_mean_for_ipo_and_the_sum_for_all_else():
    norms = {loss: length_norm(DPOConfig(loss_type=loss)) for loss in ("sigmoid", "ipo", "hinge", "robust")}
    assert norms == {"sigmoid": "sum", "ipo": "mean", "hinge": "sum", "robust": "sum"}
    assert length_norm(DPOConfig(loss_type="ipo", length_norm="sum")) == "sum"


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_sharing_the_prompt_changes_no_number_but_the_tokens_computed(model, monkeypatch, loss_type):
    made = tiny.record_gradients(monkeypatch, preference)
    examples = tiny.examples(8)
    settings = {"loss_type": loss_type, "ref_model_name_or_path": model, "micro_batch_tokens": 60}
    shared, plain = (train_dpo(config(model, share_prompts=on, **settings), examples) for on in (True, False))
    tiny.assert_close_gradients(made[0].steps[0][0], made[1].steps[0][0])
    ours, theirs = shared.history[0], plain.history[0]
    prompts = sum(len(tiny.ids(example.prompt)) for example in examples)
    assert ours.pop("num_unique_tokens") == theirs.pop("num_unique_tokens") - prompts
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
