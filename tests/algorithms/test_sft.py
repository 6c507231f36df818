"""Tests of SFT on packs against the plain model, one sequence at a time, with F.cross_entropy."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from fastrlhf.algorithms import sft
from fastrlhf.algorithms.sft import train_sft
from fastrlhf.config import SFTConfig
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_policy(tmp_path_factory.mktemp("base"))


def config(model, **settings):
    fields = {"per_device_train_batch_size": 8, "max_steps": 1, "learning_rate": 1e-2, "progress": False}
    return SFTConfig(model_name_or_path=model, **fields | settings)


def plain_loss(model, examples, completion_only: bool = True, response: str = "reference"):
    """Returns the loss in nats per trained token, computed one sequence at a time, and the number of trained tokens."""
    total, count = torch.tensor(0.0), 0
    for example in examples:
        prompt, answer = tiny.ids(example.prompt), [*tiny.ids(getattr(example, response)), tiny.EOS]
        labels = torch.tensor([-100] * len(prompt) + answer if completion_only else [*prompt, *answer])
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0]
        total = total + F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
        count += int((labels[1:] != -100).sum())
    return total / count


@pytest.mark.parametrize("settings", [{}, {"completion_only_loss": False}, {"response": "chosen"}])
def test_loss_and_gradient_are_those_of_the_plain_model_one_sequence_at_a_time(model, monkeypatch, settings):
    made = tiny.record_gradients(monkeypatch, sft)
    examples = tiny.examples(8)
    result = train_sft(config(model, micro_batch_tokens=60, **settings), examples)
    plain = AutoModelForCausalLM.from_pretrained(model)
    loss = plain_loss(
        plain, examples, settings.get("completion_only_loss", True), settings.get("response", "reference")
    )
    loss.backward()
    assert result.history[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    tiny.assert_close_gradients(made[0].steps[0][0], [p.grad for p in plain.parameters()])


def test_one_micro_batch_of_eight_is_eight_of_one(model, monkeypatch):
    made = tiny.record_gradients(monkeypatch, sft)
    examples = tiny.examples(8)
    longest = max(len(e.prompt.split()) + len(e.reference.split()) + 1 for e in examples)
    whole = train_sft(config(model, micro_batch_tokens=10_000), examples)
    split = train_sft(config(model, micro_batch_tokens=longest), examples)
    assert split.history[0]["loss"] == pytest.approx(whole.history[0]["loss"], rel=1e-6)
    tiny.assert_close_gradients(made[1].steps[0][0], made[0].steps[0][0])


def test_accumulation_is_only_another_way_to_write_the_batch_size(model):
    examples = tiny.examples(20)
    a = train_sft(config(model, max_steps=2), examples)
    b = train_sft(config(model, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=4), examples)
    assert a.history == b.history


def test_a_small_set_is_memorised(model):
    result = train_sft(config(model, max_steps=40, per_device_train_batch_size=4), tiny.examples(4))
    losses = [row["loss"] for row in result.history]
    assert losses[0] > 3
    assert losses[-1] < 0.05


def test_eval_loss_is_the_loss_of_the_trained_model_on_the_held_out_rows_per_token(model):
    held_out = tiny.examples(5, seed=1)
    result = train_sft(config(model, max_steps=3, eval_steps=2), tiny.examples(8), held_out)
    assert ["eval_loss" in row for row in result.history] == [False, True, True]
    assert result.final == {"eval_loss": result.history[-1]["eval_loss"]}
    with torch.no_grad():
        assert result.final["eval_loss"] == pytest.approx(plain_loss(result.model, held_out).item(), rel=1e-6)


def test_an_evaluation_on_start_is_of_the_untrained_model_and_moves_nothing(model):
    held_out, examples = tiny.examples(5, seed=1), tiny.examples(8)
    plain, watched = (
        train_sft(config(model, max_steps=2, eval_on_start=on), examples, held_out) for on in (False, True)
    )
    with torch.no_grad():
        untrained = plain_loss(AutoModelForCausalLM.from_pretrained(model), held_out).item()
    assert watched.initial == {"eval_loss": pytest.approx(untrained, rel=1e-6)}
    assert plain.initial == {}
    assert watched.history == plain.history


def test_the_same_seed_gives_the_same_run_bit_for_bit_and_another_seed_another(model):
    cfg, examples = config(model, max_steps=3, per_device_train_batch_size=4), tiny.examples(30)
    first, again, other = (train_sft(c, examples) for c in (cfg, cfg, replace(cfg, seed=1)))
    assert first.history == again.history
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
    assert [row["num_tokens"] for row in first.history] != [row["num_tokens"] for row in other.history]


def test_a_model_from_scratch_depends_only_on_the_seed(tmp_path):
    tiny.tokenizer().save_pretrained(tmp_path)
    cfg = SFTConfig(
        tokenizer_name_or_path=str(tmp_path),
        model_config=tiny.model_config().to_json_string(),
        max_steps=1,
        progress=False,
    )
    torch.manual_seed(1)
    first = train_sft(cfg, tiny.examples(8))
    torch.manual_seed(2)
    assert train_sft(cfg, tiny.examples(8)).history == first.history
    assert train_sft(replace(cfg, seed=1), tiny.examples(8)).history != first.history
