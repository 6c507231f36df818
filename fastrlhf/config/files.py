"""Reads configurations from YAML files and flags, and writes the resolved configuration of a run."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fastrlhf.config import CONFIGS, TRAIN_NOTHING
from fastrlhf.config.choices import NoChoice
from fastrlhf.config.elsewhere import explain, explain_command
from fastrlhf.config.help import keys_of
from fastrlhf.config.paths import Filled, as_given, filled_in, remember
from fastrlhf.config.sources import Source

RECIPES = Path(__file__).parent.parent / "recipes"

COMMANDS = {*CONFIGS}

TRUTHS = {**dict.fromkeys(("true", "yes", "on", "1"), "True"), **dict.fromkeys(("false", "no", "off", "0"), "False")}
ALIASES = {
    "gradient_checkpointing": "activation_checkpointing",
    "max_completion_length": "response_length",
    "reset_group_size": "num_generations",
    "reward_function": "reward_functions",
    "reward_funcs": "reward_functions",
}
"""Other accepted names of keys: TRL's, and those of the previous release."""


def read_yaml(path: str, kind: type, command: str) -> dict[str, Any]:
    """Reads the keys for one command from a YAML file or a recipe, and checks that each is a field of `kind`.

    The file is either flat or has a section per command; the keys of a section `shared` then hold for all commands,
    unless a command's own section sets them. The list `run_first` in a section names other sections (see the function
    `run_first`). Environment variables ($NAME) and a leading ~ in values are expanded. A blank or null key counts as
    absent, unless null is one of its values. The value of a text key is taken literally: `run_name: 12:30` is not
    converted to a number. Raises ValueError for an unknown key, saying what to write instead.
    """
    hints = get_type_hints(kind)
    known, given = {field.name for field in fields(kind)}, dict[str, Any]()
    texts, place = _keys_of_command(path, load_yaml(path, as_text=True), command, known)
    for (alias, value), text in zip(_keys_of_command(path, load_yaml(path), command, known)[0], texts, strict=True):
        key = _without_alias(alias, known)
        if key not in known:
            raise ValueError(f"{place}: unknown key {alias!r}{unknown(str(alias), kind, command)}")
        if value is not None or NoneType in get_args(hints[key]):
            written = text[1] if _takes_text(hints[key]) and not isinstance(value, dict) else value
            given[key] = _filled_in(path, key, written)
    return given


def _keys_of_command(
    path: str, content: dict[str, Any], command: str, known: Collection[str]
) -> tuple[list[tuple[Any, Any]], str]:
    """Returns the (key, value) pairs for one command, later ones overriding earlier ones, and the name of the file (and
    section) for error messages.

    Raises ValueError for an unknown section, and if one section sets a key of `known` under two of its names."""
    place = path
    if set(content) & COMMANDS:
        for section in content:
            if section not in COMMANDS | {"shared"}:
                told = explain_command(str(section), COMMANDS | {"shared"})
                raise ValueError(f"{path}: unknown section {section!r}{told}")
        if command not in content:
            raise ValueError(f"{path}: no section {command!r}; it has {', '.join(content)}")
        own = {key: value for key, value in _section(path, content, command).items() if key != "run_first"}
        parts, place = [_section(path, content, "shared"), own], f"{path}, {command}"
    else:
        parts = [content]
    for part in parts:
        _check_one_name(part, known, place)
    return [item for part in parts for item in part.items()], place


def _takes_text(hint: Any) -> bool:
    """Returns whether every value that the hint allows is text, a mapping of texts, a list of them, or null."""
    if get_origin(hint) is Literal:
        return all(isinstance(value, str) for value in get_args(hint))
    options = [option for option in get_args(hint) if option not in (NoneType, Ellipsis)]
    return all(map(_takes_text, options)) if options else hint in (str, Source)


def shared_keys(path: str, command: str) -> set[str]:
    """Returns the keys that a command takes from section `shared`."""
    content = load_yaml(path)
    if not set(content) & COMMANDS:
        return set()
    shared, own = ({ALIASES.get(key, key) for key in _section(path, content, name)} for name in ("shared", command))
    return shared - own


def run_first(path: str, command: str) -> list[str]:
    """Returns the sections to run, in order, before the section of `command`: its list `run_first`.

    A `run_first` list inside one of these sections is ignored. Raises ValueError for a name that is not another
    training section.
    """
    content = load_yaml(path)
    names = _section(path, content, command).get("run_first") or []
    others = [name for name in content if name in COMMANDS - TRAIN_NOTHING - {command, "rlp"}]
    if not isinstance(names, list):
        raise ValueError(f"{path}: run_first: must be a list of sections, as [sft, reward]; got {names!r}")
    for name in names:
        if name not in others:
            raise ValueError(
                f"{path}: run_first: {name!r} is not another training section; the file has {', '.join(others)}"
            )
    return names


