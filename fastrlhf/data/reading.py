"""Re-encodes prompts and responses for a judge whose tokenizer or chat template differs from the run's.

The prompt is taken from the dataset row; if it consists of turns, the judge's chat template renders them. The response
is decoded to text by the run's tokenizer and then encoded by the judge's. (TRL's issue 1979 reports judges that get the
policy's token ids, which mean other tokens to them.)
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
    """Configuration key that names the judge, for error messages."""
    run: PreTrainedTokenizerBase = field(repr=False)
    """The run's tokenizer, which decodes the token ids of the rollouts."""
    judge: PreTrainedTokenizerBase = field(repr=False)
    examples: Mapping[tuple[int, tuple[int, ...]], Example] = field(repr=False)
    """(row number, prompt ids in the run's tokenizer) -> the example with the prompt that the judge reads."""
    rules: TextRules = field(default_factory=TextRules)

    def __call__(self, rollouts: Sequence[Rollout]) -> Texts:
        """Returns prompt and response of each rollout as ids of the judge's tokenizer. A response gets an end token
        only if the rollout has one.

        Raises ValueError, naming the row, if the judge's chat template refuses a response.
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
        """Returns the example to encode: the prompt of the row, and the response as text."""
        asked = self.examples[row, tuple(prompt)]
        before, whole = decode(prompt, self.run), decode([*prompt, *response], self.run)
        text = whole[len(before) :] if whole.startswith(before) else decode(response, self.run)
        if not isinstance(asked.prompt, str):
            return replace(_bare(asked), reference=[{"role": "assistant", "content": text}])
        if self.rules.trailing_space == "response":  # the run moved white space from prompt to response
            num_spaces = len(asked.prompt) - len(asked.prompt.rstrip())
            starts = (asked.prompt[: len(asked.prompt) - k] for k in range(num_spaces + 1))
            return Example(prompt=next(filter(before.endswith, starts), asked.prompt), reference=text, row=row)
        return replace(_bare(asked), reference=text)


def _bare(example: Example) -> Example:
    return Example(prompt=example.prompt, row=example.row, template=example.template)


def judge_rows(
    name: str, examples: Sequence[Example], judge: PreTrainedTokenizerBase, fields: Sequence[str], rules: TextRules
) -> list[TokenizedExample]:
    """Encodes examples with a judge's tokenizer and chat template, without truncation. Raises ValueError, naming the
    judge's key `name` and the row, if the chat template refuses a row."""
    try:
        return encode_rows(examples, judge, fields=fields, rules=rules)
    except UnusableRow as bad:
        raise ValueError(f"{name}: its own chat template cannot render {bad.detail}") from None


def open_reader(
    name: str,
    run: PreTrainedTokenizerBase,
    judge: PreTrainedTokenizerBase,
    rows: Sequence[TokenizedExample],
    rules: TextRules,
) -> TextReader:
    """Makes the reader of a judge for the rows of a run, after encoding every row once with a dummy answer to find
    problems. Raises ValueError as `judge_rows` does, and if the judge's chat template asks for the date but the run has
    no `template_date`."""
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
