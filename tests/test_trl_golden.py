"""Compares losses, gradients and metrics with values of TRL 1.16 (PPO: 1.12) recorded by tests/golden/record_trl.py.
Texts and float32 weights are equal. TRL pads whole batches; fastrlhf packs sequences and splits them into
micro-batches, so sums have a different order. Reordering the rows of a batch changes TRL's own gradients by 2e-6.
"""

import json
from types import SimpleNamespace

import pytest
import torch

from fastrlhf.algorithms import dpo, experience, kto, ppo, reward_model, sft
from fastrlhf.algorithms.advantages import whiten
from fastrlhf.config import DPOConfig, KTOConfig, PPOConfig, RewardConfig, SFTConfig
from fastrlhf.data.tokens import tokenize_examples
from fastrlhf.types import Example, Rollout
from tests import tiny
from tests.golden import record_trl as recorded

GOLDEN = json.loads(recorded.FILE.read_text(encoding="utf-8"))
EXAMPLES = [
    Example(prompt=prompt, chosen=chosen, rejected=rejected, row=row)
    for row, (prompt, chosen, rejected) in enumerate(recorded.PAIRS)
]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    models = {
        "policy": recorded.causal_lm(recorded.POLICY),
        "reference": recorded.causal_lm(recorded.REFERENCE),
        "reward": recorded.reward_model(),
    }
    folders = {name: str(tmp_path_factory.mktemp(name)) for name in models}
    for name, model in models.items():
        model.save_pretrained(folders[name])
        tiny.tokenizer().save_pretrained(folders[name])
    return folders


def assert_same_gradients(model, gradients, golden):
    """Norms must agree within TOLERANCE. Dot products must agree within TOLERANCE times the norm, because their terms
    may cancel."""
    names = [name for name, _ in model.named_parameters()]
    ours = recorded.summary(zip(names, gradients, strict=True))
    assert ours.keys() == golden.keys()
    for name, (norm, dot) in golden.items():
        assert norm > 0, name
        assert ours[name][0] == pytest.approx(norm, rel=TOLERANCE), name
        assert ours[name][1] == pytest.approx(dot, abs=TOLERANCE * norm), name


def assert_same_metrics(ours, golden, names):
    expected = {name: golden[name] for name in names}
    assert {name: ours[name] for name in names} == pytest.approx(expected, rel=TOLERANCE, abs=1e-7)


