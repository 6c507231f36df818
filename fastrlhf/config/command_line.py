"""Merges command-line flags and the configuration files that they name into one configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from io import StringIO
from itertools import dropwhile, pairwise, takewhile
from typing import Any

from fastrlhf.config import files
from fastrlhf.config.batch import replaced_batch_keys
from fastrlhf.config.checks import UNREAD
from fastrlhf.config.choices import NoChoice
from fastrlhf.config.elsewhere import explain_command
from fastrlhf.config.paths import with_variables
from fastrlhf.config.sources import Source
from fastrlhf.config.train import LORA_KEYS

POSITIONAL = {"merge": ("adapters",), "chat": ("model_name_or_path", "adapter")}
"""Command -> keys that may be given without their names, in front of all flags."""


def parse(kind: type, arguments: Sequence[str], command: str) -> Any:
    """Builds the configuration of a command from its flags and files. A flag overrides a file, and of a repeated flag
    the last one counts. Raises ValueError for an unknown key or a bad value.

    A key of section `shared` that has no effect for this command is ignored, because other sections may read it.
    """
    rest = split_configs(_with_positional(arguments, *POSITIONAL.get(command, ())))
    values: dict[str, Any] = {}
    shared: set[str] = set()
    path = ""
    while "--config" in rest:
        where = rest.index("--config")
        if where + 1 == len(rest):
            raise ValueError("--config: give a file or the name of a recipe")
        path = rest[where + 1]
        values |= files.read_yaml(path, kind, command)
        shared |= files.shared_keys(path, command)
        del rest[where : where + 2]
    files.check_one_name(rest, kind)
    rest = [files.without_alias(argument, kind) for argument in rest]
    files.check_flags(rest, kind, command)
    flags = {part.partition("=")[0][2:].replace("-", "_") for part in rest if part.startswith("--")}
    for name in replaced_batch_keys(flags):
        values.pop(name, None)
    while True:
        try:
            _check_adapter([*values, *(part.partition("=")[0][2:].replace("-", "_") for part in rest)])
            return with_variables(_from_flags(kind, [*files.as_flags(values), *rest], command), values)
        except ValueError as error:
            key = str(error).partition(":")[0]
            if key in shared & values.keys() and UNREAD in str(error):
                del values[key]
                continue
            # Neither the parser nor the check of choices can tell that the value comes from a file.
            named = re.search(r"--(\w+)", str(error)) or (isinstance(error, NoChoice) and re.match(r"(\w+)", key))
            if named and named[1] in values and not any(part.startswith(f"--{named[1]}") for part in rest):
                raise ValueError(f"{path}, {command}: {error}") from None
            raise


def _check_adapter(given: Sequence[str]) -> None:
    """Raises ValueError if a key of adapters is given without use_peft, even if it has its default value."""
    for key in given if "use_peft" not in given else ():
        if key in LORA_KEYS:
            raise ValueError(f"{key}: must be absent when use_peft is false, {UNREAD}; set use_peft as well")


def _from_flags(kind: type, flags: Sequence[str], command: str) -> Any:
    import tyro

    message = StringIO()
    files.check_choices(flags, kind)
    try:
        with redirect_stderr(message):
            return tyro.cli(
                kind,
                prog=f"fastrlhf {command}",
                args=files.spelled_out(flags, kind),
                config=(tyro.conf.FlagConversionOff,),
                use_underscores=True,
                registry=_with_entries(),
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        told = _first_paragraph(message.getvalue()).removeprefix(f"Error parsing {kind.__name__}: ")
        raise ValueError(told) from None


def _with_entries() -> Any:
    """Returns rules for the parser that keep an entry of `dataset_name` as text, which the configuration reads."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def entry(info: Any) -> Any:
        if info.type is not Source:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="ENTRY",
            instance_from_str=lambda words: words[0],
            is_instance=lambda value: isinstance(value, Source),
            str_from_instance=lambda source: [getattr(source, "path", "")],
        )

    return registry


def split_configs(arguments: Sequence[str]) -> list[str]:
    """Splits every `--config=FILE` among the arguments into `--config` and `FILE`."""
    return [
        part
        for argument in arguments
        for part in (argument.split("=", 1) if argument.startswith("--config=") else [argument])
    ]


def config_paths(arguments: Sequence[str]) -> list[str]:
    return [path for flag, path in pairwise(split_configs(arguments)) if flag == "--config"]


def _first_paragraph(box: str) -> str:
    """Returns the first paragraph of tyro's error box, without its title, on one line. If the terminal lacks
    box-drawing characters, the box is made of hyphens, and a line of hyphens follows the title."""
    rules = ("\u2500", "\u2570", "---")
    lines = [line.strip("\u2502 ") for line in box.splitlines()[1:]]
    body = dropwhile(lambda line: line.startswith(rules), lines)
    return " ".join(takewhile(lambda line: not line.startswith(rules), body))


def parse_for_tool(
    arguments: Sequence[str], kinds: Mapping[str, type], names: Sequence[str]
) -> tuple[dict[str, str], Any]:
    """Splits arguments into the flags `names` of a tool and the configuration of the trainer that it examines. `kinds`:
    trainer -> its configuration class."""
    rest, options = split_configs(arguments), {}
    for name in ("command", *names):
        rest = [part for given in rest for part in (given.split("=", 1) if given.startswith(f"--{name}=") else [given])]
        if (flag := f"--{name}") in rest:
            where = rest.index(flag)
            if where + 1 == len(rest):
                raise ValueError(f"{flag}: give a value")
            options[name] = rest[where + 1]
            del rest[where : where + 2]
    command = options["command"] = options.get("command") or _only_section(rest, kinds)
    if command not in kinds:
        raise ValueError(f"--command: {command!r} is not a trainer{explain_command(command, kinds)}")
    return options, parse(kinds[command], rest, command)


def _only_section(arguments: Sequence[str], kinds: Mapping[str, type]) -> str:
    """Returns the only training section of the configuration files. Raises ValueError if they have none or several."""
    sections = list(dict.fromkeys(name for path in config_paths(arguments) for name in files.training_sections(path)))
    if len(sections) == 1:
        return sections[0]
    told = f"the file has the sections {', '.join(sections)}" if sections else "no section names the trainer"
    raise ValueError(f"--command: {told}; choose one of {', '.join(sections or kinds)}")


def number(options: dict[str, str], name: str, default: str, kind: type[int] | type[float]) -> Any:
    try:
        return kind(options.get(name, default))
    except ValueError:
        raise ValueError(f"--{name}: {options[name]!r} is not a number") from None


def _with_positional(arguments: Sequence[str], *names: str) -> list[str]:
    """Turns the words in front of the first flag into the values of the keys `names`; the last key takes all that are
    left."""
    if not names:
        return list(arguments)
    words = list(takewhile(lambda word: not word.startswith("-"), arguments))
    rest, flags = list(arguments[len(words) :]), []
    for i, name in enumerate(names):
        values = words[i:] if i + 1 == len(names) else words[i : i + 1]
        flags += [f"--{name}", *values] if values else []
    return [*flags, *rest]
