"""Merges command-line flags and the configuration files that they name into one configuration."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from itertools import dropwhile, pairwise, takewhile
from typing import Any

from fastrlhf.config import files
from fastrlhf.config.checks import UNREAD
from fastrlhf.config.choices import NoChoice
from fastrlhf.config.paths import with_variables
from fastrlhf.config.train import LORA_KEYS


def parse(kind: type, arguments: Sequence[str], command: str) -> Any:
    """Builds the configuration of a command from its flags and files. A flag overrides a file, and of a repeated flag
    the last one counts. Raises ValueError for an unknown key or a bad value.

    A key of section `shared` that has no effect for this command is ignored, because other sections may read it.
    """
    rest = split_configs(arguments)
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
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        told = _first_paragraph(message.getvalue()).removeprefix(f"Error parsing {kind.__name__}: ")
        raise ValueError(told) from None


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
