"""Opens the tokenizer and reads and tokenises the rows that a configuration names, which every command does before it
loads a model."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fastrlhf.config import DPOConfig, KTOConfig, SFTConfig, TrainConfig, parse_columns, require
from fastrlhf.config.files import load_yaml
from fastrlhf.data.examples import LoadedExamples, Origin, load_examples
from fastrlhf.data.forms import RESPONSES
from fastrlhf.data.given import Rows, given_examples
from fastrlhf.data.labels import GROUP_LABELS
from fastrlhf.data.rows import source_names
from fastrlhf.data.specials import add_template_end, require_eos
from fastrlhf.data.templates import reads_clock
from fastrlhf.data.token_report import TokenReport
from fastrlhf.data.tokenizer import load_tokenizer
from fastrlhf.data.tokens import TextRules, TokenizedExamples, tokenize_examples
from fastrlhf.data.turns import from_first_answer
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
from fastrlhf.runtime.locks import check_idle
from fastrlhf.runtime.reporters import import_reporters
from fastrlhf.types import Example, TokenizedExample

log = logging.getLogger(__name__)

MUCH = 0.1
"""A warning is logged if more than this share of the rows is too long."""


@dataclass(frozen=True, kw_only=True)
class Data:
    train: list[TokenizedExample]
    eval: list[TokenizedExample]
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
        return {name: _fingerprint(rows) for name, rows in (("train", self.train), ("eval", self.eval))}


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
    tokenizer, data = together(lambda: _read(config, fields, train, evaluation, tokenizer, keep_rows))
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
    train, evaluation, origin = _load_both(config, fields) if train is None else (train, evaluation, Origin())
    train = given_examples(config, fields, train, "train")
    evaluation = given_examples(config, fields, evaluation, "eval")
    tokenized = _tokenize(config, tokenizer, train, fields, "train", day, keep_rows)
    held_out = _tokenize(config, tokenizer, evaluation, fields, "eval", day, keep_rows) if evaluation else None
    return tokenizer, Data(
        train=tokenized.examples,
        eval=held_out.examples if held_out else [],
        day=day,
        conversations=_has_turns([*train, *evaluation]),
        rules=TextRules.of(config, day),
        report=tokenized.report,
        origin=origin,
    )


def open_eval_inputs(
    config: TrainConfig, fields: Sequence[str], examples: Rows | None
) -> tuple[PreTrainedTokenizerBase, Data]:
    """Returns the tokenizer and the rows on which models are judged, with their text. `examples` replace the rows of
    the dataset.

    They are the rows that training with the same dataset keys evaluates on. If there are none, because
    `dataset_test_split` is empty and `num_eval_examples` is 0, they are all rows of the split. Raises ValueError as
    `open_inputs` does.
    """
    tokenizer = open_tokenizer(config)
    if examples is None:
        if config.dataset_test_split:
            examples = _load(config, fields, config.dataset_test_split, config.num_eval_examples).examples
        else:
            train, held_out, _ = _split(config, fields)
            examples = held_out if config.num_eval_examples else train
    examples = given_examples(config, fields, examples, "eval")
    day = template_day(config, tokenizer)
    tokenized = _tokenize(config, tokenizer, examples, fields, "eval", day, keep_rows=True)
    return tokenizer, Data(
        train=[],
        eval=tokenized.examples,
        report=tokenized.report,
        day=day,
        conversations=_has_turns(examples),
        rules=TextRules.of(config, day),
    )


def with_tokenizer(config: TrainConfig, data: Data, fields: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Data:
    """Returns `data` with the evaluation rows encoded by another tokenizer and its chat template."""
    examples = [row.source for row in data.eval if row.source is not None]
    day = data.day or template_day(config, tokenizer)
    tokenized = _tokenize(config, tokenizer, examples, fields, "eval", day, keep_rows=True)
    rules = TextRules.of(config, day)
    return dataclasses.replace(data, eval=tokenized.examples, report=tokenized.report, day=day, rules=rules)


def with_room(
    examples: Sequence[TokenizedExample], name: str, max_length: int, response_length: int
) -> list[TokenizedExample]:
    """Returns the examples whose prompt leaves room for a whole response. Raises ValueError if there are none."""
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


def _has_turns(examples: Sequence[Example]) -> bool:
    return any(isinstance(example.prompt, list) for example in examples)


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


def _load_both(config: TrainConfig, fields: Sequence[str]) -> tuple[list[Example], list[Example], Origin]:
    if config.dataset_test_split:
        train = _load(config, fields, config.dataset_train_split, config.max_train_examples)
        test = _load(config, fields, config.dataset_test_split, config.num_eval_examples)
        return train.examples, test.examples, train.origin()
    train, held_out, origin = _split(config, fields)
    if not train:
        raise ValueError(f"num_eval_examples: {config.num_eval_examples} rows held out leave none to train on")
    return train, held_out, origin


def _split(config: TrainConfig, fields: Sequence[str]) -> tuple[list[Example], list[Example], Origin]:
    """Splits the training split into the rows to train on and the held-out rows. The last `num_eval_examples` rows are
    held out; of the others, the first `max_train_examples` are trained on.

    Unusable rows count as well, so that the held-out rows depend neither on `fields` nor on `max_train_examples`.
    """
    limit = 0 if config.num_eval_examples else config.max_train_examples
    loaded = _load(config, fields, config.dataset_train_split, limit)
    first_held_out = loaded.num_rows - config.num_eval_examples
    end = min(first_held_out, config.max_train_examples or first_held_out)
    return (
        [example for example in loaded.examples if example.row < end],
        [example for example in loaded.examples if example.row >= first_held_out],
        loaded.origin(),
    )


def _load(config: TrainConfig, fields: Sequence[str], split: str, limit: int) -> LoadedExamples:
    require(
        all(source_names(config.dataset_name) or [""]),
        "dataset_name",
        config.dataset_name,
        "a hub name, or a local file or folder",
    )
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
    day: str,
    keep_rows: bool,
) -> TokenizedExamples:
    for example in examples:
        for field in fields:
            if field not in GROUP_LABELS and getattr(example, field) is None:
                raise ValueError(f"{name}: row {example.row} has no {field}; remove the row or add the field")
    train_on = config.train_on if isinstance(config, SFTConfig) else ""
    if train_on == "all_assistant":
        examples = [from_first_answer(example, response) for example in examples for response in fields]
    rules = TextRules.of(config, day)
    tokenized = tokenize_examples(
        examples,
        tokenizer,
        max_length=config.max_length,
        truncation_mode=config.truncation_mode,
        fields=[name for name in fields if name in (*RESPONSES, "responses")],
        chat_template_kwargs=rules.chat_template_kwargs,
        day=rules.day,
        train_suffix=isinstance(config, SFTConfig | DPOConfig | KTOConfig) and config.train_suffix,
        trailing_space=rules.trailing_space,
        max_bad_fraction=config.max_bad_fraction,
        max_dropped_fraction=config.max_dropped_fraction,
        keep_source=keep_rows,
    )
    report = tokenized.report
    log.info("%s: %s", name, report.summary())
    if isinstance(config, SFTConfig):
        log.info("%s: %s", name, _describe_trained(config, examples, report))
    if day:
        log.info("%s: the chat template asks for the date and gets %s", name, day)
    if report.changed:
        log.warning("%s: the chat template changes the content of responses: %s", name, report.describe_changes())
    if report.rows_too_long > MUCH * len(examples):
        log.warning(
            "%s: %d of %d rows are longer than max_length %d; raise it, or see truncation_mode",
            *(name, report.rows_too_long, len(examples), config.max_length),
        )
    return tokenized


def _describe_trained(config: SFTConfig, examples: Sequence[Example], report: TokenReport) -> str:
    if config.train_on == "all" or not config.completion_only_loss:
        return f"all {report.num_tokens:,} tokens are trained, including prompts"
    told = f"{report.num_trained:,} of {report.num_tokens:,} tokens are trained ({config.train_on})"
    turns = [turn for example in examples if isinstance(example.prompt, list) for turn in example.prompt]
    earlier = sum(turn["role"] == "assistant" for turn in turns)
    return told + (f"; {earlier:,} earlier turns of the assistant are not trained: see train_on" if earlier else "")


def _fingerprint(rows: Sequence[TokenizedExample]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        for field in dataclasses.fields(row):
            value = getattr(row, field.name)
            if value is not None and field.name in ("prompt", *RESPONSES):
                digest.update(f"{field.name} {len(value)} ids".encode())
                digest.update(array("q", value))
            elif value is not None and field.name != "source":
                digest.update(f"{field.name} {value!r}".encode())
    return f"{len(rows)} rows of hash {digest.hexdigest()[:16]}"


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