def test_rows_are_tokenised_as_by_trl():
    """A response ends in exactly one EOS, which is added if the text has none. This also holds if TRL gets prompt and
    response as one text."""
    rows = tokenize_examples(EXAMPLES, tiny.tokenizer(), max_length=64, fields=("chosen", "rejected")).examples
    chosen = [row.prompt + row.chosen for row in rows]
    rejected = [row.prompt + row.rejected for row in rows]
    assert all(ids.count(tiny.EOS) == 1 and ids[-1] == tiny.EOS for ids in chosen + rejected)
    for case in ("sft", "sft_whole"):
        assert GOLDEN[case]["token_ids"] == chosen
    for case in ("reward", *recorded.PREFERENCE):
        assert GOLDEN[case]["token_ids"] == chosen + rejected


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("sft", {}),
        ("sft_whole", {"completion_only_loss": False}),
        ("reward", {}),
        ("dpo", {}),
        ("cdpo", {"label_smoothing": 0.1}),  # the comment in record_trl.py explains how TRL 1.16 computes it
        ("robust", {"loss_type": "robust", "label_smoothing": 0.1}),
        ("hinge", {"loss_type": "hinge", "beta": 1.0}),
        ("apo_zero", {"loss_type": "apo_zero", "beta": 0.3}),
        ("apo_down", {"loss_type": "apo_down", "beta": 0.3}),
        ("ipo", {"loss_type": "ipo", "beta": 0.2}),  # both use means over tokens, EOS included
    ],
)
def test_loss_gradient_and_metrics_are_those_of_trl(paths, monkeypatch, case, settings):
    golden, names = GOLDEN[case], ["loss", "num_tokens"]
    common = {"per_device_train_batch_size": len(EXAMPLES), "max_steps": 1, "micro_batch_tokens": 40, "progress": False}
    if case.startswith("sft"):
        config = SFTConfig(model_name_or_path=paths["policy"], response="chosen", **common, **settings)
        module, train = sft, sft.train_sft
    elif case == "reward":
        config = RewardConfig(model_name_or_path=paths["reward"], **common, **settings)
        module, train = reward_model, reward_model.train_reward_model
        names += ["accuracy", "margin", "mean_reward"]
    else:
        models = {"model_name_or_path": paths["policy"], "ref_model_name_or_path": paths["reference"]}
        config = DPOConfig(**models, **common, **settings)
        module, train = dpo, dpo.train_dpo
        names += [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")]
        names += ["logps/chosen", "logps/rejected"]

    made = tiny.record_gradients(monkeypatch, module)
    result = train(config, EXAMPLES)
    assert_same_metrics(result.history[0], golden["metrics"] | {"loss": golden["loss"]}, names)
    assert_same_gradients(result.model, made[0].steps[0][0], golden["gradients"])


@pytest.mark.parametrize("precomputed", [True, False])
def test_kto_is_that_of_trl(paths, monkeypatch, precomputed):
    golden = GOLDEN["kto"]
    by_row = {prompt: row for row, (prompt, *_) in enumerate(recorded.PAIRS)}
    rows = [{"prompt": x, "completion": y, "label": label} for x, y, label in recorded.KTO_ROWS]
    # fastrlhf shuffles these rows into the order of KTO_ROWS, which decides the mismatched responses of KTO's KL term
    rows.sort(key=lambda row: by_row[row["prompt"]])
    config = KTOConfig(
        model_name_or_path=paths["policy"],
        ref_model_name_or_path=paths["reference"],
        precompute_ref_log_probs=precomputed,
        **recorded.KTO,
        per_device_train_batch_size=len(rows),
        max_steps=1,
        micro_batch_tokens=40,
        progress=False,
    )
    made = tiny.record_gradients(monkeypatch, kto)
    result = kto.train_kto(config, rows)
    names = ["loss", "kl", "num_tokens", "rewards/margins"]
    names += [f"{name}/{kind}" for name in ("rewards", "logps") for kind in ("chosen", "rejected")]
    assert_same_metrics(result.history[0], golden["metrics"] | {"loss": golden["loss"]}, names)
    assert_same_gradients(result.model, made[0].steps[0][0], golden["gradients"])


def replay(case):
    """Returns an engine that returns TRL's responses, and changes the policy as if by earlier updates. A run copies its
    reference before it makes an engine, so the reference stays unchanged.
    """

    def rollout(prefix):
        golden = GOLDEN[case]["rollouts"][prefix.row]
        return Rollout(
            prefix=prefix,
            completion=golden["responses"],
            sampler_logprob=golden["logprobs"],
            ended=tiny.EOS in golden["responses"],
        )

    def make(config, policy, eos_token_id):
        recorded.with_formula_weights(policy, recorded.POLICY)
        return SimpleNamespace(generate=lambda prefixes: [rollout(prefix) for prefix in prefixes])

    return make


def bessel_whiten(values, mask, *, shift_mean=True):
    """Divides by the sample standard deviation (n - 1), like TRL; fastrlhf uses the population standard deviation
    (n)."""
    whitened, count = whiten(values, mask, shift_mean=shift_mean), mask.sum()
    assert mask.all()
    mean = whitened.mean()
    return mean + (whitened - mean) * ((count - 1) / count).sqrt()


def run_update(paths, monkeypatch, case):
    """Runs one update on TRL's rollouts.

    Returns (result, optimiser, field of Experience -> (our values, TRL's values), [N, response_length] each).
    """
    made = tiny.record_gradients(monkeypatch, ppo, recorded.PPO_LEARNING_RATE)
    seen = tiny.record_experience(monkeypatch)
    config = PPOConfig(
        model_name_or_path=paths["reference"],
        reward_model_path=paths["reward"],
        per_device_train_batch_size=len(recorded.PROMPTS),
        max_steps=1,
        num_ppo_epochs=recorded.NUM_PPO_EPOCHS,
        max_length=32,
        micro_batch_tokens=40,
        progress=False,
        **recorded.ON_POLICY[case],
    )
    prompts = [Example(prompt=prompt, row=row) for row, prompt in enumerate(recorded.PROMPTS)]
    result = ppo.train_ppo(config, prompts, engine=replay(case))
    [(ours, rows)] = seen
    beside = {
        name: (
            getattr(ours, name).view(len(rows), -1),
            torch.tensor([GOLDEN[case]["rollouts"][row][theirs] for row in rows]),
        )
        for name, theirs in (
            ("sampler_logprob", "logprobs"),
            ("value", "values"),
            ("advantage", "advantages"),
            ("returns", "returns"),
        )
    }
    return result, made[0], beside


@pytest.mark.parametrize("case", recorded.ON_POLICY)
def test_a_ppo_update_is_that_of_trl(paths, monkeypatch, case):
    """Trains two passes over one batch; in the second pass some ratios and some values are clipped. The test does not
    compare metrics that TRL computes differently: TRL's objective/scores include the penalty, policy/approxkl_avg is a
    different estimate, and policy/entropy_avg is a mean over the passes.
    """
    monkeypatch.setattr(experience, "whiten", bessel_whiten)
    result, optimizer, beside = run_update(paths, monkeypatch, case)
    for ours, theirs in beside.values():
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)

    golden = GOLDEN[case]
    names = [f"objective/{name}" for name in ("kl", "entropy", "non_score_reward", "rlhf_reward")]
    names += ["loss/policy_avg", "loss/value_avg", "policy/clipfrac_avg", "val/clipfrac_avg", "val/ratio"]
    names += ["val/num_eos_tokens", "episode"]
    assert_same_metrics(result.history[0], golden["metrics"], names)
    # TRL gives means over the passes, and the first pass clips nothing
    for name in ("policy/clipfrac_avg", "val/clipfrac_avg"):
        assert 0 < golden["metrics"][name] < 0.5

    assert len(optimizer.steps) == len(golden["steps"]) == recorded.NUM_PPO_EPOCHS
    for ours, theirs in zip(optimizer.steps, golden["steps"], strict=True):
        assert_same_gradients(result.model, ours[0], theirs["policy"])
        assert_same_gradients(result.value_model, ours[1], theirs["critic"])


def test_advantages_differ_from_trl_by_the_variance_of_a_population(paths, monkeypatch):
    _, _, beside = run_update(paths, monkeypatch, "ppo")
    ours, theirs = beside["advantage"]
    count = theirs.numel()
    torch.testing.assert_close(ours, theirs * (count / (count - 1)) ** 0.5, rtol=TOLERANCE, atol=TOLERANCE)
