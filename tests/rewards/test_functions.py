"""Tests of reward functions on two episodes: the first starts at a reset and ends with an EOS; the second is
truncated."""

import asyncio
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastrlhf.config import PPOConfig, RTOConfig
from fastrlhf.rewards import functions as module
from fastrlhf.rewards.functions import (
    RewardFunctions,
    TrainerState,
    check_parameters,
    load_reward_functions,
    mean_rewards,
    open_reward_functions,
    takes_texts,
)
from fastrlhf.rewards.terms import open_rewards
from fastrlhf.types import Example, Prefix, Rollout, TokenizedExample
from tests import tiny
from tests.rewards.test_terms import EPISODES


def rollout(prompt: str, reset: str, completion: list[int], row: int = 0) -> Rollout:
    ids = tiny.ids(prompt) + tiny.ids(reset)
    return Rollout(
        prefix=Prefix(token_ids=ids, num_reset=len(tiny.ids(reset)), row=row, episode=row),
        completion=completion,
        sampler_logprob=[-1.0] * len(completion),
        ended=tiny.EOS in completion,
    )


ROLLOUTS = [
    rollout("w1 w2", "w7", [*tiny.ids("w8"), tiny.EOS, *tiny.ids("w9")]),  # compat "reference" samples past the EOS
    rollout("w3", "", tiny.ids("w4 w5"), row=1),
]
ROWS = {
    0: Example(prompt="the text of row 0", row=0, columns={"answer": "w7 w8", "level": 3}),
    1: Example(prompt=[{"role": "user", "content": "w3"}], row=1, columns={"answer": "w9"}),
}


def ask(rollouts=ROLLOUTS, *, rows=None, retries=0, state=None, **functions):
    run = RewardFunctions(functions=functions, tokenizer=tiny.tokenizer(), rows=rows or {}, retries=retries)
    run.state = state or run.state
    given = {name: [x if x is None else x.tolist() for x in values] for name, values in run(rollouts).items()}
    return given | {"metrics": run.metrics, "extra": run.extra} if run.metrics or run.extra else given


def test_a_function_of_trls_form_is_given_whole_responses_once():
    seen = []

    def reward(prompts, completions, **kwargs):
        seen.append((prompts, completions, kwargs["completion_ids"]))
        return [0.5, -1]

    assert ask(mine=reward) == {"mine": [0.5, -1]}
    assert seen == [(["w1 w2", "w3"], ["w7 w8", "w4 w5"], [[*tiny.ids("w7 w8"), tiny.EOS], tiny.ids("w4 w5")])]


def test_a_function_gets_texts_or_messages_and_every_column():
    seen = {}

    def reward(**kwargs):
        seen.update(kwargs)
        return [float(answer == "w7 w8") for answer in kwargs["answer"]]

    assert ask(rows=ROWS, mine=reward, state=TrainerState(global_step=7, max_steps=9)) == {"mine": [1, 0]}
    assert seen["prompts"] == ["the text of row 0", [{"role": "user", "content": "w3"}]]
    assert seen["completions"] == ["w7 w8", [{"role": "assistant", "content": "w4 w5"}]]
    assert seen["answer"] == ["w7 w8", "w9"]
    assert seen["level"] == [3, None]
    assert (seen["trainer_state"].global_step, seen["trainer_state"].max_steps) == (7, 9)


def test_a_function_gets_only_the_arguments_that_it_accepts():
    def brief(completions, weight=2.0):
        return [-weight * len(text) for text in completions]

    assert ask(mine=brief) == {"mine": [-10, -10]}
    for other in (lambda rollout: 0.0, len, dict, lambda rollout, **kwargs: 0.0):
        assert not takes_texts(other)
    for one in (brief, lambda prompts: 0.0, lambda **kwargs: 0.0, lambda completion_ids, *, answer: 0.0):
        assert takes_texts(one)


def test_functions_log_metrics_and_columns_of_samples():
    def reward(completions, log_metric, log_extra):
        log_metric("mine/words", 2)
        log_metric("mine/words", 3)
        log_extra("upper", [text.upper() for text in completions])
        return [0, 0]

    assert ask(mine=reward) == {"mine": [0, 0], "metrics": {"mine/words": 2.5}, "extra": {"upper": ["W7 W8", "W4 W5"]}}


