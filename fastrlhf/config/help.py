"""Formats the page of `fastrlhf COMMAND --help`: the keys in groups, each with the docstring under its field."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from fastrlhf.config import CONFIGS
from fastrlhf.config.groups import GROUPS

WIDTH = 100

_MODEL = "--model_name_or_path Qwen/Qwen3-0.6B"
EXAMPLES: dict[str, tuple[str, ...]] = {
    "chat": (
        'fastrlhf chat runs/dpo --system "Answer in one sentence."',
        "fastrlhf chat Qwen/Qwen3-0.6B runs/dpo/adapter --reward_model_path runs/reward",
    ),
    "merge": (
        "fastrlhf merge runs/dpo/adapter --output_dir runs/merged",
        "fastrlhf merge runs/helpful runs/harmless --adapter_weights 0.7 0.3 --output_dir runs/both",
    ),
    "sft": (
        f"fastrlhf sft {_MODEL} --dataset_name trl-lib/Capybara --output_dir runs/sft",
        f"fastrlhf sft {_MODEL} --use_peft --dataset_name rows.jsonl --output_dir runs/sft",
        "fastrlhf sft --config tldr_tiny",
    ),
    "reward": (
        "fastrlhf reward --model_name_or_path runs/sft --dataset_name pairs.jsonl --output_dir runs/reward",
        "fastrlhf reward --config tldr_tiny",
    ),
    "dpo": (
        f"fastrlhf dpo {_MODEL} --dataset_name trl-lib/ultrafeedback_binarized --output_dir runs/dpo",
        "fastrlhf dpo --config dpo_ultrafeedback --loss_type ipo --output_dir runs/ipo",
        "fastrlhf dpo --model_name_or_path runs/sft --dataset_name pairs.jsonl --output_dir runs/dpo",
    ),
    "kto": (
        f"fastrlhf kto {_MODEL} --dataset_name trl-lib/kto-mix-14k --output_dir runs/kto",
        "fastrlhf kto --model_name_or_path runs/sft --dataset_name rows.jsonl --balance_weights --output_dir runs/kto",
    ),
    "ppo": (
        "fastrlhf ppo --model_name_or_path runs/sft --reward_model_path runs/reward"
        " --dataset_name prompts.jsonl --output_dir runs/ppo",
        "fastrlhf ppo --model_name_or_path runs/sft --reward_model_path runs/reward"
        " --dataset_name prompts.jsonl --advantage_estimator rloo --num_generations 4 --output_dir runs/rloo",
    ),
    "grpo": (
        "fastrlhf grpo --model_name_or_path runs/sft --reward_model_path runs/reward"
        " --dataset_name prompts.jsonl --output_dir runs/grpo",
        "fastrlhf grpo --model_name_or_path runs/sft --reward_model_path runs/reward"
        " --dataset_name prompts.jsonl --reward_functions my_rewards.py:brevity --output_dir runs/grpo",
    ),
    "drpo": (
        "fastrlhf drpo --model_name_or_path runs/sft --reward_model_path runs/reward"
        " --dataset_name rows.jsonl --output_dir runs/drpo",
        "fastrlhf drpo --config drpo_tldr",
    ),
    "rto": (
        "fastrlhf rto --model_name_or_path runs/sft --reward_model_path runs/reward --dpo_model_path runs/dpo"
        " --dataset_name prompts.jsonl --output_dir runs/rto",
        "fastrlhf rto --config rto_ultrafeedback",
    ),
    "rlp": (
        "fastrlhf rlp --config rlp_alpacafarm",
        "fastrlhf rlp --config rlp_alpacafarm --refinement uml --output_dir runs/rlp_uml",
    ),
    "eval": (
        "fastrlhf eval --models runs/sft runs/dpo --reward_model_path runs/reward --dataset_name rows.jsonl",
        "fastrlhf eval --models runs/dpo --opponent runs/sft --reward_model_path runs/reward"
        " --dataset_name prompts.jsonl --output_dir runs/eval",
    ),
    "cache": ("fastrlhf cache", "fastrlhf cache --clear all"),
    "demo": (
        "fastrlhf demo",
        "fastrlhf demo --methods dpo ipo ppo drpo --seed 1 --out runs/demo_1",
    ),
}
"""Command -> one to three example command lines for its help page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key of a command."""

    name: str
    type: str
    """The allowed values, or the type in words: text, number, whole number, true or false, list of ..."""
    default: Any
    help: str
    """The docstring under the field, on one line."""


def keys_of(kind: type) -> dict[str, Key]:
    """Returns the keys that a config class reads, in order of declaration."""
    declared: dict[str, tuple[str, str]] = {}
    for parent in reversed(kind.__mro__):
        if "__dataclass_fields__" in vars(parent):
            for name, annotation, text in _declarations(parent):
                declared[name] = (annotation, text or declared.get(name, ("", ""))[1])
    unread = getattr(kind, "UNREAD", ())
    return {
        field.name: Key(
            name=field.name, type=declared[field.name][0], default=field.default, help=declared[field.name][1]
        )
        for field in fields(kind)
        if field.name not in unread
    }


def _declarations(kind: type) -> Iterator[tuple[str, str, str]]:
    """Yields (name, type in words, docstring) of each field that a class itself declares."""
    [node] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(node, ast.ClassDef)
    for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            match following:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    help = " ".join(text.split())
                case _:
                    help = ""
            yield statement.target.id, _in_words(statement.annotation), help


WORDS = {
    "str": "text",
    "int": "whole number",
    "float": "number",
    "bool": "true or false",
    "None": "null",
    "Source": "mapping",
}


def _in_words(annotation: ast.expr) -> str:
    match annotation:
        case ast.Subscript(value=ast.Name(id="Literal"), slice=ast.Tuple(elts=values)):
            return ", ".join(str(ast.literal_eval(value)) for value in values)
        case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=[item, *_])):
            return f"list of {_in_words(item)}s"
        case ast.BinOp(left=left, right=right):
            return f"{_in_words(left)} or {_in_words(right)}"
    name = ast.unparse(annotation)
    return WORDS.get(name, name)


def as_yaml(value: Any) -> str:
    """Formats a default as it is written in a YAML file; an empty default gives an empty text."""
    if value in ("", ()):
        return ""
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else json.dumps(list(value) if isinstance(value, tuple) else value)


def format_help(command: str, width: int = WIDTH) -> str:
    """Returns the whole help page: what the command does, examples, then its keys in the groups of config/groups.py."""
    kind = CONFIGS[command]
    lines = textwrap.wrap(f"fastrlhf {command}: {_first_paragraph(kind)}", width, break_on_hyphens=False)
    lines += ["", "Examples", *(line for example in EXAMPLES[command] for line in _as_command(example, width))]
    lines += [
        "",
        "A key is a flag (--seed 1) or a line of a YAML file (seed: 1) given by --config FILE.",
        "A flag overrides the file; if a flag is repeated, the last one counts.",
        "Brackets hold the default; a key without one is empty.",
    ]
    keys = keys_of(kind)
    for group, names in GROUPS.items():
        if present := [keys[name] for name in names if name in keys]:
            lines += ["", group, *(line for key in present for line in _entry(key, width))]
    return "\n".join(lines)


def _first_paragraph(kind: type) -> str:
    return " ".join(inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0].split())


def _entry(key: Key, width: int) -> list[str]:
    default = as_yaml(key.default)
    head = f"  --{key.name}  {key.type}" + (f"  [{default}]" if default else "")
    return [
        *textwrap.wrap(head, width, initial_indent="", subsequent_indent=" " * 8, break_on_hyphens=False),
        *textwrap.wrap(key.help, width, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False),
    ]


def _as_command(example: str, width: int) -> list[str]:
    """Breaks an example command into shell lines of at most `width` characters; a flag stays on the line of its
    value."""
    parts = example.replace(" --", "\n--").split("\n")
    lines, line = [], f"  {parts[0]}"
    for part in parts[1:]:
        if len(line) + len(part) + 3 > width:
            lines.append(f"{line} \\")
            line = f"      {part}"
        else:
            line = f"{line} {part}"
    return [*lines, line]
