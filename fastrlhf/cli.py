"""The command line: `fastrlhf COMMAND [--config FILE] [--key value ...]`. Flags override the file, and the file
overrides the defaults."""

from __future__ import annotations

import logging
import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from fastrlhf import __version__
from fastrlhf import config as configs
from fastrlhf.config import compare, files
from fastrlhf.config.command_line import config_paths, number, parse, parse_for_tool
from fastrlhf.config.elsewhere import explain_command
from fastrlhf.config.functions import FunctionFailed, user_frames
from fastrlhf.config.help import format_help
from fastrlhf.runtime.out_of_memory import describe, is_out_of_memory
from fastrlhf.runtime.printable import PrintableFormatter, printable
from fastrlhf.runtime.signals import Interrupted, stop_at_once

USAGE = """\
usage: fastrlhf COMMAND [--config FILE] [--key value ...]

  demo       runs the whole chain on the embedded task: SFT, reward model, DPO, PPO, DR-PO, evaluation
  sft        supervised fine-tuning
  reward     trains a reward model on preference pairs
  dpo        DPO, or IPO with --loss_type ipo
  kto        KTO, from responses labelled as desirable or not
  ppo        PPO, with a critic
  grpo       GRPO: groups of responses compared with each other, no critic
  drpo       DR-PO: PPO from reset states
  rto        RTO: PPO on the token rewards of a DPO model
  rlp        RLP: refits the reward model with answers of the policy and trains the policy again
  eval       win rates of models against each other or against responses of a dataset
  report     fastrlhf report RUN_DIR [--output PAGE]: one HTML page of a run; RUN_DIR RUN_DIR ...: a comparison of runs
  inspect    shows rows as the model sees them: --config FILE [--num N] [--rows N|all] [--html PAGE]
  plan       memory and steps of a run: --config FILE [--memory_gib N]; exit code 1 if the run does not fit
  merge      fastrlhf merge ADAPTER [ADAPTER ...] --output_dir FOLDER: adds adapters to their base model
  chat       fastrlhf chat MODEL [ADAPTER]: talks with a model in the terminal
  cache      lists the tokenised rows kept on this disk; --clear all, or --clear KEY ..., deletes entries
  doctor     fastrlhf doctor [OUTPUT_DIR]: versions, GPU, paths of the kernels, self-check against float64

inspect and plan take the keys of one trainer; --command NAME says which one if FILE has sections of several.
fastrlhf COMMAND --help lists the keys of a command. FILE is a YAML file or the name of a recipe.
fastrlhf --version prints the version."""

PATIENCE = 2.0
"""Number of seconds that a process other than rank 0 waits before it reports its error. If rank 0 has failed too,
torchrun ends this process during the wait, so that the error is reported only once."""

COMPARISON = "comparison.html"
"""File in the current folder to which `fastrlhf report` writes a comparison of several runs."""

UNREAD_EXIT_CODE = 141
"""Exit code that a shell reports for a program ended by SIGPIPE."""

