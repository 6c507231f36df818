"""Resolves the relative paths of a configuration at the start of a run, and remembers the text that the user gave,
which is what config.yaml gets."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from fastrlhf.config.batch import processes
from fastrlhf.config.checks import check_config
from fastrlhf.config.sources import Source
from fastrlhf.config.train import TrainConfig

Config = TypeVar("Config", bound=TrainConfig)

FUNCTIONS = ("reward_functions", "psi", "equivalence", "loss_type", "callbacks")
"""Keys whose values may name a function or class in a file: path/to/file.py:function."""

MADE = ("output_dir", "ref_cache_dir", "dataset_cache_dir")
"""Keys of folders that a run creates if they are missing."""

PLACES = "# absolute paths: "
"""Begins the line of config.yaml that holds, as JSON, the absolute paths of the keys with relative paths."""

_GIVEN: dict[tuple[str, str], str] = {}
"""(key, resolved text) -> the text that the user gave: a relative path, or a path with $NAME."""


def at_start(config: Config, kind: type, trainer: str) -> Config:
    """Returns the configuration with absolute paths, so that a user-defined function may change the working directory.
    Every trainer calls this at its start.

    The path of an input is made absolute only if it exists; otherwise it may be a name on the hub. Raises TypeError for
    the configuration of another trainer, and ValueError if a key needs `output_dir`, which is empty.
    """
    check_config(config, kind, trainer)
    config.check_folder(config.output_dir)
    absolute = {}
    for field in fields(config):
        value = getattr(config, field.name)
        items = value if isinstance(value, tuple) else (value,)
        texts = tuple(_with_absolute(field.name, item) for item in items)
        if texts != items:
            absolute[field.name] = texts if isinstance(value, tuple) else texts[0]
    return changed(config, **absolute) if absolute else config


def _with_absolute(key: str, item: Any) -> Any:
    """Makes the path in an item of a key absolute: a text, or the path of an entry of `dataset_name`."""
    if isinstance(item, Source):
        return replace(item, path=_absolute(key, item.path))
    if isinstance(item, Mapping):
        return {**item, "path": _absolute(key, str(item.get("path", "")))}
    return _absolute(key, item) if isinstance(item, str) and item else item


def changed(config: Config, **values: Any) -> Config:
    """Returns a copy of a configuration with other values, which keeps the names of its environment variables."""
    return _noted(replace(config, **values), _variables(config))


def remember(key: str, resolved: str, given: str) -> None:
    """Remembers the text that the user gave for a key whose value has been resolved."""
    if resolved != given:
        _GIVEN[key, resolved] = _GIVEN.get((key, given), given)


def as_given(config: Any) -> dict[str, Any]:
    """Returns the values of a configuration as the user gave them, for config.yaml and the trackers. In several
    processes `train_batch_size` is filled in, because the other keys determine the batch only together with the number
    of processes."""
    values = {key: _as_given(key, value) for key, value in asdict(config).items()} | dict(_variables(config))
    if processes() > 1 and isinstance(config, TrainConfig):
        values["train_batch_size"] = config.batch_size
    return values


class Filled(str):
    """Text from a file with its environment variables expanded; `given` is the text before that."""

    given: str

    def __new__(cls, filled: str, given: str) -> Filled:
        text = super().__new__(cls, filled)
        text.given = given
        return text


def with_variables(config: Config, values: Mapping[str, Any]) -> Config:
    """Records in a configuration which of its numbers a file gave as environment variables; `values` are the values of
    the file. A global registry cannot hold this, because another configuration may have the same number. Returns
    `config`."""
    filled = {key: text for key, text in values.items() if isinstance(text, Filled)}
    numbers = {key: getattr(config, key) for key in filled if isinstance(getattr(config, key), int | float)}
    # A flag may have replaced the value of the file.
    return _noted(config, {key: filled[key].given for key, x in numbers.items() if x == as_number(filled[key])})


def _noted(config: Config, names: Mapping[str, str]) -> Config:
    object.__setattr__(config, "_variables", names)  # not a field, so that comparisons and copies ignore it
    return config


def _variables(config: Any) -> Mapping[str, str]:
    return getattr(config, "_variables", {})


def filled_in(key: str, value: Any) -> Any:
    """Expands $NAME and a leading ~ in a value from a file, except in a chat template, which may be Jinja."""
    if isinstance(value, (list, tuple)):
        return [filled_in(key, item) for item in value]
    if isinstance(value, Mapping):
        return {name: filled_in(key, item) for name, item in value.items()}
    if not isinstance(value, str) or key == "chat_template":
        return value
    return os.path.expanduser(os.path.expandvars(value))


def is_same(key: str, written: Any, value: Any) -> bool:
    """Returns whether the value written in a config.yaml equals the present one. Two paths are equal if they lead to
    the same place; an environment variable has its present value. `dtype: auto` equals every dtype, because the run
    compares again once it knows its device. A missing `template_date` equals every date, because the run keeps the
    recorded one."""
    if (key == "dtype" and value == "auto") or (key == "template_date" and not (written and value)):
        return True
    value = list(value) if isinstance(value, tuple) else value
    filled = filled_in(key, written)
    return (
        value in (written, filled, as_number(filled))
        or ("$" not in str(written) and written == _as_given(key, value))
        or _is_same_place(filled, value)
    )


def _absolute(key: str, text: str) -> str:
    path, colon, function = text.rpartition(":") if key in FUNCTIONS else (text, "", "")
    named = key in (*FUNCTIONS, *MADE, "dataset_name", "chat_template") or key.endswith("_path")
    path = os.path.expanduser(path)
    if not named or not path or not (key in MADE or os.path.lexists(path)):
        return text
    resolved = f"{os.path.abspath(path)}{colon}{function}"
    remember(key, resolved, text)
    return resolved


def _as_given(key: str, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_as_given(key, item) for item in value)
    if isinstance(value, Mapping):
        return {name: _as_given(key, item) for name, item in value.items()}
    if not isinstance(value, str) or (key, value) in _GIVEN or not os.path.isabs(value):
        return _GIVEN.get((key, value), value)
    for parent in Path(value).parents:  # a path inside output_dir, such as a stage of rlp
        if ("output_dir", str(parent)) in _GIVEN:
            return os.path.join(_GIVEN["output_dir", str(parent)], Path(value).relative_to(parent))
    return value


def places_of(config: Any) -> str:
    """Returns a comment line for config.yaml with the absolute paths that relative paths led to, so that the run can be
    continued from another working directory; empty if there are no relative paths. `config` has absolute paths."""
    given = as_given(config)
    places = {key: value for key, value in asdict(config).items() if value != given[key] and "$" not in str(given[key])}
    return f"{PLACES}{json.dumps(places)}\n" if places else ""


def written_places(text: str) -> dict[str, Any]:
    """Returns key -> absolute path or list of paths from the line that `places_of` added to the text of a config.yaml;
    empty if there is no line, or if it is damaged."""
    lines = [line.removeprefix(PLACES) for line in text.splitlines() if line.startswith(PLACES)]
    try:
        found = json.loads(lines[0]) if lines else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def leads_to(key: str, value: Any, place: Any) -> bool:
    """Returns whether a path, made absolute, equals the absolute path in `place`; lists of paths are compared item by
    item."""
    items, there = (list(x) if isinstance(x, (list, tuple)) else [x] for x in (value, place))
    return place is not None and [_with_absolute(key, x) for x in items] == there


def as_number(text: Any) -> Any:
    """Converts text that is a number to this number; returns any other value unchanged."""
    try:
        return float(text) if isinstance(text, str) else text
    except ValueError:
        return text


def _is_same_place(one: Any, other: Any) -> bool:
    texts = isinstance(one, str) and isinstance(other, str) and one and other
    return bool(texts) and os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)
