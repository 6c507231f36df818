"""Tests of the rewards of single tokens, with values computed by hand. Most tests use two episodes:

episode 0   one reset token (compat "reference"), then 3 5 EOS and one token after the EOS
episode 1   4 3 6, truncated at the length limit
"""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from fastrlhf.config import PPOConfig, RTOConfig
from fastrlhf.rewards.functions import RewardFunctions
from fastrlhf.rewards.terms import (
    Episodes,
    Rewards,
    Term,
    moved_to,
    reward_metrics,
    sentence_end_ids,
    shaped,
)
from fastrlhf.types import Prefix, Rollout
from fastrlhf_kernels import gae
from tests import tiny
from tests.golden import record_group_losses as recorded

RATIO = torch.tensor([9.0, 1.0, -2.0, 0.5, 9.0, 0.25, 3.0, -0.25])  # nats; the tokens with 9 must get no reward


def rollout(completion: list[int], row: int, num_reset: int = 0) -> Rollout:
    return Rollout(
        prefix=Prefix(token_ids=[7] * (2 + num_reset), num_reset=num_reset, row=row, episode=row),
        completion=completion,
        sampler_logprob=[-1.0] * len(completion),
        ended=tiny.EOS in completion,
    )


EPISODES = Episodes(
    rollouts=[rollout([3, 5, tiny.EOS, 9], 10, num_reset=1), rollout([4, 3, 6], 11)],
    cu_rows=torch.tensor([0, 5, 8], dtype=torch.int32),
    sampled=torch.tensor([0, 1, 1, 1, 1, 1, 1, 1]).bool(),
    earns=torch.tensor([0, 1, 1, 1, 0, 1, 1, 1]).bool(),
    end=torch.tensor([3, 7]),
    missing_eos=torch.tensor([False, True]),
    score=torch.tensor([2.0, -3.0]),
    token=torch.tensor([7, 3, 5, tiny.EOS, 9, 4, 3, 6]),
    logprob=torch.tensor([-1.0, -2, -3, -1, -2, -3, -1, -2]),
    reference_logprob=torch.tensor([-2.0, -2, -1, -2, -2, -1, -2, -2]),
    dpo_log_ratio=None,
)
DPO = replace(EPISODES, dpo_log_ratio=RATIO)


def terms(episodes: Episodes = EPISODES, functions=None, **settings) -> dict[str, Term]:
    dpo_model_path = "" if episodes.dpo_log_ratio is None else "dpo"
    config = PPOConfig(dpo_model_path=dpo_model_path, **settings)
    return Rewards(config=config, functions=RewardFunctions(functions=functions or {})).terms(episodes)


def rewards(episodes: Episodes = EPISODES, functions=None, **settings) -> dict[str, list[float]]:
    found = terms(episodes, functions, **settings)
    assert {term.reward.dtype for term in found.values()} == {torch.float32}
    return {name: term.reward.tolist() for name, term in found.items()}


def test_ppo_earns_the_score_at_the_last_valid_token_and_pays_kl_at_every_row():
    assert rewards(kl_coef=0.5) == {
        "score": [0, 0, 0, 2, 0, 0, 0, -3],
        "kl": [-0.5, 0, 1, -0.5, 0, 1, -0.5, 0],
    }


def test_a_missing_eos_costs_a_penalty_or_replaces_the_score():
    penalised = rewards(missing_eos_penalty=1.5)
    assert penalised["score"] == [0, 0, 0, 2, 0, 0, 0, -3]
    assert penalised["missing_eos"] == [0, 0, 0, 0, 0, 0, 0, -1.5]
    assert list(penalised) == ["score", "missing_eos", "kl"]
    assert rewards(missing_eos_score=-1.0)["score"] == [0, 0, 0, 2, 0, 0, 0, -1]
    assert rewards(missing_eos_score=0.0, score_coef=3.0)["score"] == [0, 0, 0, 6, 0, 0, 0, 0]


def test_a_truncated_response_earns_only_token_rewards():
    cut = replace(DPO, goes_on=DPO.missing_eos)
    functions = {"whole": lambda _: 7.0, "tokens": lambda r: [1.0] * len(r.completion)}
    found, ending = (rewards(episodes, functions, length_coef=0.5) for episodes in (cut, DPO))
    assert found.pop("score") == [0, 0, 0, 2, 0, 0, 0, 0]
    assert found.pop("whole") == [0, 0, 0, 7, 0, 0, 0, 0]
    assert found == {name: ending[name] for name in ("kl", "dpo", "length", "tokens")}


