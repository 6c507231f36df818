"""Tests the theory of RTO (Zhong et al. 2024, arXiv 2404.18922) on a tree small enough to enumerate, in float64.

The vocabulary has three tokens and a response at most three; token 0 ends a response, so there are 15 responses. All
identities hold exactly at the optimum, so only float64 rounding errors remain.
"""

from itertools import product

import pytest
import torch

from fastrlhf.config import PPOConfig
from fastrlhf.rewards.terms import Episodes, Rewards, shaped
from fastrlhf.types import Prefix, Rollout

VOCAB, HORIZON, EOS, PERIOD = 3, 3, 0, 1
BETA_1, BETA_2, BETA_3 = 0.35, 0.2, 0.5

State = tuple[int, ...]
STATES = [s for n in range(HORIZON) for s in product(range(1, VOCAB), repeat=n)]
RESPONSES = sorted(
    [(*s, EOS) for s in STATES] + list(product(range(1, VOCAB), repeat=HORIZON))  # truncated at the length limit
)
ROWS = [(y[:h], y[h]) for y in RESPONSES for h in range(len(y))]
COUNTS = [len(y) for y in RESPONSES]
ENDS = torch.tensor([h == len(y) - 1 for y in RESPONSES for h in range(len(y))])
SENTENCE_ENDS = ENDS | torch.tensor([token == PERIOD for _, token in ROWS])


