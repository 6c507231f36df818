"""Tests of the losses of `fastrlhf dpo`, selected by name."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from fastrlhf.algorithms import dpo, pair_losses
from fastrlhf.algorithms.dpo import train_dpo
from fastrlhf.algorithms.pair_losses import pair_function
from fastrlhf.config import DPOConfig
from fastrlhf.config.offline import PAIR_LOSSES
from fastrlhf.data.packing import pair
from tests import tiny
from tests.algorithms.test_dpo import config, padded_log_ratios


def softplus_loss(chosen, rejected):
    """A user-defined loss: DPO at beta 0.3, plus a penalty if the log-ratio of the chosen response is negative."""
    return -F.logsigmoid(0.3 * (chosen - rejected)) + F.relu(-chosen)


def no_gradient(chosen, rejected):
    return (rejected - chosen).detach()


def one_number(chosen, rejected):
    return (rejected - chosen).mean()


def textbook_loss(cfg, u, mean, nll):
    """Computes the loss of `cfg` from u [B, 2], the log-ratios (or log-probs) of the responses, each a sum or mean over
    tokens."""
    chosen, rejected = (mean if cfg.loss_type in ("simpo", "orpo") else u).unbind(1)
    return {
        "apo_zero": lambda: 1 - (cfg.beta * chosen).sigmoid() + (cfg.beta * rejected).sigmoid(),
        "apo_down": lambda: (cfg.beta * chosen).sigmoid() + 1 - (cfg.beta * (chosen - rejected)).sigmoid(),
        "simpo": lambda: -F.logsigmoid(cfg.beta * (chosen - rejected) - cfg.simpo_gamma),
        "cpo": lambda: -F.logsigmoid(cfg.beta * (chosen - rejected)) + nll,
        "orpo": lambda: nll - cfg.beta * F.logsigmoid(torch.logit(chosen.exp()) - torch.logit(rejected.exp())),
        "sigmoid": lambda: -F.logsigmoid(cfg.beta * (chosen - rejected)),
        f"{__name__}:softplus_loss": lambda: softplus_loss(chosen, rejected),
    }[cfg.loss_type]().mean()


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "apo_zero", "beta": 0.4},
        {"loss_type": "apo_down", "beta": 0.4},
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.3},
        {"loss_type": "cpo"},
        {"loss_type": "orpo", "beta": 0.5},
        {"loss_type": "sigmoid", "reference_free": True},
        {"loss_type": f"{__name__}:softplus_loss"},
    ],
    ids=str,
)
def test_loss_and_gradient_are_those_of_the_padded_textbook_loop(model, other, monkeypatch, settings):
    made = tiny.record_gradients(monkeypatch, dpo)
    examples = tiny.examples(8)
    cfg = config(model, micro_batch_tokens=80, **settings)
    if cfg.has_reference:
        cfg = config(model, micro_batch_tokens=80, ref_model_name_or_path=other, **settings)
    [row] = train_dpo(cfg, examples).history
    policy = AutoModelForCausalLM.from_pretrained(model)
    reference = AutoModelForCausalLM.from_pretrained(other) if cfg.has_reference else None
    u, mean = (padded_log_ratios(policy, reference, examples, m) for m in (False, True))
    lengths = [len([*tiny.ids(example.chosen), tiny.EOS]) for example in examples]
    loss = textbook_loss(cfg, u, mean, nll=-u[:, 0].sum() / sum(lengths))
    loss.backward()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    tiny.assert_close_gradients(made[0].steps[0][0], [p.grad for p in policy.parameters()])
    assert row["rewards/margins"] == pytest.approx(cfg.beta * (u[:, 0] - u[:, 1]).mean().item(), rel=1e-4)


def test_the_margin_of_a_pair_adds_to_the_gamma_of_simpo():
    cfg = DPOConfig(loss_type="simpo", beta=2.0, simpo_gamma=0.3, margin_scale=1.0)
    pairs = pair_losses.Pairs(trees=[(), ()], label_prob=None, target=None, margin=torch.tensor([0.5, -1.0]))
    logprob, cu_rows = torch.tensor([-1.0, -2.0, -1.5, -2.5]), torch.arange(5)
    loss = pair_losses.loss_of_pairs(cfg, "simpo", logprob, None, cu_rows, pairs, 2).loss
    z = torch.tensor([2.0 - 0.3 - 0.5, 2.0 - 0.3 + 1.0])
    assert loss.item() == pytest.approx(-F.logsigmoid(z).mean().item(), rel=1e-6)


def test_cpo_and_orpo_by_name_equal_the_sums_of_their_terms():
    assert DPOConfig(loss_type="orpo").losses == ("orpo", "sft")
    assert DPOConfig(loss_type="cpo").losses == ("cpo", "sft")
    assert DPOConfig(loss_type=("orpo",)).losses == ("orpo",)
    assert not DPOConfig(loss_type="orpo").has_reference
    assert DPOConfig(loss_type=("sigmoid", "sft")).has_reference


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "kto"}, r"loss_type: must be one of .* \(KTO is a separate command, fastrlhf kto"),
        ({"loss_type": ("sigmoid", "simpo")}, "reference_free: must be true when simpo and sigmoid are added up"),
        ({"loss_type": "orpo", "reference_free": True}, "reference_free: must be false when loss_type is orpo"),
        ({"loss_type": "simpo", "length_norm": "sum"}, "length_norm: must be auto or mean for simpo"),
        ({"loss_type": "simpo", "ref_cache_dir": "x"}, "ref_cache_dir: must be '' when no loss has a reference"),
        ({"loss_type": "apo_zero", "margin_scale": 1.0}, "margin_scale: must be 0 when loss_type is apo_zero"),
        ({"loss_type": "apo_down", "label_smoothing": 0.1}, "label_smoothing: must be 0 when loss_type is apo_down"),
        ({"loss_type": "orpo", "label_source": "counts"}, "label_source: must be data when loss_type is orpo"),
        ({"simpo_gamma": 1.0}, "simpo_gamma: must be 0.5 when loss_type is not simpo"),
        ({"loss_type": "orpo", "loss_weights": (1.0,)}, "loss_weights: must be 2 numbers, one for each of orpo, sft"),
        ({"loss_type": "ipo", "psi": "logit", "reference_free": True}, "reference_free: must be false when psi is"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DPOConfig(**settings)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.py:loss", "loss_type: no file 'missing.py'"),
        (f"{__name__}:no_gradient", "gives a loss without a gradient"),
        (f"{__name__}:one_number", "must give a finite loss for every pair; a trial call"),
        (f"{__name__}:textbook_loss", "failed on a trial call with two pairs: TypeError"),
    ],
)
def test_an_invalid_loss_function_is_refused_before_a_model_is_loaded(model, monkeypatch, name, message):
    monkeypatch.setattr(dpo, "policy_or_given", None)
    with pytest.raises(ValueError, match=message):
        train_dpo(config(model, loss_type=name), tiny.examples(8))


@pytest.mark.parametrize("norm", ["sum", "mean", "pair_mean"])
def test_a_user_defined_loss_divides_log_ratios_as_pair_loss_does(norm):
    cfg = DPOConfig(loss_type=(f"{__name__}:softplus_loss", "sigmoid"), beta=0.3, length_norm=norm)
    pairs = pair_losses.Pairs(trees=[(), ()], label_prob=None, target=None, margin=None)
    logprob, cu_rows = torch.tensor([0.5, 1.0, 0.25, 2.0, 1.0, 0.5, 0.5]), torch.tensor([0, 2, 3, 4, 7])
    ours, plain = (pair_losses.loss_of_pairs(cfg, name, logprob, None, cu_rows, pairs, 2).loss for name in cfg.losses)
    # The log-ratios of the chosen responses are positive, so the penalty of softplus_loss is zero
    assert ours.item() == pytest.approx(plain.item(), rel=1e-6)
    assert pair_function(cfg.functions[0]) is pair_function(cfg.functions[0])


def test_the_first_loss_may_differ_only_by_rounding():
    metrics = {"logprob_chosen": -150.0, "logprob_rejected": -250.0}
    cfg, pairs = (
        DPOConfig(beta=0.1, dtype="float32"),
        pair_losses.Pairs(trees=[()], label_prob=None, target=None, margin=None),
    )
    pair_losses.check_first_loss(cfg, pairs, metrics | {"loss/sigmoid": math.log(2) + 0.5 * 0.1 * 3e-5 * 400})
    with pytest.raises(ValueError, match=r"the first sigmoid loss is 0.694147"):
        pair_losses.check_first_loss(cfg, pairs, metrics | {"loss/sigmoid": math.log(2) + 1e-3})
    with pytest.raises(ValueError, match="the first sigmoid loss is nan"):
        pair_losses.check_first_loss(cfg, pairs, metrics | {"loss/sigmoid": math.nan})


@pytest.mark.parametrize("length_norm", ["sum", "mean"])
def test_the_target_of_ipo_is_reported_per_token_and_per_response(length_norm):
    cfg = DPOConfig(loss_type="ipo", beta=0.1, label_smoothing=0.1, length_norm=length_norm)
    tree = pair([3], [4, 5, 1], [4, 1, 1, 1, 1], scored=True, share_prompt=True)
    text = pair_losses.describe_target(cfg, pair_losses.Pairs(trees=[tree], label_prob=None, target=None, margin=None))
    # IPO's target is (1 - 2 * 0.1) / (2 * 0.1) = 4 nats: per token with "mean", else per response (4 tokens on average)
    per_token, per_response = (4, 16) if length_norm == "mean" else (1, 4)
    assert f"{per_token} nats per token, {per_response} per response of 4.0 tokens" in text


def test_auto_is_the_mean_for_ipo_simpo_and_orpo_and_the_sum_elsewhere():
    norms = {loss: DPOConfig().length_norm_of(loss) for loss in PAIR_LOSSES}
    assert {loss for loss, norm in norms.items() if norm == "mean"} == {"ipo", "simpo", "orpo"}
    assert DPOConfig(length_norm="sum").length_norm_of("ipo") == "sum"
    for soft in ({"label_source": "counts"}, {"loss_type": "ipo", "psi": "logit"}):
        assert DPOConfig(**soft).length_norm_of("ipo") == "sum"
