"""Rows of a dataset, whatever their form, as `Example`s.

source -> rows -> one form for the whole dataset -> Example per row, or a counted reason why not
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
    NAMES,
    PAIRS,
    PREFIX_PAIRS,
    PROMPTS,
    RESPONSES,
    TEXTS,
    Form,
)
from fastrlhf.data.labels import GROUP_LABELS, read_group_labels, read_pair_labels
from fastrlhf.data.rows import IN_MEMORY, UnusableRow, read_rows, shorten, source_names
from fastrlhf.data.turns import HH_MARK, TEMPLATE_KEYS, is_empty, present, read_template_values, read_text
from fastrlhf.types import Example


@dataclass(frozen=True, kw_only=True)
class LoadedExamples:
    """The usable rows of a split, in order, and why the others were skipped."""

    source: str
    form: str
    """Name of the form that was recognised from the columns."""
    examples: list[Example] = field(repr=False)
    num_rows: int
    """Number of rows read, including skipped ones."""
    skipped: dict[str, int]
    """Reason -> number of rows."""
    first_bad: str | None
    """The first skipped row: its number from 0, where it stands, why it was skipped, how it begins."""
    unread: tuple[str, ...] = ()
    """Columns with text that are not read."""

    def summary(self) -> str:
        """One-line summary for the header of a run."""
        text = f"{self.source}: {len(self.examples):,} examples of {self.num_rows:,} rows ({self.form})"
        unread = f"; no part of prompt or response: {', '.join(self.unread)}" if self.unread else ""
        if self.first_bad is None:
            return f"{text}, none skipped{unread}"
        return f"{text}, skipped {_counts(self.skipped)}; the first: {self.first_bad}{unread}"


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
    """Reads one split, or a slice of one such as train[:500], of a hub dataset, of a local file (`SUFFIXES`; its only
    split is "train"), of a folder of them or of one that `save_to_disk` wrote, or of a list of several of these; or
    rows in memory, for example a datasets.Dataset.

    Known forms, told apart by the columns, and as text or conversations by the values, that most rows have:

        prompt, chosen, rejected               strings, or lists of {"role", "content"}
        prompt, completion                     the completion is the reference
        chosen, rejected                       the prompt inside: all turns before the last, as messages or as
                                               "\\n\\nHuman: ...\\n\\nAssistant: ..." text (Anthropic HH)
        messages                               the last turn is the reference, those before it the prompt
        prompt
        conversations                          ShareGPT: turns of {"from", "value"}, as messages; beside chosen and
                                               rejected the prompt of a pair
        chosen, rejected                       plain text: the prompt is what both begin with
        instruction, input, output             Alpaca: a turn of the user and one of the assistant
        text                                   the whole text is trained
        info, summaries, choice                OpenAI's comparisons, prompt and response in their TL;DR form
        subreddit, title, post, summary        TL;DR posts; the summary is the reference
        instruction, completions               UltraFeedback: a group of responses, overall_score their scores
        prompt, responses                      a list of strings, or of lists of messages, of which `preferences` (a
                                               matrix of P(i better than j)) or `scores` (numbers) may judge

    Text beside turns in a row is a turn. A column `system` is a turn before the prompt, whatever the form; `tools`,
    `documents` and `chat_template_kwargs` go to the chat template. All other columns stay with the example.

    Args:
        config_name: of a hub dataset, or of a folder whose README.md names configurations.
        columns: name above -> column of the dataset, where they differ; also "reference" for any column.
        needs: which of prompt, chosen, rejected, reference, responses a usable row must have; other responses are given
            where good. And which of label_prob, margin, wins, num_labels, which are read only where they are needed;
            so are preferences and scores, of which a row has one or none.
        max_bad_fraction: skipped rows / rows read, at most.
        limit: rows read, at most.

    Raises:
        ValueError: the source, split, file or columns are wrong, there is no row or no usable one, or too many are
            skipped; the message says which and how to fix it.
    """
    needs = tuple(dict.fromkeys(("prompt", *needs)))
    _check_arguments(needs, max_bad_fraction, limit)
    rows = list(islice(read_rows(source, split, config_name), limit))
    source = ", ".join(source_names(source)) or IN_MEMORY
    if not rows:
        raise ValueError(f"{source}: split {split!r} has no rows")
    values = [row for _, row in rows]
    names = _name_columns(values, columns or {}, source)
    required = [name for name in needs if name not in GROUP_LABELS]
    form, conversational = _detect_form(values, names, required, source)

    _check_unpaired(values, form, columns or {}, source)
    # A system prompt is a turn, so that its rows are conversations, and then all rows are.
    has_system = any(str(row["system"]).strip() for row in _having(values, ["system"]))
    as_turns = has_system and form in (PAIRS, DEMONSTRATIONS, PROMPTS, GROUPS)
    examples: list[Example] = []
    skipped: Counter[str] = Counter()
    first_bad = None
    for number, (place, row) in enumerate(rows):
        try:
            examples.append(_to_example(row, number, names, form, conversational or as_turns, needs))
        except UnusableRow as bad:
            skipped[bad.reason] += 1
            first_bad = first_bad or f"row {number} ({place}): {bad}: {shorten(repr(row))}"
    loaded = LoadedExamples(
        source=source,
        form=f"{form.name}, {_kind(form, conversational, as_turns)}",
        examples=examples,
        num_rows=len(rows),
        skipped=dict(skipped.most_common()),
        first_bad=first_bad,
        unread=_unread(examples, names, form, needs),
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
        raise ValueError(f"needs: {sorted(unknown)} not among {', '.join(known)}")
    if not 0 <= max_bad_fraction <= 1:
        raise ValueError(f"max_bad_fraction: {max_bad_fraction} is not in 0..1")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: {limit} rows leave nothing to read; give 1 or more, or None for all")


def _name_columns(rows: Sequence[object], columns: Mapping[str, str], source: str) -> dict[str, str]:
    """Name of a form -> column of the dataset."""
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
            f"{source}: columns {', '.join(found) or '(none: rows are not objects)'} are none of the known forms "
            f"({forms}; completion counts as reference); name them with columns, as prompt=<column>,chosen=<column>"
        )
    return names


def _detect_form(
    rows: Sequence[object], names: Mapping[str, str], needs: Sequence[str], source: str
) -> tuple[Form, bool]:
    """The first form that these columns match and that has all `needs`, and whether it is conversational. A form that
    fewer than half of the rows have is taken only if no other fits, because a stray column does not make a form.
    """
    candidates = [form for form in FORMS if set(form.required) <= set(names)]
    having = {form.name: _having(rows, [names[name] for name in form.required]) for form in candidates}
    candidates = [form for form in candidates if 2 * len(having[form.name]) >= len(rows)] or candidates
    if names.get("prompt", "prompt") != "prompt":  # the user named a prompt column, so no form may build another prompt
        candidates = [form for form in candidates if "prompt" in form.required] or candidates
    if "reference" not in needs:  # the form "text" has no prompt
        candidates = [form for form in candidates if form is not TEXTS] or candidates
    form = next((form for form in candidates if set(needs) <= form.provides(names)), None)
    if form is None:
        given = candidates[0].provides(names)
        missing = sorted(set(needs) - given)
        instead = ", or use the response chosen (response of sft, reset_source of drpo, opponent of eval)"
        raise ValueError(
            f"{source}: no {' and no '.join(missing)} in {candidates[0].name} ({', '.join(names.values())}); "
            f"name a column for it with columns, as {missing[0]}=<column>"
            f"{instead if 'reference' in missing and 'chosen' in given else ''}"
        )
    keys = [names[name] for name in form.required]
    lists = [row for row in having[form.name] if isinstance(row[keys[-1]], list)]
    whole = [row for row in lists if len(row[keys[-1]]) > 1 and isinstance(row[keys[0]], str)]
    conversational = 2 * len(lists) > len(having[form.name])
    if form is PAIRS and conversational and 2 * len(whole) > len(lists):
        form = CONVERSATION_PAIRS  # whole conversations beside the bare text of their first turn
    if form is CONVERSATION_PAIRS and not conversational and "rejected" in names:
        texts = [row[keys[-1]] for row in having[form.name] if isinstance(row[keys[-1]], str)]
        if 2 * sum(HH_MARK.match(text.strip()) is not None for text in texts) < len(texts):
            form = PREFIX_PAIRS
    return form, conversational


def _check_unpaired(rows: Sequence[object], form: Form, columns: Mapping[str, str], source: str) -> None:
    """Raises ValueError for unpaired preferences (KTO): completions some of which are labelled as bad."""
    bad = sum(row["label"] is False for row in _having(rows, ["label"]))
    if form is DEMONSTRATIONS and bad and "reference" not in columns:
        raise ValueError(
            f"{source}: label is false in {bad:,} of {len(rows):,} rows: these completions are examples of what not to "
            "write (unpaired preferences, as for KTO); leave them out, or train on all with "
            "columns: reference=completion"
        )


def _kind(form: Form, conversational: bool, as_turns: bool) -> str:
    if as_turns and not conversational:
        return "text, read as conversations because of the column system"
    return "conversational" if conversational else "text"


def _unread(examples: Sequence[Example], names: Mapping[str, str], form: Form, needs: Sequence[str]) -> tuple[str, ...]:
    """The columns with text from which no example was made."""
    read = {*form.required, *needs, *form.provides(names), *(["input"] if form is ALPACA else ())}
    if examples and isinstance(examples[0].prompt, list):
        read |= {*TEMPLATE_KEYS, "system"}
    columns = {names[name] for name in read if name in names}
    found = (name for example in examples for name, value in example.columns.items() if _is_text(value))
    return tuple(dict.fromkeys(name for name in found if name not in columns))


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _having(rows: Iterable[object], keys: Sequence[str]) -> list[dict[str, Any]]:
    """The rows that have all these columns."""
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