def log_policy(seed: int) -> dict[State, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {s: torch.randn(VOCAB, generator=draw, dtype=torch.float64).log_softmax(0) for s in STATES}


REFERENCE, DPO = log_policy(0), log_policy(1)
SCORE = torch.randn(len(RESPONSES), generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def rows_of(policy: dict[State, torch.Tensor]) -> torch.Tensor:
    """Returns log pi(token | state) for every row of every response."""
    return torch.stack([policy[state][token] for state, token in ROWS])


def per_response(rows: torch.Tensor) -> torch.Tensor:
    return torch.stack([part.sum() for part in rows.split(COUNTS)])


def at_ends(values: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(ROWS), dtype=values.dtype).masked_scatter(ENDS, values)


def soft_value_iteration(reward: torch.Tensor, beta: float) -> tuple[dict[State, torch.Tensor], dict[State, float]]:
    """Returns (log pi*, V*) that maximise E[sum r - beta log(pi / pi_ref)], computed backwards over the tree; `reward`
    is given by row.

    A response that has ended, or is truncated, has value 0. The reward of a step may depend only on its state and
    token.
    """
    by_step: dict[tuple[State, int], float] = {}
    for step, value in zip(ROWS, reward.tolist(), strict=True):
        assert by_step.setdefault(step, value) == pytest.approx(value, abs=1e-12), step
    values: dict[State, float] = {}
    policy: dict[State, torch.Tensor] = {}
    for state in reversed(STATES):
        q = torch.tensor([by_step[state, a] + values.get((*state, a), 0.0) for a in range(VOCAB)], dtype=torch.float64)
        logits = REFERENCE[state] + q / beta
        policy[state], values[state] = logits.log_softmax(0), beta * logits.logsumexp(0).item()
    return policy, values


def token_rewards() -> torch.Tensor:
    return BETA_1 * (rows_of(DPO) - rows_of(REFERENCE))


def optimum(shaping: str) -> torch.Tensor:
    """Returns log pi* of every response, for the policy pi* that is optimal under the RTO reward with this shaping."""
    reward = shaped(token_rewards(), shaping, ENDS, SENTENCE_ENDS) + at_ends(BETA_3 * SCORE)
    return per_response(rows_of(soft_value_iteration(reward, BETA_2)[0]))


def test_the_tree_holds_every_response_once():
    assert len(RESPONSES) == len(set(RESPONSES)) == 15
    assert per_response(rows_of(REFERENCE)).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_the_log_ratio_of_the_optimum_is_the_reward_shaped_by_its_value():
    """beta log(pi* / pi_ref) = r + V*(s') - V*(s). This identity turns a DPO model into a token reward."""
    reward = torch.randn(len(STATES), VOCAB, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    by_row = torch.stack([reward[STATES.index(state), token] for state, token in ROWS])
    policy, value = soft_value_iteration(by_row, BETA_2)
    before = torch.tensor([value[state] for state, _ in ROWS], dtype=torch.float64)
    # A finished response is not a state and has value 0.
    after = torch.tensor([value.get((*state, token), 0.0) for state, token in ROWS], dtype=torch.float64)
    log_ratio = BETA_2 * (rows_of(policy) - rows_of(REFERENCE))
    torch.testing.assert_close(log_ratio, by_row + after - before, rtol=0, atol=1e-12)
    torch.testing.assert_close(per_response(log_ratio), per_response(by_row) - value[()], rtol=0, atol=1e-12)


def test_the_optimum_is_the_reference_tilted_by_the_dpo_model_and_the_score():
    """The optimum is pi* ~ pi_ref (pi_dpo / pi_ref)^(beta1 / beta2) exp(beta3 score / beta2)."""
    reference, dpo = per_response(rows_of(REFERENCE)), per_response(rows_of(DPO))
    tilted = reference + BETA_1 / BETA_2 * (dpo - reference) + BETA_3 / BETA_2 * SCORE
    torch.testing.assert_close(optimum("token"), tilted.log_softmax(0), rtol=0, atol=1e-12)


def test_with_equal_betas_and_no_score_the_optimum_is_the_dpo_model():
    policy, _ = soft_value_iteration(BETA_2 * (rows_of(DPO) - rows_of(REFERENCE)), BETA_2)
    torch.testing.assert_close(rows_of(policy), rows_of(DPO), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("shaping", "same"), [("sentence", "token"), ("eos", "token"), ("rs", "none")])
def test_shapings_move_credit_and_not_the_optimum(shaping, same):
    torch.testing.assert_close(optimum(shaping), optimum(same), rtol=0, atol=1e-12)


def test_with_rs_and_none_the_optimum_ignores_the_dpo_model():
    only_score = per_response(rows_of(REFERENCE)) + BETA_3 / BETA_2 * SCORE
    torch.testing.assert_close(optimum("none"), only_score.log_softmax(0), rtol=0, atol=1e-12)
    assert (optimum("token") - optimum("none")).abs().max() > 0.1


def expected_reward(log_policy_of: dict[State, torch.Tensor]) -> torch.Tensor:
    """Returns the expected sum of the rewards of a response, computed by the trainer's own float32 code."""
    logprob = rows_of(log_policy_of)
    everywhere = torch.ones(len(ROWS), dtype=torch.bool)
    episodes = Episodes(
        rollouts=[
            Rollout(
                prefix=Prefix(token_ids=[1], num_reset=0, row=i, episode=i),
                completion=list(y),
                sampler_logprob=[0.0] * len(y),
                ended=y[-1] == EOS,
            )
            for i, y in enumerate(RESPONSES)
        ],
        cu_rows=torch.tensor([0, *COUNTS]).cumsum(0).int(),
        sampled=everywhere,
        earns=everywhere,
        end=ENDS.nonzero()[:, 0],
        missing_eos=torch.tensor([y[-1] != EOS for y in RESPONSES]),
        score=SCORE.float(),
        token=torch.tensor([token for _, token in ROWS]),
        logprob=logprob.float(),
        reference_logprob=rows_of(REFERENCE).float(),
        dpo_log_ratio=(rows_of(DPO) - rows_of(REFERENCE)).float(),
    )
    config = PPOConfig(dpo_model_path="dpo", dpo_reward_scale=BETA_1, kl_coef=BETA_2, score_coef=BETA_3)
    rows = sum(term.reward for term in Rewards(config=config).terms(episodes).values())
    return (per_response(logprob).exp() * per_response(torch.as_tensor(rows))).sum()


def test_what_the_trainer_pays_is_largest_at_that_optimum():
    """The gradient of the expected reward is 0 at the optimum, up to float32 rounding, and not 0 at the reference."""
    best, _ = soft_value_iteration(token_rewards() + at_ends(BETA_3 * SCORE), BETA_2)
    sizes = []
    for policy in (best, REFERENCE):
        logits = {state: logprobs.clone().requires_grad_() for state, logprobs in policy.items()}
        expected_reward({state: x.log_softmax(0) for state, x in logits.items()}).backward()
        sizes.append(max(float(torch.as_tensor(x.grad).abs().max()) for x in logits.values()))
    assert sizes[0] < 1e-6
    assert sizes[1] > 1e-2
    assert expected_reward(best) > expected_reward(REFERENCE)
