"""Opens the tokenizer and reads and tokenises the rows that a configuration names, which every command does before it
loads a model."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from fastrlhf.config import TrainConfig, require
from fastrlhf.config.files import load_yaml
from fastrlhf.data.examples import Origin
from fastrlhf.data.fingerprints import rows_fingerprint
from fastrlhf.data.given import Rows, given_examples
from fastrlhf.data.parallel import return_memory
from fastrlhf.data.specials import add_template_end, require_eos
from fastrlhf.data.templates import reads_clock
from fastrlhf.data.token_report import TokenReport
from fastrlhf.data.token_set import TokenSet
from fastrlhf.data.tokenizer import load_tokenizer
from fastrlhf.data.tokens import TextRules
from fastrlhf.distributed.ranks import compare, on_first, start, together, world_size
from fastrlhf.models.attention import check_attention
from fastrlhf.models.four_bit import quantization
from fastrlhf.models.layers import check_liger
from fastrlhf.models.loading import check_architecture
from fastrlhf.models.offload import check_offloading
from fastrlhf.models.precision import DTYPES, describe_precision, resolve_device, with_dtype
from fastrlhf.publish.push import check_push, open_repository
from fastrlhf.runtime.adamw import check_optim
from fastrlhf.runtime.callbacks import load_callbacks
from fastrlhf.runtime.checkpoint import check_run_dir, check_same_data
from fastrlhf.runtime.dataset import dataset_parts, given_part, judged_rows, training_rows
from fastrlhf.runtime.locks import check_idle
from fastrlhf.runtime.reporters import import_reporters
from fastrlhf.types import Example, TokenizedExample

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Data:
    train: Sequence[TokenizedExample]
    eval: Sequence[TokenizedExample]
    report: TokenReport
    """Effects of tokenisation on the training rows."""
    day: str = ""
    """The date for the chat template; empty if the template does not ask for one."""
    conversations: bool = False
    """Whether any row is a conversation, which a chat template renders."""
    rules: TextRules = dataclasses.field(default_factory=TextRules)
    """Rules of tokenisation, for models that read the text with another tokenizer."""
    origin: Origin = dataclasses.field(default_factory=Origin)
    """How the training rows were read; empty for rows that a program passed."""

    @cached_property
    def train_rows(self) -> Mapping[int, Example]:
        """Row number -> training example with its text and its other columns; empty without `keep_rows`. Raises
        ValueError if two rows have the same number."""
        return _by_number(self.train)

    @cached_property
    def eval_rows(self) -> Mapping[int, Example]:
        """Row number -> evaluation example; empty without `keep_rows`. If these rows come from another split, their
        numbers start at 0 again."""
        return _by_number(self.eval)

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """For each split, a text with the number of rows and a hash of their content in order."""
        return {name: rows_fingerprint(rows) for name, rows in (("train", self.train), ("eval", self.eval))}


def open_inputs(
    config: TrainConfig,
    fields: Sequence[str],
    train: Rows | None,
    evaluation: Rows | None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    keep_rows: bool = False,
) -> tuple[PreTrainedTokenizerBase, Data]:
    """Returns the tokenizer and the tokenised rows. `fields` are the fields that rows must have, the `needs` of
    `load_examples`. `train` and `evaluation` replace the rows of the dataset, and `tokenizer` the tokenizer that
    `config` names. With `keep_rows` the examples stay in memory, so that reward functions and judges with another
    tokenizer can read the text and the columns of a row.

    Raises ValueError on every rank, before a model is loaded or a folder is made, if any rank finds a problem with
    paths, files, rows, reporters or callbacks, or lacks a library or device, or if ranks have read different rows.
    """
    start(config)
    log.info("\n".join((f"batch: {config.describe_batch()}", *describe_precision(config))))
    check_push(config)
    if config.output_dir:
        on_first(lambda: (check_run_dir(config), check_idle(config.output_dir)))

    def read() -> tuple[PreTrainedTokenizerBase, Data]:
        return _read(config, fields, train, evaluation, tokenizer, keep_rows)

    own: list[tuple[PreTrainedTokenizerBase, Data]] = []
    if train is None and world_size() > 1:  # rank 0 fills the token store, and the other ranks map its entries
        on_first(lambda: own.append(read()))
    tokenizer, data = together(lambda: own[0] if own else read())
    return_memory()  # of the text of the rows
    if world_size() > 1:
        compare(data.fingerprint, "dataset")
    ranks, num_eval = world_size(), len(data.eval)
    require(num_eval == 0 or num_eval >= ranks, "num_eval_examples", num_eval, f"0, or at least the {ranks} processes")
    check_held_out(config, num_eval)
    if config.output_dir:
        check_same_data(config.output_dir, data.fingerprint)
    on_first(lambda: open_repository(config))
    return tokenizer, data


def _read(
    config: TrainConfig,
    fields: Sequence[str],
    train: Rows | None,
    evaluation: Rows | None,
    tokenizer: PreTrainedTokenizerBase | None,
    keep_rows: bool,
) -> tuple[PreTrainedTokenizerBase, Data]:
    import_reporters(config.report_to)
    load_callbacks(config)
    check_libraries(config)
    check_architecture(config)
    if train is None and not config.dataset_test_split:
        check_held_out(config, config.num_eval_examples)
    tokenizer = open_tokenizer(config) if tokenizer is None else given_tokenizer(config, tokenizer)
    day = template_day(config, tokenizer)
    if train is None:
        wanted = training_rows(config)
        parts = dataset_parts(config, tokenizer, fields, wanted, day, keep_rows=keep_rows)
    else:
        given = [given_examples(config, fields, rows, name) for rows, name in ((train, "train"), (evaluation, "eval"))]
        parts = [
            given_part(config, tokenizer, examples, fields, name, day, keep_rows=keep_rows)
            for examples, name in zip(given, ("train", "eval"), strict=True)
            if examples or name == "train"
        ]
    training = parts[0]
    assert training is not None
    held_out = parts[1] if len(parts) > 1 else None
    return tokenizer, Data(
        train=training.rows,
        eval=held_out.rows if held_out else TokenSet(),
        day=day,
        conversations=training.conversations or (held_out is not None and held_out.conversations),
        rules=TextRules.of(config, day),
        report=training.report,
        origin=training.origin,
    )


def open_eval_inputs(
    config: TrainConfig, fields: Sequence[str], examples: Rows | None
) -> tuple[PreTrainedTokenizerBase, Data]:
    """Returns the tokenizer and the rows on which models are judged, with their text. `examples` replace the rows of
    the dataset. Without `examples`, these are the rows that training with the same dataset keys evaluates on. If there
    are none, because `dataset_test_split` is empty and `num_eval_examples` is 0, they are all rows of the split. Raises
    ValueError as `open_inputs` does.
    """
    tokenizer = open_tokenizer(config)
    day = template_day(config, tokenizer)
    if examples is None:
        (part,) = dataset_parts(config, tokenizer, fields, [judged_rows(config)], day, keep_rows=True)
    if examples is not None or part is None:
        given = given_examples(config, fields, examples, "eval")
        part = given_part(config, tokenizer, given, fields, "eval", day, keep_rows=True)
    return tokenizer, Data(
        train=TokenSet(),
        eval=part.rows,
        report=part.report,
        day=day,
        conversations=part.conversations,
        rules=TextRules.of(config, day),
    )


def with_tokenizer(config: TrainConfig, data: Data, fields: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Data:
    """Returns `data` with the evaluation rows encoded by another tokenizer and its chat template."""
    examples = [row.source for row in data.eval if row.source is not None]
    day = data.day or template_day(config, tokenizer)
    part = given_part(config, tokenizer, examples, fields, "eval", day, keep_rows=True)
    rules = TextRules.of(config, day)
    return dataclasses.replace(data, eval=part.rows, report=part.report, day=day, rules=rules)


def with_room(examples: Sequence[TokenizedExample], name: str, max_length: int, response_length: int) -> TokenSet:
    """Returns the examples whose prompt leaves room for a whole response. Raises ValueError if there are none."""
    most = max_length - response_length
    rows = TokenSet.of(examples)
    kept = rows.select(np.flatnonzero(rows.lengths("prompt") <= most))
    if len(kept) < len(examples):
        log.warning(
            "%s: %d of %d prompts exceed %d tokens (max_length - response_length) and are left out",
            *(name, len(examples) - len(kept), len(examples), most),
        )
    if not kept:
        raise ValueError(f"max_length: no {name} prompt leaves room for a response of {response_length} tokens")
    return kept


def given_tokenizer(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Checks a tokenizer object passed to a trainer, adds the end token of its chat template to its end tokens, and
    returns it. Raises ValueError if it has no EOS, if `config` also names a tokenizer, or if `config` sets a property
    that must be set on the object."""
    for key in ("tokenizer_name_or_path", "eos_token", "chat_template"):
        value = getattr(config, key)
        require(not value, key, value, "empty when a tokenizer is given; set it on the tokenizer")
    require_eos(tokenizer)
    add_template_end(tokenizer)
    return tokenizer


