from dataclasses import replace
from datetime import date
from functools import cache

import pytest

from fastrlhf.data.rows import UnusableRow
from fastrlhf.data.templates import Renderer, reads_clock
from fastrlhf.data.tokens import tokenize_examples
from fastrlhf.data.turns import from_first_answer
from fastrlhf.types import Example, Message
from tests.data.chat_templates import CHATML, TEMPLATES, TOOLS
from tests.data.vocabularies import byte_level as make_byte_level

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

byte_level = cache(make_byte_level)
ENDS = ("</s>", "<|im_end|>")
DAY = date(2026, 11, 30)
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str, **others) -> Message:
    return {"role": "assistant", "content": text, **others}


def example(prompt: list[Message], answer: list[Message], **fields) -> Example:
    return Example(prompt=prompt, reference=answer, row=fields.pop("row", 0), **fields)


def pieces(row: Example, template: str, **fields) -> tuple[str, list[tuple[str, bool]]]:
    renderer = Renderer(tokenizer=byte_level(), ends=ENDS, template=template, day=DAY, **fields)
    rendered = renderer.render(row, {"reference": row.reference})
    return rendered.prompt, [(piece.text, piece.trained) for piece in rendered.responses["reference"]]


def whole(row: Example, template: str) -> str:
    """Returns the ids of the whole conversation as rendered by transformers."""
    turns = [*row.prompt, *(row.reference or [])]
    template = template.replace("strftime_now('%d %b %Y')", "'30 Nov 2026'")
    return str(byte_level().apply_chat_template(turns, chat_template=template, tokenize=False, **row.template))


ROWS = {
    "one turn": example([user("f")], [assistant("def")]),
    "a system turn": example([{"role": "system", "content": "s"}, user("f")], [assistant(" def ")]),
    "several turns": example([user("f"), assistant("d"), user("e")], [assistant("def")]),
    "a response of three turns": example([user("f")], [assistant("d"), user("e"), assistant("def")]),
    "reasoning": example([user("f")], [assistant("def", reasoning_content="because")]),
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("row", ROWS)
def test_prompt_and_pieces_equal_the_rendering_of_transformers(template, row):
    expected = whole(ROWS[row], TEMPLATES[template])
    prompt, parts = pieces(ROWS[row], TEMPLATES[template])
    assert prompt + "".join(text for text, _ in parts) == expected
    assert sum(trained for _, trained in parts) == sum(t["role"] == "assistant" for t in ROWS[row].reference or [])


def test_in_a_response_of_three_turns_only_assistant_turns_are_trained_with_their_ends():
    _, parts = pieces(ROWS["a response of three turns"], CHATML)
    between = "\n<|im_start|>user\ne<|im_end|>\n<|im_start|>assistant\n"
    assert parts == [("d<|im_end|>", True), (between, False), ("def<|im_end|>\n", True)]


def test_templates_that_rewrite_earlier_turns_are_rendered_for_each_turn():
    row = example(
        [user("f")], [assistant("d", reasoning_content="r"), user("e"), assistant("def", reasoning_content="x")]
    )
    _, parts = pieces(row, TEMPLATES["reasoning of the last turn alone"])
    assert [text for text, trained in parts if trained] == ["d<|im_end|>", "<think>x</think>def<|im_end|>\n"]


def test_generation_markers_define_what_is_trained_if_turns_cannot_be_found():
    marked = TEMPLATES["generation markers"].replace(
        "{{ m.content }}<|im_end|>{% endgen", "{{ m.content + '!' * (messages | length) }}<|im_end|>{% endgen"
    )
    row = example([user("f")], [assistant("d"), user("e"), assistant("def")])
    _, parts = pieces(row, marked)
    assert [text for text, trained in parts if trained] == ["d!!!!<|im_end|>", "def!!!!<|im_end|>"]


def test_tool_calls_reach_the_template_complete():
    answer = [CALL, {"role": "tool", "content": "2", "name": "add"}, assistant("It is 2.")]
    row = example([user("1 + 1?")], answer, template={"tools": [TOOL]})
    prompt, parts = pieces(row, TOOLS)
    assert '"name": "add"' in prompt
    assert parts == [
        ('[add {"a": 1}]<|im_end|>', True),
        ("\n<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\n", False),
        ("It is 2.<|im_end|>\n", True),
    ]


def test_empty_content_is_not_rendered_as_none():
    row = example([user("f"), CALL, {"role": "tool", "content": "2"}], [assistant("def")])
    prompt, _ = pieces(row, TOOLS.replace("m.content or ''", "m.content"))
    assert "None" not in prompt
    assert "[add" in prompt


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (example([user("f"), CALL], [assistant("d")]), "template_ignores_tool_calls"),
        (example([user("f")], [assistant("d")], template={"tools": [TOOL]}), "template_ignores_tools"),
        (
            example([user("f")], [assistant("d")], template={"documents": [{"text": "long"}]}),
            "template_ignores_documents",
        ),
    ],
)
def test_content_that_a_template_drops_is_refused_by_name(row, reason):
    with pytest.raises(UnusableRow, match=reason):
        pieces(row, CHATML)


