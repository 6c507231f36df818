import json

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from fastrlhf.config import DPOConfig
from fastrlhf.data.identity import difference, judge_tokenizer, require_same_tokenizer
from tests import tiny
from tests.data import vocabularies
from tests.data.chat_templates import CHATML


def changed(change) -> PreTrainedTokenizerFast:
    """Returns a copy of the byte-level tokenizer whose tokenizer.json the function `change` has edited in place."""
    tokenizer = vocabularies.byte_level()
    file = json.loads(tokenizer.backend_tokenizer.to_str())
    change(file)
    kept = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(file)), **kept)


def swap_ids(file):
    vocabulary = file["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def told(theirs, ours=None, *, conversations=False) -> tuple[str, str] | None:
    found = difference(ours or vocabularies.byte_level(), theirs, conversations=conversations)
    return None if found is None else (found.what, found.told)


def test_the_same_tokenizer_is_the_same_however_it_was_saved(tmp_path):
    ours = vocabularies.byte_level()
    ours.save_pretrained(tmp_path)
    assert told(PreTrainedTokenizerFast.from_pretrained(tmp_path)) is None
    assert told(changed(lambda file: None)) is None
    padded = changed(lambda file: file.update(padding={"strategy": "BatchLongest", "direction": "Left"} | PAD))
    padded.pad_token = "<unk>"
    assert told(padded) is None
    assert told(vocabularies.sentencepiece(legacy=True), vocabularies.sentencepiece(legacy=True)) is None


PAD = {"pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (swap_ids, "'a' has id 70 there and 69 in the run"),
        (lambda file: file["model"]["merges"].reverse(), "merge 0 is \u010a + \u010a there and d + e in the run"),
        (lambda file: file["model"]["merges"].pop(), "merge 3 is none there and \u010a + \u010a in the run"),
        (
            lambda file: file.update(normalizer={"type": "Lowercase"}),
            "'The quick brown fox, 1234567890 times!' becomes",
        ),
        (lambda file: file["pre_tokenizer"].update(add_prefix_space=True), "'The quick brown fox, 1234567890 times!'"),
    ],
    ids=["ids", "order of merges", "fewer merges", "normaliser", "prefix space"],
)
def test_other_ids_for_one_text_are_another_tokenizer(change, expected):
    what, message = told(changed(change)) or ("", "")
    assert what == "ids"
    assert message.startswith(expected)


def test_special_tokens_that_only_the_other_has_make_no_difference():
    theirs = vocabularies.byte_level()
    theirs.add_special_tokens({"pad_token": "[PAD]"})
    assert told(theirs) is None
    assert told(vocabularies.byte_level(), theirs) == (
        "ids",
        f"'[PAD]' has id None there and {len(theirs) - 1} in the run",
    )
    theirs = vocabularies.byte_level()
    theirs.add_tokens(["word"])  # an ordinary text may contain an added token
    assert told(theirs) == ("ids", f"'word' has id {len(theirs) - 1} there and None in the run")


def test_another_end_and_another_bos_are_found():
    theirs = vocabularies.byte_level()
    theirs.eos_token = "<|im_end|>"
    assert told(theirs) == ("end", "its responses end in '<|im_end|>', those of the run in '</s>'")
    ours = vocabularies.sentencepiece(legacy=True)
    theirs = vocabularies.sentencepiece(legacy=True)
    theirs.backend_tokenizer.post_processor = tiny.tokenizer().backend_tokenizer.post_processor
    assert told(theirs, ours) == ("ids", "a text begins with the ids [] there and [1] in the run")
    assert told(theirs, ours, conversations=True) is None  # for conversations only the template adds a BOS


def test_templates_count_for_conversations_by_what_they_write():
    ours, theirs = vocabularies.byte_level(), vocabularies.byte_level()
    ours.chat_template = CHATML
    assert told(theirs, ours, conversations=True) is None  # without a template it gets the text of our template
    theirs.chat_template = "{# the same #}" + CHATML
    assert told(theirs, ours, conversations=True) is None
    theirs.chat_template = CHATML.replace("{{ m.content }}", "{{ m.content | trim }}")
    what, message = told(theirs, ours, conversations=True) or ("", "")
    assert what == "template"
    assert message.startswith("a conversation is '<|im_start|>user\\nhi<|im_end|>")
    assert told(theirs, ours, conversations=False) is None


def test_models_read_token_by_token_must_have_the_tokenizer_of_the_run(tmp_path):
    ours, other = vocabularies.byte_level(), vocabularies.byte_level()
    ours.chat_template, other.chat_template, other.eos_token = CHATML, "{{ messages }}", "<|im_end|>"
    other.save_pretrained(tmp_path)
    common = ("ref_model_name_or_path", str(tmp_path), ours)
    with pytest.raises(
        ValueError, match=r"^ref_model_name_or_path: its responses end in .*; set eos_token to the one that"
    ):
        require_same_tokenizer(*common, DPOConfig(), conversations=True)
    with pytest.raises(
        ValueError, match=r"^ref_model_name_or_path: a conversation is .*; set chat_template to the one"
    ):
        require_same_tokenizer(*common, DPOConfig(eos_token="</s>"), conversations=True)
    require_same_tokenizer(*common, DPOConfig(eos_token="</s>"), conversations=False)
    require_same_tokenizer(*common, DPOConfig(eos_token="</s>", chat_template=CHATML), conversations=True)
    with pytest.raises(
        ValueError, match=r"has another tokenizer than the run .*give a model with the tokenizer of the"
    ):
        require_same_tokenizer(*common[:2], tiny.tokenizer(), DPOConfig(), conversations=True)


def test_a_judge_without_a_tokenizer_reads_that_of_the_run_with_a_warning(tmp_path, caplog):
    ours = vocabularies.byte_level()
    assert judge_tokenizer("judge", str(tmp_path), ours, DPOConfig(), conversations=False) is None
    assert "judge: no tokenizer is saved with" in caplog.text
    endless = vocabularies.byte_level()
    endless.eos_token = None
    endless.save_pretrained(tmp_path)
    assert judge_tokenizer("judge", str(tmp_path), ours, DPOConfig(), conversations=False) is None
    other = vocabularies.sentencepiece(legacy=True)
    other.save_pretrained(tmp_path)
    found = judge_tokenizer("judge", str(tmp_path), ours, DPOConfig(), conversations=False)
    assert found is not None
    assert found[0].get_vocab() == other.get_vocab()