STDOUT = 1
"""File descriptor of standard output."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. The exit code is 2 after a user's mistake, which one line on standard error explains, and 1
    after running out of memory."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"fastrlhf {__version__}")
        return 0
    command, rest = arguments[0], arguments[1:]
    try:
        if command not in COMMANDS:
            told = explain_command(command, COMMANDS)
            raise ValueError(f"unknown command {command!r}{told}; fastrlhf --help lists them")
        with quiet_when_unread(), stop_at_once():
            if {"-h", "--help"} & {*rest}:
                print(format_help(command) if command in configs.CONFIGS else USAGE)
            else:
                COMMANDS[command](rest)
    except (ValueError, OSError) as error:
        return _fail(command, _in_one_line(error), 2, user_frames(error))
    except ModuleNotFoundError as error:
        return _fail(command, f"needs {error.name}: pip install 'fastrlhf[train]'", 2)
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            return _fail(command, describe(error), 1)
        if not (frames := user_frames(error)) and not isinstance(error, FunctionFailed):
            raise
        return _fail(command, _in_one_line(error), 1, frames)
    except Interrupted as stop:
        then = "; the same command continues" if command in TRAINERS else ""
        return _fail(command, f"{stop}{then}", stop.exit_code)
    except KeyboardInterrupt:
        return _fail(command, "interrupted", 130)
    except Exception as error:
        if not (frames := user_frames(error)):
            raise
        return _fail(command, f"{type(error).__name__}: {_in_one_line(error)}", 1, frames)
    return 0


def _in_one_line(error: BaseException) -> str:
    return "; ".join([" ".join(str(error).split()), *getattr(error, "__notes__", ())])


def _fail(command: str, message: str, exit_code: int, frames: Sequence[str] = ()) -> int:
    """Prints an error on one line of standard error, and one line per traceback frame. If several processes fail in the
    same way, only rank 0 prints."""
    if not _is_first():
        if exit_code > 128:  # Every process receives the signal, so only rank 0 reports it.
            return exit_code
        time.sleep(PATIENCE)
    for line in (f"fastrlhf {command}: {message}", *(f"  {frame}" for frame in frames)):
        print(printable(line), file=sys.stderr)
    return exit_code


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _train(command: str, arguments: Sequence[str]) -> None:
    """Runs one trainer. Sections that it names in `run_first` run before it, unless they have finished or a flag has
    made them unnecessary. All of them are checked before the first one starts."""
    config = _parse_run(command, arguments)
    earlier = _run_first(command, config, config_paths(arguments))
    sections = _rlp_sections(config, arguments) if command == "rlp" else ()
    _quiet_libraries()
    from fastrlhf.runtime.checkpoint import check_run_dir, holds_model

    finished = [(name, run) for name, run in earlier if holds_model(run.output_dir)]
    for name, run in finished:
        compare.check_unchanged(run, name)
    runs = [*(run for run in earlier if run not in finished), (command, config)]
    for name, run in finished:
        print(f"{name}: {run.output_dir} holds a finished run; skipped")
    for name, run in runs:
        if name != "rlp":  # rlp checks and resumes its own stages
            check_run_dir(run)
    if len(runs) > 1:
        from fastrlhf.tools.plan.preflight import check_chain, rlp_stages

        check_chain([*runs[:-1], *(rlp_stages(config, *sections) if sections else runs[-1:])])
    here = Path.cwd()
    for name, run in runs:
        os.chdir(here)  # a user-defined function of the previous section may have changed the folder
        if earlier:
            print(f"{name}:")
        try:
            _run(name, run, *(sections if name == command else ()))
        except Interrupted as stop:
            if not stop.finished or run is not config or name == "rlp":  # there is more to do
                raise
            print(stop)


def _run_first(command: str, config: Any, paths: Sequence[str]) -> list[tuple[str, Any]]:
    """Returns the sections that `run_first` names and their configurations, in order. Flags apply only to `command`. A
    section is left out if a flag overrides the only key that pointed to its output folder. A section that
    is needed only by left-out sections is left out too.
    """
    earlier = []
    for path in paths:
        for name in files.run_first(path, command):
            try:
                earlier.append((name, _parse_run(name, ["--config", path])))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
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


def _rlp_sections(config: configs.RLPConfig, arguments: Sequence[str]) -> tuple[Any, Any]:
    """Returns the configurations of the sections that train RLP's reward models and policies."""
    paths = config_paths(arguments)
    configs.require(len(paths) == 1, "--config", paths, f"one file with sections rlp, reward and {config.policy}")
    reward, policy = (parse(TRAINERS[name][0], ["--config", paths[0]], name) for name in ("reward", config.policy))
    return reward, policy


def _run(command: str, config: Any, *sections: Any) -> None:
    from importlib import import_module

    _, module, function = TRAINERS[command]
    here = Path.cwd()
    try:
        result = getattr(import_module(f"fastrlhf.algorithms.{module}"), function)(config, *sections)
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error) and command != "rlp":  # the stages of rlp have separate configurations
            from fastrlhf.tools.plan.advice import add_advice

            add_advice(error, config)
        raise
    for name, value in result.final.items():
        print(f"{name} {value:.4f}")
    absolute = os.path.isabs(config.output_dir)
    print(f"saved in {result.output_dir if absolute else os.path.relpath(result.output_dir, here)}")


def _parse_run(command: str, arguments: Sequence[str]) -> Any:
    config = parse(TRAINERS[command][0], arguments, command)
    configs.require(bool(config.output_dir), "output_dir", config.output_dir, f"the folder of the {command} run")
    return config


def _evaluate(arguments: Sequence[str]) -> None:
    config = parse(configs.EvalConfig, arguments, "eval")
    _quiet_libraries()
    from fastrlhf.evaluation.evaluate import evaluate_models, format_table

    print(format_table(evaluate_models(config), config.opponent, config.reward_model_path))
    if config.output_dir:
        print(f"saved in {config.output_dir}: summary.json, samples.jsonl")


def _demo(arguments: Sequence[str]) -> None:
    config = parse(configs.DemoConfig, arguments, "demo")
    _quiet_libraries()
    from fastrlhf.demo import format_summary, run_demo

    print(format_summary(run_demo(config)))
    print(f"saved in {config.out}: summary.json, report.html, and a folder per stage")


def _report(arguments: Sequence[str]) -> None:
    from fastrlhf.report.compare import write_comparison
    from fastrlhf.report.report import write_report

    folders, page = list(arguments), None
    if "--output" in folders:
        where = folders.index("--output")
        configs.require(where + 1 < len(folders), "--output", "", "followed by the page to write")
        page = Path(folders[where + 1])
        del folders[where : where + 2]
    unknown = [folder for folder in folders if folder.startswith("-")]
    configs.require(bool(folders) and not unknown, "RUN_DIR", list(arguments), "the folder of a run, or of several")
    if len(folders) > 1:
        print(write_comparison([Path(folder) for folder in folders], page or Path(COMPARISON)))
    else:
        print(write_report(Path(folders[0]), page))


