import gzip
import os
from pathlib import Path

import pytest

from fastrlhf.data.examples import load_examples
from fastrlhf.data.tokenizer import load_tokenizer, resolve_chat_template
from fastrlhf.data.tokens import tokenize_examples
from fastrlhf.types import Example, Message
from tests.data.vocabularies import byte_level
from tests.data.words import ASSISTANT, BOS, END, EOS, HUMAN, IS_ASSISTANT, IS_USER, A, B, C, D, E, F, words

TURN_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }} [end]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
EOS_TEMPLATE = TURN_TEMPLATE.replace("[end]", "<eos>")
real_data = pytest.mark.skipif("FASTRLHF_DATA" not in os.environ, reason="FASTRLHF_DATA is not a folder with samples")


def turn(role: str, content: str) -> list[Message]:
    return [{"role": role, "content": content}]


def example(prompt: str, row: int = 0, **responses: str) -> Example:
    return Example(prompt=prompt, row=row, **responses)


def chat(prompt: str, row: int = 0, **responses: str) -> Example:
    turns = {name: turn("assistant", text) for name, text in responses.items()}
    return Example(prompt=turn("user", prompt), row=row, **turns)


def ids(examples: list[Example], tokenizer=None, max_length: int = 100, **arguments) -> list[tuple]:
    result = tokenize_examples(examples, tokenizer or words(), max_length=max_length, **arguments)
    return [(e.prompt, e.chosen, e.rejected, e.reference) for e in result.examples]


def report(examples: list[Example], tokenizer=None, max_length: int = 100, **arguments):
    return tokenize_examples(examples, tokenizer or words(), max_length=max_length, **arguments).report


# The EOS and BOS rules. -----------------------------------------------------


def test_prompt_and_responses_are_tokenised_separately_and_responses_end_in_eos():
    pair = example("a b", row=7, chosen=" c", rejected=" d e", reference="f")
    assert ids([pair]) == [([A, B], [C, EOS], [D, E, EOS], [F, EOS])]
    assert ids([pair], fields=("reference",)) == [([A, B], None, None, [F, EOS])]
    assert tokenize_examples([pair], words(), max_length=9).examples[0].row == 7


def test_an_eos_in_the_text_is_not_added_again_and_both_kinds_are_counted():
    rows = [example("a", chosen="c <eos>", rejected="d <eos> \n"), example("a", chosen="c<eos><eos>", rejected="d")]
    assert ids(rows) == [([A], [C, EOS], [D, EOS], None)] * 2
    counts = report(rows)
    assert (counts.eos_added, counts.eos_present) == (1, 3)
    assert "3 of 4 responses end in EOS, added to 1" in counts.summary()


def test_white_space_before_a_response_is_counted_if_it_would_join_the_response():
    rows = [example("a ", chosen="f"), example("a\t", chosen="f"), example("a\n", chosen="f"), example("a", chosen="f")]
    template = TURN_TEMPLATE.replace("[assistant]{% endif", "[assistant] {% endif").replace("] {{", "]{{ ' ' +")
    counts = report(
        [*rows, chat("a", chosen="f"), example("b" * 99 + " ", chosen="f")], byte_level(), chat_template=template
    )
    assert counts.space_ended == 3  # the generation prompt of the template also ends in a space
    assert "white space" not in report(rows[1:], byte_level()).summary()
    assert report(rows).space_ended == 0  # no token of this vocabulary contains a space


def test_a_space_at_the_end_of_a_prompt_does_not_merge_with_the_response():
    tokenizer = byte_level()
    together = tokenizer("a: f")["input_ids"]
    (row,) = tokenize_examples([example("a: ", chosen="f")], tokenizer, max_length=9).examples
    assert len(together) == 3  # " f" is one token, which TRL counts as part of the response
    assert row.prompt[:2] == together[:2]
    assert [tokenizer.decode([token]) for token in (*row.prompt[2:], *row.chosen)] == [" ", "f", "</s>"]


def test_a_prompt_gets_the_bos_of_its_tokenizer_and_never_an_eos():
    row = example("a b", chosen="c", rejected="d")
    expected = [([BOS, A, B], [C, EOS], [D, EOS], None)]
    assert ids([row], words("<bos> $A", bos_token="<bos>")) == expected
    assert ids([row], words("<bos> $A <eos>", bos_token="<bos>")) == expected
    assert ids([row], words("$A <eos>")) == [([A, B], [C, EOS], [D, EOS], None)]


