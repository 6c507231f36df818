"""Reads a dataset in any known form and makes an `Example` of every row.

The source is read as rows, one form is recognised for the whole dataset, and each row becomes an Example or is counted
as skipped, with a reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from fastrlhf.data.forms import (
    ALPACA,
    CONVERSATION_PAIRS,
    DEMONSTRATIONS,
    FORMS,
    GROUPS,
    LABELS,
    MESSAGES,
    NAMES,
    PAIRS,
    PREFIX_PAIRS,
    PROMPTS,
    RESPONSES,
    SHAREGPT,
    TEXTS,
    Form,
)
from fastrlhf.data.labels import GROUP_LABELS, read_group_labels, read_label, read_pair_labels
from fastrlhf.data.rows import IN_MEMORY, UnusableRow, read_rows, shorten, source_names
from fastrlhf.data.token_report import MOST_SHOWN
from fastrlhf.data.turns import HH_MARK, TEMPLATE_KEYS, is_empty, present, read_template_values, read_text
from fastrlhf.types import Example


@dataclass(frozen=True, kw_only=True)
class Origin:
    """How rows were read, without the rows."""

    sources: tuple[str, ...] = ()
    """Names of the datasets; empty for rows in memory."""
    lines: list[str] = field(default_factory=list)
    """Source and form, columns that are not used, and the first skipped rows of every reason."""
    read: frozenset[str] = frozenset()
    """Columns that are a part of prompts, responses and labels, or are passed to the chat template."""


@dataclass(frozen=True, kw_only=True)
class LoadedExamples:
    """The usable rows of a split, in order, and the reasons for which rows were skipped."""

    source: str
    form: str
    """Name of the form that was recognised from the columns."""
    examples: list[Example] = field(repr=False)
    num_rows: int
    """Number of rows read, including skipped ones."""
    skipped: dict[str, int]
    """Reason -> number of rows."""
    first_bad: str | None
    """The first skipped row: its number, counted from 0, its place in the source, the reason, and the beginning of the
    row."""
    unread: tuple[str, ...] = ()
    """Columns with text that are no part of a prompt or response."""
    read: frozenset[str] = frozenset()
    """Columns that are a part of prompts, responses and labels, or are passed to the chat template."""
    sources: tuple[str, ...] = ()
    """Names of the datasets; empty for rows in memory."""
    bad_rows: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> the first `MOST_SHOWN` rows that were skipped for it: number, place, details, beginning of the row."""

    def summary(self) -> str:
        """Formats a one-line summary for the first lines of a run."""
        head, *unread = self._facts()
        if self.first_bad is None:
            return "; ".join([f"{head}, none skipped", *unread])
        return "; ".join([f"{head}, skipped {_counts(self.skipped)}", f"the first: {self.first_bad}", *unread])

    def origin(self) -> Origin:
        lines = self._facts()
        for reason, count in self.skipped.items():
            lines += [f"skipped {count:,} {reason}:", *(f"  {told}" for told in self.bad_rows[reason])]
        return Origin(sources=self.sources, lines=lines, read=self.read)

    def _facts(self) -> list[str]:
        names = ", ".join(self.unread).encode("utf-8", errors="backslashreplace").decode()  # a name may not be UTF-8
        return [
            f"{self.source}: {len(self.examples):,} examples of {self.num_rows:,} rows ({self.form})",
            *([f"columns not used in prompt or response: {names}"] if names else []),
        ]


