import gzip
import json

import pytest

from fastrlhf.data.specials import end_ids
from fastrlhf.data.tokenizer import load_tokenizer, num_token_ids, resolve_chat_template, token_ids
from fastrlhf.data.tokens import tokenize_examples
from fastrlhf.types import Example
from tests import tiny
from tests.data.words import ASSISTANT, EOS, HUMAN, UNK, WORDS, A, B, words

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def ids(example: Example, tokenizer) -> tuple:
    (row,) = tokenize_examples([example], tokenizer, max_length=100).examples
    return row.prompt, row.chosen, row.rejected


def test_a_saved_tokenizer_comes_back_with_its_eos(tmp_path):
    words().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).eos_token_id == EOS


def test_a_saved_tokenizer_without_eos_needs_the_flag(tmp_path):
    words(eos_token=None).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}: it has no EOS token.*eos_token"):
        load_tokenizer(str(tmp_path))
    assert load_tokenizer(str(tmp_path), eos_token="<eos>").eos_token_id == EOS


def test_an_eos_outside_the_vocabulary_is_added_at_its_end(tmp_path):
    words(eos_token=None).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), eos_token="<stop>")
    assert (tokenizer.eos_token_id, len(tokenizer)) == (len(WORDS), len(WORDS) + 1)
    assert ids(Example(prompt="a", chosen="b<stop>", rejected="a", row=0), tokenizer) == ([A], [B, 14], [A, 14])


def test_an_eos_that_would_get_the_id_of_another_token_is_refused(tmp_path):
    """transformers would give the new token the id len(tokenizer), which in this tokenizer is the id of w26."""
    tiny.tokenizer({4, 17, 30}).save_pretrained(tmp_path)
    told = "^eos_token: '<stop>' would be added with id 29, the id of 'w26', because some ids below the tokenizer's"
    with pytest.raises(ValueError, match=told):
        load_tokenizer(str(tmp_path), eos_token="<stop>")
    assert load_tokenizer(str(tmp_path), eos_token="w3").eos_token_id == 6


def test_token_ids_are_the_ids_that_have_a_token():
    tokenizer = tiny.tokenizer({4, 17, 30})
    assert token_ids(tokenizer) == sorted(set(range(tiny.VOCAB)) - {4, 17, 30})
    assert (len(tokenizer), num_token_ids(tokenizer)) == (tiny.VOCAB - 3, tiny.VOCAB)
    assert token_ids(tiny.tokenizer({tiny.VOCAB - 1})) == list(range(tiny.VOCAB - 1))


def test_ids_that_only_get_vocab_lacks_have_a_token(monkeypatch):
    """Covers tokenizers whose get_vocab lacks special tokens, or tokens whose bytes are not whole characters."""
    tokenizer = tiny.tokenizer({30})
    vocab = tokenizer.get_vocab()
    lacking = {token: i for token, i in vocab.items() if i not in (tiny.EOS, 8, 31)}
    monkeypatch.setattr(tokenizer, "get_vocab", lambda: lacking)
    monkeypatch.setattr(type(tokenizer), "__len__", lambda _: 32)
    assert token_ids(tokenizer) == [*range(30), 31]
    own = tokenizer.convert_ids_to_tokens

    def convert(token):
        if token == 30:
            raise IndexError("piece id is out of range")
        return own(token)

    monkeypatch.setattr(tokenizer, "convert_ids_to_tokens", convert)
    assert token_ids(tokenizer) == [*range(30), 31]
    monkeypatch.setattr(tokenizer, "convert_ids_to_tokens", lambda token: own(token) or "<unk>")
    assert token_ids(tokenizer) == [*range(30), 31]


def test_the_chat_template_flag_is_saved_with_the_tokenizer(tmp_path):
    words().save_pretrained(tmp_path)
    load_tokenizer(str(tmp_path), chat_template="hh").save_pretrained(tmp_path / "again")
    again = load_tokenizer(str(tmp_path / "again"))
    turns = {"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b"}]}
    assert ids(Example(**turns, row=0), again) == ([HUMAN, A, ASSISTANT], [B, EOS], None)