def test_an_eos_that_equals_pad_and_bos_changes_nothing():
    row = example("a", chosen="b")
    assert ids([row], words(pad_token="<eos>", bos_token="<eos>")) == ids([row]) == [([A], [B, EOS], None, None)]


def test_a_tokenizer_without_eos_is_refused_and_the_flag_that_helps_is_named():
    with pytest.raises(ValueError, match=r"no EOS token.*eos_token"):
        ids([example("a", chosen="b")], words(eos_token=None))


def test_truncation_and_padding_stored_in_the_tokenizer_do_not_apply():
    tokenizer = words(pad_token="<eos>")
    tokenizer.backend_tokenizer.enable_truncation(1)
    tokenizer.backend_tokenizer.enable_padding(length=7)
    assert ids([example("a b c", chosen="d e f")], tokenizer) == [([A, B, C], [D, E, F, EOS], None, None)]


# Lengths. -------------------------------------------------------------------


def test_a_row_of_exactly_max_length_is_unchanged_in_every_mode():
    row = example("a b", chosen="c d")
    for mode in ("keep_start", "keep_end", "drop"):
        counts = report([row], max_length=5, truncation_mode=mode)
        assert (counts.truncated, counts.dropped, counts.eos_added) == (0, {}, 1)


def test_keep_start_cuts_the_end_of_each_response_that_is_too_long():
    row = example("a b", chosen="c d e", rejected="f")
    assert ids([row], max_length=4) == [([A, B], [C, D], [F, EOS], None)]
    counts = report([row], max_length=4)
    assert (counts.responses_cut, counts.prompts_cut, counts.eos_added) == (1, 0, 1)


def dropped_first(counts):
    """Reason -> the first row that was dropped for it."""
    return {reason: counts.firsts[reason] for reason in counts.dropped}


def test_keep_start_drops_a_row_whose_prompt_fills_max_length():
    rows = [example("a b c", row=4, chosen="d"), example("a b", row=5, chosen="d")]
    assert ids(rows, max_length=3) == [([A, B], [D], None, None)]
    counts = report(rows, max_length=3)
    assert (counts.dropped, dropped_first(counts)) == (
        {"prompt_fills_max_length": 1},
        {"prompt_fills_max_length": "row 4"},
    )
    assert "dropped 1 for prompt_fills_max_length (first: row 4)" in counts.summary()


def test_keep_end_cuts_the_beginning_of_the_prompt_for_the_longest_response():
    row = example("a b c d", chosen="e", rejected="e f")
    assert ids([row], max_length=5, truncation_mode="keep_end") == [([C, D], [E, EOS], [E, F, EOS], None)]
    counts = report([row], max_length=5, truncation_mode="keep_end")
    assert (counts.responses_cut, counts.prompts_cut, counts.eos_added) == (0, 1, 2)


def test_keep_end_keeps_the_bos():
    tokenizer = words("<bos> $A", bos_token="<bos>")
    row = example("a b c d", chosen="e")
    assert ids([row], tokenizer, max_length=5, truncation_mode="keep_end") == [([BOS, C, D], [E, EOS], None, None)]


def test_keep_end_drops_a_row_whose_response_leaves_no_room_for_a_prompt():
    rows = [example("a", row=3, chosen="b c d"), example("a b", chosen="c")]
    counts = report(rows, max_length=4, truncation_mode="keep_end")
    assert dropped_first(counts) == {"response_fills_max_length": "row 3"}


def test_drop_drops_the_whole_row_if_one_response_is_too_long():
    rows = [example("a", chosen="b", rejected="c d e"), example("a", chosen="b", rejected="c")]
    assert ids(rows, max_length=4, truncation_mode="drop") == [([A], [B, EOS], [C, EOS], None)]
    assert report(rows, max_length=4, truncation_mode="drop").dropped == {"longer_than_max_length": 1}
    assert ids(rows, max_length=4, truncation_mode="drop", fields=("chosen",)) == [([A], [B, EOS], None, None)] * 2


def test_a_prompt_without_responses_fits_up_to_max_length():
    rows = [example("a b c"), example("a b")]
    assert ids(rows, max_length=3) == [([A, B, C], None, None, None), ([A, B], None, None, None)]
    assert report(rows, max_length=2).dropped == {"longer_than_max_length": 1}
    assert ids(rows, max_length=2, truncation_mode="keep_end")[0] == ([B, C], None, None, None)


