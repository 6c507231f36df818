"""Tests of finding the names that reward functions look up in their keyword arguments."""

import logging

import pytest

from fastrlhf.config import GRPOConfig
from fastrlhf.rewards.functions import open_reward_functions
from fastrlhf.rewards.lookups import looked_up
from fastrlhf.types import Example
from tests import tiny

ROWS = {0: Example(prompt="w1", row=0, columns={"answer": "w7", "level": 3})}


def misspelt(completions, **kwargs):
    answers = kwargs.get("anwser") or [None] * len(completions)
    return [float(text == answer) for text, answer in zip(completions, answers, strict=True)]


async def by_index(prompts, **columns):
    return [float(len(columns["answer"])) + len(columns.pop("colour", ())) for _ in prompts]


def plain(completions, answer, other={"anwser": 1}):  # noqa: B006
    return [float(other["anwser"])] * len(completions)


class Reward:
    def __call__(self, completions, **kwargs):
        name = "level"
        return [kwargs[name] + kwargs["anwser"] for _ in completions]


@pytest.mark.parametrize(
    ("function", "names"),
    [(misspelt, ["anwser"]), (by_index, ["answer", "colour"]), (plain, []), (Reward(), ["anwser"]), (len, [])],
)
def test_the_names_are_read_from_the_source(function, names):
    assert looked_up(function) == names


def warnings(function, caplog) -> list[str]:
    with caplog.at_level(logging.WARNING):
        open_reward_functions(GRPOConfig(), tiny.tokenizer(), {"mine": function}, ROWS)
    return caplog.messages


def test_a_misspelt_column_is_named_with_the_nearest_one_before_the_run(caplog):
    assert warnings(misspelt, caplog) == [
        "reward function mine looks up 'anwser', which is no column of the dataset; did you mean 'answer'?"
    ]


def test_an_unknown_column_is_named_with_those_that_exist(caplog):
    assert warnings(by_index, caplog) == [
        "reward function mine looks up 'colour', which is no column of the dataset; the columns are answer, level"
    ]


def test_a_function_of_a_single_rollout_is_not_examined(caplog):
    assert warnings(lambda rollout, **kwargs: kwargs.get("anwser", 0.0), caplog) == []
