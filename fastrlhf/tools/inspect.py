"""Shows the rows of a dataset as the model will see them: every token with its role in training.

Rows are loaded, tokenised and packed, and resets are drawn, by the functions of the trainers (tools/plan/work.py). Only
a tokenizer is needed, no model.

`fastrlhf inspect --config FILE [--command dpo] [--num 5] [--html PAGE]`
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from fastrlhf.algorithms.scoring import Tree
from fastrlhf.config import DPOConfig, KTOConfig, PPOConfig, RewardConfig, SFTConfig, TrainConfig, require
from fastrlhf.data.packing import check_micro_batch, micro_batches, num_computed
from fastrlhf.data.specials import end_ids
from fastrlhf.report.page import render_page, token_markup
from fastrlhf.report.samples import token_texts
from fastrlhf.tools.plan.work import Work, first_prefixes, open_work, to_tree
from fastrlhf.types import Prefix, TokenizedExample

ROLES = {
    "prompt": "given to the model, not trained",
    "reset": "copied from a response of the dataset, given to the model, not trained",
    "trained": "the loss is computed on these tokens",
    "eos": "a trained token that ends the response",
    "masked": "belongs to a response, but is not trained",
    "score": "the last token, at which the reward model gives its score",
}
"""Roles that a token can have."""

ANSI = {"prompt": "2", "reset": "33", "trained": "32", "eos": "1;35", "masked": "36", "score": "1;35"}
"""Role -> parameters of the terminal's colour code (SGR)."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One segment of a pack."""

    name: str
    """Name of the segment: prompt, chosen, ..."""
    tokens: list[tuple[str, int]]
    """(role, id), in order"""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One item of a batch: a sequence, a pair, a group, or the prefix of an episode."""

    title: str
    lines: list[Line]


@dataclass(frozen=True, kw_only=True)
class Inspection:
    tokenizer: PreTrainedTokenizerBase
    facts: list[str]
    """Lines about the training data and the first step."""
    rows: list[Row]


def inspect_rows(config: TrainConfig, num: int) -> Inspection:
    """Returns the first `num` rows (on-policy: episodes) in the order in which the run draws them.

    Raises ValueError as the trainer would: for a bad path, a bad row, or a row that does not fit a micro-batch.
    """
    require(num >= 1, "num", num, "at least 1")
    work = open_work(config, most_batches=-(-num // config.batch_size))
    if isinstance(config, PPOConfig):
        return _episodes(config, work, num)
    tree_of, examples = to_tree(config), work.examples
    trees = [tree_of(example) for example in examples]
    check_micro_batch(config, examples, [num_computed(tree) for tree in trees])
    drawn = [i for batch in work.batches for i in batch]
    ends = end_ids(work.tokenizer)
    return Inspection(
        tokenizer=work.tokenizer,
        facts=[
            *_describe_rows(work),
            _describe_tokens(trees),
            _describe_step(config, [trees[i] for i in work.batches[0]], work.steps),
        ],
        rows=[_row(config, examples[i], trees[i], ends) for i in drawn[:num]],
    )


def format_text(inspection: Inspection, *, colour: bool) -> str:
    """Formats rows for a terminal: one line per sequence of tokens with the same role. Control characters are escaped,
    e.g. \\x1b."""

    def paint(role: str, text: str) -> str:
        return f"\033[{ANSI[role]}m{text}\033[0m" if colour else text

    width = max(map(len, ROLES))
    output = [*inspection.facts, ""]
    used = {role for row in inspection.rows for line in row.lines for role, _ in line.tokens}
    output += [f"  {paint(role, role.ljust(width))}  {told}" for role, told in ROLES.items() if role in used]
    for row in inspection.rows:
        output += ["", row.title]
        for line in row.lines:
            output.append(f"  {line.name}: {len(line.tokens)} tokens{line.note}")
            texts = token_texts(inspection.tokenizer, [token for _, token in line.tokens])
            pairs = zip((role for role, _ in line.tokens), texts, strict=True)
            for role, run in groupby(pairs, key=lambda pair: pair[0]):
                for part in _printable("".join(text for _, text in run)):
                    output.append(f"    {role.ljust(width)} | {paint(role, part)}")
    return "\n".join(output)


def format_html(inspection: Inspection, title: str) -> str:
    """Formats rows as a self-contained HTML page: every token has the colour of its role, and a tooltip shows its
    id."""
    legend = "".join(f'<span class="{role}">{role}</span> {told}<br>' for role, told in ROLES.items())
    sections = [("What the colours mean", f'<p class="tokens">{legend}</p>')]
    for row in inspection.rows:
        lines = "".join(
            f"<h3>{escape(line.name)}: {len(line.tokens)} tokens{escape(line.note)}</h3>"
            f'<p class="tokens">{"".join(_spans(inspection.tokenizer, line))}</p>'
            for line in row.lines
        )
        sections.append((row.title, lines))
    return render_page(title, inspection.facts, sections, footer="Rest the mouse on a token to see its id.")


def _episodes(config: PPOConfig, work: Work, num: int) -> Inspection:
    prefixes = first_prefixes(config, work)
    first = prefixes[: config.batch_size]
    resets = [prefix.num_reset for prefix in first if prefix.num_reset]
    lengths = [len(example.prompt) for example in work.examples]
    facts = [
        *_describe_rows(work),
        f"{len(lengths):,} prompts of {sum(lengths) / len(lengths):.1f} tokens on average, {max(lengths):,} at most",
        f"update 1 of {work.steps:,}: {len(first):,} episodes, {len(resets):,} after a reset"
        + (f" of {sum(resets) / len(resets):.1f} tokens on average" if resets else "")
        + f"; a response has at most {config.response_length} tokens, including those of its reset",
    ]
    if config.reset_source == "sample" and config.reset_prob > 0:
        facts.append("with reset_source sample the reference model writes what resets copy, so no reset is shown here")
    if config.reset_source == "rollout":
        facts.append("with reset_source rollout the policy writes what resets copy, so no reset is shown here")
    return Inspection(
        tokenizer=work.tokenizer,
        facts=facts,
        rows=[_episode(config, prefix) for prefix in prefixes[:num]],
    )


def _episode(config: PPOConfig, prefix: Prefix) -> Row:
    num_prompt = len(prefix.token_ids) - prefix.num_reset
    roles = ["prompt"] * num_prompt + ["reset"] * prefix.num_reset
    depth = f", {prefix.reset_depth:.0%} of the response" if prefix.num_reset else ""
    return Row(
        title=f"row {prefix.row}, episode {prefix.episode}: reset of {prefix.num_reset} tokens{depth}",
        lines=[
            Line(
                name="prefix",
                tokens=list(zip(roles, prefix.token_ids, strict=True)),
                note=f"; after it the policy samples at most {config.response_length - prefix.num_reset} tokens",
            )
        ],
    )


def _row(config: TrainConfig, example: TokenizedExample, tree: Tree, ends: Sequence[int]) -> Row:
    trunks = {segment.parent for segment in tree}
    names, lines = _names(config), []
    for index, segment in enumerate(tree):
        is_trunk = index in trunks
        num_prompt = len(segment.token_ids) if is_trunk else 0 if segment.parent >= 0 else len(example.prompt)
        length = len(segment.token_ids)
        scored = set(range(length - segment.num_scored, length) if segment.scored is None else segment.scored)
        tokens = []
        for i, token in enumerate(segment.token_ids):
            role = "prompt" if i < num_prompt else "masked"
            if i in scored:
                role = "eos" if token in ends else "trained"
            tokens.append((role, token))
        if isinstance(config, RewardConfig) and not is_trunk:
            tokens[-1] = ("score", tokens[-1][1])
        cut = not is_trunk and segment.token_ids[-1] not in ends
        note = "; cut at max_length, so it has no EOS" if cut else ""
        lines.append(Line(name="prompt" if is_trunk else next(names), tokens=tokens, note=note))
    return Row(title=f"row {example.row}: {num_computed(tree)} tokens, {_num_scored(tree)} trained", lines=lines)


def _names(config: TrainConfig) -> Iterator[str]:
    """Yields the names of the responses of a row, in the order of the leaves of its tree."""
    if isinstance(config, SFTConfig):
        return iter([f"prompt and {config.response}"])
    if isinstance(config, KTOConfig):
        return iter(["prompt and response"])
    if isinstance(config, DPOConfig) and config.psi_backend == "groupwise":
        return (f"responses[{i}]" for i in range(1 << 30))
    return iter(["chosen", "rejected"])


def _num_scored(tree: Tree) -> int:
    return sum(segment.num_scored for segment in tree)


def _describe_rows(work: Work) -> list[str]:
    return work.report.summary().split("; ")


def _describe_tokens(trees: Sequence[Tree]) -> str:
    costs = [num_computed(tree) for tree in trees]
    return (
        f"{sum(costs):,} tokens per epoch, {sum(map(_num_scored, trees)):,} of them trained; a row has "
        f"{sum(costs) / len(costs):.1f} on average, {max(costs):,} at most"
    )


def _describe_step(config: TrainConfig, trees: Sequence[Tree], steps: int) -> str:
    costs = [num_computed(tree) for tree in trees]
    packs = [sum(costs[i] for i in micro) for micro in micro_batches(costs, config.micro_batch_tokens)]
    listed = ", ".join(f"{tokens:,}" for tokens in packs[:8]) + (", ..." if len(packs) > 8 else "")
    return f"step 1 of {steps:,}: {len(trees):,} rows in packs of {listed} tokens"


def _printable(text: str) -> list[str]:
    """Splits a text into lines; each line break is shown as \\n at the end of its line, and all other control
    characters are escaped."""
    shown = text.replace("\n", "\\n\n")
    if shown.endswith("\n"):
        shown = shown[:-1]
    return ["".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in shown.split("\n")]


def _spans(tokenizer: PreTrainedTokenizerBase, line: Line) -> Iterator[str]:
    texts = token_texts(tokenizer, [token for _, token in line.tokens])
    for (role, token), text in zip(line.tokens, texts, strict=True):
        yield f'<span class="{role}" title="{token}">{token_markup(text)}</span>'
