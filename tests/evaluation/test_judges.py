import pytest
import torch

from fastrlhf.data.packing import pack
from fastrlhf.evaluation.judges import checked_scores, reward_model_judge
from fastrlhf.models.forward import sequence_scores
from fastrlhf.models.loading import load_reward_model
from fastrlhf.types import Prefix, Rollout, Segment
from tests import tiny

CPU = torch.device("cpu")


def rollout(prompt: list[int], completion: list[int], row: int = 0, num_reset: int = 0) -> Rollout:
    return Rollout(
        prefix=Prefix(token_ids=prompt, num_reset=num_reset, row=row, episode=row),
        completion=completion,
        sampler_logprob=[0.0] * len(completion),
        ended=tiny.EOS in completion,
    )


@pytest.fixture
def model(tmp_path):
    return load_reward_model(tiny.save_reward_model(tmp_path), pad_token_id=0)


@torch.no_grad()
def score(model, token_ids: list[int]) -> torch.Tensor:
    return sequence_scores(model, pack([Segment(token_ids=token_ids)]))[0]


@pytest.mark.parametrize("micro_batch_tokens", [9, 20, 1000])
def test_a_response_is_judged_after_its_prompt_and_up_to_its_first_eos(model, micro_batch_tokens):
    judge = reward_model_judge(model, eos_token_id=tiny.EOS, micro_batch_tokens=micro_batch_tokens)
    judged = judge(
        [
            rollout([5, 6, 7], [8, 9, tiny.EOS]),
            rollout([5, 6, 7], [8, 9, 10, 11]),  # truncated, without an EOS
            rollout([5, 6, 7, 8], [9, tiny.EOS, 12, 13, tiny.EOS], num_reset=1),  # continues after its EOS
            rollout([14], [tiny.EOS]),
        ]
    )
    texts = [[5, 6, 7, 8, 9, 1], [5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 8, 9, 1], [14, 1]]
    torch.testing.assert_close(judged, torch.stack([score(model, text) for text in texts]), rtol=1e-5, atol=1e-6)
    assert judged.dtype == torch.float32
    assert not judged.requires_grad
    assert len(set(judged.tolist())) >= 3


def test_a_response_is_judged_up_to_the_first_of_several_ends(model):
    judge = reward_model_judge(model, eos_token_id=(tiny.EOS, 9), micro_batch_tokens=100)
    judged = judge([rollout([5, 6], [8, 9, 7, tiny.EOS]), rollout([5, 6], [8, tiny.EOS, 9])])
    texts = [[5, 6, 8, 9], [5, 6, 8, tiny.EOS]]
    torch.testing.assert_close(judged, torch.stack([score(model, text) for text in texts]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("micro_batch_tokens", [12, 19, 1000])
def test_shared_prefixes_are_computed_once_and_change_no_score(model, micro_batch_tokens):
    """Eight of the ten episodes start after 4 to 7 tokens of one text, so they share prefixes. Sharing a prefix changes
    the order of float32 sums."""
    text, seen = [4 + (5 * i) % 25 for i in range(7)], []
    rollouts = [rollout(text[: 4 + i % 4], [3 + i, 9, tiny.EOS], num_reset=i % 4) for i in range(8)]
    rollouts[3:3] = [rollout([5, 6], [7, tiny.EOS]), rollout([8], [9])]
    texts = [[*each.prefix.token_ids, *each.completion] for each in rollouts]
    judge = reward_model_judge(model, eos_token_id=tiny.EOS, micro_batch_tokens=micro_batch_tokens)
    trunk = model.base_model
    hook = trunk.register_forward_pre_hook(lambda _, __, kw: seen.append(kw["input_ids"].numel()), with_kwargs=True)
    judged = judge(rollouts)
    hook.remove()
    torch.testing.assert_close(judged, torch.stack([score(model, text) for text in texts]), rtol=1e-6, atol=2e-6)
    assert max(seen) <= micro_batch_tokens
    assert sum(seen) < sum(map(len, texts))
    if micro_batch_tokens == 1000:
        assert seen == [7 + 8 * 3 + 4 + 2]


def test_a_response_longer_than_a_micro_batch_is_refused(model):
    judge = reward_model_judge(model, eos_token_id=tiny.EOS, micro_batch_tokens=4)
    with pytest.raises(ValueError, match=r"^micro_batch_tokens: 4 cannot hold response 1 of 5 tokens"):
        judge([rollout([5], [6]), rollout([5, 6, 7], [8, 9])])


@pytest.mark.parametrize("scores", [torch.tensor([1.5, -2.0]), torch.tensor([1.5, -2.0]).double(), [1.5, -2]])
def test_a_judge_may_return_a_tensor_of_any_kind_or_plain_numbers(scores):
    checked = checked_scores(scores, [rollout([5], [6])] * 2, CPU)
    assert checked.dtype == torch.float32
    assert checked.tolist() == [1.5, -2.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_refused_by_the_row_of_its_prompt(bad):
    rollouts = [rollout([5], [6], row=30), rollout([5], [6], row=41), rollout([5], [6], row=52)]
    with pytest.raises(ValueError, match=f"^judge: the score of a response to row 41 is {bad}$"):
        checked_scores(torch.tensor([0.0, bad, bad]), rollouts, CPU)


@pytest.mark.parametrize("shape", [(), (1,), (2, 1)])
def test_a_judge_that_returns_another_number_of_scores_is_refused(shape):
    with pytest.raises(ValueError, match=r"^judge: must return one score per rollout \[2\]; got \("):
        checked_scores(torch.zeros(shape), [rollout([5], [6])] * 2, CPU)
