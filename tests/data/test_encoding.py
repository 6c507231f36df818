from functools import cache

import pytest

from fastrlhf.data.encoding import decode, encode, encode_inside, encode_prompts, is_lossless, reads_back
from fastrlhf.data.tokens import tokenize_examples
from fastrlhf.types import Example
from tests.data import vocabularies
from tests.data.words import words

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

KINDS = {
    "byte level": cache(vocabularies.byte_level),
    "SentencePiece": cache(lambda: vocabularies.sentencepiece(legacy=False)),
    "SentencePiece, legacy": cache(lambda: vocabularies.sentencepiece(legacy=True)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["def f", " def f", "\ndef f", "  f", "Yes.", "\u00e9", "x</s>", "f\n\n"])
def test_a_text_after_a_prompt_decodes_unchanged(kind, text):
    tokenizer = KINDS[kind]()
    ((prompt,), _), (ids,) = encode_prompts(["Write code:\n"], tokenizer), encode_inside([text], tokenizer)
    assert decode([*prompt, *ids], tokenizer) == decode(prompt, tokenizer) + text
    assert reads_back(prompt, ids, text, tokenizer)
    assert not reads_back(prompt, ids, text + "x", tokenizer)


@pytest.mark.parametrize("legacy", [False, True])
def test_sentencepiece_puts_no_space_before_a_response(legacy):
    tokenizer = vocabularies.sentencepiece(legacy=legacy)
    tokens = tokenizer.convert_ids_to_tokens
    assert tokens(encode(["def f"], tokenizer)[0]) == ["\u2581def", "\u2581f"]
    assert tokens(encode_inside(["def f"], tokenizer)[0]) == ["def", "\u2581f"]
    assert tokens(encode_inside([" def f"], tokenizer)[0]) == ["\u2581def", "\u2581f"]


def test_only_byte_level_vocabularies_count_as_lossless():
    assert {kind: is_lossless(make()) for kind, make in KINDS.items()} == dict.fromkeys(KINDS, False) | {
        "byte level": True
    }
    assert not is_lossless(words())


@pytest.mark.parametrize("legacy", [False, True])
def test_a_prompt_gets_one_bos(legacy):
    tokenizer = vocabularies.sentencepiece(legacy=legacy)
    (bare, own, two), present = encode_prompts(["def", "<s>def", "<s><s>def"], tokenizer)
    bos = tokenizer.bos_token_id
    assert [ids.count(bos) for ids in (bare, own, two)] == [1, 1, 3]
    assert present == 1
    report = tokenize_examples(
        [Example(prompt=text, chosen="f", row=i) for i, text in enumerate(["<s>def", "def"])], tokenizer, max_length=50
    ).report
    assert report.bos_present == 1
    assert "1 prompts begin with BOS themselves and get no second one" in report.summary()


def test_responses_that_do_not_decode_to_their_text_are_counted():
    rows = [Example(prompt="a", chosen=" b", row=0), Example(prompt="a", chosen="b\n\nc", row=1)]
    report = tokenize_examples(rows, words(), max_length=50).report
    assert report.unlike_text == 2  # decoding puts a space before the EOS, as before a word
    assert (
        "with this tokenizer (first: row 0, ' b<eos>' becomes ' b <eos>', the model learns the decoded text)"
        in report.summary()
    )
    assert "2 responses do not decode to their original text" in report.summary()
    assert tokenize_examples(rows, vocabularies.byte_level(), max_length=50).report.unlike_text == 0
    assert tokenize_examples(rows, vocabularies.sentencepiece(legacy=True), max_length=50).report.unlike_text == 0


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    prompt=st.text("def f\n:.<\u00e9\U0001f600", min_size=1, max_size=12),
    response=st.text("def f\n:.<\u00e9\U0001f600", max_size=12),
)
def test_any_response_after_any_prompt_decodes_unchanged(kind, prompt, response):
    tokenizer = KINDS[kind]()
    ((before,), _), (ids,) = encode_prompts([prompt], tokenizer), encode_inside([response], tokenizer)
    assert reads_back(before, ids, response, tokenizer)
