"""Rewards that are functions of the user's, on two episodes: one after a reset that ends, and one that does not."""

import pytest

from fastrlhf.config import PPOConfig, RTOConfig
from fastrlhf.rewards.functions import TextReward, load_reward_functions, texts_taken
from fastrlhf.rewards.terms import open_rewards
from fastrlhf.types import Prefix, Rollout
from tests import tiny
from tests.rewards.test_terms import EPISODES


def rollout(prompt: str, reset: str, completion: list[int]) -> Rollout:
    ids = tiny.ids(prompt) + tiny.ids(reset)
    return Rollout(
        prefix=Prefix(token_ids=ids, num_reset=len(tiny.ids(reset)), row=0, episode=0),
        completion=completion,
        sampler_logprob=[-1.0] * len(completion),
        ended=tiny.EOS in completion,
    )


ROLLOUTS = [
    rollout("w1 w2", "w7", [*tiny.ids("w8"), tiny.EOS, *tiny.ids("w9")]),  # compat reference samples past the EOS
    rollout("w3", "", tiny.ids("w4 w5")),
]


def text_reward(function) -> TextReward:
    return TextReward(name="mine", function=function, tokenizer=tiny.tokenizer())


def test_a_function_of_texts_is_given_prompts_and_whole_responses_once():
    seen = []

    def reward(prompts, completions, **kwargs):
        seen.append((prompts, completions, kwargs))
        return [0.5, -1]

    assert text_reward(reward)(ROLLOUTS) == [0.5, -1]
    response_ids = [[*tiny.ids("w7 w8"), tiny.EOS], tiny.ids("w4 w5")]
    assert seen == [(["w1 w2", "w3"], ["w7 w8", "w4 w5"], {"completion_ids": response_ids})]


def test_it_is_given_only_what_it_takes():
    def brief(completions, weight=2.0):
        return [-weight * len(text) for text in completions]

    assert text_reward(brief)(ROLLOUTS) == [-10, -10]
    assert texts_taken(brief) == ("completions",)
    assert texts_taken(lambda completions, *_, completion_ids: None) == ("completions", "completion_ids")
    for other in (lambda rollout: 0.0, lambda prompts: 0.0, len, dict):
        assert texts_taken(other) == ()


def test_a_run_pays_a_function_of_texts_at_the_last_valid_token():
    def reward(prompts, completions, **kwargs):
        assert prompts == ["w4 w4"] * 2
        return [1.5 * len(completion.split()) for completion in completions]

    opened = open_rewards(PPOConfig(), tiny.tokenizer(), {"texts": reward, "rollouts": lambda rollout: 1.0})
    terms = opened.terms(EPISODES)
    assert terms["texts"].reward.tolist() == [0, 0, 0, 4.5, 0, 0, 0, 4.5]  # three words each, one of a reset
    assert terms["rollouts"].reward.tolist() == [0, 0, 0, 1, 0, 0, 0, 1]


@pytest.mark.parametrize("given", [1.0, [1.0], None, "good", [1.0, 2.0, 3.0]])
def test_another_number_of_rewards_than_of_completions_is_refused(given):
    with pytest.raises(
        ValueError, match=r"^reward function 'mine': gives .* for 2 completions; give a list, one number"
    ):
        text_reward(lambda completions: given)(ROLLOUTS)


def test_a_reward_of_texts_that_is_no_number_is_told_with_its_row():
    opened = open_rewards(PPOConfig(), tiny.tokenizer(), {"mine": lambda completions: [0.0, None]})
    with pytest.raises(
        ValueError, match=r"^reward function 'mine': the response to row 11 earns None; give one number"
    ):
        opened.terms(EPISODES)


def test_what_a_function_asks_for_and_there_is_not_is_told_before_the_run():
    def graded(completions, ground_truth, **kwargs):
        return [0.0]

    with pytest.raises(
        ValueError, match=r"^reward_functions: 'graded' asks for ground_truth; a function of completions"
    ):
        load_reward_functions(PPOConfig(), {"graded": graded})


def test_functions_of_a_run_have_names_of_their_own(tmp_path):
    (tmp_path / "mine.py").write_text("def brief(rollout):\n    return -float(len(rollout.completion))\n")
    config = PPOConfig(reward_functions=(f"{tmp_path}/mine.py:brief",))
    opened = open_rewards(config, tiny.tokenizer(), {"long": lambda rollout: 1.0})
    assert list(opened.functions) == ["long", "brief"]
    assert opened.terms(EPISODES)["brief"].reward.tolist() == [0, 0, 0, -4, 0, 0, 0, -3]
    for name in ("kl", "brief"):
        with pytest.raises(ValueError, match=f"^reward_functions: '{name}' is the name of another reward; call it"):
            load_reward_functions(config, {name: lambda rollout: 0.0})


def test_keys_of_functions_are_refused_where_there_is_none():
    for settings in ({"reward_function_norm": "running"}, {"reward_function_clip": 1.0}):
        config = PPOConfig(**settings)
        with pytest.raises(ValueError, match=rf"^{next(iter(settings))}: must be .* without a reward function, since"):
            load_reward_functions(config)
        assert list(load_reward_functions(config, {"brevity": len})) == ["brevity"]


def test_rto_without_a_dpo_model_is_refused():
    with pytest.raises(ValueError, match=r"^dpo_model_path: give the DPO model"):
        load_reward_functions(RTOConfig())


@pytest.mark.parametrize("error", [KeyError("tone"), ValueError("no such word"), OSError("gone")])
def test_what_a_function_raises_is_told_with_its_name_and_its_own_traceback(error):
    def texts(completions):
        raise error

    def rollouts(rollout):
        raise error

    for function in (texts, rollouts):
        opened = open_rewards(PPOConfig(), tiny.tokenizer(), {"mine": function})
        with pytest.raises(RuntimeError) as raised:
            opened.terms(EPISODES)
        assert str(raised.value) == f"reward_functions: 'mine' raised {type(error).__name__}: {error}"
        assert raised.value.__cause__ is error


def test_a_lack_of_memory_in_a_function_stays_one():
    def hungry(rollout):
        raise MemoryError

    with pytest.raises(MemoryError):
        open_rewards(PPOConfig(), tiny.tokenizer(), {"mine": hungry}).terms(EPISODES)
