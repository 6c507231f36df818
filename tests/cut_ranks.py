"""Functions that interrupt runs of several processes by signals and resume the runs. tests/ranks.py calls them and
passes its function `run`."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from fastrlhf.algorithms import experience
from fastrlhf.distributed.ranks import on_first
from fastrlhf.rollout import engine
from fastrlhf.runtime.optim import Optimizer
from fastrlhf.runtime.run import Run
from fastrlhf.runtime.signals import Interrupted
from tests import resumable


def stopped(run: Callable[..., Any], place: Path, two: Path) -> bool:
    """Runs PPO, interrupts it after its first step by a signal to rank 1 only, and resumes it.

    Returns whether the run on this rank was interrupted.
    """
    log, folder = Run.log, two / "ppo-resumed"

    def signalled(run: Run, step: int, *arguments: Any, **keywords: Any) -> None:
        if step == 1 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        log(run, step, *arguments, **keywords)

    Run.log = signalled
    try:
        run("ppo", place, folder)
    except Interrupted as stop:
        interrupted = stop.exit_code == 128 + signal.SIGTERM
    else:
        interrupted = False
    Run.log = log
    on_first(lambda: shutil.copytree(folder, place / "one" / "ppo-resumed"))
    run("ppo", place, folder)
    return interrupted


CUTS: dict[str, tuple[str, Any, str, tuple[int, ...]]] = {
    "rollout": ("drpo", engine, "check_room", (0, 1)),
    "judge": ("drpo", resumable, "noisy_judge", (0,)),
    "scoring": ("ppo", experience, "_scored", (1,)),
    "update": ("drpo", Optimizer, "step", (1,)),
    "update with an exact KL": ("rto", Optimizer, "step", (1,)),
}
"""Part of a step -> (trainer, module or class of a function, name of the function, ranks that get a signal when they
first call the function)."""


def cut(run: Callable[..., Any], part: str, place: Path, two: Path) -> tuple[str, list[int]]:
    """Interrupts a run by a signal in a part of its second step, then resumes it. Returns the message of the
    interruption and how often the function in CUTS was called in each step."""
    kind, owner, name, signalled = CUTS[part]
    function, log, sent, calls = getattr(owner, name), Run.log, [True], [0]

    def logged(run: Run, step: int, *arguments: Any, **keywords: Any) -> None:
        log(run, step, *arguments, **keywords)
        sent[:] = [dist.get_rank() not in signalled]
        calls.append(0)

    def called(*arguments: Any, **keywords: Any) -> Any:
        calls[-1] += 1
        if not sent[0]:
            sent[0] = True
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments, **keywords)

    folder, said = two / f"{kind} cut in the {part}", "no interruption"
    with patch.object(Run, "log", logged), patch.object(owner, name, called):
        try:
            run(kind, place, folder)
        except Interrupted as stop:
            said = str(stop)
    run(kind, place, folder)
    return said, calls


def finished(run: Callable[..., Any], place: Path, two: Path) -> str:
    """Interrupts a run by a signal to rank 1 only, after the last step; returns the message of the interruption."""
    finish = Run.finish

    def signalled(*arguments: Any, **keywords: Any) -> Any:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return finish(*arguments, **keywords)

    with patch.object(Run, "finish", signalled):
        try:
            run("sft", place, two / "sft finished")
        except Interrupted as stop:
            return f"{stop}; finished: {stop.finished}"
    return "no interruption"


def rescued(run: Callable[..., Any], place: Path, two: Path) -> list[str]:
    """Runs DR-PO with a judge that fails in the second step, and then resumes the run. Only rank 0 calls the judge.

    Returns the notes that were added to the error.
    """
    judge, calls = resumable.noisy_judge, []

    def unavailable(rollouts: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise ConnectionError("503")
        return judge(rollouts)

    resumable.noisy_judge = unavailable
    notes = ["no error"]
    try:
        run("drpo", place, two / "drpo-resumed")
    except ConnectionError as error:
        notes = error.__notes__
    finally:
        resumable.noisy_judge = judge
    run("drpo", place, two / "drpo-resumed")
    return notes
