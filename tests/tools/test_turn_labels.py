from datetime import date

import pytest

from fastrlhf.data.templates import Renderer
from fastrlhf.report.samples import token_texts
from fastrlhf.tools.turn_labels import turn_labels
from fastrlhf.types import Example
from tests.data import vocabularies
from tests.data.chat_templates import CHATML, TEMPLATES

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CONVERSATION = [{"role": "system", "content": "s"}, USER, ANSWER, USER]


def labels(template, prompt, response=(), *, cut=0, skip=0):
    """Returns (label, text) of each turn of a conversation, without the first `skip` and the last `cut` tokens."""
    tokenizer = vocabularies.byte_level()
    tokenizer.chat_template = template
    renderer = Renderer(tokenizer=tokenizer, ends=(), day=date.today())
    example = Example(prompt=list(prompt), row=0)
    whole = [
        tokenizer.apply_chat_template([*prompt, *turns], tokenize=False, add_generation_prompt=ask)
        for turns, ask in (([], True), (response, False))
    ]
    texts = [whole[0], whole[1].removeprefix(whole[0]).removesuffix("\n") if response else ""]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    ids = [ids[0][skip:], ids[1][: len(ids[1]) - cut]]
    of_tokens = tuple(token_texts(tokenizer, one) for one in ids)
    found = turn_labels(renderer, example, list(response), of_tokens)
    merged: list[tuple[str, str]] = []
    for label, text in zip(found, [*of_tokens[0], *of_tokens[1]], strict=bool(found)):
        if merged and merged[-1][0] == label:
            merged[-1] = label, merged[-1][1] + text
        else:
            merged.append((label, text))
    return merged


def test_every_token_belongs_to_the_turn_in_which_it_begins():
    assert labels(CHATML, CONVERSATION, [ANSWER]) == [
        ("turn 1 system", "<|im_start|>system\ns<|im_end|>\n"),
        ("turn 2 user", "<|im_start|>user\na<|im_end|>\n"),
        ("turn 3 assistant", "<|im_start|>assistant\nb<|im_end|>\n"),
        ("turn 4 user", "<|im_start|>user\na<|im_end|>\n"),
        ("turn 5 assistant", "<|im_start|>assistant\nb<|im_end|>"),
    ]


def test_a_prompt_ends_in_the_generation_prompt():
    assert labels(CHATML, [USER]) == [
        ("turn 1 user", "<|im_start|>user\na<|im_end|>\n"),
        ("generation prompt", "<|im_start|>assistant\n"),
    ]


def test_a_response_may_be_cut():
    assert labels(CHATML, [USER], [{"role": "assistant", "content": "bcd"}], cut=2)[1:] == [
        ("turn 2 assistant", "<|im_start|>assistant\nbc"),
    ]


def test_a_response_of_several_turns_names_the_functions_it_calls():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    turns = [call, {"role": "tool", "content": "2"}, ANSWER]
    assert [label for label, _ in labels(CHATML, [USER], turns)] == [
        *("turn 1 user", "turn 2 assistant (calls add)", "turn 3 tool", "turn 4 assistant"),
    ]


def test_turns_that_the_template_renders_differently_once_others_follow_share_a_label():
    found = labels(TEMPLATES["reasoning of the last turn alone"], CONVERSATION, [ANSWER])
    assert [label for label, _ in found] == [
        "turn 1 system",
        "turn 2 user",
        "turns 3 assistant, 4 user",
        "turn 5 assistant",
    ]
    found = labels(TEMPLATES["a second end"], [USER, ANSWER, USER], [ANSWER])
    assert [label for label, _ in found] == ["turns 1 user, 2 assistant, 3 user, 4 assistant"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_labels_cover_every_token_of_every_template(name):
    last = CONVERSATION[1:]
    text = "".join(text for _, text in labels(TEMPLATES[name], last, [ANSWER]))
    assert "b" in text
    assert labels(TEMPLATES[name], last, [ANSWER])[-1][0].endswith("4 assistant")


def test_a_prompt_whose_beginning_was_cut_has_no_labels():
    assert labels(CHATML, CONVERSATION, [ANSWER], skip=3) == []
