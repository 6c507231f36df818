"""Reads and tokenises the rows that a configuration names, or maps them from the token store."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastrlhf.config import DPOConfig, KTOConfig, SFTConfig, Source, TrainConfig, parse_columns, require
from fastrlhf.config.paths import changed
from fastrlhf.config.sources import dataset_names, labels_of, weighted
from fastrlhf.data.examples import LoadedExamples, load_examples
from fastrlhf.data.fingerprints import code_fingerprint, digest_of, tokenizer_fingerprint
from fastrlhf.data.forms import RESPONSES
from fastrlhf.data.given import given_examples
from fastrlhf.data.labels import GROUP_LABELS
from fastrlhf.data.parallel import default_processes
from fastrlhf.data.rows import source_fingerprint
from fastrlhf.data.token_report import TokenReport
from fastrlhf.data.tokens import TextRules, tokenize_examples
from fastrlhf.data.turns import from_first_answer
from fastrlhf.runtime.mixing import describe, join_parts
from fastrlhf.runtime.token_store import Part, read_part, store_folder, write_part
from fastrlhf.types import Example

log = logging.getLogger(__name__)

MUCH = 0.1
"""A warning is logged if more than this share of the rows is too long."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A choice of rows of a dataset."""

    name: str
    """What the rows are for, train or eval, in messages."""
    split: str
    limit: int = 0
    """Maximum number of rows to read; 0: all."""
    held_out: bool | None = None
    """True: the last `num_eval_examples` rows. False: the rows before, at most `max_train_examples`. None: all."""


def training_rows(config: TrainConfig) -> list[Rows]:
    """Returns the rows to train on and the rows to evaluate on, if there are any.

    Without a `dataset_test_split`, unusable rows count as well, so that the held-out rows depend neither on the fields
    of the command nor on `max_train_examples`.
    """
    split, most, num_eval = config.dataset_train_split, config.max_train_examples, config.num_eval_examples
    if config.dataset_test_split:
        test = Rows(name="eval", split=config.dataset_test_split, limit=num_eval)
        return [Rows(name="train", split=split, limit=most), test]
    if not num_eval:
        return [Rows(name="train", split=split, limit=most)]
    return [Rows(name="train", split=split, held_out=False), Rows(name="eval", split=split, held_out=True)]


def judged_rows(config: TrainConfig) -> Rows:
    """Returns the rows on which `fastrlhf eval` judges models: those that training with the same keys evaluates on, or
    if there are none, all rows of the training split."""
    split, num = config.dataset_test_split, config.num_eval_examples
    if split:
        return Rows(name="eval", split=split, limit=num)
    if num:
        return Rows(name="eval", split=config.dataset_train_split, held_out=True)
    return Rows(name="eval", split=config.dataset_train_split, limit=config.max_train_examples)


def dataset_parts(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    fields: Sequence[str],
    wanted: Sequence[Rows],
    day: str,
    *,
    keep_rows: bool,
) -> list[Part | None]:
    """Returns the tokenised rows of each choice in `wanted`; None if a choice has no usable row. Parts that are in the
    token store are mapped; other parts are read, tokenised and stored. With `keep_rows`, rows are always read, and
    every tokenised row holds its example.

    The entries of `dataset_name`, if it has any, are read one by one, each as the only dataset of a run would be, and
    then joined; the numbers of the rows of an entry follow those of the entry before. Raises ValueError as
    `load_examples` and `tokenize_examples` do, and then names the entry. It does not communicate with other ranks.
    """
    sources = weighted(config.dataset_name)
    if not sources:
        return _parts(config, tokenizer, fields, wanted, day, keep_rows=keep_rows)
    by_source = []
    for index, source in enumerate(sources):
        own = [replace(rows, split=_split(config, source, rows)) for rows in wanted]
        single = changed(
            config,
            dataset_name=source.path,
            dataset_config=config.dataset_config if source.config is None else source.config,
            columns=config.columns if source.columns is None else source.columns,
        )
        try:
            by_source.append(_parts(single, tokenizer, fields, own, day, keep_rows=keep_rows))
        except ValueError as error:
            raise ValueError(f"dataset_name[{index}]: {error}") from error
    joined = [
        join_parts(parts, labels_of(sources), _first_rows(wanted, rows.split, by_source))
        for rows, parts in zip(wanted, zip(*by_source, strict=True), strict=True)
    ]
    for rows, part in zip(wanted, joined, strict=True):
        if part:
            log.info("%s: %s", rows.name, describe(config, part.rows, drawn=rows.name == "train"))
    return joined


