import pytest
import torch

from fastrlhf.evaluation.completions import EVAL_EPISODES, respond, response_kl
from fastrlhf.types import Prefix, Rollout, TokenizedExample
from tests import tiny

EXAMPLES = [
    TokenizedExample(prompt=[3 + (5 * i + j) % 29 for j in range(2 + i % 3)], reference=[9, 1], row=10 + i)
    for i in range(8)
]


def answers(model, **settings) -> list[Rollout]:
    fields = {"eos_token_id": tiny.EOS, "response_length": 6, "temperature": 0.9, "seed": 3, "batch_size": 64}
    return respond(model, EXAMPLES, **fields | settings)


@torch.no_grad()
def logprob(model, prompt: list[int], completion: list[int], temperature: float) -> float:
    """Returns the log-prob of a completion, computed by the model's own forward in float64."""
    logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1].double() / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum().item()


def test_every_prompt_gets_one_response_in_order_with_its_own_random_numbers():
    rollouts = answers(tiny.policy())
    assert [r.prefix for r in rollouts] == [
        Prefix(token_ids=example.prompt, num_reset=0, row=example.row, episode=EVAL_EPISODES + i)
        for i, example in enumerate(EXAMPLES)
    ]
    assert all(len(r.completion) == 6 or r.ended for r in rollouts)
    completions = [r.completion for r in rollouts]
    assert [r.completion for r in answers(tiny.policy(), batch_size=3)] == completions
    assert [r.completion for r in answers(tiny.policy(), seed=4)] != completions


def test_evaluation_and_training_use_different_episode_numbers():
    assert EVAL_EPISODES > 10**12


def test_temperature_zero_is_greedy_for_every_seed():
    model = tiny.policy()
    greedy = [r.completion for r in answers(model, temperature=0)]
    assert greedy == [r.completion for r in answers(model, temperature=0, seed=9)]
    assert greedy != [r.completion for r in answers(model)]


def test_the_kl_of_a_policy_to_itself_is_0():
    model = tiny.policy()
    assert response_kl(model, model, answers(model), temperature=0.9, micro_batch_tokens=64) == 0


@pytest.mark.parametrize("micro_batch_tokens", [12, 1000])
def test_the_kl_of_a_response_is_the_sum_of_its_log_ratios_averaged_over_responses(micro_batch_tokens):
    policy, reference = tiny.policy(), tiny.policy(seed=5)
    rollouts = answers(policy)
    ratios = [
        logprob(policy, r.prefix.token_ids, r.completion, 0.9)
        - logprob(reference, r.prefix.token_ids, r.completion, 0.9)
        for r in rollouts
    ]
    ours = response_kl(policy, reference, rollouts, temperature=0.9, micro_batch_tokens=micro_batch_tokens)
    assert ours == pytest.approx(sum(ratios) / len(ratios), rel=1e-5)
    assert ours > 0.1