def test_normalisers_count_no_score_and_no_number_that_is_not_paid():
    """A truncated response gets neither its score (-3) nor its function reward (100), so these must not change the
    running means. The scores that count are 2 and then 4, which is one standard deviation above their mean.
    """
    run = Rewards(config=PPOConfig(score_norm="running", reward_function_norm="running", reward_function_clip=0.5))
    run.functions = RewardFunctions(functions={"number": lambda r: 2.0 if r.ended else 100.0})
    for score, expected in ((2.0, 0.0), (4.0, 1.0)):
        cut = replace(EPISODES, goes_on=EPISODES.missing_eos, score=torch.tensor([score, -3.0]))
        found = run.terms(cut)
        assert found["score"].reward.tolist() == pytest.approx([0, 0, 0, expected, 0, 0, 0, 0])
        assert not found["number"].reward.any()
    all_cut = run.terms(replace(EPISODES, goes_on=torch.tensor([True, True])))
    assert not all_cut["score"].reward.any()
    assert all_cut["number"].metrics["reward/number_clipped"] == 0


def test_the_score_is_weighted_after_clipping_and_the_clipped_share_is_reported():
    found = terms(score_clip=2.5, score_coef=2.0)["score"]
    assert found.reward.tolist() == [0, 0, 0, 4, 0, 0, 0, -5]
    assert {name: value.item() for name, value in found.metrics.items()} == {"reward/score_clipped": 0.5}
    assert terms()["score"].metrics == {}


def test_running_scores_are_standardised_over_all_that_the_run_has_seen():
    run = Rewards(config=PPOConfig(score_norm="running"))
    batches = [np.array([2.0, -3.0]), np.array([10.0, 1000.0]), np.array([4.0, 4.0])]
    for i, batch in enumerate(batches):
        seen = np.concatenate(batches[: i + 1])
        found = run.terms(replace(EPISODES, score=torch.tensor(batch).float()))["score"].reward[[3, 7]]
        np.testing.assert_allclose(found, (batch - seen.mean()) / seen.std(), rtol=1e-6)
    constant = Rewards(config=PPOConfig(score_norm="running"))
    assert constant.terms(replace(EPISODES, score=torch.tensor([5.0, 5.0])))["score"].reward.abs().max() == 0


@pytest.mark.parametrize("scale", [0.5, 0.0, -2.0])
def test_sampled_tokens_up_to_the_eos_earn_the_scaled_log_ratio_and_no_other_row_does(scale):
    found = rewards(DPO, dpo_reward_scale=scale)
    assert found.pop("dpo") == [scale * x for x in (0, 1, -2, 0.5, 0, 0.25, 3, -0.25)]
    assert found == rewards()
    infinite = replace(DPO, dpo_log_ratio=torch.where(DPO.earns, RATIO, -torch.inf))
    assert rewards(infinite, dpo_reward_scale=scale)["dpo"] == rewards(DPO, dpo_reward_scale=scale)["dpo"]


def test_the_clip_comes_after_the_scale_and_its_share_is_of_the_tokens_that_earn():
    found = terms(DPO, dpo_reward_scale=-2.0, dpo_reward_clip=1.5)["dpo"]
    assert found.reward.tolist() == [0, -1.5, 1.5, -1, 0, -0.5, -1.5, 0.5]
    told = {name: value.item() for name, value in found.metrics.items()}
    assert told == {
        "reward/dpo_clipped": 3 / 6,
        "rto/token_reward_mean": pytest.approx(-2.5 / 6),
        "rto/abs_sum": 6.5 / 2,
    }
    assert "reward/dpo_clipped" not in terms(DPO)["dpo"].metrics


def test_rs_subtracts_the_clipped_rewards():
    """Shaping "rs" must subtract the sum of the clipped log-ratios, so that token rewards do not change the return of a
    response."""
    found = terms(DPO, dpo_reward_scale=1.0, dpo_reward_clip=1.5, reward_shaping="rs")["dpo"]
    assert found.reward.tolist() == [0, 1, -1.5, 0.5, 0, 0.25, 1.5, -1.75]
    assert found.metrics["reward/dpo_clipped"] == 2 / 6