def _split(config: TrainConfig, source: Source, rows: Rows) -> str:
    """Returns the split of a source from which `rows` are read: its own split replaces the training split."""
    return source.split if source.split is not None and rows.split == config.dataset_train_split else rows.split


def _first_rows(wanted: Sequence[Rows], split: str, by_source: Sequence[Sequence[Part | None]]) -> list[int]:
    """Returns the row number that the first row of each source gets in a split."""
    read = [
        max(part.num_read if part else 0 for rows, part in zip(wanted, parts, strict=True) if rows.split == split)
        for parts in by_source
    ]
    return [sum(read[:index]) for index in range(len(read))]


def _parts(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    fields: Sequence[str],
    wanted: Sequence[Rows],
    day: str,
    *,
    keep_rows: bool,
) -> list[Part | None]:
    """Returns the tokenised rows of each of `wanted` from a name or a list of names."""
    names = dataset_names(config.dataset_name)
    require(all(names or [""]), "dataset_name", config.dataset_name, "a hub name, or a local file or folder")

    @cache
    def load(split: str, limit: int) -> LoadedExamples:
        return load_examples(names, split=split, limit=limit or None, **_reading(config, fields))

    folder, own = store_folder(config.dataset_cache_dir), tokenizer_fingerprint(tokenizer)
    if own is None:
        told = "it does not run in the Rust library or has a class outside transformers, so each start tokenises again"
        log.info("dataset_cache_dir: tokenizer %s has no fingerprint: %s", tokenizer.name_or_path, told)
    warnings: list[str] = []
    keys = _keys(config, own, fields, wanted, day, warnings)
    parts = [read_part(folder, key) if key else None for key in keys]
    if None not in parts and not keep_rows:
        for warning in dict.fromkeys(warnings):
            log.warning("%s", warning)
    chosen: list[list[Example]] = []
    for i, (rows, part) in enumerate(zip(wanted, parts, strict=True)):
        loaded = load(rows.split, rows.limit) if part is None or keep_rows else None
        if (rows.split, rows.limit) not in [(earlier.split, earlier.limit) for earlier in wanted[:i]]:
            log.info("%s", loaded.summary() if loaded else part and part.loaded)
        chosen.append(_chosen(config, loaded, rows) if loaded else [])
        if rows.held_out is False and loaded and not chosen[i]:
            raise ValueError(f"num_eval_examples: {config.num_eval_examples} rows held out leave none to train on")

    # A file that has changed while it was read would be kept under the fingerprint of its earlier content.
    unchanged = own and None in parts and keys == _keys(config, own, fields, wanted, day, [])
    finished: list[Part | None] = []
    for rows, key, part, examples in zip(wanted, keys, parts, chosen, strict=True):
        if part is None and examples:
            part = _make(config, tokenizer, examples, fields, rows.name, day, load(rows.split, rows.limit))
            if key and unchanged:
                part = write_part(folder, key, part, _told(config, tokenizer, rows))
        finished.append(part and _finished(config, part, examples, fields, rows.name, day, keep_rows))
    return finished


def given_part(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    fields: Sequence[str],
    name: str,
    day: str,
    *,
    keep_rows: bool,
) -> Part:
    """Tokenises examples that a program passes; they are not kept in the token store."""
    part = _make(config, tokenizer, examples, fields, name, day)
    return _finished(config, part, examples, fields, name, day, keep_rows)


def _make(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    fields: Sequence[str],
    name: str,
    day: str,
    loaded: LoadedExamples | None = None,
) -> Part:
    """Tokenises examples; `loaded` is the result of reading them, if they were read."""
    for example in examples:
        for field in fields:
            if field not in GROUP_LABELS and getattr(example, field) is None:
                raise ValueError(f"{name}: row {example.row} has no {field}; remove the row or add the field")
    # Every rank tokenises the rows that a program passes.
    ranks = 1 if loaded else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    answers = _answers(config, examples, fields)
    tokenized = tokenize_examples(
        answers,
        tokenizer,
        **_settings(config, fields, day),
        processes=config.dataset_num_proc or default_processes(ranks),
    )
    prompts = [example.prompt for example in answers if isinstance(example.prompt, list)]
    return Part(
        rows=tokenized.examples,
        report=tokenized.report,
        **({"loaded": loaded.summary(), "origin": loaded.origin(), "num_read": loaded.num_rows} if loaded else {}),
        conversations=bool(prompts),
        earlier_turns=sum(turn["role"] == "assistant" for prompt in prompts for turn in prompt),
    )


