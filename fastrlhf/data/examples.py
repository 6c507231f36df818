"""Rows of a dataset, whatever their form, as `Example`s.

source -> rows -> one form for the whole dataset -> Example per row, or a counted reason why not
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from fastrlhf.data.labels import GROUP_LABELS, PAIR_LABELS, read_group_labels, read_pair_labels
from fastrlhf.data.rows import IN_MEMORY, UnusableRow, read_rows, shorten
from fastrlhf.types import Example, Message, Text

RESPONSES = ("chosen", "rejected", "reference")


@dataclass(frozen=True, kw_only=True)
class LoadedExamples:
    """The usable rows of a split, in order, and what became of the others."""

    source: str
    form: str
    """The form that the columns were understood as."""
    examples: list[Example] = field(repr=False)
    num_rows: int
    """Rows read, the skipped ones included."""
    skipped: dict[str, int]
    """Reason -> rows."""
    first_bad: str | None
    """The first skipped row: its number from 0, where it stands, why it was skipped, how it begins."""

    def summary(self) -> str:
        """For the header of a run."""
        text = f"{self.source}: {len(self.examples):,} examples of {self.num_rows:,} rows ({self.form})"
        if self.first_bad is None:
            return f"{text}, none skipped"
        return f"{text}, skipped {_counts(self.skipped)}; the first: {self.first_bad}"


def load_examples(
    source: str | Iterable[Mapping[str, Any]],
    *,
    split: str = "train",
    config_name: str | None = None,
    columns: Mapping[str, str] | None = None,
    needs: Sequence[str] = ("prompt",),
    max_bad_fraction: float = 0.1,
    limit: int | None = None,
) -> LoadedExamples:
    """Reads one split of a hub dataset, of a local file (`SUFFIXES`; its only split is "train") or of a folder of them;
    or rows in memory, for example a datasets.Dataset.

    Known forms, told apart by the columns, and as text or conversations by the values, that most rows have:

        prompt, chosen, rejected               strings, or lists of {"role", "content"}
        prompt, completion                     the completion is the reference
        chosen, rejected                       the prompt inside: all turns before the last, as messages or as
                                               "\\n\\nHuman: ...\\n\\nAssistant: ..." text (Anthropic HH)
        messages                               the last turn is the reference, those before it the prompt
        prompt
        info, summaries, choice                OpenAI's comparisons, prompt and response in their TL;DR form
        subreddit, title, post, summary        TL;DR posts; the summary is the reference
        instruction, completions               UltraFeedback: a group of responses, overall_score their scores
        prompt, responses                      a list of strings, or of lists of messages, of which `preferences` (a
                                               matrix of P(i better than j)) or `scores` (numbers) may judge

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
            skipped; the message says which and how to mend it.
    """
    needs = tuple(dict.fromkeys(("prompt", *needs)))
    _check_arguments(needs, max_bad_fraction, limit)
    rows = list(islice(read_rows(source, split, config_name), limit))
    source = source if isinstance(source, str) else IN_MEMORY
    if not rows:
        raise ValueError(f"{source}: split {split!r} has no rows")
    values = [row for _, row in rows]
    names = _name_columns(values, columns or {}, source)
    required = [name for name in needs if name not in GROUP_LABELS]
    form, conversational = _detect_form(values, names, required, source)

    labelled = form is DEMONSTRATIONS and _having(values, ["label"])  # unpaired preferences

    examples: list[Example] = []
    skipped: Counter[str] = Counter()
    first_bad = None
    for number, (place, row) in enumerate(rows):
        try:
            examples.append(_to_example(row, number, names, form, conversational, needs))
        except UnusableRow as bad:
            skipped[bad.reason] += 1
            first_bad = first_bad or f"row {number} ({place}): {bad}: {shorten(repr(row))}"
    loaded = LoadedExamples(
        source=source,
        form=f"{form.name}, {'conversational' if conversational else 'text'}{', label is not read' * bool(labelled)}",
        examples=examples,
        num_rows=len(rows),
        skipped=dict(skipped.most_common()),
        first_bad=first_bad,
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


Fields = dict[str, Any]
"""prompt, chosen, rejected, reference (Text) and a group's fields: those that a row has."""


@dataclass(frozen=True, kw_only=True)
class Form:
    name: str
    required: tuple[str, ...]
    """Columns that the dataset must have; the type of the last one says whether it is conversational."""
    convert: Callable[[Mapping[str, Any], bool], Fields]
    """(row under the names of the forms, conversational) -> fields. Raises UnusableRow."""
    gives: tuple[str, ...] | None = None
    """Responses it makes; None: those that are columns of the dataset."""

    def provides(self, names: Iterable[str]) -> set[str]:
        given = RESPONSES if self.gives is None else ()
        return {"prompt", *(self.gives or ())}.union({*given, *PAIR_LABELS}.intersection(names))