@pytest.mark.parametrize(
    ("shaping", "expected"),
    [
        ("token", [0, 1, -2, 0.5, 0, 0.25, 3, -0.25]),
        ("sentence", [0, 1, 0, -1.5, 0, 0, 3.25, -0.25]),  # token 3 ends a sentence
        ("eos", [0, 0, 0, -0.5, 0, 0, 0, 3]),
        ("rs", [0, 1, -2, 1, 0, 0.25, 3, -3.25]),
        ("none", [0, 0, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_the_five_shapings(shaping, expected):
    config = PPOConfig(dpo_model_path="dpo", dpo_reward_scale=1.0, reward_shaping=shaping)
    found = Rewards(config=config, sentence_ends=torch.tensor([3, 9])).terms(DPO)["dpo"]
    assert found.reward.tolist() == expected
    assert found.metrics["rto/abs_sum"] == 3.5  # a sum over the tokens, independent of the shaping


def ragged(seed: int = 0):
    """Draws token rewards for 40 episodes of 1 to 9 tokens. Returns (rewards, cu_rows, episode ends, sentence ends)."""
    draw = np.random.default_rng(seed)
    cu_rows = np.cumsum([0, *draw.integers(1, 10, 40)])
    ends = torch.zeros(cu_rows[-1], dtype=torch.bool)
    ends[cu_rows[1:] - 1] = True
    token = torch.from_numpy(draw.normal(size=cu_rows[-1]))
    return token, torch.from_numpy(cu_rows).int(), ends, ends | torch.from_numpy(draw.random(cu_rows[-1]) < 0.3)


@pytest.mark.parametrize("limit", [0.0, 0.7])
def test_every_shaping_keeps_the_total_and_rs_makes_it_zero_clipped_or_not(limit):
    token, cu_rows, ends, sentence_ends = ragged()
    token = token.clamp(-limit, limit) if limit else token
    totals = torch.stack([part.sum() for part in token.split(cu_rows.diff().tolist())])
    for shaping in ("token", "sentence", "eos", "rs"):
        paid = shaped(token, shaping, ends, sentence_ends)
        found = torch.stack([part.sum() for part in paid.split(cu_rows.diff().tolist())])
        torch.testing.assert_close(found, totals * (shaping != "rs"))
    moved = moved_to(token, sentence_ends)
    assert not moved[~sentence_ends].any()
    assert moved.sign().ne(0).sum() > ends.sum()  # sentences also end within responses


def test_with_lambda_1_rs_and_none_differ_by_the_potential_of_the_state():
    """Checks that A_rs - A_none = -(sum of the token rewards before the state). This difference depends only on the
    state, like a baseline, so for lambda 1 shaping does not change the expected gradient.
    """
    token, cu_rows, ends, sentence_ends = ragged()
    draw = torch.Generator().manual_seed(1)
    score, value = (torch.randn(len(token), generator=draw) for _ in range(2))
    score = torch.where(ends, score, 0.0)
    potential = torch.cat([part.cumsum(0) - part for part in token.split(cu_rows.diff().tolist())]).float()
    advantages = {
        shaping: {
            lam: gae(score + shaped(token.float(), shaping, ends, sentence_ends), value, cu_rows, gamma=1.0, lam=lam)[0]
            for lam in (1.0, 0.9)
        }
        for shaping in ("rs", "none")
    }
    torch.testing.assert_close(advantages["rs"][1.0], advantages["none"][1.0] - potential, rtol=1e-5, atol=1e-5)
    assert (advantages["rs"][0.9] - advantages["none"][0.9] + potential).abs().max() > 0.1


def test_normalisers_of_token_rewards_count_earning_tokens_over_all_batches():
    run = Rewards(config=PPOConfig(dpo_model_path="dpo", dpo_reward_norm="running", dpo_reward_scale=0.5))
    earned, seen = RATIO[DPO.earns], []
    for factor in (1.0, 3.0):
        seen += (factor * earned).tolist()
        found = run.terms(replace(DPO, dpo_log_ratio=factor * RATIO))["dpo"].reward
        expected = 0.5 * (factor * earned.numpy() - np.mean(seen)) / np.std(seen)
        np.testing.assert_allclose(found[DPO.earns], expected, rtol=1e-6)
        assert not found[~DPO.earns].any()


def test_what_a_function_gives_is_normalised_over_the_rows_it_pays_and_then_clipped():
    """A reward for a whole response counts as one row; token rewards count as one row per token, up to the EOS. Every
    function has its own running mean and standard deviation.
    """
    functions = {
        "mixed": lambda r: 10.0 if r.ended else [1.0, 2.0, 3.0],
        "tokens": lambda r: [float(token) for token in r.completion],
    }
    found = terms(functions=functions, reward_function_norm="running", reward_function_clip=1.2)
    paid = {"mixed": ([3, 5, 6, 7], [10.0, 1, 2, 3]), "tokens": ([1, 2, 3, 5, 6, 7], [3.0, 5, tiny.EOS, 4, 3, 6])}
    for name, (rows, given) in paid.items():
        scaled = (np.array(given) - np.mean(given)) / np.std(given)
        expected = np.zeros(8)
        expected[rows] = scaled.clip(-1.2, 1.2)
        np.testing.assert_allclose(found[name].reward, expected, rtol=1e-6, atol=1e-7)
        assert found[name].metrics[f"reward/{name}_clipped"] == pytest.approx((abs(scaled) > 1.2).mean())
    plain = terms(functions=functions)["mixed"].metrics  # reward sums of the responses: 10 and 1 + 2 + 3 = 6
    assert {name: value.item() for name, value in plain.items()} == {
        "rewards/mixed/mean": 8.0,
        "rewards/mixed/std": pytest.approx(8**0.5),
    }


def test_python_integers_are_accepted_as_rewards():
    assert rewards(missing_eos_penalty=1, length_coef=2) == rewards(missing_eos_penalty=1.0, length_coef=2.0)


def test_length_costs_every_token_that_earns():
    assert rewards(length_coef=0.5)["length"] == [0, -0.5, -0.5, -0.5, 0, -0.5, -0.5, -0.5]
    assert "length" not in rewards()


def test_a_function_gives_a_number_at_the_end_or_one_per_sampled_token():
    def mixed(rollout):
        return len(rollout.completion) if rollout.ended else [1.0, 2.0, 3.0]

    found = rewards(functions={"mixed": mixed, "array": lambda rollout: np.array(rollout.completion) / 2})
    assert found["mixed"] == [0, 0, 0, 4, 0, 1, 2, 3]
    assert found["array"] == [0, 1.5, 2.5, 0.5, 0, 2, 1.5, 3]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1.0, 2.0], r"'f': the response to row 10 has 4 tokens and gets rewards of shape \(2,\)"),
        (float("nan"), "'f': the response to row 10 gets nan"),
        ([0.0, float("inf"), 0.0, 0.0], "'f': the response to row 10 gets inf"),
        ("good", "'f': the response to row 10 gets 'good'; return one number, one per token, or None"),
    ],
)
def test_invalid_rewards_of_a_function_are_reported_with_their_row(given, message):
    with pytest.raises(ValueError, match=message):
        terms(functions={"f": lambda _: given})


