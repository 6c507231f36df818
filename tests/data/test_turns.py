import pytest

from fastrlhf.data.rows import UnusableRow
from fastrlhf.data.turns import answer, answer_to, from_first_answer, is_empty, read_template_values, read_turns
from fastrlhf.types import Example

CALLS = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]


def test_a_turn_keeps_every_key_that_has_a_value():
    turn = {"role": "assistant", "content": None, "tool_calls": CALLS, "reasoning_content": "so", "name": None}
    assert read_turns([turn], "x") == [
        {"role": "assistant", "content": None, "tool_calls": CALLS, "reasoning_content": "so"}
    ]
    tool = {"role": "tool", "content": "2", "tool_call_id": "1", "name": "add"}
    assert read_turns([tool], "x") == [tool]
    assert read_turns(tool, "x") == [tool]


def test_text_parts_are_joined_and_other_parts_refused_by_name():
    parts = [{"type": "text", "text": "a"}, "b", {"type": "text", "text": " c"}]
    assert read_turns([{"role": "user", "content": parts}], "x") == [{"role": "user", "content": "ab c"}]
    for kind, reason in (("image", "has_image"), ("input_audio", "has_input_audio"), ("table", "wrong_type")):
        with pytest.raises(UnusableRow, match=f"{reason}: content of x has a part of type '{kind}'"):
            read_turns([{"role": "user", "content": [{"type": kind}]}], "x")
    with pytest.raises(UnusableRow, match="content of x is NoneType, not text"):
        read_turns([{"role": "user", "content": None}], "x")


def test_sharegpt_turns_are_converted_to_roles_and_contents():
    said = [("system", "s"), ("human", "q"), ("function_call", '{"name": "f", "arguments": {}}'), ("observation", "2")]
    turns = read_turns([{"from": who, "value": text} for who, text in [*said, ("gpt", "a")]], "x")
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "tool", "assistant"]
    assert turns[2]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    assert turns[4] == {"role": "assistant", "content": "a"}
    with pytest.raises(UnusableRow, match="unknown_role: x has a turn from 'narrator'"):
        read_turns([{"from": "narrator", "value": "a"}], "x")


def test_template_arguments_are_checked_and_parsed_from_json():
    assert read_template_values({"tools": '[{"name": "f"}]', "documents": None, "chat_template_kwargs": {"a": 1}}) == {
        "tools": [{"name": "f"}],
        "chat_template_kwargs": {"a": 1},
    }
    for row in ({"tools": "{"}, {"tools": {"name": "f"}}, {"chat_template_kwargs": [1]}):
        with pytest.raises(UnusableRow, match="wrong_type"):
            read_template_values(row)


def test_an_answer_begins_and_ends_with_the_assistant():
    turns = [{"role": role, "content": "x"} for role in ("assistant", "tool", "assistant")]
    assert answer(turns, "x") == turns
    assert answer_to([], "text", "x") == [{"role": "assistant", "content": "text"}]
    for wrong in ([], turns[:2], turns[1:]):
        with pytest.raises(UnusableRow, match="response_not_by_assistant"):
            answer(wrong, "x")


def test_a_call_of_a_tool_is_not_empty():
    assert not is_empty([{"role": "assistant", "content": None, "tool_calls": CALLS}])
    assert is_empty([{"role": "assistant", "content": " "}])


def test_text_is_not_accepted_as_turns():
    row = Example(prompt="a", reference="b", row=0)
    assert from_first_answer(row, "reference") is row


@pytest.mark.parametrize("calls", ["add", ["add"], {"name": "add"}])
def test_calls_of_tools_that_are_not_a_list_of_objects_are_refused(calls):
    with pytest.raises(UnusableRow, match="wrong_type: tool_calls of x must be a list of objects"):
        read_turns([{"role": "assistant", "content": "a", "tool_calls": calls}], "x")