def _explicit(row: Mapping[str, Any], conversational: bool) -> Fields:
    if not conversational:
        return {name: _text(row[name], name) for name in ("prompt", *RESPONSES) if row.get(name) is not None}
    prompt = _messages(_present(row, "prompt"), "prompt")
    fields: Fields = {"prompt": prompt}
    for name in RESPONSES:
        if row.get(name) is not None:
            fields[name] = _answer_to(prompt, row[name], name)
    return fields


def _group(row: Mapping[str, Any], conversational: bool) -> Fields:
    prompt, values = _present(row, "prompt"), _present(row, "responses")
    if not isinstance(values, list) or len(values) < 2:
        raise UnusableRow("wrong_type", "responses must be a list of at least two")
    if conversational:
        prompt = _messages(prompt, "prompt")
        responses: list[Text] = [_answer_to(prompt, value, f"responses[{i}]") for i, value in enumerate(values)]
    else:
        prompt = _text(prompt, "prompt")
        responses = [_text(value, f"responses[{i}]") for i, value in enumerate(values)]
    for i, response in enumerate(responses):
        if _is_empty(response):
            raise UnusableRow("empty_response", f"responses[{i}] is empty or white space")
    return {"prompt": prompt, "responses": responses, **{name: row.get(name) for name in GROUP_LABELS}}


def _rated(row: Mapping[str, Any], conversational: bool) -> Fields:
    completions = _present(row, "completions")
    if not isinstance(completions, list) or not all(isinstance(one, dict) for one in completions):
        raise UnusableRow("wrong_type", "completions must be a list of {response, overall_score}")
    names = {"responses": "response", "scores": "overall_score"}
    lists = {name: [one.get(key) for one in completions] for name, key in names.items()}
    return _group({"prompt": _present(row, "instruction"), **lists}, conversational=False)


def _implicit(row: Mapping[str, Any], conversational: bool) -> Fields:
    read = _messages if conversational else _human_assistant_turns
    turns = {name: read(row[name], name) for name in RESPONSES if row.get(name) is not None}
    if not turns:
        raise UnusableRow("missing_chosen", "no response in this row")
    prompts = [conversation[:-1] for conversation in turns.values()]
    if any(prompt != prompts[0] for prompt in prompts):
        raise UnusableRow("prompts_differ", f"{' and '.join(turns)} differ before their last turn")
    if not conversational:
        for name, conversation in turns.items():
            _check_turns(conversation, name)
    answers: Fields = {name: _answer(conversation[-1:], name) for name, conversation in turns.items()}
    return answers | {"prompt": prompts[0]}


def _chat(row: Mapping[str, Any], conversational: bool) -> Fields:
    turns = _messages(_present(row, "messages"), "messages")
    return {"prompt": turns[:-1], "reference": _answer(turns[-1:], "messages")}


def _tldr_prompt(post: Mapping[str, Any]) -> str:
    subreddit, title, body = (_text(_present(post, name), name) for name in ("subreddit", "title", "post"))
    if not body.strip():
        raise UnusableRow("empty_prompt", "the post is empty")
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {body}\n\nTL;DR:"


def _tldr_response(value: object, name: str) -> str:
    text = _text(value, name)
    return text if text.startswith(" ") or not text.strip() else f" {text}"


def _tldr_post(row: Mapping[str, Any], conversational: bool) -> Fields:
    return {"prompt": _tldr_prompt(row), "reference": _tldr_response(_present(row, "summary"), "summary")}


def _comparison(row: Mapping[str, Any], conversational: bool) -> Fields:
    info, summaries, choice = (_present(row, name) for name in ("info", "summaries", "choice"))
    two = isinstance(summaries, list) and [type(summary) for summary in summaries] == [dict, dict]
    if not two or not isinstance(info, dict) or not isinstance(choice, int) or choice not in (0, 1):
        raise UnusableRow("wrong_type", "expected info {...}, summaries [{text}, {text}], and choice 0 or 1")
    texts = [_tldr_response(_present(summary, "text"), "text") for summary in summaries]
    return {"prompt": _tldr_prompt(info), "chosen": texts[choice], "rejected": texts[1 - choice]}