def test_template_arguments_of_a_row_override_those_of_the_run():
    row = example([user("f")], [assistant("d")], template={"chat_template_kwargs": {"mode": "row"}})
    renderer = Renderer(
        tokenizer=byte_level(),
        ends=ENDS,
        template="{{ mode }}{{ other }}" + CHATML,
        kwargs={"mode": "run", "other": "!"},
    )
    assert renderer.render(row, {}).prompt.startswith("row!<|im_start|>")
    assert renderer.render(replace(row, template={}), {}).prompt.startswith("run!<|im_start|>")


def test_a_template_that_writes_the_date_gets_the_date_of_the_run():
    prompt, _ = pieces(ROWS["one turn"], TEMPLATES["the day"])
    assert prompt.startswith("30 Nov 2026\n<|im_start|>")
    tokenizer = make_byte_level()
    assert not reads_clock(tokenizer)
    tokenizer.chat_template = TEMPLATES["the day"]
    assert reads_clock(tokenizer)


def ids(rows: list[Example], template: str, **arguments):
    return tokenize_examples(rows, byte_level(), max_length=200, chat_template=template, **arguments)


@pytest.mark.parametrize("name", ["ChatML", "without a newline", "a second end", "BOS first"])
def test_a_response_ends_with_exactly_one_end_of_turn(name):
    tokenizer, found = byte_level(), ids([ROWS["one turn"]], TEMPLATES[name])
    (row,) = found.examples
    assert row.reference is not None
    assert tokenizer.convert_ids_to_tokens(row.reference) == ["def", "<|im_end|>"]
    assert row.trained is None
    assert (found.report.eos_present, found.report.eos_added, found.report.other_end) == (1, 0, 1)
    assert "1 end in <|im_end|> and get no </s> behind it" in found.report.summary()


def test_the_suffix_of_a_turn_is_trained_only_on_request():
    tokenizer = byte_level()
    (plain,) = ids([ROWS["a response of three turns"]], CHATML).examples
    (row,) = ids([ROWS["a response of three turns"]], CHATML, train_suffix=True).examples
    assert row.reference is not None
    assert plain.reference is not None
    tokens = tokenizer.convert_ids_to_tokens(row.reference)
    assert tokenizer.decode(row.reference) == tokenizer.decode(plain.reference) + "\n"
    newline = "\u010a"
    trained = [tokens[i] for i in row.scored("reference") or ()]
    assert trained == ["d", "<|im_end|>", newline, "def", "<|im_end|>", newline]
    assert [tokens[i] for i in plain.scored("reference") or ()] == ["d", "<|im_end|>", "def", "<|im_end|>"]


def test_a_response_that_starts_at_the_first_assistant_turn_contains_all_of_them():
    row = from_first_answer(ROWS["several turns"], "reference")
    assert (row.prompt, len(row.reference or ())) == ([user("f")], 3)
    report = ids([row], CHATML).report
    assert report.num_trained == 4  # d and def, each with its end token
    assert from_first_answer(ROWS["one turn"], "reference") == ROWS["one turn"]


def test_texts_changed_by_the_template_are_counted_and_refused_above_a_limit():
    cutting = CHATML.replace("m.content }}", "m.content.split('</think>')[-1].strip() }}")
    rows = [example([user("f")], [assistant(text)], row=i) for i, text in enumerate(("def", "no</think>def", " def"))]
    report = ids(rows, cutting).report
    assert report.changed == {"text_lost": 1, "white_space_trimmed": 1}
    assert "text_lost (first: row 1), 1 rows with white_space_trimmed (first: row 2)" in report.summary()
    with pytest.raises(ValueError, match=r"refuses or changes 2 of 3 rows .*max_bad_fraction 0.5"):
        ids(rows, cutting, max_bad_fraction=0.5)


def test_a_row_that_the_template_refuses_is_counted_and_the_others_stay():
    refusing = "{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}" + CHATML
    report = ids([ROWS["one turn"], replace(ROWS["several turns"], row=4)], refusing, max_bad_fraction=0.5).report
    assert (report.num_kept, report.dropped) == (1, {"template_refuses": 1})
    assert report.firsts["template_refuses"] == "row 4, the chat template refuses the turns: too long"


turns = st.lists(
    st.tuples(st.sampled_from(["user", "assistant", "system", "tool"]), st.text("def \n<|:", max_size=6)), max_size=4
)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
@hypothesis.given(prompt=turns, middle=turns, name=st.sampled_from(sorted(TEMPLATES)))
def test_a_conversation_of_any_turns_is_rendered_as_transformers_does_or_refused(prompt, middle, name):
    made = [{"role": role, "content": text} for role, text in prompt]
    answer = [assistant("d"), *({"role": role, "content": text} for role, text in middle), assistant("def")]
    row = example([*made, user("f")], answer)
    try:
        start, parts = pieces(row, TEMPLATES[name])
    except UnusableRow:
        return
    assert start + "".join(text for text, _ in parts) == whole(row, TEMPLATES[name])
    assert sum(trained for _, trained in parts) == sum(turn["role"] == "assistant" for turn in answer)
