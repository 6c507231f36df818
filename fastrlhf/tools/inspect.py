"""Shows the rows of a dataset as the model will see them: every token with its role in training and the turn to which
it belongs, the columns and labels of the row, and the rows that are left out.

Rows are loaded, tokenised and packed, and resets are drawn, by the functions of the trainers (tools/plan/work.py). Only
a tokenizer is needed, no model. Of a larger dataset only the first rows are read (tools/first_rows.py).

`fastrlhf inspect --config FILE [--command dpo] [--num 5] [--rows 1000|all] [--html PAGE]`
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from html import escape
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from fastrlhf.algorithms.scoring import Tree
from fastrlhf.config import DPOConfig, KTOConfig, PPOConfig, RewardConfig, SFTConfig, TrainConfig, require
from fastrlhf.data.labels import GROUP_LABELS, PAIR_LABELS
from fastrlhf.data.packing import check_micro_batch, micro_batches, num_computed
from fastrlhf.data.rows import shorten
from fastrlhf.data.specials import end_ids, special_tokens
from fastrlhf.data.templates import Renderer
from fastrlhf.report.page import render_page, token_markup
from fastrlhf.report.samples import token_texts
from fastrlhf.runtime.printable import printable
from fastrlhf.tools.first_rows import FEW, open_first_rows
from fastrlhf.tools.plan.work import Work, first_prefixes, open_work, to_tree
from fastrlhf.tools.turn_labels import turn_labels
from fastrlhf.types import Example, Prefix, Text, TokenizedExample

ROLES = {
    "prompt": "given to the model, not trained",
    "reset": "copied from a response of the dataset, given to the model, not trained",
    "trained": "the loss is computed on these tokens",
    "eos": "a trained token that ends the response",
    "masked": "belongs to a response, but is not trained",
    "score": "the last token, at which the reward model gives its score",
}
"""Roles that a token can have."""

SPECIAL = ("\u27e6", "\u27e7")
"""Brackets around special tokens in text for a terminal, which distinguish them from ordinary text that looks the
same."""

ANSI = {"prompt": "2", "reset": "33", "trained": "32", "eos": "1;35", "masked": "36", "score": "1;35"}
"""Role -> parameters of the terminal's colour code (SGR)."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One segment of a pack."""

    name: str
    """Name of the segment: prompt, chosen, ..."""
    tokens: list[tuple[str, int]]
    """(role, token id) of every token, in order."""
    note: str = ""
    turns: list[str] = field(default_factory=list)
    """For a conversation, the label of the turn of every token; empty if there are no turns or they are unknown."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One item of a batch: a sequence, a pair, a group, or the prefix of an episode."""

    title: str
    lines: list[Line]
    details: list[str] = field(default_factory=list)
    """Lines about the labels and columns of the row."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    tokenizer: PreTrainedTokenizerBase
    facts: list[str]
    """Lines about the training data and the first step."""
    rows: list[Row]
    special: frozenset[int] = frozenset()
    """Ids of the special tokens."""


def inspect_rows(config: TrainConfig, num: int, num_read: int | None = FEW) -> Inspection:
    """Returns `num` rows (on-policy: episodes) and what was read, skipped and dropped.

    If the run trains on more than `num_read` rows, only the first `num_read` rows are read, or `num` if that is more.
    The result then counts these rows and shows the first `num` in the order of the file. Otherwise, with `num_read`
    None, or if none of the first rows is usable, all rows are read, and the result shows those that the run draws
    first.

    Raises ValueError as the trainer would: for a bad path, a bad row, or a row that does not fit a micro-batch.
    """
    require(num >= 1, "num", num, "at least 1")
    require(num_read is None or num_read >= 1, "rows", num_read, "at least 1, or all")
    work = _first_rows(config, max(num, num_read)) if num_read else None
    work = work or open_work(config, most_batches=-(-num // config.batch_size), keep_rows=True)
    if isinstance(config, PPOConfig):
        return _episodes(config, work, num)
    tree_of, examples = to_tree(config), work.examples
    trees = [tree_of(example) for example in examples]
    check_micro_batch(config, examples, [num_computed(tree) for tree in trees])
    drawn = [i for batch in work.batches for i in batch]
    step = [] if work.num_read else [_describe_step(config, [trees[i] for i in work.batches[0]], work.steps)]
    return Inspection(
        tokenizer=work.tokenizer,
        facts=[*_describe_rows(config, work), _describe_tokens(trees, work), *step],
        rows=[_row(config, work, i, trees[i]) for i in drawn[:num]],
        special=frozenset(special_tokens(work.tokenizer)),
    )


def _first_rows(config: TrainConfig, num: int) -> Work | None:
    try:
        return open_first_rows(config, num)
    except ValueError:  # reading all rows succeeds, or gives the message of the trainer
        return None


def format_text(inspection: Inspection, *, colour: bool) -> str:
    """Formats rows for a terminal: one line per sequence of tokens with the same role. Control characters are escaped,
    e.g. \\x1b."""

    def paint(role: str, text: str) -> str:
        return f"\033[{ANSI[role]}m{text}\033[0m" if colour else text

    width = max(map(len, ROLES))
    output = [*map(printable, inspection.facts), ""]
    used = {role for row in inspection.rows for line in row.lines for role, _ in line.tokens}
    output += [f"  {paint(role, role.ljust(width))}  {told}" for role, told in ROLES.items() if role in used]
    for row in inspection.rows:
        output += ["", row.title, *(f"  {printable(detail)}" for detail in row.details)]
        for line in row.lines:
            output.append(f"  {line.name}: {len(line.tokens)} tokens{line.note}")
            for turn, tokens in _by_turn(inspection, line):
                output += [f"    {turn}"] if turn else []
                for role, run in groupby(tokens, key=lambda token: token.role):
                    for part in _printable("".join(_marked(token) for token in run)):
                        output.append(f"    {role.ljust(width)} | {paint(role, part)}")
    return "\n".join(output)


def format_html(inspection: Inspection, title: str) -> str:
    """Formats rows as a self-contained HTML page: every token has the colour of its role, and a tooltip shows its
    id."""
    legend = "".join(f'<span class="{role}">{role}</span> {told}<br>' for role, told in ROLES.items())
    legend += '<span class="special">special</span> a special token of the tokenizer<br>'
    sections = [("What the colours mean", f'<p class="tokens">{legend}</p>')]
    for row in inspection.rows:
        parts = [f'<p class="tokens">{"<br>".join(map(escape, row.details))}</p>'] if row.details else []
        for line in row.lines:
            parts.append(f"<h3>{escape(line.name)}: {len(line.tokens)} tokens{escape(line.note)}</h3>")
            for turn, tokens in _by_turn(inspection, line):
                parts += [f"<h4>{escape(turn)}</h4>"] if turn else []
                parts.append(f'<p class="tokens">{"".join(map(_span, tokens))}</p>')
        sections.append((row.title, "".join(parts)))
    return render_page(title, inspection.facts, sections, footer="Rest the mouse on a token to see its id.")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Token:
    role: str
    id: int
    text: str
    special: bool


def _by_turn(inspection: Inspection, line: Line) -> Iterator[tuple[str, list[_Token]]]:
    """Yields (label of a turn, its tokens); the label is empty for text without turns."""
    texts = token_texts(inspection.tokenizer, [token for _, token in line.tokens])
    tokens = [
        _Token(role=role, id=token, text=text, special=token in inspection.special)
        for (role, token), text in zip(line.tokens, texts, strict=True)
    ]
    labelled = zip(line.turns or [""] * len(tokens), tokens, strict=True)
    for turn, run in groupby(labelled, key=lambda pair: pair[0]):
        yield turn, [token for _, token in run]


def _marked(token: _Token) -> str:
    return token.text.join(SPECIAL) if token.special else token.text


def _span(token: _Token) -> str:
    kind, told = (" special", ", special token") if token.special else ("", "")
    return f'<span class="{token.role}{kind}" title="{token.id}{told}">{token_markup(token.text)}</span>'


def _episodes(config: PPOConfig, work: Work, num: int) -> Inspection:
    most = -(-num // config.batch_size)
    prefixes = first_prefixes(config, replace(work, batches=work.batches[:most]))
    first = prefixes[: config.batch_size]
    resets = [prefix.num_reset for prefix in first if prefix.num_reset]
    lengths = [len(example.prompt) for example in work.examples]
    update = "an update that starts from the first of these rows" if work.num_read else f"update 1 of {work.steps:,}"
    facts = [
        *_describe_rows(config, work),
        f"{len(lengths):,} prompts of {sum(lengths) / len(lengths):.1f} tokens on average, {max(lengths):,} at most",
        f"{update}: {len(first):,} episodes, {len(resets):,} after a reset"
        + (f" of {sum(resets) / len(resets):.1f} tokens on average" if resets else "")
        + f"; a response has at most {config.response_length} tokens, including those of its reset",
    ]
    if config.reset_source == "sample" and config.reset_prob > 0:
        facts.append("with reset_source sample the reference model writes what resets copy, so no reset is shown here")
    if config.reset_source == "rollout":
        facts.append("with reset_source rollout the policy writes what resets copy, so no reset is shown here")
    index_of = {row: index for index, row in enumerate(work.examples.rows())}
    return Inspection(
        tokenizer=work.tokenizer,
        facts=facts,
        rows=[_episode(config, work, index_of[prefix.row], prefix) for prefix in prefixes[:num]],
        special=frozenset(special_tokens(work.tokenizer)),
    )


def _episode(config: PPOConfig, work: Work, index: int, prefix: Prefix) -> Row:
    example = work.examples[index]
    num_prompt = len(prefix.token_ids) - prefix.num_reset
    roles = ["prompt"] * num_prompt + ["reset"] * prefix.num_reset
    turns = _turns(work, example, config.reset_source, example.prompt, prefix.token_ids[num_prompt:])
    depth = f", {prefix.reset_depth:.0%} of the response" if prefix.num_reset else ""
    return Row(
        title=f"{work.examples.place(index)}, episode {prefix.episode}: reset of {prefix.num_reset} tokens{depth}",
        lines=[
            Line(
                name="prefix",
                tokens=list(zip(roles, prefix.token_ids, strict=True)),
                note=f"; after it the policy samples at most {config.response_length - prefix.num_reset} tokens",
                turns=turns,
            )
        ],
        details=_details(work, example),
    )


def _row(config: TrainConfig, work: Work, index: int, tree: Tree) -> Row:
    example, place = work.examples[index], work.examples.place(index)
    trunks, ends = {segment.parent for segment in tree}, end_ids(work.tokenizer)
    names, lines = _names(config), []
    for index, segment in enumerate(tree):
        is_trunk, length = index in trunks, len(segment.token_ids)
        num_prompt = length if is_trunk else 0 if segment.parent >= 0 else len(example.prompt)
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
        name, response = ("prompt", "") if is_trunk else next(names)
        ids = [] if is_trunk else segment.token_ids[num_prompt:]
        lines.append(
            Line(
                name=name,
                tokens=tokens,
                note="; cut at max_length, so it has no EOS" if cut else "",
                turns=_turns(work, example, response, example.prompt, ids)[-length:],
            )
        )
    title = f"{place}: {num_computed(tree)} tokens, {_num_scored(tree)} trained"
    return Row(title=title, lines=lines, details=_details(work, example))


def _names(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """Yields the names of the responses of a row, in the order of the leaves of its tree, as (shown name, field)."""
    if isinstance(config, SFTConfig):
        return iter([(f"prompt and {config.response}", config.response)])
    if isinstance(config, KTOConfig):
        return iter([("prompt and response", "reference")])
    if isinstance(config, DPOConfig) and config.psi_backend == "groupwise":
        return ((name, name) for name in (f"responses[{i}]" for i in range(1 << 30)))
    return iter([("chosen", "chosen"), ("rejected", "rejected")])


def _turns(
    work: Work, example: TokenizedExample, field: str, prompt: Sequence[int], response: Sequence[int]
) -> list[str]:
    """Returns the label of the turn of every token of a prompt and a (part of a) response; empty for text. `field` is
    the name of the response, which is ignored if `response` is empty."""
    source = example.source
    if source is None or isinstance(source.prompt, str):
        return []
    said = _response(source, field) if response else []
    renderer = Renderer(
        tokenizer=work.tokenizer,
        ends=(),
        kwargs=work.rules.chat_template_kwargs,
        day=work.rules.day or date.today(),
    )
    texts = token_texts(work.tokenizer, prompt), token_texts(work.tokenizer, response)
    return turn_labels(renderer, source, said if isinstance(said, list) else [], texts)


def _response(source: Example, name: str) -> Text | None:
    """Returns the response of an example that is named "chosen" or "responses[0]", for example."""
    group, _, number = name.removesuffix("]").partition("[")
    return getattr(source, group)[int(number)] if number else getattr(source, name)


def _details(work: Work, example: TokenizedExample) -> list[str]:
    """Returns lines about the labels, template variables and columns of a row."""
    labels = {name: getattr(example, name) for name in (*PAIR_LABELS, *GROUP_LABELS)}
    lines = [f"{name}: {_short(value)}" for name, value in labels.items() if value is not None]
    if (source := example.source) is not None:
        lines += [f"{name} for the chat template: {_short(value)}" for name, value in source.template.items()]
        others = {name: value for name, value in source.columns.items() if name not in work.origin.read}
        lines += [f"column {name}, not used: {_short(value)}" for name, value in others.items()]
    return lines


def _short(value: object) -> str:
    return shorten(json.dumps(value, ensure_ascii=False, default=str))


def _num_scored(tree: Tree) -> int:
    return sum(segment.num_scored for segment in tree)


def _describe_rows(config: TrainConfig, work: Work) -> list[str]:
    lines = [*_describe_reading(work), *work.origin.lines, *work.report.facts()]
    for reason, count in work.report.dropped.items():
        lines += [f"dropped {count:,} for {reason}:", *(f"  {told}" for told in work.report.dropped_rows[reason])]
    if work.num_eval:
        lines.append(f"{work.num_eval:,} rows held out for evaluation")
    if work.rules.chat_template_kwargs:
        lines.append(f"chat_template_kwargs: {_short(work.rules.chat_template_kwargs)}")
    if work.rules.day:
        lines.append(f"the chat template asks for the date and gets {work.rules.day}")
    return lines


def _describe_reading(work: Work) -> list[str]:
    """Returns lines about rows that were not read, if there are any."""
    if not work.num_read:
        return []
    return [
        f"only the first {work.num_read:,} rows are read, and all counts are of these rows; --rows all reads every row",
        "the rows are shown in the order of the file; the order of the run, its steps and packs, the rows held out for "
        "evaluation, max_bad_fraction and max_dropped_fraction depend on every row",
    ]


def _describe_tokens(trees: Sequence[Tree], work: Work) -> str:
    costs = [num_computed(tree) for tree in trees]
    where = "in these rows" if work.num_read else "per epoch"
    return (
        f"{sum(costs):,} tokens {where}, {sum(map(_num_scored, trees)):,} of them trained; a row has "
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
