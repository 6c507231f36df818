"""What every configuration is checked with where it is defined."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints


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


UNREAD = "since nothing reads it there"
"""How the rule ends that a key breaks which nothing would read."""


def at_default(config: Any, readers: Iterable[tuple[bool, str, tuple[str, ...]]]) -> None:
    """Raises ValueError for a key that nothing would read and that is not the default of its class all the same.

    `readers`: (whether something reads the keys, why nothing would, the keys).
    """
    defaults = {field.name: field.default for field in fields(config)}
    for read, because, names in readers:
        for name in () if read else names:
            value, default = getattr(config, name), defaults[name]
            require(value == default, name, value, f"{default!r} {because}, {UNREAD}")


def check_choices(config: object) -> None:
    """What dataclasses leave unchecked: a Literal field holds one of its values, and every number is finite."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal:
            require(value in get_args(hint), name, value, f"one of {', '.join(map(str, get_args(hint)))}")
        require(not isinstance(value, float) or math.isfinite(value), name, value, "finite")