def test_async_functions_of_both_forms_run_at_the_same_time():
    started = []

    async def both_started():
        for _ in range(1000):
            if len(started) == 2:
                return
            await asyncio.sleep(0.01)
        raise AssertionError("the second reward function did not start while the first was running")

    async def texts(completions):
        started.append("texts")
        await both_started()
        return [1.0, 2.0]

    async def tokens(rollout):
        if rollout is ROLLOUTS[0]:
            started.append("tokens")
        await both_started()
        return [float(i) for i in rollout.completion]

    assert ask(texts=texts, tokens=tokens) == {"texts": [1, 2], "tokens": [[11, 1, 12], [7, 8]]}


@pytest.mark.parametrize("form", [tuple, np.array, torch.tensor])
def test_the_numbers_may_come_as_an_array(form):
    found = RewardFunctions(functions={"mine": lambda completions: form([0.5, 2.0])}, tokenizer=tiny.tokenizer())
    assert [value.item() for value in found(EPISODES.rollouts)["mine"]] == [0.5, 2.0]


def test_a_response_without_a_reward_earns_nothing_and_is_not_counted():
    functions = {"some": lambda completions: [None, 3.0], "none": lambda rollout: None}
    run = RewardFunctions(functions=functions, tokenizer=tiny.tokenizer(), weights={"some": 2.0})
    assert run.totals(run(EPISODES.rollouts)) == [0, 6]
    assert mean_rewards(run(EPISODES.rollouts)) == {"some": 3}
    found = open_rewards(PPOConfig(kl_coef=0.0), tiny.tokenizer(), run).terms(EPISODES)
    assert found["some"].reward.tolist() == [0, 0, 0, 0, 0, 0, 0, 6]  # the weighted reward
    assert not found["none"].reward.any()
    assert {name: x.item() for name, x in found["some"].metrics.items()} == {
        "rewards/some/mean": 3,  # the unweighted value
        "rewards/some/std": 0,
        "rewards/some/unjudged": 0.5,
    }
    assert {name: x.item() for name, x in found["none"].metrics.items()} == {"rewards/none/unjudged": 1}
    scaled = open_rewards(PPOConfig(reward_function_norm="running"), tiny.tokenizer(), run)
    assert scaled.terms(EPISODES)["some"].reward.tolist() == [0] * 8  # a single reward equals the mean


def test_a_run_pays_a_function_of_trls_form_at_the_last_valid_token():
    def reward(prompts, completions, **kwargs):
        assert prompts == ["w4 w4"] * 2
        return [1.5 * len(completion.split()) for completion in completions]

    functions = {"texts": reward, "rollouts": lambda rollout: 1.0}
    terms = open_rewards(
        PPOConfig(), tiny.tokenizer(), open_reward_functions(PPOConfig(), tiny.tokenizer(), functions)
    ).terms(EPISODES)
    # 1.5 * 3 words; one word of the first response comes from the reset
    assert terms["texts"].reward.tolist() == [0, 0, 0, 4.5, 0, 0, 0, 4.5]
    assert terms["rollouts"].reward.tolist() == [0, 0, 0, 1, 0, 0, 0, 1]


@pytest.mark.parametrize(
    "given", [1.0, [1.0], None, "go", [1.0, 2.0, 3.0], np.array(1.0), torch.tensor(1.0), np.ones(1)]
)
def test_another_number_of_rewards_than_of_completions_is_refused(given):
    with pytest.raises(
        ValueError, match=r"^reward function 'mine' returns .* for 2 completions; return a list with one number"
    ):
        ask(mine=lambda completions: given)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("good", "row 1 gets 'good'; return one number, one per token, or None"),
        (float("nan"), "row 1 gets nan; return finite numbers, or None"),
        ([1.0, 2.0, 3.0], r"row 1 has 2 tokens and gets rewards of shape \(3,\)"),
    ],
)
def test_a_reward_that_is_not_a_number_is_reported_with_its_row(given, told):
    with pytest.raises(ValueError, match=rf"^reward function 'mine': the response to {told}"):
        ask(mine=lambda completions: [0.0, given])