def test_responses_that_tokens_cannot_tell_apart_are_dropped():
    unknown = example("a", row=1, chosen="x", rejected="y")
    cut = example("a", row=2, chosen="b c", rejected="b d")
    kept = example("a", chosen="b", rejected="c")
    counts = report([kept, unknown, cut], max_length=2)
    assert (counts.dropped, dropped_first(counts)) == (
        {"chosen_equals_rejected": 2},
        {"chosen_equals_rejected": "row 1"},
    )
    assert (counts.rows_cut, counts.rows_too_long) == (3, 3)


def test_rows_without_tokens_and_responses_past_their_eos_are_dropped():
    rows = [
        example("a", chosen="b"),
        example("a", row=1, chosen=" <eos>"),
        example(" ", row=2, chosen="b"),
        example("a", row=3, chosen="b <eos> c"),
    ]
    assert dropped_first(report(rows)) == {
        "empty_response": "row 1",
        "empty_prompt": "row 2",
        "eos_inside_response": "row 3",
    }


def test_every_row_and_every_response_is_kept_or_counted_once():
    letters = list("abcdefabcdef")
    rows = [
        example(" ".join(letters[:p]), row=p, chosen=" ".join(letters[:c]), rejected=" ".join(letters[c : c + r]))
        for p in range(5)
        for c in range(5)
        for r in range(5)
    ]
    for mode in ("keep_start", "keep_end", "drop"):
        result = tokenize_examples(rows, words(), max_length=6, truncation_mode=mode)
        counts = result.report
        assert counts.num_examples == len(rows) == counts.num_kept + sum(counts.dropped.values())
        responses = [ids for e in result.examples for ids in (e.chosen, e.rejected) if ids]
        assert len(responses) == 2 * counts.num_kept == counts.eos_added + counts.eos_present + counts.responses_cut
        assert sum(ids[-1] != EOS for ids in responses) == counts.responses_cut
        assert all(0 < len(e.prompt) <= 6 - len(ids) for e in result.examples for ids in (e.chosen, e.rejected) if ids)


def test_dropping_every_row_is_an_error_with_the_counts():
    with pytest.raises(ValueError, match=r"no row is left.*dropped 2 for prompt_fills_max_length"):
        ids([example("a b", chosen="c")] * 2, max_length=2)
    with pytest.raises(ValueError, match=r"^there are no rows to train or evaluate on; give at least one"):
        ids([])


def test_a_template_that_refuses_every_row_is_named_as_the_cause():
    turns = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    rows = [Example(prompt=turns, reference=[{"role": "assistant", "content": "c"}], row=0)]
    told = (
        r"^chat_template: no row is left after tokenising; give another template: .*the hh template has no role system"
    )
    with pytest.raises(ValueError, match=told):
        tokenize_examples(rows, words(), max_length=9, truncation_mode="keep_start", chat_template="hh")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_length": 1}, "max_length: 1"),
        ({"truncation_mode": "keep"}, "truncation_mode: 'keep' is not one of keep_start"),
        ({"fields": ("completion",)}, "fields: .*'completion'"),
        ({"chat_template": "chatml"}, "chat_template: 'chatml' is not a Jinja"),
    ],
)
def test_a_wrong_argument_is_one_clear_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        ids([example("a", chosen="b")], **arguments)


# Conversations. -------------------------------------------------------------


def test_a_conversation_goes_through_the_template_of_the_tokenizer():
    tokenizer = words()
    tokenizer.chat_template = TURN_TEMPLATE
    expected = [([IS_USER, A, END, IS_ASSISTANT], [B, END, EOS], [C, END, EOS], None)]
    assert ids([chat("a", chosen="b", rejected="c")], tokenizer) == expected
    assert ids([chat("a", chosen="b", rejected="c")], chat_template=TURN_TEMPLATE) == expected


def test_a_template_that_closes_turns_with_eos_gives_exactly_one():
    tokenizer = words("<bos> $A <eos>", bos_token="<bos>")
    tokenizer.chat_template = EOS_TEMPLATE
    expected = [([IS_USER, A, EOS, IS_ASSISTANT], [B, EOS], None, None)]
    assert ids([chat("a", chosen="b")], tokenizer) == expected
    assert report([chat("a", chosen="b")], tokenizer).eos_present == 1


def test_the_hh_template_writes_human_assistant_text():
    prompt = [*turn("user", "a"), *turn("assistant", "b"), *turn("user", "c")]
    row = Example(prompt=prompt, chosen=turn("assistant", "d"), row=0)
    assert ids([row], chat_template="hh") == [([HUMAN, A, ASSISTANT, B, HUMAN, C, ASSISTANT], [D, EOS], None, None)]
    tokenizer = words()
    text = tokenizer.apply_chat_template(
        prompt, chat_template=resolve_chat_template("hh", tokenizer), tokenize=False, add_generation_prompt=True
    )
    assert text == "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"