def training_sections(path: str) -> list[str]:
    """Returns the names of the training sections of a file or recipe, in order; a file without sections has none."""
    return [name for name in load_yaml(path) if name in COMMANDS - TRAIN_NOTHING]


def names_folder(values: Iterable[Mapping[str, Any]], folder: str) -> bool:
    """Returns whether any key other than output_dir in one of the configurations is a path to the folder or into it."""
    texts = [
        text
        for keys in values
        for key, value in keys.items()
        for item in (value if isinstance(value, (list, tuple)) else [value])
        for text in (item.values() if isinstance(item, dict) else [item])
        if key != "output_dir" and isinstance(text, str) and text
    ]
    places = [Path(os.path.abspath(text)) for text in texts]
    return any(Path(os.path.abspath(folder)) in (place, *place.parents) for place in places)


def _section(path: str, content: dict[str, Any], name: str) -> dict[str, Any]:
    section = content.get(name) or {}
    if not isinstance(section, dict):
        raise ValueError(f"{path}: section {name!r} must be a mapping of keys to values")
    return section


def load_yaml(path: str, *, as_text: bool = False) -> dict[str, Any]:
    """Loads the mapping in a YAML file, or in the recipe of that name. With `as_text` every value except null is
    returned as the text in the file. Raises ValueError, naming the file, if it does not hold a mapping."""
    import yaml  # not in the base install

    file = Path(path).expanduser()
    if not file.exists() and (RECIPES / f"{path}.yaml").exists():
        file = RECIPES / f"{path}.yaml"
    if not file.is_file():
        recipes = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.yaml")))
        raise ValueError(f"config: no file {path!r}; the recipes are {recipes}")
    try:
        text = file.read_text(encoding="utf-8")
        content = yaml.load(text, _loader(as_text)) or {}
        _check_repeats(yaml.compose(text, yaml.SafeLoader), path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be a mapping of keys to values")
    return content


FLOAT = re.compile(
    r"[-+]?(\d+\.\d*|\.\d+)([eE][-+]?\d+)?$|[-+]?\d+[eE][-+]?\d+$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*)$|0x[0-9a-fA-F]+$")


@cache
def _loader(as_text: bool) -> Any:
    """Returns a YAML loader that differs from YAML 1.1: it reads 12:30, 2026-11-30 and 007 as text and 1e-4 as a
    number. With `as_text` it reads every value except null as text."""
    import yaml  # not in the base install

    class Loader(yaml.SafeLoader):
        pass

    others = {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp", *(["bool"] if as_text else []))}
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in others]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    if not as_text:
        Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
        Loader.add_implicit_resolver("tag:yaml.org,2002:int", INTEGER, list("-+0123456789"))
    return Loader


@cache
def _dumper() -> Any:
    """Returns a YAML dumper that also quotes text such as 1e6, which `_loader` would otherwise read as a number."""
    import yaml  # not in the base install

    class Dumper(yaml.SafeDumper):
        pass

    Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
    return Dumper


def _check_repeats(node: Any, path: str) -> None:
    """Raises ValueError for a key that occurs twice in one mapping; PyYAML would silently take the last."""
    pairs = node.value if node is not None and node.id == "mapping" else []
    keys = [key.value for key, _ in pairs]
    for key, value in pairs:
        if keys.count(key.value) > 1:
            lines = [str(other.start_mark.line + 1) for other, _ in pairs if other.value == key.value]
            raise ValueError(f"{path}: {key.value!r} occurs more than once, in lines {' and '.join(lines)}")
        _check_repeats(value, path)


def _filled_in(path: str, key: str, value: Any) -> Any:
    if isinstance(value, list):
        if None in value:
            raise ValueError(f"{path}: {key}: item {value.index(None) + 1} of the list is blank; remove it")
        return [_filled_in(path, key, item) for item in value]
    if isinstance(value, dict):
        return {name: _filled_in(path, key, item) for name, item in value.items()}
    if not isinstance(value, str) or key == "chat_template":
        return value
    filled = filled_in(key, value)
    if "$" in filled:
        raise ValueError(f"{path}: {key}: {value!r} names an environment variable that is not set")
    if "$" in value:
        remember(key, filled, value)
        return Filled(filled, value)
    return filled


def check_flags(arguments: Sequence[str], kind: type, command: str) -> None:
    """Raises ValueError for a flag that is not a field of `kind`; the message says what to write instead."""
    known = [field.name for field in fields(kind)]
    for argument in arguments:
        name = argument.partition("=")[0][2:].replace("-", "_")
        if argument.startswith("--") and name not in (*known, "help"):
            raise ValueError(f"unknown key {argument.partition('=')[0]}{unknown(name, kind, command)}")


def without_alias(argument: str, kind: type) -> str:
    """Replaces an alias in a flag by the name of its key; other arguments are returned unchanged."""
    name, equals, value = argument.partition("=")
    alias = name[2:].replace("-", "_")
    key = _without_alias(alias, {field.name for field in fields(kind)})
    return f"--{key}{equals}{value}" if name.startswith("--") and key != alias else argument


def check_one_name(arguments: Sequence[str], kind: type) -> None:
    """Raises ValueError if flags set one key under two of its names; the parser would silently take the last."""
    flags = [argument.partition("=")[0][2:].replace("-", "_") for argument in arguments if argument.startswith("--")]
    _check_one_name(flags, {field.name for field in fields(kind)})


def _check_one_name(names: Iterable[str], known: Collection[str], place: str = "") -> None:
    used: dict[str, str] = {}
    for name in names:
        key = _without_alias(name, known)
        if (other := used.setdefault(key, name)) != name:
            where = f"{place}: " if place else ""
            raise ValueError(f"{where}{other!r} and {name!r} are two names of the key {key}; give one of them")


def _without_alias(key: str, known: Collection[str]) -> str:
    return ALIASES[key] if ALIASES.get(key) in known else key


def spelled_out(arguments: Sequence[str], kind: type) -> list[str]:
    """Spells truth values as the parser expects them: true, yes, on and 1, in upper or lower case, become True, and a
    boolean flag without a value gets True."""
    truths = {name for name, hint in get_type_hints(kind).items() if bool in (hint, *get_args(hint))}
    spelled: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if spelled and _is_flag_of(truths, spelled[-1]):
            if not argument.startswith("--"):
                spelled.append(TRUTHS.get(argument.lower(), argument))
                continue
            spelled.append("True")
        spelled.append(
            f"{name}={TRUTHS.get(value.lower(), value)}" if equals and _is_flag_of(truths, name) else argument
        )
    return [*spelled, "True"] if spelled and _is_flag_of(truths, spelled[-1]) else spelled


def check_choices(arguments: Sequence[str], kind: type) -> None:
    """Raises NoChoice for a flag whose value is none of the choices of its key."""
    hints = get_type_hints(kind)
    pairs = [(one.partition("=")[0], one.partition("=")[2]) for one in arguments if "=" in one]
    pairs += [(flag, value) for flag, value in pairwise(arguments) if "=" not in flag]
    for flag, value in pairs:
        key = flag[2:].replace("-", "_")
        hint = hints.get(key) if flag.startswith("--") else None
        if get_origin(hint) is Literal and not value.startswith("--") and value not in map(str, get_args(hint)):
            raise NoChoice(key, value, get_args(hint))


def _is_flag_of(names: Collection[str], argument: str) -> bool:
    return argument.startswith("--") and argument[2:].replace("-", "_") in names


def unknown(name: str, kind: type, command: str) -> str:
    """Returns the end of the message about an unknown key, which says what to write instead (see
    config/elsewhere.py)."""
    readers = {command: [*keys_of(other)] for command, other in CONFIGS.items()}
    return explain(name, command, [field.name for field in fields(kind)], readers)


def as_flags(values: dict[str, Any]) -> list[str]:
    """Converts values from a file to command-line flags, so that one parser reads files and flags."""
    flags = []
    for key, value in values.items():
        flags.append(f"--{key}")
        if isinstance(value, dict):
            flags.append(json.dumps(value))
        elif isinstance(value, list):
            flags.extend(json.dumps(item) if isinstance(item, dict) else str(item) for item in value)
        else:
            flags.append(str(value))
    return flags


def as_yaml(config: Any) -> str:
    """Returns the whole configuration as YAML text; a run with this text as its file has the same configuration.
    Environment variables and relative paths are written as the user gave them."""
    import yaml  # not in the base install

    return yaml.dump(plain(as_given(config)), Dumper=_dumper(), sort_keys=False)


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values as a YAML file holds them: tuples as lists."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