def test_a_missing_column_is_reported_before_the_run():
    def graded(completions, ground_truth, level=1, **kwargs):
        return [0.0]

    with pytest.raises(
        ValueError,
        match=r"^reward_functions: 'graded' has parameters ground_truth; available are prompts, .* and the columns of "
        r"the dataset: answer, level$",
    ):
        open_reward_functions(PPOConfig(), tiny.tokenizer(), {"graded": graded}, ROWS)
    rows = {0: Example(prompt="w1", row=0, columns={"ground_truth": 1})}
    assert open_reward_functions(PPOConfig(), tiny.tokenizer(), {"graded": graded}, rows).functions


class Counts:
    """A stateful reward function that counts the responses it has seen."""

    def __init__(self):
        self.seen, self.scale = 0, torch.tensor([1.0, 2.0])

    def __call__(self, completions):
        self.seen += len(completions)
        self.scale = self.scale + 1
        return [self.scale.sum().item()] * len(completions)

    def state_dict(self):
        return {"seen": self.seen, "scale": self.scale}

    def load_state_dict(self, state):
        self.seen, self.scale = state["seen"], state["scale"]


PROMPTS = [TokenizedExample(prompt=tiny.ids("w1 w2"), reference=[*tiny.ids("w5 w6 w7"), tiny.EOS], row=0)]


def test_a_trial_call_on_real_rows_finds_what_is_wrong_and_leaves_no_trace(caplog):
    seen, counts = [], Counts()

    def reward(prompts, completions, answer):
        seen.append((prompts, completions, answer))
        return [0.25, 0.5]

    functions = {"mine": reward, "counts": counts, "token": lambda r: [1.0] * len(r.completion)}
    run = RewardFunctions(functions=functions, tokenizer=tiny.tokenizer(), rows=ROWS)
    with caplog.at_level(logging.INFO):
        run.rehearse(PROMPTS, response_length=2)
    assert seen == [(["the text of row 0"] * 2, ["w5 w6"] * 2, ["w7 w8"] * 2)]
    assert (counts.seen, counts.scale.tolist()) == (0, [1, 2])
    assert "reward function mine: 0.25 for a response to row 0" in caplog.messages
    assert "reward function token: 2 over 2 tokens for a response to row 0" in caplog.messages
    for broken, kind, told in (
        (lambda completions: [0.0], ValueError, "^reward function 'mine' returns"),
        (lambda completions: 1 / 0, RuntimeError, "^reward_functions: 'mine' raised ZeroDivisionError"),
        (lambda rollout, other: 0.0, RuntimeError, "^reward_functions: 'mine' raised TypeError"),
    ):
        with pytest.raises(kind, match=told) as stop:
            RewardFunctions(functions={"mine": broken}, tokenizer=tiny.tokenizer()).rehearse(PROMPTS, 2)
        assert stop.value.__notes__ == ["in a trial call on row 0, before the run"]


def test_a_function_of_one_row_is_refused_with_the_two_forms_that_there_are():
    told = (
        r"^reward_functions: 'single' takes completion, answer; write single\(completions, answer, \*\*kwargs\), which "
    )
    with pytest.raises(ValueError, match=told):
        check_parameters("single", lambda completion, answer: 1.0, ["answer"])
    check_parameters("single", lambda rollout, scale=2.0: scale, ["answer"])


def test_the_state_of_functions_is_saved_with_the_rewards():
    counts = Counts()
    rewards = open_rewards(PPOConfig(), tiny.tokenizer(), RewardFunctions(functions={"counts": counts, "len": len}))
    rewards.functions.tokenizer = tiny.tokenizer()
    rewards.functions.functions = {"counts": counts}
    rewards.terms(EPISODES)
    state = rewards.state_dict()
    assert state["function.counts.seen"] == 2
    rewards.terms(EPISODES)
    assert state["function.counts.scale"].tolist() == [2, 3]  # later calls do not change `state`, which is a copy
    fresh = Counts()
    again = open_rewards(PPOConfig(), tiny.tokenizer(), RewardFunctions(functions={"counts": fresh}))
    again.load_state_dict(state)
    assert (fresh.seen, fresh.scale.tolist()) == (2, [2, 3])