def _merge(arguments: Sequence[str]) -> None:
    config = parse(configs.MergeConfig, arguments, "merge")
    _quiet_libraries()
    from fastrlhf.tools.merge import merge_adapters

    lost = merge_adapters(config)
    print(f"saved in {config.output_dir}, in {config.dtype}")
    if lost:
        print(f"{config.dtype} loses {100 * lost:.0f} % of the adapters' update by rounding; float32 loses nothing")


def _chat(arguments: Sequence[str]) -> None:
    config = parse(configs.ChatConfig, arguments, "chat")
    _quiet_libraries()
    from fastrlhf.tools.chat import HELP, open_chat, talk, typed

    chat = open_chat(config)
    print(HELP if chat.tokenizer.chat_template else f"no chat template: each line is continued as text; {HELP}")
    talk(chat, typed(), sys.stdout)


def _inspect(arguments: Sequence[str]) -> None:
    options, config = parse_for_tool(arguments, TRAINER_CONFIGS, ("num", "rows", "html"))
    num = number(options, "num", "5", int)
    _quiet_libraries()
    from fastrlhf.tools.inspect import FEW, format_html, format_text, inspect_rows

    found = inspect_rows(config, num, None if options.get("rows") == "all" else number(options, "rows", str(FEW), int))
    if isinstance(sys.stdout, TextIOWrapper):  # rows may hold characters that the terminal's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    print(format_text(found, colour=sys.stdout.isatty() and not os.environ.get("NO_COLOR")))
    if "html" in options:
        page = format_html(found, f"{options['command']}: {config.dataset_name}")
        Path(options["html"]).expanduser().write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
        print(f"\nwritten to {options['html']}")


def _plan(arguments: Sequence[str]) -> None:
    options, config = parse_for_tool(arguments, TRAINER_CONFIGS, ("memory_gib",))
    memory_gib = number(options, "memory_gib", "0", float)
    _quiet_libraries()
    from fastrlhf.tools.plan.plan import format_plan, plan_run

    plan = plan_run(config, memory_gib=memory_gib)
    print(format_plan(plan))
    if not plan.fits:
        raise SystemExit(1)


def _cache(arguments: Sequence[str]) -> None:
    from fastrlhf.tools.cache import list_or_clear

    print(list_or_clear(parse(configs.CacheConfig, arguments, "cache")))


def _doctor(arguments: Sequence[str]) -> None:
    from fastrlhf.tools.doctor import examine, format_findings

    configs.require(len(arguments) <= 1, "OUTPUT_DIR", list(arguments), "one folder, in which runs will be written")
    findings = examine(arguments[0] if arguments else ".")
    print(format_findings(findings))
    if any(finding.level == "broken" for finding in findings):
        raise SystemExit(1)


@contextmanager
def quiet_when_unread() -> Iterator[None]:
    """Context that ends the program without an error when the reader of standard output has closed the pipe; further
    output is dropped.

    Any other broken pipe is raised unchanged. SIGPIPE keeps its handler, because a library's lost connection would
    otherwise end the run.
    """
    try:
        try:
            yield
        except SystemExit:
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        if not _is_unread():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)  # otherwise the flush at the exit of Python fails again
        raise SystemExit(UNREAD_EXIT_CODE) from None


def _is_unread() -> bool:
    """Returns whether standard output is a pipe that the reader has closed."""
    poll = select.poll()
    poll.register(STDOUT, 0)  # POLLERR is reported even though it is not requested
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _quiet_libraries() -> None:
    """Silences progress bars and advice of other libraries, but not their errors, and all output of ranks other than
    0."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # `datasets` is imported later, and only if needed
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.basicConfig(format="%(message)s")
    for handler in logging.getLogger().handlers:
        handler.setFormatter(PrintableFormatter("%(message)s"))
    logging.getLogger("fastrlhf").setLevel(logging.INFO if _is_first() else logging.ERROR)
    sys.stdout = sys.stdout if _is_first() else open(os.devnull, "w")  # noqa: SIM115 (open until the end)


TRAINERS: dict[str, tuple[type, str, str]] = {
    "sft": (configs.SFTConfig, "sft", "train_sft"),
    "reward": (configs.RewardConfig, "reward_model", "train_reward_model"),
    "dpo": (configs.DPOConfig, "dpo", "train_dpo"),
    "kto": (configs.KTOConfig, "kto", "train_kto"),
    "ppo": (configs.PPOConfig, "ppo", "train_ppo"),
    "grpo": (configs.GRPOConfig, "ppo", "train_ppo"),
    "drpo": (configs.DRPOConfig, "ppo", "train_ppo"),
    "rto": (configs.RTOConfig, "ppo", "train_ppo"),
    "rlp": (configs.RLPConfig, "rlp", "train_rlp"),
}
"""Command -> its configuration class, and its module and function in fastrlhf.algorithms."""

TRAINER_CONFIGS = {name: config for name, (config, _, _) in TRAINERS.items()}

COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "demo": _demo,
    **{name: partial(_train, name) for name in TRAINERS},
    "eval": _evaluate,
    "report": _report,
    "inspect": _inspect,
    "plan": _plan,
    "merge": _merge,
    "chat": _chat,
    "cache": _cache,
    "doctor": _doctor,
}

if __name__ == "__main__":
    sys.exit(main())
