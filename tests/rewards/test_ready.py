"""Tests of the built-in reward functions on texts whose reward is obvious."""

import sys

import pytest

from fastrlhf.config import PPOConfig
from fastrlhf.rewards import ready
from fastrlhf.rewards.functions import load_reward_functions, takes_texts


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_exact_match_ignores_case_white_space_character_width_and_a_full_stop():
    given = [" The  Cat.\n", chat("\uff34he cat"), "the cats", "", "7"]
    assert ready.exact_match(given, ["the cat", "THE CAT", "the cat", "the cat", 7]) == [1, 1, 0, 0, 1]


@pytest.mark.parametrize(
    ("text", "answer", "earned"),
    [
        ("so 6 * 7\n#### 42", "She has 6 * 7 pens.\n#### 42", 1),
        ("#### 1,200", "1200", 1),
        (r"It is \boxed{\frac{1}{2}}.", "0.5", 1),
        (r"\boxed{3} no, \boxed{4}", "#### 4", 1),
        (r"#### 5 and \boxed{4}", "4", 1),
        ("#### 41", "#### 42", 0),
        ("the answer is 42", "#### 42", 0),  # the response has no marked answer
        ("####", "#### 42", 0),
        (r"\boxed{42", "#### 42", 0),
        ("#### forty-two?", "42", 0),
        ("#### 42", "", None),
    ],
)
def test_a_marked_answer_counts_by_its_value(text, answer, earned):
    assert ready.math_answer([text, chat(text)], answer=[answer, answer]) == [earned, earned]


def test_math_answers_name_the_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ValueError, match=r"^math_answer needs math-verify: pip install 'fastrlhf\[math\]'$"):
        ready.math_answer(["#### 1"], answer=["1"])


@pytest.mark.parametrize(
    ("function", "right", "wrong"),
    [
        (ready.hash_format, ["so\n#### 5", "#### -1,200.5", "#### $3.\n"], ["5", "#### 5 apples", "#### ", "####5 x"]),
        (
            ready.boxed_format,
            [r"\boxed{5}", r"a \boxed{\frac{1}{2}} b"],
            [r"\boxed{ }", r"\boxed{5", r"\boxed{1}\boxed{1}"],
        ),
        (
            ready.think_format,
            ["<think>a\nb</think>c", " <think></think> c "],
            ["c", "<think>a</think>", "<think>a", "x<think>a</think>c", "<think><think>a</think>c"],
        ),
        (ready.matches(r"^yes.*no$"), ["yes\nno"], ["no yes"]),
    ],
)
def test_formats(function, right, wrong):
    assert (
        function([*right, *wrong]) == function(list(map(chat, [*right, *wrong]))) == [1] * len(right) + [0] * len(wrong)
    )


def test_length_counts_tokens():
    assert ready.num_tokens(completion_ids=[[4, 5, 1], []]) == [3, 0]


def test_they_are_named_without_a_module():
    loaded = load_reward_functions(PPOConfig(reward_functions=ready.READY))
    assert loaded == {name: getattr(ready, name) for name in ready.READY}
    assert all(map(takes_texts, loaded.values()))
    with pytest.raises(
        ValueError, match=r"^reward_functions: 'math' must be one of exact_match, math_answer, .*num_tokens, or"
    ):
        load_reward_functions(PPOConfig(reward_functions=("math",)))
