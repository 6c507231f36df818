"""Reads only the first rows of a dataset, so that `fastrlhf inspect` takes the same time for a file of any size.

JSON Lines, CSV and Parquet files are read up to the last row that is needed. Other sources, for example a JSON array or
a slice of a split, are read whole, but only their first rows are tokenised.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

from fastrlhf.config import PPOConfig, TrainConfig, parse_columns
from fastrlhf.config.sources import dataset_names, weighted
from fastrlhf.data.examples import load_examples
from fastrlhf.data.given import given_examples
from fastrlhf.data.rows import read_rows
from fastrlhf.data.tokens import TextRules
from fastrlhf.runtime.dataset import given_part
from fastrlhf.runtime.inputs import open_tokenizer, template_day, with_room
from fastrlhf.tools.plan.work import Work, fields_of, without_model

FEW = 1000
"""Number of rows that `inspect` reads by default."""


def open_first_rows(config: TrainConfig, num: int) -> Work | None:
    """Reads and tokenises the first `num` rows of the training split, or `max_train_examples` if that is fewer. The
    batches of the result have the rows in the order of the file.

    Returns None if a run with this configuration trains on at most `num` rows or reads rows from several weighted
    sources; `open_work` then reads all rows. The shares `max_bad_fraction` and `max_dropped_fraction` are not checked,
    because they hold for all rows. Raises ValueError for a bad path, for columns without a known form, and if none of
    these rows is usable.
    """
    names, most = dataset_names(config.dataset_name), config.max_train_examples
    if weighted(config.dataset_name) or not names or not all(names):
        return None
    held_out = 0 if config.dataset_test_split else config.num_eval_examples  # the last rows of the split
    if 0 < most <= num and not held_out:
        return None
    split, config_name = config.dataset_train_split, config.dataset_config or None
    num_needed = num + held_out
    if sum(1 for _ in islice(read_rows(names, split, config_name), num_needed + 1)) <= num_needed:
        return None
    config = replace(without_model(config), max_bad_fraction=1.0, max_dropped_fraction=1.0)
    tokenizer, fields = open_tokenizer(config), fields_of(config)
    day = template_day(config, tokenizer)
    loaded = load_examples(
        names,
        split=split,
        config_name=config_name,
        columns=parse_columns(config.columns),
        needs=("prompt", *fields),
        max_bad_fraction=1.0,
        limit=min(num, most or num),
    )
    examples = given_examples(config, fields, loaded, "train")
    part = given_part(config, tokenizer, examples, fields, "train", day, keep_rows=True)
    rows, size = part.rows, config.batch_size
    if isinstance(config, PPOConfig):
        rows, size = with_room(rows, "train", config.max_length, config.response_length), size // config.num_generations
    return Work(
        tokenizer=tokenizer,
        examples=rows,
        report=part.report,
        steps=1,
        batches=[list(range(start, min(start + size, len(rows)))) for start in range(0, len(rows), size)],
        origin=loaded.origin(),
        rules=TextRules.of(config, day),
        num_read=loaded.num_rows,
    )
