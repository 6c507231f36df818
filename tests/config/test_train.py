"""Tests of keys that stand for several other keys."""

import pytest

from fastrlhf.config import (
    parse_columns,
    parse_model_config,
)


def test_columns_are_pairs_of_a_known_name_and_a_column():
    assert parse_columns("") == {}
    assert parse_columns("prompt=question,chosen=a=b") == {"prompt": "question", "chosen": "a=b"}
    for wrong in ("prompt", "prompt=", "question=prompt", "prompt:question"):
        with pytest.raises(ValueError, match=r"^columns: .* must look like prompt=question"):
            parse_columns(wrong)


def test_a_model_config_is_a_json_mapping_with_a_model_type():
    assert parse_model_config('{"model_type": "llama", "hidden_size": 8}') == {"model_type": "llama", "hidden_size": 8}
    with pytest.raises(ValueError, match=r"^model_config: not valid JSON"):
        parse_model_config("{model_type: llama}")
    for wrong in ("[]", '{"hidden_size": 8}'):
        with pytest.raises(ValueError, match=r"^model_config: must be a mapping with a model_type"):
            parse_model_config(wrong)
