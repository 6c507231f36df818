"""Generates the pages of the manual that are derived from the code, so that they always agree with it.

configuration.md    every key of every command, from the config dataclasses and the docstring under each field
trl_keys.txt        every key of TRL and transformers and what it is called here, for docs/trl.md to include
stops.txt           what happens when a run stops, from tests/stops.py, for docs/resume.md to include
models.txt          the sweep of architectures, from the rows of `python -m bench models`, for docs/models.md to include
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from bench.models.sweep import ROWS, page, read_rows
from fastrlhf.config import CONFIGS, TRAIN_NOTHING, elsewhere
from fastrlhf.config.groups import GROUPS
from fastrlhf.config.help import Key, as_yaml, keys_of
from tests.stops import STOPS

INTRODUCTION = """\
# Configuration reference

Written from the config classes of `fastrlhf.config`. A key is a flag (`--learning_rate 1e-6`), a line of a YAML file
(`learning_rate: 1e-6`) or an argument of the class (`DPOConfig(learning_rate=1e-6)`). A key that nothing would read
with the other settings is refused unless it has its default. `fastrlhf COMMAND --help` lists the keys of one command.
"""


def configuration() -> str:
    """Returns the page of all keys, in the groups of `--help`."""
    keys = {command: keys_of(kind) for command, kind in CONFIGS.items()}
    lines = [INTRODUCTION, "| command | class | |", "|---|---|---|"]
    for command, kind in CONFIGS.items():
        text = " ".join((kind.__doc__ or "").partition("\n\n")[0].split())
        lines.append(f"| `{command}` | `{kind.__name__}` | {text} |")
    for group, names in GROUPS.items():
        lines += ["", f"## {group}", ""]
        for name in names:
            lines += _entry(name, {command: known[name] for command, known in keys.items() if name in known})
    return "\n".join(lines) + "\n"


def _entry(name: str, readers: Mapping[str, Key]) -> Iterator[str]:
    """Yields the entry of a key with the commands that read it: one entry per description, if commands describe it
    differently."""
    for text, type_ in dict.fromkeys((key.help, key.type) for key in readers.values()):
        same = {command: key for command, key in readers.items() if (key.help, key.type) == (text, type_)}
        yield f"`{name}`\n: {text}\n\n  *{type_}*; {_defaults(same)}. Read by {_listed(list(same))}.\n"


def _defaults(readers: Mapping[str, Key]) -> str:
    """Returns the most common default, and each other default with its command."""
    shown = {
        command: f"`{as_yaml(key.default)}`" if as_yaml(key.default) else "empty" for command, key in readers.items()
    }
    usual = max(dict.fromkeys(shown.values()), key=list(shown.values()).count)
    others = [f"{value} for {command}" for command, value in shown.items() if value != usual]
    return ", ".join([f"default {usual}", *others])


def _listed(commands: list[str]) -> str:
    training = [command for command in CONFIGS if command not in ("rlp", *TRAIN_NOTHING)]
    if set(training) <= set(commands):
        commands = ["all trainers", *(command for command in commands if command not in training)]
    return ", ".join(commands)


def trl_keys() -> str:
    """Returns a section with a table for each config of TRL."""
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


def models() -> str:
    """Returns the table of architectures, or a sentence if no rows are committed."""
    rows = read_rows(ROWS).values() if ROWS.exists() else []
    return page(rows) if rows else "No rows of this sweep are committed yet.\n"


def stops() -> str:
    """Returns the table of events that stop or disturb a run, with their outcomes."""
    lines = ["| event | what follows | what is saved | exit code |", "|---|---|---|---|"]
    lines += [f"| {event} | {stop.follows} | {stop.saved} | {stop.exit_code} |" for event, stop in STOPS.items()]
    return "\n".join(lines) + "\n"


PAGES = {"configuration.md": configuration, "trl_keys.txt": trl_keys, "models.txt": models, "stops.txt": stops}


def write(folder: Path) -> None:
    """Writes every page into `folder`."""
    folder.mkdir(exist_ok=True)
    for name, text_of in PAGES.items():
        (folder / name).write_text(text_of(), encoding="utf-8")
