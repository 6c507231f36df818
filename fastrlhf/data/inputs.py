"""From a configuration to tokenised rows: what every command does first, and before it loads a model."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from fastrlhf.checkpoint import check_idle, check_run_dir, check_same_data
from fastrlhf.config import TrainConfig, parse_columns, require
from fastrlhf.data.examples import RESPONSES, LoadedExamples, load_examples
from fastrlhf.data.tokens import load_tokenizer, tokenize_examples
from fastrlhf.metrics import import_reporters
from fastrlhf.types import Example, TokenizedExample

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Data:
    train: list[TokenizedExample]
    eval: list[TokenizedExample]

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Of each split how many rows it has, and a hash of all that they hold, in order."""
        return {name: _fingerprint(rows) for name, rows in (("train", self.train), ("eval", self.eval))}


def open_inputs(
    config: TrainConfig,
    fields: Sequence[str],
    train: Sequence[Example] | None,
    evaluation: Sequence[Example] | None,
) -> tuple[PreTrainedTokenizerBase, Data]:
    """The tokenizer and the tokenised rows that have `fields`; `train` and `evaluation` stand in for the dataset's.

    Raises ValueError for anything that is wrong with the paths, the files, the rows or the reporters, before a model is
    loaded and before a folder is made.
    """
    if config.output_dir:
        check_run_dir(config)
        check_idle(config.output_dir)
    import_reporters(config.report_to)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("WORLD_SIZE: this version trains in one process; start it without torchrun")
    tokenizer = _tokenizer(config)
    if train is None:
        train, evaluation = _load_both(config, fields)
    data = Data(
        train=_tokenize(config, tokenizer, train, fields, "train"),
        eval=_tokenize(config, tokenizer, evaluation, fields, "eval") if evaluation else [],
    )
    if config.output_dir:
        check_same_data(config.output_dir, data.fingerprint)
    return tokenizer, data


def open_eval_inputs(
    config: TrainConfig, fields: Sequence[str], examples: Sequence[Example] | None
) -> tuple[PreTrainedTokenizerBase, list[TokenizedExample]]:
    """The tokenizer and the rows to judge; `examples` stand in for the dataset's.

    They are those that training with the same dataset keys evaluates on. Where that is none (no `dataset_test_split`,
    and `num_eval_examples` is 0) they are all rows of the split. Raises ValueError as `open_inputs` does.
    """
    tokenizer = _tokenizer(config)
    if examples is None:
        if config.dataset_test_split:
            examples = _load(config, fields, config.dataset_test_split, config.num_eval_examples).examples
        else:
            train, held_out = _split(config, fields)
            examples = held_out if config.num_eval_examples else train
    return tokenizer, _tokenize(config, tokenizer, examples, fields, "eval")


def with_room(
    examples: Sequence[TokenizedExample], name: str, max_length: int, response_length: int
) -> list[TokenizedExample]:
    """The examples whose prompt leaves room for a whole response. Raises ValueError where none does."""
    most = max_length - response_length
    kept = [example for example in examples if len(example.prompt) <= most]
    if len(kept) < len(examples):
        log.warning(
            "%s: %d of %d prompts exceed %d tokens (max_length - response_length) and are left out",
            *(name, len(examples) - len(kept), len(examples), most),
        )
    if not kept:
        raise ValueError(f"max_length: no {name} prompt leaves room for a response of {response_length} tokens")
    return kept


def _tokenizer(config: TrainConfig) -> PreTrainedTokenizerBase:
    source = config.tokenizer_name_or_path or config.model_name_or_path
    require(bool(source), "tokenizer_name_or_path", source, "given where there is no model_name_or_path")
    return load_tokenizer(
        source,
        eos_token=config.eos_token or None,
        chat_template=config.chat_template or None,
        trust_remote_code=config.trust_remote_code,
    )


def _load_both(config: TrainConfig, fields: Sequence[str]) -> tuple[list[Example], list[Example]]:
    if config.dataset_test_split:
        train = _load(config, fields, config.dataset_train_split, config.max_train_examples)
        return train.examples, _load(config, fields, config.dataset_test_split, config.num_eval_examples).examples
    train, held_out = _split(config, fields)
    if not train:
        raise ValueError(f"num_eval_examples: {config.num_eval_examples} rows held out leave none to train on")
    return train, held_out


def _split(config: TrainConfig, fields: Sequence[str]) -> tuple[list[Example], list[Example]]:
    """The training split without its last `num_eval_examples` rows, and those.

    Rows are counted as they were read, the unusable ones included: what is held out must not depend on `fields`.
    """
    limit = config.max_train_examples + config.num_eval_examples if config.max_train_examples else 0
    loaded = _load(config, fields, config.dataset_train_split, limit)
    first_held_out = loaded.num_rows - config.num_eval_examples
    return (
        [example for example in loaded.examples if example.row < first_held_out],
        [example for example in loaded.examples if example.row >= first_held_out],
    )


def _load(config: TrainConfig, fields: Sequence[str], split: str, limit: int) -> LoadedExamples:
    require(bool(config.dataset_name), "dataset_name", config.dataset_name, "a hub name, or a local file or folder")
    loaded = load_examples(
        config.dataset_name,
        split=split,
        config_name=config.dataset_config or None,
        columns=parse_columns(config.columns),
        needs=("prompt", *fields),
        max_bad_fraction=config.max_bad_fraction,
        limit=limit or None,
    )
    log.info(loaded.summary())
    return loaded


def _tokenize(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    fields: Sequence[str],
    name: str,
) -> list[TokenizedExample]:
    for example in examples:
        for field in fields:
            if getattr(example, field) is None:
                raise ValueError(f"{name}: row {example.row} has no {field}; leave it out or give one")
    tokenized = tokenize_examples(
        examples,
        tokenizer,
        max_length=config.max_length,
        truncation_mode=config.truncation_mode,
        fields=[name for name in fields if name in (*RESPONSES, "responses")],
    )
    log.info("%s: %s", name, tokenized.report.summary())
    return list(tokenized.examples)


def _fingerprint(rows: Sequence[TokenizedExample]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        for field in dataclasses.fields(row):
            value = getattr(row, field.name)
            if value is not None and field.name in ("prompt", *RESPONSES):
                digest.update(f"{field.name} {len(value)} ids".encode())
                digest.update(array("q", value))
            elif value is not None:
                digest.update(f"{field.name} {value!r}".encode())
    return f"{len(rows)} rows of hash {digest.hexdigest()[:16]}"
