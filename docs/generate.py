"""The pages that are written from the code itself, so that they cannot differ from it.

configuration.md    every key of every command, from the config dataclasses and the docstring under each field
trl_keys.txt        every key of TRL and transformers and what it is called here, for docs/trl.md to include
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fastrlhf.cli import TRAINERS
from fastrlhf.config import DemoConfig, EvalConfig, TrainConfig, elsewhere

CONFIGS: dict[str, type] = {name: entry[0] for name, entry in TRAINERS.items()} | {
    "eval": EvalConfig,
    "demo": DemoConfig,
}
"""Command -> its config class."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of a configuration, as its class declares it."""

    name: str
    type: str
    default: Any
    help: str
    """Empty where a class only changes the default of a key that it inherits."""


def declared_keys(kind: type) -> list[Key]:
    """The keys that the body of a config class declares, in order; those that it only inherits are not among them."""
    defaults = {field.name: field.default for field in fields(kind)}
    [node] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(node, ast.ClassDef)
    keys = []
    for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = following.value.value if _is_docstring(following) else ""
            name = statement.target.id
            keys.append(
                Key(name=name, type=_type(statement.annotation), default=defaults[name], help=" ".join(text.split()))
            )
    return keys


def _is_docstring(statement: ast.stmt | None) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _type(annotation: ast.expr) -> str:
    """`Literal["a", "b"]` as its values, anything else as it is written."""
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Literal":
        values = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        return ", ".join(f"`{ast.literal_eval(value)}`" for value in values)
    return f"`{ast.unparse(annotation)}`"


def as_yaml(value: Any) -> str:
    """A default as one would write it in a file."""
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def configuration() -> str:
    """The page of all keys."""
    return "\n".join(_configuration())


def _configuration() -> Iterator[str]:
    yield "# Configuration reference\n"
    yield (
        "Written from the config classes of `fastrlhf.config`. A key is a flag (`--learning_rate 1e-6`), a line of a "
        "YAML file (`learning_rate: 1e-6`) or an argument of the class (`DPOConfig(learning_rate=1e-6)`). A key that "
        "nothing would read with the other settings is refused unless it has its default.\n"
    )
    yield "## Keys of every trainer\n"
    yield from _definitions(TrainConfig)
    for command, kind in CONFIGS.items():
        yield f"## `{command}`: {kind.__name__}\n"
        yield inspect.cleandoc(kind.__doc__ or "") + "\n"
        parents = [parent for parent in kind.__mro__[1:] if hasattr(parent, "__dataclass_fields__")]
        if parents:
            yield f"Takes {' and '.join(_where(parent) for parent in parents)} as well.\n"
        yield from _definitions(kind)


def _where(kind: type) -> str:
    """A link to the section that lists the keys of a class."""
    if kind is TrainConfig:
        return "the [keys of every trainer](#keys-of-every-trainer)"
    command = next(name for name, other in CONFIGS.items() if other is kind)
    return f"the [keys of `{command}`](#{command}-{kind.__name__.lower()})"


def _definitions(kind: type) -> Iterator[str]:
    for key in declared_keys(kind):
        text = key.help or "Described above; this command has another default."
        yield f"`{key.name}`\n: {key.type}, default `{as_yaml(key.default)}`. {text}\n"


def trl_keys() -> str:
    """A section with a table for each config of TRL."""
    lines = []
    for config, title in elsewhere.TRL_CONFIGS.items():
        lines += [f"## {title[0].upper()}{title[1:]}\n", "| key | status | here | note |", "|---|---|---|---|"]
        lines += [f"| `{key.name}` | {key.status} | {_ours(key)} | {key.note} |" for key in elsewhere.rows(config)]
        lines.append("")
    return "\n".join(lines)


def _ours(key: elsewhere.Key) -> str:
    if key.status == "same":
        return f"`{key.name}`"
    return f"`{key.ours}`" if key.ours else ""


PAGES = {"configuration.md": configuration, "trl_keys.txt": trl_keys}


def write(folder: Path) -> None:
    """Writes every page into `folder`."""
    folder.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (folder / name).write_text(page(), encoding="utf-8")
