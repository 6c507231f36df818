"""Tests of PsiPO on packs: against a textbook loop on padded tensors, against IPO, and against the closed form."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastrlhf.algorithms import dpo, psipo_groups, reference
from fastrlhf.algorithms.dpo import train_dpo
from fastrlhf.config import DPOConfig
from fastrlhf.data.packing import group, pack
from fastrlhf.models.forward import sequence_scores
from fastrlhf.models.loading import load_reward_model
from fastrlhf.types import Example
from tests import tiny

PROMPT = "w0 w28"
PREFERENCES = [[0.5, 0.9, 0.3], [0.1, 0.5, 0.8], [0.7, 0.2, 0.5]]  # a cycle, which no reward function can explain


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    return tiny.save_reward_model(tmp_path_factory.mktemp("reward"))


def config(model, **settings):
    fields = {"per_device_train_batch_size": 4, "max_steps": 1, "learning_rate": 1e-3, "progress": False}
    fields |= {"loss_type": "ipo", "psi_backend": "groupwise", "beta": 0.5}
    return DPOConfig(model_name_or_path=model, **fields | settings)


def scored_groups() -> list[Example]:
    """Groups of two, three and four responses, all different."""
    responses = ["w1 w2 w3", "w4", "w5 w6", "w7 w8 w9 w10"]
    return [
        Example(
            prompt=f"w{i} w11 w12", responses=responses[: 2 + i % 3], scores=[0.3, -1.0, 2.0, i / 7][: 2 + i % 3], row=i
        )
        for i in range(4)
    ]


def logprob(model, prompt: str, response: str) -> torch.Tensor:
    """Returns the log-prob of a response, computed from the full logits of a single sequence."""
    x, y = tiny.ids(prompt), [*tiny.ids(response), tiny.EOS]
    logits = model(torch.tensor([x + y])).logits[0, len(x) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(y)[:, None]).sum()


def textbook_loss(policy, reference, examples, tau: float, scale: float) -> torch.Tensor:
    """Returns the loss for Psi = identity, computed pair by pair. The g of a response is its mean preference over its
    group."""
    total = torch.zeros(())
    for example in examples:
        with torch.no_grad():
            start = torch.stack([logprob(reference, example.prompt, y) for y in example.responses])
        u = torch.stack([logprob(policy, example.prompt, y) for y in example.responses]) - start
        s = scale * torch.tensor(example.scores)
        g = torch.sigmoid(s[:, None] - s[None]).mean(1)
        pairs = list(itertools.combinations(range(len(u)), 2))
        total = total + sum((u[i] - u[j] - (g[i] - g[j]) / tau) ** 2 for i, j in pairs) / len(pairs)
    return total / len(examples)


def test_loss_gradient_and_metrics_are_those_of_the_textbook_loop(model, other, monkeypatch):
    made = tiny.record_gradients(monkeypatch, psipo_groups)
    examples = scored_groups()
    settings = {"ref_model_name_or_path": other, "micro_batch_tokens": 40, "score_scale": 0.7}
    [row] = train_dpo(config(model, **settings), examples).history
    policy, reference = (AutoModelForCausalLM.from_pretrained(path) for path in (model, other))
    loss = textbook_loss(policy, reference, examples, 0.5, 0.7)
    loss.backward()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    tiny.assert_close_gradients(made[0].steps[0][0], [p.grad for p in policy.parameters()])
    with torch.no_grad():
        best = [logprob(policy, e.prompt, e.responses[e.scores.index(max(e.scores))]).item() for e in examples]
        worst = [logprob(policy, e.prompt, e.responses[e.scores.index(min(e.scores))]).item() for e in examples]
    assert row["logps/chosen"] == pytest.approx(sum(best) / 4, rel=1e-5)
    assert row["logps/rejected"] == pytest.approx(sum(worst) / 4, rel=1e-5)
    lengths = [[len(tiny.ids(y)) + 1 for y in e.responses] for e in examples]
    assert row["num_unique_tokens"] == sum(3 + sum(group) for group in lengths)
    assert row["num_tokens"] == sum(3 * len(group) + sum(group) for group in lengths)


@pytest.mark.parametrize("change", [{"micro_batch_tokens": 20}, {"share_prompts": False}], ids=str)
def test_neither_micro_batches_nor_shared_prompts_change_a_gradient(model, other, monkeypatch, change):
    made = tiny.record_gradients(monkeypatch, psipo_groups)
    cfg, examples = config(model, ref_model_name_or_path=other), scored_groups()
    whole, changed = (train_dpo(c, examples).history[0] for c in (cfg, replace(cfg, **change)))
    tiny.assert_close_gradients(made[1].steps[0][0], made[0].steps[0][0], 1e-4)
    del whole["num_unique_tokens"], changed["num_unique_tokens"]
    assert changed == pytest.approx(whole, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("psi", ["identity", "clipped_logit"])
def test_a_group_of_two_is_a_pair_with_a_probability(model, other, monkeypatch, psi):
    theirs = tiny.record_gradients(monkeypatch, dpo)
    ours = tiny.record_gradients(monkeypatch, psipo_groups)
    examples = [
        replace(e, wins=3, num_labels=4, responses=[e.chosen, e.rejected], preferences=[[0.5, 0.7], [0.3, 0.5]])
        for e in tiny.examples(4)
    ]
    cfg = config(model, psi=psi, ref_model_name_or_path=other, length_norm="sum")
    # 3 wins of 4 labels, smoothed: (0.5 + 3) / (1 + 4) = 0.7, the probability in `preferences`
    pairs = replace(cfg, psi_backend="pairwise", label_source="counts", label_prior=0.5)
    by_pair, by_group = (train_dpo(c, examples).history[0] for c in (pairs, cfg))
    tiny.assert_close_gradients(ours[0].steps[0][0], theirs[0].steps[0][0])
    names = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "num_tokens")
    assert {name: by_group[name] for name in names} == pytest.approx({name: by_pair[name] for name in names}, rel=1e-5)


@pytest.mark.parametrize(("size", "psi"), [(2, "identity"), (3, "tests.algorithms.test_psipo:square")])
def test_training_on_groups_reaches_the_closed_form(model, size, psi):
    """Trains on all ways to draw `size` of three one-word responses, so that mu is uniform. The tolerance is 1e-3,
    because the targets g of a pair depend on its group. The gradient is therefore noisy, and Adam does not reach the
    exact optimum."""
    words = ["w3", "w4", "w5"]
    draws = enumerate(itertools.product(range(3), repeat=size))
    examples = [
        Example(
            prompt=PROMPT,
            responses=[words[a] for a in draw],
            preferences=[[PREFERENCES[a][b] for b in draw] for a in draw],
            row=i,
        )
        for i, draw in draws
    ]
    settings = {"beta": 0.2, "max_steps": 80, "lr_scheduler_type": "cosine", "learning_rate": 1e-2, "adam_beta2": 0.95}
    cfg = config(model, psi=psi, per_device_train_batch_size=len(examples), **settings)
    trained = train_dpo(cfg, examples).model
    reference = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        policy, start = (torch.stack([logprob(m, PROMPT, word) for word in words]) for m in (trained, reference))
    p = torch.tensor(PREFERENCES)
    g = (p if psi == "identity" else p**2).mean(1)
    expected = (start + g / 0.2).softmax(0)
    torch.testing.assert_close(policy.softmax(0), expected, rtol=0, atol=1e-3)
    assert (start.softmax(0) - expected).abs().max() > 0.1


@pytest.mark.parametrize("backend", ["pairwise", "groupwise"])
def test_a_reward_model_gives_the_probabilities(model, reward_model, backend):
    """For Psi = logit a target is a difference of scores divided by tau. At the first step the loss is the mean squared
    target, because the policy equals the reference."""
    examples = [
        replace(example, responses=[example.chosen, example.rejected], scores=[math.nan])
        for example in tiny.examples(4)
    ]
    scale = 0.5
    source = {"label_source": "reward_model", "reward_model_path": reward_model, "score_scale": scale}
    cfg = config(model, psi="logit", psi_backend=backend, micro_batch_tokens=60, **source)
    [row] = train_dpo(cfg, examples).history
    judge = load_reward_model(reward_model, pad_token_id=0)
    differences = []
    for example in examples:
        responses = [[*tiny.ids(y), tiny.EOS] for y in example.responses]
        with torch.no_grad():
            scores = sequence_scores(
                judge, pack(group(tiny.ids(example.prompt), responses, scored=False, share_prompt=False))
            )
        differences.append(scale * (scores[0] - scores[1]).item())
    assert row["loss"] == pytest.approx(sum((d / 0.5) ** 2 for d in differences) / 4, rel=1e-5)
    if backend == "groupwise":
        assert row["rewards/target_margins"] == pytest.approx(sum(map(abs, differences)) / 4, rel=1e-5)


def test_counts_are_smoothed_by_the_prior(model):
    examples = [replace(example, wins=3, num_labels=4) for example in tiny.examples(4)]
    cfg = config(model, psi_backend="pairwise", label_source="counts", label_prior=1.0)
    [row] = train_dpo(cfg, examples).history
    assert row["loss"] == pytest.approx(((4 / 6 - 0.5) / 0.5) ** 2, rel=1e-5)


def test_held_out_groups_are_evaluated(model):
    examples = scored_groups()
    result = train_dpo(config(model, max_steps=2, learning_rate=1e-6), examples, examples)
    assert result.final["eval_loss"] == pytest.approx(result.history[0]["loss"], rel=1e-2)
    assert set(result.final) >= {"eval_rewards/accuracies", "eval_rewards/target_margins", "eval_logps/chosen"}


def test_a_reference_with_permuted_groups_is_noticed_at_the_first_step(model, monkeypatch):
    compute = reference._precomputed
    examples = [replace(example, responses=example.responses[:2], scores=[1.0, 0.0]) for example in scored_groups()]
    monkeypatch.setattr(reference, "_precomputed", lambda *arguments: compute(*arguments).flip(0))
    with pytest.raises(ValueError, match=r"the first loss is .* equals its reference has 0\.213"):
        train_dpo(config(model), examples)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"psi": "logits"}, "^psi: 'logits' is unknown; give"),
        ({"psi": "logit", "psi_backend": "pairwise"}, "logit needs probabilities, and every label is hard"),
        ({"psi": "tests.algorithms.test_psipo:square"}, "^row 0: psi: .* at least 3 responses per prompt; got 2"),
    ],
    ids=str,
)
def test_keys_that_would_be_wrong_or_ignored_are_refused_before_the_run_starts(model, tmp_path, settings, message):
    examples = [replace(e, chosen="w1", rejected="w2") for e in scored_groups()]
    with pytest.raises(ValueError, match=message):
        train_dpo(config(model, output_dir=str(tmp_path / "run"), **settings), examples)
    assert not (tmp_path / "run").exists()


def test_groups_with_only_hard_labels_need_an_affine_psi(model):
    hard = [[0.5, 1.0], [0.0, 0.5]]
    examples = [Example(prompt=PROMPT, responses=["w3", "w4"], preferences=hard, row=i) for i in range(4)]
    with pytest.raises(ValueError, match="clipped_logit needs probabilities, and every label is hard"):
        train_dpo(config(model, psi="clipped_logit"), examples)
    assert train_dpo(config(model), examples).history[0]["loss"] == pytest.approx(1.0, rel=1e-5)  # (1 / (2 tau))^2


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({}, "^row 1 has neither preferences nor scores of its responses; add one of these columns"),
        ({"scores": [1.0]}, "^row 1: wrong_type: scores must be a list of 3 numbers"),
        ({"preferences": [[0.5] * 3] * 2}, "^row 1: wrong_type: preferences must be a list of 3 rows"),
    ],
)
def test_labels_from_python_are_checked_like_those_of_a_file(model, labels, message):
    first, second, *_ = scored_groups()
    with pytest.raises(ValueError, match=message):
        train_dpo(config(model), [first, replace(second, **{"scores": None, **labels})])


@pytest.mark.parametrize("responses", [["w3"], []])
def test_a_group_of_one_is_refused_by_its_row(model, responses):
    first, *_ = scored_groups()
    alone = replace(first, responses=responses, scores=[1.0] * len(responses), row=5)
    with pytest.raises(ValueError, match=r"row 5: a group needs at least two responses|no row is left|row 5 has no"):
        train_dpo(config(model), [first, alone])


def test_labels_of_a_file_that_nothing_reads_refuse_no_row(model, reward_model, tmp_path):
    rows = [{"prompt": e.prompt, "responses": e.responses, "scores": [1.0]} for e in scored_groups()]
    (tmp_path / "groups.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = config(model, dataset_name=str(tmp_path / "groups.jsonl"))
    judged = replace(cfg, label_source="reward_model", reward_model_path=reward_model)
    assert len(train_dpo(judged).history) == 1
    with pytest.raises(ValueError, match="4 wrong_type"):
        train_dpo(cfg)