def test_a_state_that_no_checkpoint_could_give_back_is_refused():
    counts = Counts()
    for value in ({1: "an int as a key"}, (1, 2), object()):
        counts.state_dict = lambda value=value: {"bad": value}
        with pytest.raises(
            ValueError, match=r"^reward_functions: 'counts' has 'bad' of \w+ in its state_dict, which a"
        ):
            RewardFunctions(functions={"counts": counts}).state_dict()


def test_functions_of_a_run_have_names_and_weights(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def brief(rollout):\n    return -float(len(rollout.completion))\n\ndef one(rollout):\n    return 1.0\n"
    )
    paths = (f"{tmp_path}/mine.py:brief", f"{tmp_path}/mine.py:one")
    config = PPOConfig(reward_functions=paths, reward_weights=(0.5, -3.0))
    functions = open_reward_functions(config, tiny.tokenizer(), {"long": lambda rollout: 1.0})
    terms = open_rewards(config, tiny.tokenizer(), functions).terms(EPISODES)
    assert list(functions.functions) == ["long", "brief", "one"]
    assert [terms[name].reward.tolist()[3] for name in functions.functions] == [1, -2, -3]
    for name in ("kl", "brief"):
        with pytest.raises(ValueError, match=f"^reward_functions: '{name}' is the name of another reward; rename"):
            load_reward_functions(config, {name: lambda rollout: 0.0})


def test_keys_of_functions_are_refused_without_functions():
    for settings in ({"reward_function_norm": "running"}, {"reward_function_clip": 1.0}, {"reward_retries": 2}):
        config = PPOConfig(**settings)
        with pytest.raises(ValueError, match=rf"^{next(iter(settings))}: must be .* without a reward function, since"):
            load_reward_functions(config)
        assert list(load_reward_functions(config, {"brevity": len})) == ["brevity"]


def test_rto_without_a_dpo_model_is_refused():
    with pytest.raises(ValueError, match=r"^dpo_model_path: give the DPO model"):
        load_reward_functions(RTOConfig())


@pytest.mark.parametrize("error", [KeyError("tone"), ValueError("no such word"), OSError("gone")])
def test_an_exception_of_a_function_is_reported_with_its_name_and_traceback(error):
    def texts(completions):
        raise error

    async def rollouts(rollout):
        raise error

    for function in (texts, rollouts):
        with pytest.raises(RuntimeError) as raised:
            ask(mine=function)
        assert str(raised.value) == f"reward_functions: 'mine' raised {type(error).__name__}: {error}"
        assert raised.value.__cause__ is error


def test_a_failing_function_is_retried_after_growing_waits(monkeypatch):
    waits, failures = [], [OSError("a"), OSError("b"), OSError("c")]
    monkeypatch.setattr(module.time, "sleep", waits.append)

    def flaky(completions):
        if failures:
            raise failures.pop()
        return [1.0, 2.0]

    assert ask(mine=flaky, retries=3) == {"mine": [1, 2]}
    assert waits == [1, 2, 4]
    failures += [OSError("a"), OSError("b")]
    with pytest.raises(RuntimeError, match="'mine' raised OSError: a"):
        ask(mine=flaky, retries=1)
    assert waits == [1, 2, 4, 1]


def test_out_of_memory_in_a_function_is_not_wrapped():
    def hungry(rollout):
        raise MemoryError

    with pytest.raises(MemoryError):
        ask(mine=hungry, retries=5)


def test_evaluation_may_use_different_rows():
    run = RewardFunctions(functions={"mine": lambda completions, answer: [float(a == "x") for a in answer]})
    run.tokenizer, run.rows = tiny.tokenizer(), ROWS
    held_out = replace(run, rows={i: Example(prompt="w1", row=i, columns={"answer": "x"}) for i in range(2)})
    assert run.totals(run(ROLLOUTS)) == [0, 0]
    assert run.totals(held_out(ROLLOUTS)) == [1, 1]


def test_a_function_that_judges_nothing_in_an_update_is_reported_once(caplog):
    caplog.set_level(logging.WARNING)
    functions = RewardFunctions(functions={"some": lambda rollout: 1.0, "none": lambda rollout: None})
    run = open_rewards(PPOConfig(), tiny.tokenizer(), functions)
    for _ in range(2):
        run.warn({"rewards/some/unjudged": 0.5, "rewards/none/unjudged": 1.0})
    assert caplog.messages == ["reward function none judged no response of an update: it returned None for each"]