def test_every_reward_term_is_logged_with_its_share():
    cu_rows = torch.tensor([0, 2, 3])
    found = reward_metrics(
        {
            "score": Term(reward=torch.tensor([0.0, 2.0, -4.0])),
            "dpo": Term(reward=torch.tensor([3.0, -2.0, 1.0]), metrics={"rto/abs_sum": torch.tensor(3.0)}),
        },
        cu_rows,
    )
    assert {name: value.item() for name, value in found.items()} == {
        "reward/score": -1.0,
        "reward/score_share": 6 / 12,
        "reward/dpo": 1.0,
        "reward/dpo_share": 6 / 12,
        "rto/abs_sum": 3.0,
        "rto/share_of_return": 2 / 8,  # per episode: dpo sums 1, 1 and scores 2, -4; (1 + 1) / (2 + 4 + 1 + 1)
        "rto/return_to_score": pytest.approx(2 / 6),
    }
    silent = reward_metrics({"score": Term(reward=torch.zeros(3))}, cu_rows)
    assert {name: value.item() for name, value in silent.items()} == {"reward/score": 0.0, "reward/score_share": 0.0}


def test_token_rewards_that_outweigh_the_score_are_reported_once(caplog):
    caplog.set_level(logging.WARNING)
    run = Rewards(config=RTOConfig())
    run.warn({"rto/return_to_score": 0.9})
    assert not caplog.messages
    run.warn({"rto/return_to_score": 2.5})
    run.warn({"rto/return_to_score": 3.5})
    [message] = caplog.messages
    assert "2.5 times its score; lower dpo_reward_scale" in message
    Rewards(config=RTOConfig(score_coef=0.0)).warn({"rto/return_to_score": 1e9})  # scores are not used: no warning
    assert len(caplog.messages) == 1


