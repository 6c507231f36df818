"""Compares the table of stops (tests/stops.py) with real runs of the command line: exit codes and saved files."""

from __future__ import annotations

import ast
import errno
import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastrlhf import cli
from fastrlhf.algorithms import sft
from fastrlhf.publish.push import PushFailed
from fastrlhf.runtime import locks, merging, optim, run
from fastrlhf.runtime.checkpoint import Checkpointer
from fastrlhf.runtime.metrics import read_metrics
from fastrlhf.tools.plan import advice
from tests import tiny
from tests.resumable import untimed_log
from tests.stops import FINISHED, LAST_STEP, NOTHING, STOPS

ROOT = Path(__file__).parent.parent
CHECKPOINT = "checkpoint-*"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, rows, a finished run of three steps, and a run that was stopped after step 2."""
    place = tmp_path_factory.mktemp("stops")
    tiny.save_policy(place / "policy")
    rows = [{"prompt": row.prompt, "completion": row.reference} for row in tiny.examples(10)]
    (place / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    empty = '{"prompt": "w1", "completion": ""}\n'
    (place / "damaged.jsonl").write_text(empty + (place / "rows.jsonl").read_text())
    assert train(place, place / "whole") == 0
    with pytest.MonkeyPatch.context() as patch:
        at_step_3(patch, lambda: signal.raise_signal(signal.SIGTERM))
        assert train(place, place / "cut", "--save_steps", "1") == 143
    return place


def train(place: Path, folder: Path, *flags: str) -> int:
    keys = {
        "model_name_or_path": place / "policy",
        "dataset_name": place / "rows.jsonl",
        "output_dir": folder,
        "per_device_train_batch_size": 4,
        "num_eval_examples": 2,
        "max_length": 32,
        "max_steps": 3,
        "max_bad_fraction": 0.5,
        "disk_wait_minutes": 0,
        "progress": "false",
    }
    arguments = [text for key, value in keys.items() for text in (f"--{key}", str(value))]
    try:
        return cli.main(["sft", *arguments, *flags])
    except Exception:
        return 1  # the exit code of Python after a traceback


def raiser(error: BaseException) -> Callable[..., None]:
    def fail(*arguments, **keywords):
        raise error

    return fail


def at_step_3(patch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Calls `act` in the third step, before any weight moves."""
    forward, calls = sft.token_nll, []

    def acting(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 3:
            act()
        return forward(*arguments, **keywords)

    patch.setattr(sft, "token_nll", acting)


def damage(*checkpoints: Path) -> None:
    for folder in checkpoints:
        (folder / "model.safetensors").write_bytes(b"0")


def without_a_line(file: Path) -> None:
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))


def no_locks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(locks.fcntl, "flock", raiser(OSError(errno.ENOLCK, "No locks available")))


def failing_reporter(patch: pytest.MonkeyPatch) -> None:
    run = SimpleNamespace(id="run", log=raiser(RuntimeError("no server")), finish=lambda **_: None)
    patch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run))


def full_disk(patch: pytest.MonkeyPatch) -> None:
    for owner, name in ((Checkpointer, "save"), (merging, "save_model")):
        patch.setattr(owner, name, raiser(OSError(errno.ENOSPC, "No space left on device")))


