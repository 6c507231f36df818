import torch

from fastrlhf.rewards import judged_scores, kl_term, score_term


def test_a_score_is_earned_at_the_last_token_of_its_episode_and_nowhere_else():
    score = torch.tensor([2.0, -3.0])
    assert score_term(score, torch.tensor([1, 4]), 6).tolist() == [0, 2, 0, 0, -3, 0]
    assert score_term(score, torch.tensor([4, 1]), 6).dtype == torch.float32


def test_the_kl_term_charges_what_the_policy_likes_more_than_the_reference():
    logprob, reference = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-2.0, -2.0, -1.0])
    assert kl_term(logprob, reference, 0.5).tolist() == [-0.5, 0.0, 1.0]


def test_a_missing_eos_lowers_the_score_by_the_penalty_or_replaces_it_or_does_nothing():
    score, missing = torch.tensor([2.0, -3.0, 0.5]), torch.tensor([True, False, True])
    judged = {
        (penalty, replacement): judged_scores(
            score, missing, missing_eos_penalty=penalty, missing_eos_score=replacement
        )
        for penalty, replacement in ((None, None), (1.0, None), (None, -1.0), (None, 0.0))
    }
    assert {key: value.tolist() for key, value in judged.items()} == {
        (None, None): [2.0, -3.0, 0.5],
        (1.0, None): [1.0, -3.0, -0.5],
        (None, -1.0): [-1.0, -3.0, -1.0],
        (None, 0.0): [0.0, -3.0, 0.0],
    }
    assert {value.dtype for value in judged.values()} == {torch.float32}