def test_sentences_end_at_tokens_whose_text_ends_a_sentence():
    words = ["<eos>", "a", "b.", "c! ", "d?", "e\n\nf", "3.5", "...", ",", '."']
    base = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<eos>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, eos_token="<eos>")
    assert [words[i] for i in sentence_end_ids(tokenizer).tolist()] == ["b.", "c! ", "d?", "e\n\nf", "..."]
    with pytest.raises(ValueError, match=r"^reward_shaping: no token of this vocabulary ends a sentence"):
        sentence_end_ids(tiny.tokenizer())


def test_the_moments_of_a_term_continue_from_a_saved_state():
    config = PPOConfig(score_norm="running")
    first, whole = (replace(EPISODES, score=torch.tensor(values)) for values in ([2.0, -3.0], [10.0, 1000.0]))
    run, resumed, new = (Rewards(config=config) for _ in range(3))
    assert run.state_dict() == {"warned": False}
    run.terms(first)
    resumed.load_state_dict(run.state_dict())
    expected = run.terms(whole)["score"].reward
    assert torch.equal(resumed.terms(whole)["score"].reward, expected)
    new.load_state_dict({"warned": True})
    assert not torch.equal(new.terms(whole)["score"].reward, expected)
    assert new.state_dict()["warned"]


@pytest.mark.parametrize(
    ("limit", "buffer", "penalties"),
    [
        (4, 2, [1.0, 0.5]),  # lengths 4 (one reset token, 3 5 EOS) and 3; penalty (length - (4 - 2)) / 2
        (4, 1, [1.0, 0.0]),
        (5, 4, [0.75, 0.5]),
        (9, 2, [0.0, 0.0]),
        (3, 1, [1.0, 1.0]),  # the penalty is at most 1
    ],
)
def test_the_soft_overlong_punishment_by_hand(limit, buffer, penalties):
    """The penalty is that of DAPO's eq. 13, times overlong_penalty 2, at the last valid token of each response."""
    found = terms(response_length=limit, overlong_buffer=buffer, overlong_penalty=2.0)["overlong"].reward
    assert found[[3, 7]].tolist() == [-2 * penalty for penalty in penalties]
    assert found.count_nonzero() == sum(penalty > 0 for penalty in penalties)


def test_the_soft_overlong_punishment_is_that_of_verl():
    """Compares with rewards of verl for responses with score 0, recorded by tests/golden/record_group_losses.py."""
    expected = json.loads(recorded.FILE.read_text(encoding="utf-8"))["verl"]["overlong"]
    lengths, setting = torch.tensor(recorded.OVERLONG_LENGTHS), recorded.OVERLONG
    num = int(lengths.sum())
    episodes = Episodes(
        rollouts=[rollout([4] * length, row) for row, length in enumerate(recorded.OVERLONG_LENGTHS)],
        cu_rows=F.pad(lengths.cumsum(0), (1, 0)).int(),
        sampled=torch.ones(num, dtype=torch.bool),
        earns=torch.ones(num, dtype=torch.bool),
        end=lengths.cumsum(0) - 1,
        missing_eos=torch.ones(len(lengths), dtype=torch.bool),
        score=torch.zeros(len(lengths)),
        token=torch.full((num,), 4),
        logprob=torch.zeros(num),
        reference_logprob=torch.zeros(num),
        dpo_log_ratio=None,
    )
    keys = {"overlong_buffer": setting["buffer"], "overlong_penalty": setting["penalty"]}
    found = terms(episodes, response_length=setting["limit"], **keys)["overlong"].reward
    assert found[episodes.end].tolist() == pytest.approx(expected, abs=1e-6)
    assert found.count_nonzero() == sum(value < 0 for value in expected) == 8


def test_a_penalty_without_a_buffer_and_one_of_interrupted_responses_are_refused():
    with pytest.raises(ValueError, match=r"overlong_penalty: must be 1\.0 when overlong_buffer is 0"):
        PPOConfig(overlong_penalty=2.0)
    with pytest.raises(ValueError, match="overlong_buffer: must be 0 when truncation is bootstrap"):
        PPOConfig(overlong_buffer=2, truncation="bootstrap")
    with pytest.raises(ValueError, match="overlong_buffer: must be at most the 53 tokens of response_length"):
        PPOConfig(overlong_buffer=54)
