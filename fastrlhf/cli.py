"""The command line: `fastrlhf COMMAND [--config FILE] [--key value ...]`. Flags beat the file, the file beats the
defaults."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict
from functools import partial
from io import StringIO
from itertools import pairwise, takewhile
from typing import Any

from fastrlhf import config as configs
from fastrlhf import config_files as files
from fastrlhf.config.checks import UNREAD

USAGE = """\
usage: fastrlhf COMMAND [--config FILE] [--key value ...]

  demo       the whole chain on the embedded task: SFT, reward model, DPO, PPO, DR-PO, evaluation
  sft        supervised fine-tuning
  reward     a reward model from preference pairs
  dpo        DPO, or IPO with --loss_type ipo
  ppo        PPO
  drpo       DR-PO: PPO from reset states
  rto        RTO: PPO on the token rewards of a DPO model
  eval       win rates between models and dataset responses
  report     fastrlhf report RUN_DIR: one HTML page of a run

fastrlhf COMMAND --help lists the keys of a command. FILE is YAML, or the name of a recipe."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; a mistake of the user's is one line on standard error and exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    command, rest = arguments[0], arguments[1:]
    try:
        if command not in COMMANDS:
            near = files.nearest(command, COMMANDS)
            raise ValueError(f"unknown command {command!r}{near}; fastrlhf --help lists them")
        COMMANDS[command](rest)
    except (ValueError, OSError) as error:
        print(f"fastrlhf {command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"fastrlhf {command}: needs {error.name}: pip install 'fastrlhf[train]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"fastrlhf {command}: interrupted", file=sys.stderr)
        return 130
    return 0


def parse(kind: type, arguments: Sequence[str], command: str) -> Any:
    """The configuration that a file and flags describe. Raises ValueError for a key or a value that is none.

    A key of a section `shared` that nothing would read under this command is left to the other sections.
    """
    rest = _split_configs(arguments)
    values: dict[str, Any] = {}
    shared: set[str] = set()
    while "--config" in rest:
        where = rest.index("--config")
        if where + 1 == len(rest):
            raise ValueError("--config: give a file or the name of a recipe")
        values |= files.read_yaml(rest[where + 1], kind, command)
        shared |= files.shared_keys(rest[where + 1], command)
        del rest[where : where + 2]
    rest = [files.without_alias(argument) for argument in rest]
    files.check_flags(rest, kind)
    while True:
        try:
            return _from_flags(kind, [*files.as_flags(values), *rest], command)
        except ValueError as error:
            key = str(error).partition(":")[0]
            if key not in shared & values.keys() or UNREAD not in str(error):
                raise
            del values[key]


def _from_flags(kind: type, flags: Sequence[str], command: str) -> Any:
    import tyro

    message = StringIO()
    try:
        with redirect_stderr(message):
            return tyro.cli(
                kind,
                prog=f"fastrlhf {command}",
                args=flags,
                config=(tyro.conf.FlagConversionOff,),
                use_underscores=True,
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        told = _first_paragraph(message.getvalue()).removeprefix(f"Error parsing {kind.__name__}: ")
        raise ValueError(told) from None


def _split_configs(arguments: Sequence[str]) -> list[str]:
    """The arguments with --config=FILE as two of them."""
    return [
        part
        for argument in arguments
        for part in (argument.split("=", 1) if argument.startswith("--config=") else [argument])
    ]


def _config_paths(arguments: Sequence[str]) -> list[str]:
    return [path for flag, path in pairwise(_split_configs(arguments)) if flag == "--config"]


def _first_paragraph(box: str) -> str:
    """What tyro's box of several lines says, in one: the text up to the first rule."""
    lines = [line.strip("\u2502 ") for line in box.splitlines()[1:]]
    return " ".join(takewhile(lambda line: not line.startswith(("\u2500", "\u2570")), lines))


def _train(command: str, arguments: Sequence[str]) -> None:
    """Runs one trainer, after the sections of its file that it names in `run_first`, that it still needs and that have
    not run yet."""
    config = _parse_run(command, arguments)
    earlier = _run_first(command, config, _config_paths(arguments))
    _quiet_libraries()
    from fastrlhf.checkpoint import check_output_dir, holds_model

    finished = [(name, run) for name, run in earlier if holds_model(run.output_dir)]
    for name, run in finished:
        files.check_unchanged(run, name)
    runs = [*(run for run in earlier if run not in finished), (command, config)]
    for name, run in finished:
        print(f"{name}: {run.output_dir} holds a finished run; skipped")
    for _, run in runs:
        check_output_dir(run.output_dir)
    for name, run in runs:
        if earlier:
            print(f"{name}:")
        _run(name, run)


def _run_first(command: str, config: Any, paths: Sequence[str]) -> list[tuple[str, Any]]:
    """The sections that `run_first` names and their configurations, in order.

    Flags are for `command` alone; where one has replaced the folder of a section, so that no key names it any more, the
    section is left out, and those that it alone needed with it.
    """
    earlier = [
        (name, _parse_run(name, ["--config", path])) for path in paths for name in files.run_first(path, command)
    ]
    in_file, resolved = [files.read_yaml(path, type(config), command) for path in paths], [asdict(config)]
    needed = []
    for name, run in reversed(earlier):
        folder = run.output_dir
        if files.names_folder(in_file, folder) and not files.names_folder(resolved, folder):
            print(f"{name}: a flag has replaced {folder}; skipped")
        else:
            needed.insert(0, (name, run))
            resolved.append(asdict(run))
        in_file.append(asdict(run))
    return needed


def _run(command: str, config: Any) -> None:
    from importlib import import_module

    _, module, function = TRAINERS[command]
    result = getattr(import_module(f"fastrlhf.algorithms.{module}"), function)(config)
    for name, value in result.final.items():
        print(f"{name} {value:.4f}")
    print(f"saved in {result.output_dir}")


def _parse_run(command: str, arguments: Sequence[str]) -> Any:
    config = parse(TRAINERS[command][0], arguments, command)
    configs.require(bool(config.output_dir), "output_dir", config.output_dir, f"the folder of the {command} run")
    return config


def _evaluate(arguments: Sequence[str]) -> None:
    config = parse(configs.EvalConfig, arguments, "eval")
    _quiet_libraries()
    from fastrlhf.evaluation.evaluate import evaluate_models, format_table

    print(format_table(evaluate_models(config)))


def _demo(arguments: Sequence[str]) -> None:
    config = parse(configs.DemoConfig, arguments, "demo")
    _quiet_libraries()
    from fastrlhf.demo import format_summary, run_demo

    print(format_summary(run_demo(config)))
    print(f"saved in {config.out}: summary.json, report.html, and a folder per stage")


def _report(arguments: Sequence[str]) -> None:
    from pathlib import Path

    from fastrlhf.evaluation.report import write_report

    if list(arguments) in (["-h"], ["--help"]):
        print(USAGE)
        return
    configs.require(len(arguments) == 1, "RUN_DIR", list(arguments), "one folder of a run")
    print(write_report(Path(arguments[0])))


def _quiet_libraries() -> None:
    """Their progress bars and advice would hide ours; errors still show."""
    import logging

    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fastrlhf").setLevel(logging.INFO)


TRAINERS: dict[str, tuple[type, str, str]] = {
    "sft": (configs.SFTConfig, "sft", "train_sft"),
    "reward": (configs.RewardConfig, "reward_model", "train_reward_model"),
    "dpo": (configs.DPOConfig, "preference", "train_dpo"),
    "ppo": (configs.PPOConfig, "on_policy", "train_on_policy"),
    "drpo": (configs.DRPOConfig, "on_policy", "train_on_policy"),
    "rto": (configs.RTOConfig, "on_policy", "train_on_policy"),
}
"""Command -> its configuration, and its module and function in fastrlhf.algorithms."""

COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "demo": _demo,
    **{name: partial(_train, name) for name in TRAINERS},
    "eval": _evaluate,
    "report": _report,
}

if __name__ == "__main__":
    sys.exit(main())
