"""The reward model on packs against the plain AutoModelForSequenceClassification, padded."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification

from fastrlhf.algorithms import reward_model
from fastrlhf.algorithms.reward_model import evaluate, ranking_losses, score_pairs, train_reward_model
from fastrlhf.config import RewardConfig
from fastrlhf.models.loading import load_reward_model
from fastrlhf.types import Example, Segment
from tests import tiny


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return tiny.save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return tiny.save_reward_model(tmp_path_factory.mktemp("judge"))


def config(model, **settings):
    fields = {"per_device_train_batch_size": 8, "max_steps": 1, "learning_rate": 1e-3, "progress": False}
    return RewardConfig(model_name_or_path=model, **fields | settings)


def sequences(examples: list[Example]) -> list[list[int]]:
    """chosen, rejected, chosen, rejected, ..."""
    return [
        [*tiny.ids(e.prompt), *tiny.ids(response), tiny.EOS] for e in examples for response in (e.chosen, e.rejected)
    ]


def plain_scores(model, tokens: list[list[int]]) -> torch.Tensor:
    """[N] of a right-padded batch, the way other programs call the model."""
    width = max(map(len, tokens))
    ids = torch.tensor([s + [0] * (width - len(s)) for s in tokens])
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in tokens])
    return model(ids, attention_mask=mask).logits[:, 0]


def test_loss_and_gradient_are_minus_log_sigmoid_of_the_plain_models_scores(judge, monkeypatch):
    made = tiny.record_gradients(monkeypatch, reward_model)
    examples = tiny.examples(8)
    [row] = train_reward_model(config(judge, micro_batch_tokens=80), examples).history
    plain = AutoModelForSequenceClassification.from_pretrained(judge)
    scores = plain_scores(plain, sequences(examples)).view(8, 2)
    margin = scores[:, 0] - scores[:, 1]
    loss = -F.logsigmoid(margin).mean()
    loss.backward()
    expected = {"loss": loss, "accuracy": (margin > 0).float().mean(), "margin": margin.mean()}
    assert row == pytest.approx(
        {
            **{name: value.item() for name, value in expected.items()},
            "min_reward": scores.min().item(),
            "mean_reward": scores.mean().item(),
            "max_reward": scores.max().item(),
            "grad_norm": 0.0,  # of the recorder
            "learning_rate": 0.0,
            "num_tokens": sum(map(len, sequences(examples))),
            "num_unique_tokens": sum(map(len, sequences(examples))) - sum(len(tiny.ids(e.prompt)) for e in examples),
        },
        rel=1e-5,
        abs=1e-6,
    )
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    tiny.assert_close_gradients(made[0].steps[0][0], list(gradients.values()))


def test_one_micro_batch_of_eight_is_eight_of_one(judge, monkeypatch):
    made = tiny.record_gradients(monkeypatch, reward_model)
    examples = tiny.examples(8)
    lengths = [len(s) for s in sequences(examples)]
    longest = max(a + b for a, b in zip(lengths[::2], lengths[1::2], strict=True))
    whole = train_reward_model(config(judge, micro_batch_tokens=10_000), examples).history[0]
    split = train_reward_model(config(judge, micro_batch_tokens=longest), examples).history[0]
    assert split == pytest.approx(whole, rel=1e-5)
    tiny.assert_close_gradients(made[1].steps[0][0], made[0].steps[0][0])


def test_metrics_of_three_pairs_by_hand_a_tie_counts_one_half():
    scores = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [2.0, 2.0]])
    summary = reward_model._summary(scores, ranking_losses(RewardConfig(), scores, torch.zeros(3)))
    losses = [math.log1p(math.exp(-1)), math.log1p(math.exp(2)), math.log(2)]  # -log sigmoid of margins 1, -2, 0
    rewards = {"min_reward": -1.0, "mean_reward": 5 / 6, "max_reward": 2.0}
    assert summary == pytest.approx({"loss": sum(losses) / 3, "accuracy": 1.5 / 3, "margin": -1 / 3} | rewards)


def test_margins_and_centring_by_hand():
    scores = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
    cfg = RewardConfig(center_rewards_coefficient=0.25)
    losses = ranking_losses(cfg, scores, torch.tensor([1.0, 0.5]))  # sums 1 and 0, differences less margin 0 and -2.5
    assert losses.tolist() == pytest.approx([math.log(2) + 0.25, math.log1p(math.exp(2.5))])


def test_margins_of_the_rows_reach_their_pairs_in_training_and_evaluation(judge):
    examples = [replace(example, margin=0.1 * i) for i, example in enumerate(tiny.examples(9))]
    cfg = config(judge, micro_batch_tokens=36, margin_scale=2.0, learning_rate=1e-30, per_device_train_batch_size=9)
    result = train_reward_model(cfg, examples, examples)
    plain = AutoModelForSequenceClassification.from_pretrained(judge)
    with torch.no_grad():
        scores = plain_scores(plain, sequences(examples)).view(9, 2)
    expected = -F.logsigmoid(scores[:, 0] - scores[:, 1] - torch.arange(9) * 0.2).mean().item()
    assert result.history[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert result.final["eval_loss"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match=r"^row 8: bad_margin: margin is nan, not finite"):
        train_reward_model(cfg, [*examples[:8], replace(examples[8], margin=math.nan)])
    with pytest.raises(ValueError, match="row 0 has no margin"):
        train_reward_model(cfg, tiny.examples(9))


def test_a_head_of_zeros_ties_on_every_pair(judge):
    model = load_reward_model(judge, pad_token_id=0)
    torch.nn.init.zeros_(model.score.weight)
    pairs = [(Segment(token_ids=[3, 4, 1]), Segment(token_ids=[3, 5, 6, 1]))] * 4
    assert evaluate(config(judge), model, pairs, torch.zeros(4)) == pytest.approx(
        {
            "eval_loss": math.log(2),
            "eval_accuracy": 0.5,
            "eval_margin": 0.0,
            "eval_min_reward": 0.0,
            "eval_mean_reward": 0.0,
            "eval_max_reward": 0.0,
            "eval_accuracy_low": 0.5,
            "eval_accuracy_high": 0.5,
        }
    )


def test_the_saved_model_is_a_plain_sequence_classifier_with_identical_scores(policy, tmp_path):
    folder = tmp_path / "run"
    held_out = tiny.examples(6, seed=3)
    result = train_reward_model(config(policy, max_steps=3, output_dir=str(folder)), tiny.examples(16), held_out)
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        tokens = sequences(held_out)
        reloaded = plain_scores(plain, tokens)
        assert torch.equal(reloaded, plain_scores(result.model, tokens))
        pairs = [(Segment(token_ids=a), Segment(token_ids=b)) for a, b in zip(tokens[::2], tokens[1::2], strict=True)]
        torch.testing.assert_close(score_pairs(result.model, pairs).flatten(), reloaded, rtol=1e-5, atol=1e-5)
    margin = reloaded.view(-1, 2) @ torch.tensor([1.0, -1.0])
    assert result.final["eval_loss"] == pytest.approx(F.softplus(-margin).mean().item(), rel=1e-5)
    again = load_reward_model(str(folder), pad_token_id=0, must_be_trained=True)
    assert torch.equal(again.score.weight, result.model.score.weight)


def test_an_easy_rule_is_learnt_for_pairs_never_seen(policy):
    cfg = config(policy, max_steps=15, per_device_train_batch_size=16, learning_rate=3e-3, seed=1)
    result = train_reward_model(cfg, tiny.easy_pairs(200), tiny.easy_pairs(100, seed=1))
    assert result.history[0]["accuracy"] < 0.9
    assert result.final["eval_accuracy"] > 0.95
    assert result.final["eval_accuracy_low"] <= result.final["eval_accuracy"] <= result.final["eval_accuracy_high"]


def test_the_new_head_depends_on_the_seed_alone(policy):
    cfg, examples = config(policy, max_steps=2), tiny.examples(8)  # all in every batch: only the head can differ
    torch.manual_seed(1)
    first = train_reward_model(cfg, examples)
    torch.manual_seed(2)
    assert train_reward_model(cfg, examples).history == first.history
    other = train_reward_model(replace(cfg, seed=1), examples)
    assert abs(other.history[0]["loss"] - first.history[0]["loss"]) > 1e-3


def test_it_starts_from_a_model_and_from_nothing_else(policy):
    with pytest.raises(ValueError, match="model_name_or_path: must be the model whose trunk"):
        train_reward_model(RewardConfig(tokenizer_name_or_path=policy), tiny.examples(4))
    with pytest.raises(ValueError, match="model_config: must be empty"):
        train_reward_model(config(policy, model_config='{"model_type": "llama"}'), tiny.examples(4))


def test_sharing_the_prompt_changes_no_number_but_the_tokens_computed(monkeypatch, tmp_path):
    made = tiny.record_gradients(monkeypatch, reward_model)
    path, examples = tiny.save_policy(tmp_path / "base"), tiny.examples(8)
    fields = {"model_name_or_path": path, "per_device_train_batch_size": 8, "max_steps": 1, "progress": False}
    configs = [RewardConfig(**fields, micro_batch_tokens=60, share_prompts=on) for on in (True, False)]
    shared, plain = (train_reward_model(config, examples) for config in configs)
    tiny.assert_close_gradients(made[0].steps[0][0], made[1].steps[0][0])
    ours, theirs = shared.history[0], plain.history[0]
    prompts = sum(len(tiny.ids(example.prompt)) for example in examples)
    assert ours.pop("num_unique_tokens") == theirs.pop("num_unique_tokens") - prompts
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