def out_of_memory(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(advice, "add_advice", lambda error, config: None)  # takes seconds
    at_step_3(patch, raiser(torch.OutOfMemoryError("CUDA")))


def not_finite(patch: pytest.MonkeyPatch) -> None:
    at_step_3(patch, lambda: patch.setattr(optim, "_grad_norm", lambda model: torch.tensor(float("nan"))))


def while_saving(patch: pytest.MonkeyPatch, number: int) -> None:
    save = merging.save_model

    def signalled(*arguments, **keywords):
        signal.raise_signal(number)
        save(*arguments, **keywords)

    patch.setattr(merging, "save_model", signalled)


def send(number: int) -> Callable[[pytest.MonkeyPatch, Path], None]:
    return lambda patch, run: at_step_3(patch, lambda: signal.raise_signal(number))


Fault = Callable[[pytest.MonkeyPatch, Path], object]
NEW, CUT, WHOLE = "", "cut", "whole"
SCENARIOS: dict[str, list[tuple[str, Fault, tuple[str, ...]]]] = {
    "Ctrl-C": [(NEW, send(signal.SIGINT), ())],
    "SIGTERM, SIGHUP, SIGUSR1, SIGUSR2": [
        (NEW, send(number), ()) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    ],
    "one of these signals after the last step, while the trained model is saved": [
        (NEW, lambda patch, run, number=number: while_saving(patch, number), ())
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    ],
    "full disk": [(CUT, lambda patch, run: full_disk(patch), ())],
    "a file system without locks or without flushing of folders": [(NEW, lambda patch, run: no_locks(patch), ())],
    "a file of a checkpoint is cut, altered or missing": [(CUT, lambda patch, run: damage(run / "checkpoint-2"), ())],
    "files of all checkpoints are cut, altered or missing": [
        (CUT, lambda patch, run: damage(*run.glob(CHECKPOINT)), ())
    ],
    "another configuration, dataset or starting model": [(CUT, lambda patch, run: None, ("--learning_rate", "0.5"))],
    "lines are missing from `metrics.jsonl`": [(CUT, lambda patch, run: without_a_line(run / "metrics.jsonl"), ())],
    "out of memory": [(NEW, lambda patch, run: out_of_memory(patch), ())],
    "a loss, gradient, score, reward or value is not finite": [(NEW, lambda patch, run: not_finite(patch), ())],
    "any other error, `sys.exit` in a user's function included": [
        (NEW, lambda patch, run, error=error: at_step_3(patch, raiser(error)), ())
        for error in (KeyError("x"), SystemExit(0), ZeroDivisionError("division by zero"))
    ],
    "an error in an evaluation": [(NEW, lambda patch, run: patch.setattr(sft, "evaluate", raiser(KeyError("x"))), ())],
    "the run is finished": [(WHOLE, lambda patch, run: None, ())],
    "a damaged row, an empty response": [(NEW, lambda patch, run: None, ("--dataset_name", "DAMAGED"))],
    "the upload of `push_to_hub` fails": [
        (NEW, lambda patch, place: patch.setattr(run, "push", raiser(PushFailed("push_to_hub: 503"))), ())
    ],
    "W&B or TensorBoard fails": [(NEW, lambda patch, run: failing_reporter(patch), ("--report_to", "wandb"))],
}
"""Event -> the ways in which a test causes the event, each as (folder in which the run starts, function that causes the
event, further flags)."""
ELSEWHERE = {
    "SIGKILL or power off, also during a save, also of one process of several": 128 + signal.SIGKILL,
    "a second run in the same folder, also from another host": ValueError("another run is training in the folder"),
    "processes that start with different keys, versions or weights": ValueError("the configuration of rank 1"),
    "the hub accepts a connection and never answers": ValueError("the hub has not answered"),
}
"""Events that need a second process, which other test files cause -> the error that the run raises, or its exit
code."""


@pytest.mark.parametrize(("event", "form"), [(event, form) for event, forms in SCENARIOS.items() for form in forms])
def test_a_run_ends_with_the_exit_code_of_the_table_and_saves_what_the_table_says(event, form, place, tmp_path):
    start, fault, flags = form
    flags = [str(place / "damaged.jsonl") if flag == "DAMAGED" else flag for flag in flags]
    folder = tmp_path / "run"
    if start:
        shutil.copytree(place / start, folder)
    before = {path.name for path in folder.glob(CHECKPOINT)}
    with pytest.MonkeyPatch.context() as patch:
        fault(patch, folder)
        assert train(place, folder, *flags) == STOPS[event].exit_code
    new = {path.name for path in folder.glob(CHECKPOINT)} - before
    trained = start != WHOLE and (folder / "config.json").exists()
    saved = FINISHED if trained else LAST_STEP if new else NOTHING
    assert saved == STOPS[event].saved
    assert before <= {path.name for path in folder.glob(CHECKPOINT)}
    assert not list(folder.glob(".*"))  # neither a lock file nor an incomplete file
    if saved == LAST_STEP:
        rows = [row["step"] for row in read_metrics(folder / "metrics.jsonl")]
        assert new == {"checkpoint-3" if event == "an error in an evaluation" else "checkpoint-2"}
        assert rows == [1, 2]
        assert train(place, folder) == 0
    if not flags and (folder / "config.json").exists():
        assert untimed_log(folder) == untimed_log(place / "whole")


def test_a_signal_after_the_last_step_of_a_stage_ends_the_command_before_the_next_stage(place, tmp_path, capsys):
    pairs = [{"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected} for row in tiny.examples(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in pairs))
    first, second = tmp_path / "first", tmp_path / "second"
    shared = {"per_device_train_batch_size": 4, "max_length": 32, "max_steps": 1, "progress": False}
    sft = {"model_name_or_path": str(place / "policy"), "dataset_name": str(place / "rows.jsonl")}
    dpo = {"model_name_or_path": str(first), "dataset_name": str(tmp_path / "pairs.jsonl"), "run_first": ["sft"]}
    sections = {"shared": shared, "sft": sft | {"output_dir": str(first)}, "dpo": dpo | {"output_dir": str(second)}}
    (tmp_path / "chain.yaml").write_text(json.dumps(sections))
    command = ["dpo", "--config", str(tmp_path / "chain.yaml")]
    with pytest.MonkeyPatch.context() as patch:
        while_saving(patch, signal.SIGTERM)
        assert cli.main(command) == 143
    said = f"interrupted after the last step; the trained model is in {first}; the same command continues"
    assert f"fastrlhf dpo: {said}" in capsys.readouterr().err
    assert not second.exists()
    assert cli.main(command) == 0
    assert f"sft: {first} holds a finished run; skipped" in capsys.readouterr().out
    assert (second / "config.json").exists()


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 143)])
def test_a_signal_while_the_model_is_loaded_has_the_exit_code_of_a_stopped_run(
    number, exit_code, place, tmp_path, capsys
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "policy_or_given", lambda *_: signal.raise_signal(number))
        assert train(place, tmp_path / "run") == exit_code
    assert "fastrlhf sft: interrupted; the same command continues" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert train(place, tmp_path / "run") == 0


@pytest.mark.parametrize("event", ELSEWHERE)
def test_events_of_other_processes_have_the_exit_code_of_the_table(event, monkeypatch):
    told = ELSEWHERE[event]
    if isinstance(told, ValueError):
        monkeypatch.setitem(cli.COMMANDS, "sft", raiser(told))
        told = cli.main(["sft"])
    assert (STOPS[event].exit_code, STOPS[event].saved) == (told, NOTHING)


def test_the_table_has_every_event_once_and_its_tests_exist():
    assert {*SCENARIOS, *ELSEWHERE} == {*STOPS}
    for stop in STOPS.values():
        tree = ast.parse((ROOT / "tests" / stop.file).read_text(encoding="utf-8"))
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert set(stop.tests) <= defined, (stop.file, set(stop.tests) - defined)
