"""Checks that a configuration runs when it is constructed."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from os import PathLike, fspath
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fastrlhf.config.choices import NoChoice


def require(ok: bool, name: str, value: object, rule: str) -> None:
    """Raises ValueError naming the field, its value and the rule it breaks."""
    if not ok:
        raise ValueError(f"{name}: must be {rule}; got {value!r}")


def at_least(config: object, least: int, *names: str) -> None:
    for name in names:
        require(getattr(config, name) >= least, name, getattr(config, name), f"at least {least}")


def above_0(config: object, *names: str) -> None:
    for name in names:
        require(getattr(config, name) > 0, name, getattr(config, name), "above 0")


UNREAD = "since it would have no effect"
"""End of the message about a key that is set although the run would ignore it."""


def at_default(config: Any, readers: Iterable[tuple[bool, str, tuple[str, ...]]]) -> None:
    """Raises ValueError for a key that is set, that is, differs from its default, although the run would ignore it.

    `readers`: tuples of (whether the run reads the keys, the reason if it does not, the names of the keys).
    """
    defaults = {field.name: field.default for field in fields(config)}
    for read, because, names in readers:
        for name in () if read else names:
            value, default = getattr(config, name), defaults[name]
            require(value == default, name, value, f"{default!r} {because}, {UNREAD}")


def check_types(config: Any) -> None:
    """Raises ValueError for a field whose value is not of its declared type, and for a number that is not finite.

    Dataclasses check neither. Values are converted if their type is close: a path to a str, a list to a tuple, a numpy
    scalar to a Python number, and, for a field that is a tuple of str, a single str to a tuple.
    """
    hints = get_type_hints(type(config))
    for field in fields(config):
        hint, value = hints[field.name], getattr(config, field.name)
        try:
            plain = _plain(hint, value)
        except TypeError:
            if get_origin(hint) is Literal:
                raise NoChoice(field.name, value, get_args(hint)) from None
            require(False, field.name, value, _in_words(hint))
            raise
        numbers = [item for item in (plain if isinstance(plain, tuple) else (plain,)) if isinstance(item, float)]
        require(all(map(math.isfinite, numbers)), field.name, plain, "finite")
        if plain is not value:
            object.__setattr__(config, field.name, plain)  # frozen, and still under construction


def check_config(config: object, kind: type, trainer: str) -> None:
    """Raises TypeError when a trainer is given the configuration of a different trainer."""
    if not isinstance(config, kind):
        given = f"the class {config.__name__}" if isinstance(config, type) else f"an object of {type(config).__name__}"
        raise TypeError(f"{trainer}: config must be an object of {kind.__name__}; got {given}")


def _plain(hint: Any, value: Any) -> Any:
    """Converts a value to the type that the hint declares. Raises TypeError if the value's type is not close to this
    type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal and value in arguments:
        return value
    if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, hint):
        return value
    if origin in (Union, UnionType):
        for option in arguments:
            try:
                return _plain(option, value)
            except TypeError:
                continue
    if origin is tuple and isinstance(value, (tuple, list)):
        items = tuple(_plain(arguments[0], item) for item in value)
        return value if items == value else items
    if origin is tuple and arguments[0] is str and isinstance(value, str) and value:
        return (value,)
    if isinstance(value, bool):
        if hint is bool:
            return value
    elif hint is int and isinstance(value, Integral):
        return value if type(value) is int else int(value)
    elif hint is float and isinstance(value, Real):
        return value if type(value) in (int, float) else float(value)
    if hint is str and isinstance(value, (str, PathLike)):
        return value if isinstance(value, str) else fspath(value)
    if hint is NoneType and value is None:
        return value
    raise TypeError


NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}


def _in_words(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        if is_dataclass(arguments[0]):
            return "a list of mappings"
        return "a list of texts" if arguments[0] is str else "a list of numbers"
    return " or ".join(map(_in_words, arguments)) if arguments else NAMES[hint]


def expand_home(config: Any) -> None:
    """Expands a leading `~/` in every str, and in every str of a tuple, of a frozen configuration."""
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, str) and value.startswith("~/"):
            object.__setattr__(config, field.name, os.path.expanduser(value))
        elif isinstance(value, tuple) and any(isinstance(each, str) and each.startswith("~/") for each in value):
            expanded = tuple(os.path.expanduser(each) if isinstance(each, str) else each for each in value)
            object.__setattr__(config, field.name, expanded)