PAIRS = Form(name="pairs", required=("prompt", "chosen"), convert=_explicit)
CONVERSATION_PAIRS = Form(name="pairs with the prompt inside", required=("chosen",), convert=_implicit)
COMPARISONS = Form(
    name="OpenAI comparisons",
    required=("info", "summaries", "choice"),
    convert=_comparison,
    gives=("chosen", "rejected"),
)
POSTS = Form(
    name="TL;DR posts", required=("subreddit", "title", "post", "summary"), convert=_tldr_post, gives=("reference",)
)
DEMONSTRATIONS = Form(name="demonstrations", required=("prompt", "reference"), convert=_explicit)
MESSAGES = Form(name="messages", required=("messages",), convert=_chat, gives=("reference",))
PROMPTS = Form(name="prompts", required=("prompt",), convert=_explicit)
GROUPS = Form(name="groups", required=("responses", "prompt"), convert=_group, gives=("responses",))
RATED = Form(name="UltraFeedback", required=("instruction", "completions"), convert=_rated, gives=("responses",))
FORMS = (COMPARISONS, POSTS, PAIRS, DEMONSTRATIONS, CONVERSATION_PAIRS, MESSAGES, PROMPTS, GROUPS, RATED)
"""The first that fits is taken: the richer before the poorer, and a group only where one is needed."""
LABELS = ("responses", *GROUP_LABELS, *PAIR_LABELS)
NAMES = ("prompt", *RESPONSES, *LABELS, "messages", *COMPARISONS.required, *POSTS.required, *RATED.required)


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
    """The first form that these columns make and that has all `needs`; and whether it is conversational.

    A form that fewer than half of the rows have is taken only where no other is: a stray column makes no form.
    """
    candidates = [form for form in FORMS if set(form.required) <= set(names)]
    having = {form.name: _having(rows, [names[name] for name in form.required]) for form in candidates}
    candidates = [form for form in candidates if 2 * len(having[form.name]) >= len(rows)] or candidates
    if names.get("prompt", "prompt") != "prompt":  # named by the user: no form may write a prompt of its own
        candidates = [form for form in candidates if "prompt" in form.required] or candidates
    form = next((form for form in candidates if set(needs) <= form.provides(names)), None)
    if form is None:
        missing = sorted(set(needs) - candidates[0].provides(names))
        raise ValueError(
            f"{source}: no {' and no '.join(missing)} in {candidates[0].name} ({', '.join(names.values())}); "
            f"name a column for it with columns, as {missing[0]}=<column>"
        )
    keys = [names[name] for name in form.required]
    lists = [row for row in having[form.name] if isinstance(row[keys[-1]], list)]
    conversational = 2 * len(lists) > len(having[form.name])
    if form is PAIRS and conversational and 2 * sum(isinstance(row[keys[0]], str) for row in lists) > len(lists):
        form = CONVERSATION_PAIRS  # whole conversations beside the bare text of their first turn
    return form, conversational


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
    group_labels = {name: fields.pop(name, None) for name in GROUP_LABELS}
    if "responses" in fields and {*GROUP_LABELS} & {*needs}:
        fields |= read_group_labels(group_labels, len(fields["responses"]))
    for name in needs:
        if name not in GROUP_LABELS:
            _present(fields, name)
    if _is_empty(fields["prompt"]):
        raise UnusableRow("empty_prompt", "the prompt is empty or white space")
    for name in RESPONSES:
        if name in fields and _is_empty(fields[name]):
            if name in needs:
                raise UnusableRow("empty_response", f"{name} is empty or white space")
            del fields[name]
    if {"chosen", "rejected"} <= set(needs) and fields["chosen"] == fields["rejected"]:
        raise UnusableRow("chosen_equals_rejected", "both responses are the same")
    columns = {column: value for column, value in row.items() if column != names.get("prompt")}
    return Example(row=number, columns=columns, **fields)


def _present(row: Mapping[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise UnusableRow(f"missing_{name}", f"no {name} in this row")
    return row[name]


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise UnusableRow("wrong_type", f"{name} is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UnusableRow("wrong_type", f"{name} holds half a surrogate pair, which is no character") from None
    return value


def _messages(value: object, name: str) -> list[Message]:
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise UnusableRow("wrong_type", f"{name} is {type(value).__name__}, not a list of {{role, content}}")
    return [{key: _text(turn.get(key), f"{key} of {name}") for key in ("role", "content")} for turn in value]


def _answer_to(prompt: list[Message], value: object, name: str) -> list[Message]:
    turns = _messages(value, name)
    # some datasets repeat the prompt at the start of every response
    return _answer(turns[len(prompt) :] if turns[: len(prompt)] == prompt else turns, name)


def _answer(turns: list[Message], name: str) -> list[Message]:
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        roles = ", ".join(turn["role"] for turn in turns) or "none"
        raise UnusableRow("response_not_one_assistant_turn", f"turns of {name} after the prompt: {roles}")
    return turns


HH_MARK = re.compile(r"(?:^|\n\n)(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def _human_assistant_turns(value: object, name: str) -> list[Message]:
    start, *parts = HH_MARK.split(_text(value, name).strip())
    if start or not parts:
        raise UnusableRow("not_human_assistant_text", f"{name} does not begin with a 'Human:' turn")
    return [
        {"role": HH_ROLES[mark], "content": content.strip()}
        for mark, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _check_turns(turns: list[Message], name: str) -> None:
    roles = [turn["role"] for turn in turns]
    if roles != ["user", "assistant"] * (len(turns) // 2):
        raise UnusableRow("roles_do_not_alternate", f"roles of {name}: {', '.join(roles)}")
    if any(not turn["content"] for turn in turns):
        raise UnusableRow("empty_turn", f"turn {[turn['content'] for turn in turns].index('')} of {name} is empty")


def _is_empty(text: Text) -> bool:
    return not (text.strip() if isinstance(text, str) else any(turn["content"].strip() for turn in text))


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