def test_a_chat_template_file_may_have_any_name_and_a_byte_order_mark_but_must_be_utf8(tmp_path):
    file = tmp_path / "a{1}[b].jinja"
    file.write_text("{{ 1 }}", encoding="utf-8-sig")
    assert resolve_chat_template(str(file), words()) == "{{ 1 }}"
    file.write_text("{{ 1 }}", encoding="utf-16")
    with pytest.raises(ValueError, match=r"^chat_template: .*\.jinja is not UTF-8 \(.*\); convert it$"):
        resolve_chat_template(str(file), words())


@pytest.mark.parametrize("name", ["/nowhere/a", "./nowhere", "a/b/c"])
def test_a_missing_folder_is_never_searched_on_the_hub(name):
    with pytest.raises(ValueError, match=f"tokenizer {name}: no such folder"):
        load_tokenizer(name)


def test_a_folder_without_a_tokenizer_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match=f"tokenizer {tmp_path}: no tokenizer found") as caught:
        load_tokenizer(str(tmp_path))
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_tokenizer_may_be_one_file(tmp_path, suffix):
    path = tmp_path / f"tokenizer.json{suffix}"
    content = tiny.tokenizer().backend_tokenizer.to_str().encode()
    path.write_bytes(gzip.compress(content) if suffix else content)
    loaded = load_tokenizer(str(path), eos_token="<eos>")
    assert loaded("w3 w0")["input_ids"] == tiny.tokenizer()("w3 w0")["input_ids"]
    assert loaded.eos_token_id == tiny.EOS


def test_an_invalid_tokenizer_file_is_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{\n nonsense")
    with pytest.raises(ValueError, match=r"tokenizer\.json.*line 2 is not JSON"):
        load_tokenizer(str(path), eos_token="<eos>")


def test_responses_may_end_in_every_special_id_of_the_generation_config(tmp_path, caplog):
    words().save_pretrained(tmp_path)
    assert end_ids(load_tokenizer(str(tmp_path))) == (EOS,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [UNK, A, EOS]}))
    assert end_ids(load_tokenizer(str(tmp_path))) == (EOS, UNK)
    assert f"generation_config.eos_token_id: the end token {A} is not a special token" in caplog.text


def test_the_generation_config_is_read_from_the_model_folder(tmp_path):
    words().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": UNK}))
    loaded = load_tokenizer(str(tmp_path / "tokenizer"), model=str(tmp_path / "model"))
    assert end_ids(loaded) == (EOS, UNK)


def test_the_end_of_turn_of_the_template_is_an_end(tmp_path):
    tokenizer = words()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(tmp_path)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_ids(load_tokenizer(str(tmp_path))) == (EOS,)
    assert end_ids(load_tokenizer(str(tmp_path), chat_template=CHATML)) == (EOS, end)
    assert end_ids(load_tokenizer(str(tmp_path), chat_template=CHATML, eos_token="<|im_end|>")) == (end,)


def test_an_invalid_model_configuration_beside_the_tokenizer_is_one_line(tmp_path):
    tiny.save_policy(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_attention_heads": 5}))
    with pytest.raises(ValueError, match=r"^tokenizer .*: Class validation error .* attention heads \(5\)\.$"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(("model_type", "differs"), [("qwen2", True), ("llama", False)])
def test_text_is_encoded_as_the_stored_tokenizer_encodes_it(model_type, differs, tmp_path, caplog):
    """AutoTokenizer builds a Qwen2 tokenizer for every folder whose model_type is qwen2. This tokenizer would encode
    the text of the test to no tokens."""
    tiny.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with caplog.at_level("WARNING", "fastrlhf"):
        tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer("w5 w6")["input_ids"] == tiny.tokenizer()("w5 w6")["input_ids"] == [8, 9]
    assert tokenizer.eos_token_id == tiny.EOS
    message = (
        f"tokenizer {tmp_path}: the class Qwen2Tokenizer of transformers encodes text differently from its "
        "tokenizer.json; the file is used"
    )
    assert [record.getMessage() for record in caplog.records] == [message] * differs