def load_examples(
    source: str | Iterable[str] | Iterable[Mapping[str, Any]],
    *,
    split: str = "train",
    config_name: str | None = None,
    columns: Mapping[str, str] | None = None,
    needs: Sequence[str] = ("prompt",),
    max_bad_fraction: float = 0.1,
    limit: int | None = None,
) -> LoadedExamples:
    """Reads the rows of a dataset, in any known form, as examples.

    `source` is the name of a hub dataset, a local file (see `SUFFIXES`; its only split is "train"), a folder of such
    files, a folder written by `save_to_disk`, a list of these names, or rows in memory, for example a datasets.Dataset.
    `split` may be a slice such as train[:500].

    The form is recognised by the columns that most rows have, and their values tell text from conversations. Known
    forms are:

        prompt, chosen, rejected               strings, or lists of {"role", "content"}
        prompt, completion                     the completion is the reference
        chosen, rejected                       the prompt is all turns before the last one, as messages or as
                                               "\\n\\nHuman: ...\\n\\nAssistant: ..." text (Anthropic HH)
        messages                               the last turn is the reference, the turns before it the prompt
        prompt
        conversations                          ShareGPT: turns of {"from", "value"}, read like messages; together
                                               with chosen and rejected, the prompt of a pair
        chosen, rejected                       plain text: the prompt is the beginning that both share
        instruction, input, output             Alpaca: a turn of the user and one of the assistant
        text                                   the whole text is trained
        info, summaries, choice                OpenAI's comparisons, prompt and response in their TL;DR form
        subreddit, title, post, summary        TL;DR posts; the summary is the reference
        instruction, completions               UltraFeedback: a group of responses, overall_score their scores
        prompt, responses                      a list of strings, or of lists of messages, with optional
                                               `preferences` (a matrix of P(i is better than j)) or `scores` (numbers)

    If a row has turns in one column and text in another, the text is read as one turn. In every form, a column `system`
    becomes a turn before the prompt, and `tools`, `documents` and `chat_template_kwargs` are passed to the chat
    template. All other columns are kept in the example.

    Args:
        config_name: configuration of a hub dataset, or of a folder whose README.md names configurations.
        columns: name in the list above, or "reference" -> column of the dataset, for columns with other names.
        needs: the fields that a usable row must have, among prompt, chosen, rejected, reference, responses, label,
            label_prob, margin, wins and num_labels. Responses that are not needed are kept if they are valid; labels
            that are not needed are ignored. Of preferences and scores a row may have one or none.
        max_bad_fraction: largest allowed share of skipped rows.
        limit: maximum number of rows to read.

    Raises:
        ValueError: the source, split, file or columns are wrong, there is no usable row, or too many rows are skipped;
            the message names the cause and the fix.
    """
    needs = tuple(dict.fromkeys(("prompt", *needs)))
    _check_arguments(needs, max_bad_fraction, limit)
    rows = list(islice(read_rows(source, split, config_name), limit))
    sources = source_names(source)
    source = ", ".join(sources) or IN_MEMORY
    if not rows:
        raise ValueError(f"{source}: split {split!r} has no rows")
    values = [row for _, row in rows]
    names = _name_columns(values, columns or {}, source)
    required = [name for name in needs if name not in GROUP_LABELS]
    form, conversational = _detect_form(values, names, required, source)

    if "label" not in needs:
        _check_unpaired(values, form, columns or {}, source)
    # A system prompt is a turn. If any row has one, all rows are therefore read as conversations.
    has_system = any(str(row["system"]).strip() for row in _having(values, ["system"]))
    as_turns = has_system and form in (PAIRS, DEMONSTRATIONS, PROMPTS, GROUPS)
    examples: list[Example] = []
    skipped: Counter[str] = Counter()
    first_bad, bad_rows = None, dict[str, list[str]]()
    for number, (place, row) in enumerate(rows):
        try:
            examples.append(_to_example(row, number, names, form, conversational or as_turns, needs))
        except UnusableRow as bad:
            skipped[bad.reason] += 1
            where, content = f"row {number} ({place})", shorten(repr(row))
            first_bad = first_bad or f"{where}: {bad}: {content}"
            if skipped[bad.reason] <= MOST_SHOWN:
                bad_rows.setdefault(bad.reason, []).append(f"{where}: {bad.detail}: {content}")
    read = _read_columns(examples, names, form, needs)
    loaded = LoadedExamples(
        source=source,
        form=f"{form.name}, {_kind(form, conversational, as_turns)}",
        examples=examples,
        num_rows=len(rows),
        skipped=dict(skipped.most_common()),
        first_bad=first_bad,
        unread=_unread(examples, read),
        read=read,
        sources=sources,
        bad_rows=bad_rows,
    )
    if not examples or skipped.total() > max_bad_fraction * len(rows):
        raise ValueError(
            f"{source}: {skipped.total():,} of {len(rows):,} rows cannot be used ({_counts(skipped)}), "
            f"more than max_bad_fraction {max_bad_fraction:g} allows; the first: {first_bad}"
            if examples
            else f"{source}: none of {len(rows):,} rows can be used ({_counts(skipped)}); the first: {first_bad}"
        )
    return loaded


