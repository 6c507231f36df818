"""Tests of reward-model training on packs, against a plain AutoModelForSequenceClassification on padded batches."""

import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification

from fastrlhf.algorithms import reward_model
from fastrlhf.algorithms.completions import Answers
from fastrlhf.algorithms.reward_model import evaluate, ranking_losses, score_pairs, train_reward_model
from fastrlhf.algorithms.rlp_uml import Views, is_active
from fastrlhf.config import RewardConfig, RLPConfig
from fastrlhf.data.tokens import tokenize_examples
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
    """Lists chosen and rejected responses alternately."""
    return [
        [*tiny.ids(e.prompt), *tiny.ids(response), tiny.EOS] for e in examples for response in (e.chosen, e.rejected)
    ]


def plain_scores(model, tokens: list[list[int]]) -> torch.Tensor:
    """Returns the scores [N] of a right-padded batch from a plain transformers forward."""
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
            "grad_norm": 0.0,  # GradientRecorder, which replaces the optimiser, reports 0
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
    losses = [math.log1p(math.exp(-1)), math.log1p(math.exp(2)), math.log(2)]  # -log sigmoid of the margins 1, -2, 0
    rewards = {"min_reward": -1.0, "mean_reward": 5 / 6, "max_reward": 2.0}
    assert summary == pytest.approx({"loss": sum(losses) / 3, "accuracy": 1.5 / 3, "margin": -1 / 3} | rewards)


def test_margins_and_centring_by_hand():
    scores = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
    cfg = RewardConfig(center_rewards_coefficient=0.25)
    # Score differences minus margins: 1 - 1 = 0 and -2 - 0.5 = -2.5. Sums of scores: 1 and 0.
    losses = ranking_losses(cfg, scores, torch.tensor([1.0, 0.5]))
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
    model.score.weight.data.zero_()  # while any thread loads a model, torch.nn.init skips weights that were loaded
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


def test_an_easy_rule_generalises_to_unseen_pairs(policy):
    cfg = config(policy, max_steps=15, per_device_train_batch_size=16, learning_rate=3e-3, seed=1)
    result = train_reward_model(cfg, tiny.easy_pairs(200), tiny.easy_pairs(100, seed=1))
    assert result.history[0]["accuracy"] < 0.9
    assert result.final["eval_accuracy"] > 0.95
    assert result.final["eval_accuracy_low"] <= result.final["eval_accuracy"] <= result.final["eval_accuracy_high"]


def test_the_new_head_depends_only_on_the_seed(policy):
    # Every batch holds all examples, so only the head can differ
    cfg, examples = config(policy, max_steps=2), tiny.examples(8)
    torch.manual_seed(1)
    first = train_reward_model(cfg, examples)
    torch.manual_seed(2)
    assert train_reward_model(cfg, examples).history == first.history
    other = train_reward_model(replace(cfg, seed=1), examples)
    assert abs(other.history[0]["loss"] - first.history[0]["loss"]) > 1e-3


def test_it_starts_only_from_a_model(policy):
    with pytest.raises(ValueError, match="model_name_or_path: must be the model whose backbone"):
        train_reward_model(RewardConfig(tokenizer_name_or_path=policy), tiny.examples(4))
    with pytest.raises(ValueError, match="model_config: must be empty"):
        train_reward_model(config(policy, model_config='{"model_type": "llama"}'), tiny.examples(4))


def test_sharing_the_prompt_changes_only_the_number_of_computed_tokens(monkeypatch, tmp_path):
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


UML = RLPConfig(refinement="uml", view_width=16, view_latent=4, views_per_step=3, mib_weight=0.5)


def views_of(count: int, seed: int = 0, **settings) -> Views:
    """Three answers of 1 to 6 tokens to each of `count` prompts."""
    draw = random.Random(seed)

    def ids(low, high):
        return [draw.randint(3, tiny.VOCAB - 1) for _ in range(draw.randint(low, high))]

    answers = [
        Answers(row=i, prompt=ids(3, 9), responses=[[*ids(1, 5), tiny.EOS] for _ in range(3)], logprob=[0.0] * 3)
        for i in range(count)
    ]
    return Views(config=replace(UML, **settings), answers=answers)


