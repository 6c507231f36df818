"""What every configuration is checked with where it is defined."""

from __future__ import annotations

import math
from typing import Literal, get_args, get_origin, get_type_hints


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


def check_choices(config: object) -> None:
    """What dataclasses leave unchecked: a Literal field holds one of its values, and every number is finite."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal:
            require(value in get_args(hint), name, value, f"one of {', '.join(map(str, get_args(hint)))}")
        require(not isinstance(value, float) or math.isfinite(value), name, value, "finite")