def open_tokenizer(config: TrainConfig) -> PreTrainedTokenizerBase:
    """Loads the tokenizer that `config` names or that was saved with its model. Raises ValueError if there is none."""
    source = config.tokenizer_name_or_path or config.model_name_or_path
    if config.model_config:
        require(bool(source), "tokenizer_name_or_path", source, "given if there is a model_config")
    require(bool(source), "model_name_or_path", source, "a folder or a hub name")
    return load_tokenizer(
        source,
        eos_token=config.eos_token or None,
        chat_template=config.chat_template or None,
        trust_remote_code=config.trust_remote_code,
        model=config.model_name_or_path or None,
    )


def template_day(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the date for a chat template that asks for one: `template_date`, the date recorded by the run that is
    resumed, the date recorded by the run that trained the model, or today. Empty if the template does not ask."""
    if not reads_clock(tokenizer):
        return ""
    places = [Path(place) for place in (config.output_dir, config.model_name_or_path) if place]
    recorded = (_recorded_day(folder / "config.yaml") for place in places for folder in (place, place.parent))
    return config.template_date or next(filter(None, recorded), "") or date.today().isoformat()


def _recorded_day(file: Path) -> str:
    try:
        return str(load_yaml(str(file)).get("template_date") or "") if file.is_file() else ""
    except ValueError:  # not a config.yaml written by fastrlhf
        return ""


def _by_number(rows: Sequence[TokenizedExample]) -> dict[int, Example]:
    examples = [row.source for row in rows if row.source is not None]
    numbered = {example.row: example for example in examples}
    if len(numbered) < len(examples):
        for example in examples:
            same = numbered[example.row]
            rule = "unique, because reward functions read the columns of a row"
            require((same, same.columns) == (example, example.columns), "row", example.row, rule)
    return numbered


def check_held_out(config: TrainConfig, num_eval: int) -> None:
    """Raises ValueError if the configuration asks for evaluations but no rows are held out."""
    if num_eval == 0:
        rule = "when no rows are held out; give num_eval_examples or dataset_test_split"
        require(not config.eval_on_start, "eval_on_start", True, f"false {rule}")
        require(not config.eval_steps, "eval_steps", config.eval_steps, f"0 {rule}")


def check_libraries(config: TrainConfig) -> None:
    """Raises ValueError if optimiser, attention or kernels cannot run on the device or with the installed libraries."""
    device, dtype = resolve_device(config.device), DTYPES[with_dtype(config).dtype]
    check_optim(config, device)
    check_attention(config.attn_implementation, device, dtype)
    if config.use_liger_kernel:
        check_liger(device)
    if config.activation_offloading:
        check_offloading(device)
    if config.load_in_4bit:
        quantization(dtype)