def test_pairs_and_views_in_one_pack_are_the_plain_model_padded(judge, monkeypatch):
    made = tiny.record_gradients(monkeypatch, reward_model)
    examples, views = tiny.examples(4), views_of(3)
    cfg = config(judge, per_device_train_batch_size=4, micro_batch_tokens=10_000)
    [row] = train_reward_model(cfg, examples, views=views).history

    plain = AutoModelForSequenceClassification.from_pretrained(judge)
    scores = plain_scores(plain, sequences(examples)).view(4, 2)
    objective = views.open(32, torch.device("cpu"), 1)
    tokens = [[*tree[0].token_ids, *side.token_ids] for tree in objective.draw(0) for side in tree[1:]]
    width = max(map(len, tokens))
    ids = torch.tensor([s + [0] * (width - len(s)) for s in tokens])
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in tokens])
    hidden = plain.model(ids, attention_mask=mask).last_hidden_state[range(6), [len(s) - 1 for s in tokens]]
    output = objective.loss(hidden, 0)
    ranking = -F.logsigmoid(scores[:, 0] - scores[:, 1]).mean()
    (ranking + output.loss).backward()

    assert row["loss"] == pytest.approx(ranking.item(), rel=1e-5)
    assert row["views/loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    assert row["views/jsd"] == pytest.approx(output.metrics["jsd"].value.item() / 3, rel=1e-5)
    assert row["views/beta"] == 1.0
    ours, heads = made[0].steps[0]
    tiny.assert_close_gradients(ours, [p.grad for p in plain.parameters()])
    tiny.assert_close_gradients(heads, [p.grad for p in objective.heads.parameters()])


@pytest.mark.parametrize("share_prompts", [True, False])
def test_negatives_are_pooled_over_micro_batches_for_any_packing(judge, monkeypatch, share_prompts):
    made = tiny.record_gradients(monkeypatch, reward_model)
    fields = {"per_device_train_batch_size": 4, "share_prompts": share_prompts}
    rows = [
        train_reward_model(
            config(judge, micro_batch_tokens=budget, **fields), tiny.examples(4), views=views_of(3)
        ).history[0]
        for budget in (10_000, 100, 40)
    ]
    for row, recorder in zip(rows[1:], made[1:], strict=True):
        assert row == pytest.approx(rows[0], rel=1e-5)
        for ours, theirs in zip(recorder.steps[0], made[0].steps[0], strict=True):
            tiny.assert_close_gradients(ours, theirs)
    assert rows[0]["hidden_grad/views"] > 1e-3
    assert rows[0]["hidden_grad/pairs"] > 1e-3


def test_heads_and_critic_have_their_own_learning_rate(policy):
    cfg = config(policy, max_steps=3, learning_rate=1e-30, per_device_train_batch_size=4)
    history = train_reward_model(cfg, tiny.examples(4), views=views_of(3, view_learning_rate=0.1)).history
    still = train_reward_model(cfg, tiny.examples(4), views=views_of(3, view_learning_rate=1e-30)).history
    # The learning rate of the trunk is 1e-30, so view_learning_rate does not affect the ranking loss
    assert [row["loss"] for row in history] == pytest.approx([row["loss"] for row in still])
    assert history[0]["views/skl"] == still[0]["views/skl"]
    assert abs(history[2]["views/skl"] / still[2]["views/skl"] - 1) > 0.01


def test_views_teach_trunk_heads_and_critic_to_tell_prompts_apart(policy):
    cfg = config(policy, max_steps=60, per_device_train_batch_size=4, learning_rate=3e-3)
    views = views_of(8, views_per_step=8, view_width=32, view_learning_rate=1e-2, beta_end=0.01, mib_weight=1.0)
    jsd = [row["views/jsd"] for row in train_reward_model(cfg, tiny.examples(8), views=views).history]
    assert is_active(jsd)
    assert not is_active(jsd[:10])
    assert jsd[-1] > jsd[0] + 0.3  # measured: 0.6


def test_synthetic_pairs_are_pairs_like_those_of_the_dataset(judge):
    examples = tiny.examples(12)
    as_ids = tokenize_examples(examples[8:], tiny.tokenizer(), max_length=1024, fields=("chosen", "rejected")).examples
    cfg = config(judge, max_steps=-1, num_train_epochs=2, per_device_train_batch_size=4)
    mixed = train_reward_model(cfg, examples[:8], synthetic=as_ids)
    whole = train_reward_model(cfg, examples)
    assert len(mixed.history) == 6
    assert mixed.history == whole.history
    assert all(map(torch.equal, mixed.model.state_dict().values(), whole.model.state_dict().values()))
