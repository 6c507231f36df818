import pytest
from transformers import PreTrainedTokenizerFast

from fastrlhf.data import fingerprints
from fastrlhf.data.fingerprints import code_fingerprint, digest_of, rows_fingerprint, tokenizer_fingerprint
from fastrlhf.data.specials import add_ends
from fastrlhf.data.token_set import TokenSet
from fastrlhf.types import TokenizedExample
from tests import tiny


def test_a_set_and_a_list_have_the_same_fingerprint_and_every_field_changes_it():
    rows = [
        TokenizedExample(prompt=[3, 4], chosen=[5, 1], label_prob=0.25, trained={"chosen": [1]}, row=0),
        TokenizedExample(prompt=[6], responses=[[7, 1], [8]], scores=[1.0, 2.0], row=1),
    ]
    expected = rows_fingerprint(rows)
    # Checkpoints of versions without a token store contain this text
    assert expected == "2 rows of hash c1201506e91d35a4"
    assert rows_fingerprint(TokenSet.of(rows)) == expected
    assert rows_fingerprint(TokenSet.of(rows).select([1, 0])) == rows_fingerprint(rows[::-1]) != expected
    assert rows_fingerprint(TokenSet(TokenSet.of(rows).blocks, fingerprint="known")) == "known"


def test_a_tokenizer_whose_code_comes_with_a_model_has_no_fingerprint():
    class Own(PreTrainedTokenizerFast):
        """A tokenizer class that is not defined in transformers, like one that is loaded with trust_remote_code."""

    tokenizer = tiny.tokenizer()
    tokenizer.__class__ = Own
    assert tokenizer_fingerprint(tokenizer) is None


def test_the_fingerprint_of_a_tokenizer_changes_with_all_that_changes_its_ids():
    first = tokenizer_fingerprint(tiny.tokenizer())
    assert tokenizer_fingerprint(tiny.tokenizer()) == first
    used = tiny.tokenizer()
    used(["w1 w2", "w3"], padding=True, truncation=True, max_length=1)
    assert tokenizer_fingerprint(used) == first
    others = [tiny.tokenizer(without=[9]), *(tiny.tokenizer() for _ in range(3))]
    others[1].chat_template = "{{ messages }}"
    others[2].add_tokens(["w1 w2"])
    others[3].add_special_tokens({"additional_special_tokens": ["w5"]})
    found = [first, *map(tokenizer_fingerprint, others)]
    add_ends(others[3], [others[3].convert_tokens_to_ids("w5")], "test")
    assert len({*found, tokenizer_fingerprint(others[3])}) == 6


def test_a_template_that_asks_for_the_time_in_its_own_way_gets_a_new_fingerprint_every_day(monkeypatch):
    def of(template: str, day: str) -> str | None:
        tokenizer = tiny.tokenizer()
        tokenizer.chat_template = template
        monkeypatch.setattr(fingerprints, "date", type("Day", (), {"today": staticmethod(lambda: day)}))
        return tokenizer_fingerprint(tokenizer)

    literal, computed = "{{ strftime_now('%d') }}", "{% set f = '%d' %}{{ strftime_now(f) }}"
    assert of(literal, "2026-01-01") == of(literal, "2026-01-02")  # the date is fixed during a run
    assert of(computed, "2026-01-01") != of(computed, "2026-01-02")


def test_a_tokenizer_that_is_not_of_the_rust_library_has_no_fingerprint():
    assert tokenizer_fingerprint(object()) is None  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("parts", [("ab", "c"), ("a", "bc"), ("abc",), ("abc", "")])
def test_a_digest_depends_on_the_limits_of_its_parts(parts):
    assert len(digest_of(*parts)) == 32
    assert [digest_of(*other) == digest_of(*parts) for other in [("ab", "c"), ("a", "bc"), ("abc",), ("abc", "")]] == [
        other == parts for other in [("ab", "c"), ("a", "bc"), ("abc",), ("abc", "")]
    ]


def test_the_fingerprint_of_the_code_changes_with_the_code_and_with_a_package(monkeypatch):
    code_fingerprint.cache_clear()
    first = code_fingerprint()
    monkeypatch.setattr(fingerprints, "version", lambda package: "0")
    code_fingerprint.cache_clear()
    assert code_fingerprint() != first
    monkeypatch.undo()
    code_fingerprint.cache_clear()
    assert code_fingerprint() == first
