"""Text for judges whose tokenizer or chat template is not that of the run: decoded, and encoded as the judge writes it.

A judge reads the prompt of the row, as text or as turns through its own chat template, and the response as the text
that the tokens of the run stand for (TRL's issue 1979 is about judges that are given the ids of the policy).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from fastrlhf.data.encoding import decode
from fastrlhf.data.rows import UnusableRow
from fastrlhf.data.specials import end_ids
from fastrlhf.data.templates import reads_clock
from fastrlhf.data.tokens import TextRules, encode_rows
from fastrlhf.types import Example, Rollout, TokenizedExample

Texts = list[tuple[list[int], list[int]]]
"""(ids of the prompt, ids of the response) of each rollout."""


@dataclass(frozen=True, kw_only=True)
class TextReader:
    """Encodes rollouts for a judge with its own tokenizer."""

    name: str
    """Key of the judge, for messages."""
    run: PreTrainedTokenizerBase = field(repr=False)
    """The tokenizer that the tokens of the rollouts belong to."""
    judge: PreTrainedTokenizerBase = field(repr=False)
    examples: Mapping[tuple[int, tuple[int, ...]], Example] = field(repr=False)
    """(row, ids of the prompt in the run) -> the example whose prompt the judge reads."""
    rules: TextRules = field(default_factory=TextRules)

    def __call__(self, rollouts: Sequence[Rollout]) -> Texts:
        """The ids of the judge. A response that did not reach an end has none here either.

        Raises ValueError, naming the row, where the judge's chat template refuses a response.
        """
        ends, examples, finished = {*end_ids(self.run)}, [], []
        for rollout in rollouts:
            ids = rollout.prefix.token_ids
            prompt = ids[: len(ids) - rollout.prefix.num_reset]
            first = next((i for i, token in enumerate(rollout.completion) if token in ends), None)
            finished.append(first is not None)
            response = [*ids[len(prompt) :], *rollout.completion[:first]]
            examples.append(self._example(rollout.prefix.row, prompt, response))
        rows = judge_rows(self.name, examples, self.judge, ["reference"], self.rules)
        return [
            (row.prompt, row.reference if done else row.reference[:-1])
            for row, done in zip(rows, finished, strict=True)
            if row.reference is not None
        ]

    def _example(self, row: int, prompt: list[int], response: list[int]) -> Example:
        """The row's prompt with the response as text."""
        asked = self.examples[row, tuple(prompt)]
        before, whole = decode(prompt, self.run), decode([*prompt, *response], self.run)
        text = whole[len(before) :] if whole.startswith(before) else decode(response, self.run)
        if not isinstance(asked.prompt, str):
            return replace(_bare(asked), reference=[{"role": "assistant", "content": text}])
        if self.rules.trailing_space == "response":  # white space that the run took from the prompt is in the response
            num_spaces = len(asked.prompt) - len(asked.prompt.rstrip())
            starts = (asked.prompt[: len(asked.prompt) - k] for k in range(num_spaces + 1))
            return Example(prompt=next(filter(before.endswith, starts), asked.prompt), reference=text, row=row)
        return replace(_bare(asked), reference=text)


def _bare(example: Example) -> Example:
    return Example(prompt=example.prompt, row=example.row, template=example.template)


def judge_rows(
    name: str, examples: Sequence[Example], judge: PreTrainedTokenizerBase, fields: Sequence[str], rules: TextRules
) -> list[TokenizedExample]:
    """The ids of examples as a judge's tokenizer writes them, uncut. Raises ValueError, naming the judge's key and the
    row, where its chat template refuses one."""
    try:
        return encode_rows(examples, judge, fields=fields, rules=rules)
    except UnusableRow as bad:
        raise ValueError(f"{name}: its own chat template cannot write {bad.detail}") from None


def open_reader(
    name: str,
    run: PreTrainedTokenizerBase,
    judge: PreTrainedTokenizerBase,
    rows: Sequence[TokenizedExample],
    rules: TextRules,
) -> TextReader:
    """The reader of a judge for the rows of a run, each of which has been tried with an answer. Raises ValueError as
    `judge_rows` does, and where the judge's template asks for a date and the run has none to give."""
    examples = {(row.row, tuple(row.prompt)): row.source for row in rows if row.source is not None}
    talks = any(isinstance(example.prompt, list) for example in examples.values())
    if talks and rules.day is None and reads_clock(judge):
        raise ValueError(
            f"template_date: the chat template of {name} asks for a date; give one, so that it is recorded"
        )
    tried = [
        replace(_bare(row), reference="a" if isinstance(row.prompt, str) else [{"role": "assistant", "content": "a"}])
        for row in examples.values()
    ]
    judge_rows(name, tried, judge, ["reference"], rules)
    return TextReader(name=name, run=run, judge=judge, examples=examples, rules=rules)