def _check_arguments(needs: Sequence[str], max_bad_fraction: float, limit: int | None) -> None:
    known = ("prompt", *RESPONSES, *LABELS)
    if unknown := set(needs) - set(known):
        raise ValueError(f"needs: {sorted(unknown)} are not among {', '.join(known)}")
    if not 0 <= max_bad_fraction <= 1:
        raise ValueError(f"max_bad_fraction: {max_bad_fraction} is not in 0..1")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: must be at least 1, or None for all rows; got {limit}")


def _name_columns(rows: Sequence[object], columns: Mapping[str, str], source: str) -> dict[str, str]:
    """Maps names that the forms use to columns of the dataset."""
    found = list(dict.fromkeys(column for row in rows if isinstance(row, dict) for column in row))
    names = {name: name for name in NAMES if name in found}
    if len(_having(rows, ["completion"])) > len(_having(rows, ["reference"])):
        names["reference"] = "completion"
    for name, column in columns.items():
        if name not in NAMES:
            raise ValueError(f"columns: {name!r} is not a name to map; names are {', '.join(NAMES)}")
        if column not in found:
            raise ValueError(f"columns: {source} has no column {column!r} for {name}; it has {', '.join(found)}")
        names[name] = column
    if not any(set(form.required) <= set(names) for form in FORMS):
        forms = "; ".join(", ".join(form.required) for form in FORMS)
        raise ValueError(
            f"{source}: columns {', '.join(found) or '(none: rows are not objects)'} fit no known form "
            f"({forms}; completion counts as reference); map them, for example columns: prompt=<column>,chosen=<column>"
        )
    return names


def _detect_form(
    rows: Sequence[object], names: Mapping[str, str], needs: Sequence[str], source: str
) -> tuple[Form, bool]:
    """Returns the first form whose columns exist and that provides all `needs`, and whether its rows are conversations.
    A form whose columns fewer than half of the rows have is taken only if no other form fits, because a few stray
    values should not decide the form.
    """
    candidates = [form for form in FORMS if set(form.required) <= set(names)]
    having = {form.name: _having(rows, [names[name] for name in form.required]) for form in candidates}
    candidates = [form for form in candidates if 2 * len(having[form.name]) >= len(rows)] or candidates
    if names.get("prompt", "prompt") != "prompt":  # the user named a prompt column, so no other prompt may be built
        candidates = [form for form in candidates if "prompt" in form.required] or candidates
    if "reference" not in needs:  # rows of the form "text" have no prompt
        candidates = [form for form in candidates if form is not TEXTS] or candidates
    form = next((form for form in candidates if set(needs) <= form.provides(names)), None)
    if form is None:
        given = candidates[0].provides(names)
        missing = sorted(set(needs) - given)
        instead = ", or use the response chosen (response of sft, reset_source of drpo, opponent of eval)"
        raise ValueError(
            f"{source}: no {' and no '.join(missing)} in {candidates[0].name} ({', '.join(names.values())}); "
            f"name the column by columns: {missing[0]}=<column>"
            f"{instead if 'reference' in missing and 'chosen' in given else ''}"
        )
    keys = [names[name] for name in form.required]
    lists = [row for row in having[form.name] if isinstance(row[keys[-1]], list)]
    whole = [row for row in lists if len(row[keys[-1]]) > 1 and isinstance(row[keys[0]], str)]
    conversational = 2 * len(lists) > len(having[form.name])
    if form is PAIRS and conversational and 2 * len(whole) > len(lists):
        form = CONVERSATION_PAIRS  # chosen is a whole conversation, and prompt only repeats its first turn
    if form is CONVERSATION_PAIRS and not conversational and "rejected" in names:
        texts = [row[keys[-1]] for row in having[form.name] if isinstance(row[keys[-1]], str)]
        if 2 * sum(HH_MARK.match(text.strip()) is not None for text in texts) < len(texts):
            form = PREFIX_PAIRS
    return form, conversational


