"""Counts the effects of tokenisation on the rows of a split; a run prints them in its first lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MOST_SHOWN = 5
"""Number of rows that `dropped_rows` lists per reason."""

TOO_LONG = ("longer_than_max_length", "prompt_fills_max_length", "response_fills_max_length", "no_trained_token")
"""Reasons for dropping a row that are due to `max_length`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenReport:
    """Effects of tokenisation on the rows of a split. Every kept response counts once, under eos_added, eos_present or
    responses_cut."""

    num_examples: int
    num_kept: int
    max_length: int
    eos_added: int
    """Number of responses to which an EOS was added."""
    eos_present: int
    """Number of responses whose text already ended in an end token."""
    responses_cut: int
    """Number of responses whose end was cut off (keep_start)."""
    prompts_cut: int
    """Number of prompts whose beginning was cut off (keep_end)."""
    dropped: dict[str, int]
    """Reason -> number of rows."""
    firsts: dict[str, str]
    """Reason for dropping a row, or kind of change -> the first such row, with details."""
    rows_cut: int = 0
    """Number of rows in which a response or the prompt was cut, including dropped rows whose responses are equal once
    they are cut."""
    ends: tuple[str, ...] = ()
    """Texts of the tokens that may end a response, the EOS first."""
    other_end: int = 0
    """Number of responses that end in one of `ends` other than the EOS."""
    bos_present: int = 0
    """Number of text prompts that already began with a BOS and got no second one."""
    space_ended: int = 0
    """Number of prompts whose trailing white space would merge with the response if both were tokenised as one text."""
    trailing_space: str = "prompt"
    """Where this white space is kept: at the end of the "prompt" or at the beginning of the "response"."""
    changed: dict[str, int] = field(default_factory=dict)
    """How the chat template changed a response -> number of kept rows."""
    num_tokens: int = 0
    """Number of tokens of the kept prompts and responses."""
    num_trained: int = 0
    """Number of trained tokens, that is, tokens of responses without the text between assistant turns."""
    unlike_text: int = 0
    """Number of responses whose ids do not decode to their text."""
    dropped_rows: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> the first `MOST_SHOWN` rows that were dropped for it, with details."""

    @property
    def truncated(self) -> int:
        return self.responses_cut + self.prompts_cut

    @property
    def rows_too_long(self) -> int:
        """Number of rows that were cut or dropped because of their length."""
        return self.rows_cut + sum(self.dropped.get(reason, 0) for reason in TOO_LONG)

    def summary(self) -> str:
        """Formats a one-line summary for the first lines of a run."""
        dropped = [f"dropped {self._told(reason, count, 'for ' + reason)}" for reason, count in self.dropped.items()]
        return "; ".join([*self.facts(), *dropped])

    def facts(self) -> list[str]:
        """Returns the parts of the summary that describe the kept rows."""
        responses = self.eos_added + self.eos_present + self.responses_cut
        parts = [f"{self.num_kept:,} of {self.num_examples:,} rows within {self.max_length:,} tokens"]
        if responses:
            parts.append(f"{self.eos_present:,} of {responses:,} responses end in EOS, added to {self.eos_added:,}")
            parts.append(f"cut: {self.responses_cut:,} responses, {self.prompts_cut:,} prompts")
        else:  # rows without responses
            parts.append(f"cut: {self.prompts_cut:,} prompts")
        if self.other_end:
            parts.append(f"{self.other_end:,} end in {' or '.join(self.ends[1:])} and get no {self.ends[0]} behind it")
        if self.bos_present:
            parts.append(f"{self.bos_present:,} prompts begin with BOS themselves and get no second one")
        if self.space_ended:
            where = "begins the response" if self.trailing_space == "response" else "stays in the prompt"
            other = "as in TRL" if self.trailing_space == "response" else "TRL moves it: see trailing_space"
            parts.append(f"{self.space_ended:,} prompts end in white space, which {where} ({other})")
        if self.unlike_text:
            first = f"first: {self.firsts['unlike_text']}; " if "unlike_text" in self.firsts else ""
            parts.append(
                f"{self.unlike_text:,} responses do not decode to their original text with this tokenizer "
                f"({first.replace('; ', ', ')}the model learns the decoded text)"
            )
        if self.changed:
            parts.append(f"changed by the chat template: {self.describe_changes()}")
        return parts

    def describe_changes(self) -> str:
        return ", ".join(self._told(kind, count, f"rows with {kind}") for kind, count in self.changed.items())

    def _told(self, reason: str, count: int, what: str) -> str:
        return f"{count:,} {what} (first: {self.firsts[reason]})"


def check_fractions(report: TokenReport, max_bad_fraction: float, max_dropped_fraction: float) -> None:
    """Raises ValueError if no row is left, if the chat template refuses or changes too many rows, or if too many rows
    are dropped."""
    by_template = {reason: count for reason, count in report.dropped.items() if reason.startswith("template_")}
    if not report.num_examples:
        raise ValueError("there are no rows to train or evaluate on; give at least one example")
    if not report.num_kept:
        template_alone = report.dropped and len(by_template) == len(report.dropped)
        cause = "chat_template: " if template_alone else ""
        fix = "give another template" if template_alone else "max_length or truncation_mode may be the cause"
        raise ValueError(f"{cause}no row is left after tokenising; {fix}: {report.summary()}")
    bad = by_template | report.changed
    if (num := sum(bad.values())) > max_bad_fraction * report.num_examples:
        raise ValueError(
            f"chat_template: it refuses or changes {num:,} of {report.num_examples:,} rows ({_firsts(report, bad)}), "
            f"more than max_bad_fraction {max_bad_fraction:g} allows; give another template, or raise max_bad_fraction"
        )
    if (num := sum(report.dropped.values())) > max_dropped_fraction * report.num_examples:
        raise ValueError(
            f"max_dropped_fraction: {num:,} of {report.num_examples:,} rows are dropped "
            f"({_firsts(report, report.dropped)}), more than {max_dropped_fraction:g} allows; raise it, or max_length"
        )


def _firsts(report: TokenReport, counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}, first {report.firsts[reason]}" for reason, count in counts.items())