def _settings(config: TrainConfig, fields: Sequence[str], day: str) -> dict[str, Any]:
    """Returns the arguments of `tokenize_examples`, which are also a part of the key of a stored entry."""
    rules = TextRules.of(config, day)
    return {
        "max_length": config.max_length,
        "truncation_mode": config.truncation_mode,
        "fields": [name for name in fields if name in (*RESPONSES, "responses")],
        "chat_template_kwargs": rules.chat_template_kwargs,
        "day": rules.day,
        "train_suffix": isinstance(config, SFTConfig | DPOConfig | KTOConfig) and config.train_suffix,
        "trailing_space": rules.trailing_space,
        "max_bad_fraction": config.max_bad_fraction,
        "max_dropped_fraction": config.max_dropped_fraction,
    }


def _reading(config: TrainConfig, fields: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments of `load_examples` other than split and limit, which are also a part of the key of a stored
    entry."""
    return {
        "config_name": config.dataset_config or None,
        "columns": parse_columns(config.columns),
        "needs": ("prompt", *fields),
        "max_bad_fraction": config.max_bad_fraction,
    }


def _keys(
    config: TrainConfig,
    tokenizer: str | None,
    fields: Sequence[str],
    wanted: Sequence[Rows],
    day: str,
    warnings: list[str],
) -> list[str | None]:
    """Returns the key of the stored entry of each choice in `wanted`: a hash of everything that determines the tokens
    and the messages. None if the tokenizer has no fingerprint. Warnings about the files of the dataset are added to
    `warnings`."""
    if tokenizer is None:
        return [None] * len(wanted)
    names, config_name = dataset_names(config.dataset_name), config.dataset_config or None
    sources = {
        split: source_fingerprint(names, split, config_name, warnings.append)
        for split in dict.fromkeys(rows.split for rows in wanted)
    }
    split_off = (config.num_eval_examples, config.max_train_examples)
    common = (names, _reading(config, fields), config.system_prompt, _train_on(config), _settings(config, fields, day))
    return [
        digest_of(
            code_fingerprint(),
            tokenizer,
            repr((common, asdict(rows), sources[rows.split], split_off if rows.held_out is not None else ())),
        )
        for rows in wanted
    ]


def _told(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> str:
    names = ", ".join(dataset_names(config.dataset_name))
    return f"{names} ({rows.split}, {rows.name}), tokenizer {tokenizer.name_or_path}"


def _chosen(config: TrainConfig, loaded: LoadedExamples, rows: Rows) -> list[Example]:
    examples = loaded.examples
    if rows.held_out is not None:
        first_held_out = loaded.num_rows - config.num_eval_examples
        end = min(first_held_out, config.max_train_examples or first_held_out)
        examples = [each for each in examples if (each.row >= first_held_out if rows.held_out else each.row < end)]
    return given_examples(config, (), examples, rows.name)


def _train_on(config: TrainConfig) -> str:
    return config.train_on if isinstance(config, SFTConfig) else ""


def _answers(config: TrainConfig, examples: Sequence[Example], fields: Sequence[str]) -> Sequence[Example]:
    """Returns the examples as they are tokenised: with `train_on` all_assistant, the response begins with the first
    answer."""
    if _train_on(config) == "all_assistant":
        return [from_first_answer(example, response) for example in examples for response in fields]
    return examples


def _finished(
    config: TrainConfig, part: Part, examples: Sequence[Example], fields: Sequence[str], name: str, day: str, keep: bool
) -> Part:
    """Prints how rows were tokenised, and adds their examples if they are kept."""
    report = part.report
    log.info("%s: %s", name, report.summary())
    if isinstance(config, SFTConfig):
        log.info("%s: %s", name, _describe_trained(config, part.earlier_turns, report))
    if day:
        log.info("%s: the chat template asks for the date and gets %s", name, day)
    if report.changed:
        log.warning("%s: the chat template changes the content of responses: %s", name, report.describe_changes())
    if report.rows_too_long > MUCH * report.num_examples:
        log.warning(
            "%s: %d of %d rows are longer than max_length %d; raise it, or see truncation_mode",
            *(name, report.rows_too_long, report.num_examples, config.max_length),
        )
    if not keep:
        return part
    return replace(part, rows=part.rows.with_sources(_answers(config, examples, fields)))


def _describe_trained(config: SFTConfig, earlier_turns: int, report: TokenReport) -> str:
    if config.train_on == "all" or not config.completion_only_loss:
        return f"all {report.num_tokens:,} tokens are trained, including prompts"
    told = f"{report.num_trained:,} of {report.num_tokens:,} tokens are trained ({config.train_on})"
    if not earlier_turns:
        return told
    return f"{told}; {earlier_turns:,} earlier turns of the assistant are not trained: see train_on"
