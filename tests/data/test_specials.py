import pytest

from fastrlhf.data.specials import add_ends, end_ids, generation_ends, special_ids, split_end, template_end
from tests.data.words import BOS, EOS, UNK, A, words


def test_the_padding_id_differs_from_the_eos_or_is_absent():
    assert special_ids(words()) == special_ids(words(pad_token="<eos>")) == (EOS, None)
    assert special_ids(words(pad_token="<bos>")) == (EOS, BOS)
    with pytest.raises(ValueError, match="no EOS token"):
        special_ids(words(eos_token=None))


def test_ends_are_listed_once_after_the_eos_and_only_if_special(caplog):
    tokenizer = words()
    add_ends(tokenizer, [UNK, EOS, UNK, A], "here")
    add_ends(tokenizer, [UNK], "there")
    assert end_ids(tokenizer) == (EOS, UNK)
    assert [record.getMessage() for record in caplog.records] == [
        f"here: the end token {A} is not a special token of the tokenizer, so it is ignored"
    ]


def test_without_a_generation_config_there_are_no_further_ends(tmp_path):
    assert generation_ends(str(tmp_path)) == []
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert generation_ends(str(tmp_path)) == [7]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 3]}')
    assert generation_ends(str(tmp_path)) == [7, 3]
    (tmp_path / "generation_config.json").write_text("{}")
    assert generation_ends(str(tmp_path)) == []


@pytest.mark.parametrize(
    ("after", "end"),
    [("<unk>\n", UNK), ("\n<unk>", UNK), ("<unk><eos>", UNK), (" stop <unk>", None), ("", None), ("<eos>", EOS)],
)
def test_the_end_of_a_turn_is_the_special_token_right_after_an_answer(after, end):
    template = "{% for m in messages %}{{ m.content }}" + after + "{% endfor %}"
    assert template_end(words(), template) == end


def test_a_template_that_refuses_the_question_has_no_end():
    assert template_end(words(), "{{ raise_exception('no') }}") is None
    assert template_end(words(), "{{ messages[5].content + 1 }}") is None


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("yes", ("yes", "", "")),
        (" yes \n", (" yes \n", "", "")),
        ("yes</s>", ("yes", "</s>", "")),
        ("yes </s> \n", ("yes ", "</s>", " \n")),
        ("yes<|end|>\n</s>", ("yes", "<|end|>", "\n</s>")),
        ("yes</s></s>", ("yes", "</s>", "</s>")),
        ("a</s> b</s>", ("a</s> b", "</s>", "")),
        ("</s>", ("", "</s>", "")),
        ("", ("", "", "")),
    ],
)
def test_a_response_is_split_before_the_end_tokens_at_its_end(text, parts):
    assert split_end(text, ["</s>", "<|end|>"]) == parts
    assert "".join(parts) == text
