"""Inspects a reward function before it is called: finds the names that it looks up, and whether it is async.

A function that takes the columns of the dataset by `**kwargs` shows no names in its signature: `kwargs.get("anwser")`
gives None for every row, without an error.
"""

from __future__ import annotations

import ast
import inspect
import logging
import textwrap
from collections.abc import Callable, Collection, Iterator
from typing import Any

from fastrlhf.config.elsewhere import nearest

log = logging.getLogger(__name__)


def is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def warn_of_unknown_names(
    name: str, function: Callable[..., Any], columns: Collection[str], given: Collection[str]
) -> None:
    """Warns if the function `name` looks up a name in its **kwargs that is neither among the columns of the dataset nor
    among the arguments that every function is `given`."""
    for key in looked_up(function):
        if key not in (*given, *columns):
            hint = nearest(key, (*columns, *given)) or f"; the columns are {', '.join(columns) or 'none'}"
            log.warning("reward function %s looks up %r, which is no column of the dataset%s", name, key, hint)


def looked_up(function: Callable[..., Any]) -> list[str]:
    """Returns, sorted, the constant names that a function looks up in its **kwargs by `kwargs["name"]`,
    `kwargs.get("name")` or `kwargs.pop("name")`. Empty if it has no **kwargs or if its source cannot be read."""
    called = function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(called))))
    except (OSError, TypeError, SyntaxError):  # code in C or typed at a prompt, or a lambda inside an expression
        return []
    definition = next(
        (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)), None
    )
    if definition is None or definition.args.kwarg is None:
        return []
    return sorted(set(_names(definition, definition.args.kwarg.arg)))


def _names(definition: ast.AST, keywords: str) -> Iterator[str]:
    for node in ast.walk(definition):
        match node:
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=str(key))) if name == keywords:
                yield key
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id=name), attr="get" | "pop"),
                args=[ast.Constant(value=str(key)), *_],
            ) if name == keywords:
                yield key