def test_the_hh_template_writes_the_bos_that_the_tokenizer_would():
    tokenizer = words("<bos> $A", bos_token="<bos>")
    assert ids([chat("a", chosen="b")], tokenizer, chat_template="hh")[0][0] == [BOS, HUMAN, A, ASSISTANT]
    assert ids([chat("a", chosen="b")], words(bos_token="<bos>"), chat_template="hh")[0][0] == [HUMAN, A, ASSISTANT]


def test_text_and_conversations_may_be_mixed():
    tokenizer = words("<bos> $A", bos_token="<bos>")
    tokenizer.chat_template = TURN_TEMPLATE
    rows = [chat("a", chosen="b"), example("a", chosen="b"), chat("c", chosen="d")]
    assert [prompt for prompt, *_ in ids(rows, tokenizer)] == [
        [IS_USER, A, END, IS_ASSISTANT],
        [BOS, A],
        [IS_USER, C, END, IS_ASSISTANT],
    ]


def test_a_conversation_without_a_template_names_the_row_and_the_flag():
    with pytest.raises(ValueError, match=r'row 5 is a conversation .*no chat template; set chat_template.*"hh"'):
        ids([chat("a", row=5, chosen="b")])


def test_a_template_that_does_not_continue_the_prompt_is_an_error_with_the_first_difference():
    thinking = TURN_TEMPLATE.replace("%}[assistant]{%", "%}[assistant] <think>{%")
    with pytest.raises(
        ValueError, match=r"row 6, chosen: .*\[assistant\] <think>', the text with the response has .* b"
    ):
        ids([chat("a", row=6, chosen="b")], chat_template=thinking)


def test_a_template_that_refuses_a_role_names_the_row():
    row = Example(prompt=turn("system", "a"), chosen=turn("assistant", "b"), row=8)
    with pytest.raises(
        ValueError, match="row 8, the chat template refuses the turns: the hh template has no role system"
    ):
        ids([row], chat_template="hh")


# The real samples. ----------------------------------------------------------


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    packed = Path(os.environ["FASTRLHF_DATA"]) / "tokenizers" / "small_bpe2000_tokenizer.json.gz"
    (folder / "tokenizer.json").write_bytes(gzip.decompress(packed.read_bytes()))
    return folder


@real_data
def test_the_small_bpe_has_no_eos_and_gets_one_at_id_2000(bpe_folder):
    with pytest.raises(ValueError, match="no EOS token"):
        load_tokenizer(str(bpe_folder))
    tokenizer = load_tokenizer(str(bpe_folder), eos_token="<|endoftext|>")
    assert (tokenizer.eos_token_id, len(tokenizer)) == (2000, 2001)


@real_data
def test_real_posts_decode_to_the_text_they_were_made_from(bpe_folder):
    tokenizer = load_tokenizer(str(bpe_folder), eos_token="<|endoftext|>")
    path = Path(os.environ["FASTRLHF_DATA"]) / "tldr_sft.jsonl.gz"
    rows = load_examples(str(path), needs=("reference",), limit=200).examples
    result = tokenize_examples(rows, tokenizer, max_length=4096)
    assert (result.report.num_kept, result.report.eos_added) == (200, 200)
    for row, tokens in zip(rows, result.examples, strict=True):
        assert tokens.reference is not None
        assert tokenizer.decode(tokens.prompt + tokens.reference) == f"{row.prompt}{row.reference}<|endoftext|>"


@real_data
def test_real_conversations_decode_to_the_raw_text_that_they_came_from(bpe_folder):
    tokenizer = load_tokenizer(str(bpe_folder), eos_token="<|endoftext|>", chat_template="hh")
    path = Path(os.environ["FASTRLHF_DATA"]) / "hh_helpful_test.jsonl.gz"
    rows = load_examples(str(path), needs=("chosen", "rejected")).examples
    result = tokenize_examples(rows, tokenizer, max_length=8192)
    assert result.report.num_kept == 464
    for row, tokens in zip(rows, result.examples, strict=True):
        assert isinstance(row.chosen, list)
        assert tokens.chosen is not None
        marks = {"user": "Human", "assistant": "Assistant"}
        text = "".join(f"\n\n{marks[m['role']]}: {m['content']}" for m in [*row.prompt, *row.chosen])  # pyright: ignore
        assert tokenizer.decode(tokens.prompt + tokens.chosen) == f"{text}<|endoftext|>"
        assert str(tokenizer.decode(tokens.prompt)).endswith("\n\nAssistant:")