def _check_unpaired(rows: Sequence[object], form: Form, columns: Mapping[str, str], source: str) -> None:
    """Raises ValueError for unpaired preferences (KTO), that is, if some responses are labelled as bad, in any form of
    a label that `kto` reads."""
    response = "reference" if form is DEMONSTRATIONS else form.required[-1]
    if form not in (DEMONSTRATIONS, MESSAGES, SHAREGPT, ALPACA) or response in columns:
        return
    given = [row["label"] for row in _having(rows, ["label"])]
    try:
        labels = [read_label(label) for label in given]
    except UnusableRow:  # some labels are of another kind, for example topics
        labels = [label for label in given if label is False]
    if bad := labels.count(False):
        same = "reference=completion" if response == "reference" else f"{response}={response}"
        raise ValueError(
            f"{source}: label is false in {bad:,} of {len(rows):,} rows, whose completions are bad examples (unpaired "
            f"preferences): train with fastrlhf kto, remove these rows, or train on all rows with columns: {same}"
        )


def _kind(form: Form, conversational: bool, as_turns: bool) -> str:
    if as_turns and not conversational:
        return "text, read as conversations because of the column system"
    return "conversational" if conversational else "text"


def _read_columns(
    examples: Sequence[Example], names: Mapping[str, str], form: Form, needs: Sequence[str]
) -> frozenset[str]:
    """Returns the columns that an example uses."""
    read = {*form.required, *needs, *form.provides(names), *(["input"] if form is ALPACA else ())}
    if examples and isinstance(examples[0].prompt, list):
        read |= {*TEMPLATE_KEYS, "system"}
    return frozenset(names[name] for name in read if name in names)


def _unread(examples: Sequence[Example], read: frozenset[str]) -> tuple[str, ...]:
    """Returns the columns with text that no example uses."""
    found = (name for example in examples for name, value in example.columns.items() if _is_text(value))
    return tuple(dict.fromkeys(name for name in found if name not in read))


def _is_text(value: object) -> bool:
    """Returns whether a value is text, or a list or an object that holds text."""
    if isinstance(value, str):
        return bool(value.strip())
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return any(map(_is_text, parts))


def _having(rows: Iterable[object], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the rows that have a value in all of these columns."""
    return [row for row in rows if isinstance(row, dict) and all(row.get(key) is not None for key in keys)]


def _to_example(
    row: object, number: int, names: Mapping[str, str], form: Form, conversational: bool, needs: Sequence[str]
) -> Example:
    if not isinstance(row, dict):
        raise UnusableRow("wrong_type", f"the row is {type(row).__name__}, not an object")
    values = {name: row.get(column) for name, column in names.items()}
    fields = form.convert(values, conversational) | read_pair_labels(values, needs)
    if isinstance(fields.get("prompt"), list):
        fields["template"] = read_template_values(values)
        system = read_text(values.get("system") or "", "system")
        if system.strip() and fields["prompt"][:1] != [{"role": "system", "content": system}]:
            fields["prompt"] = [{"role": "system", "content": system}, *fields["prompt"]]
    group_labels = {name: fields.pop(name, None) for name in GROUP_LABELS}
    if "responses" in fields and {*GROUP_LABELS} & {*needs}:
        fields |= read_group_labels(group_labels, len(fields["responses"]))
    for name in needs:
        if name not in GROUP_LABELS:
            present(fields, name)
    if is_empty(fields["prompt"]) and form is not TEXTS:
        raise UnusableRow("empty_prompt", "the prompt is empty or white space")
    for name in RESPONSES:
        if name in fields and is_empty(fields[name]):
            if name in needs:
                raise UnusableRow("empty_response", f"{name} is empty or white space")
            del fields[name]
    if {"chosen", "rejected"} <= set(needs) and fields["chosen"] == fields["rejected"]:
        raise UnusableRow("chosen_equals_rejected", "both responses are the same")
    columns = {column: value for column, value in row.items() if column != names.get("prompt")}
    return Example(row=number, columns=columns, **fields)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
