"""Kills `fastrlhf rlp` in every stage, and `fastrlhf eval` while it samples, judges and writes. A repeated command must
end with files that are bit-identical to those of an uninterrupted run. Processes and signals are real: a child process
that has loaded the libraries forks one process per run. All tests are marked `faults`: `make test-faults`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastrlhf.algorithms import rlp
from fastrlhf.algorithms.rlp import train_rlp
from fastrlhf.config import EvalConfig, PPOConfig, RewardConfig, RLPConfig
from fastrlhf.evaluation import evaluate
from fastrlhf.evaluation.evaluate import evaluate_models
from fastrlhf.rollout.engine import TransformersEngine
from fastrlhf.runtime.metrics import read_metrics, read_rows
from fastrlhf.runtime.run import Run
from fastrlhf.runtime.signals import Interrupted
from tests import tiny
from tests.resumable import untimed

ROOT = Path(__file__).parent.parent
SHARED: dict[str, Any] = {
    "max_length": 32,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "progress": False,
}

RLP_POINTS: dict[str, tuple[Any, str, int]] = {
    "reward": (Run, "log", 1),
    "policy": (Run, "log", 3),
    "answers": (rlp, "write_rows", 1),
    "scores of the answers": (rlp, "per_response", 1),
    "refit": (Run, "log", 5),
    "comparison after the refit": (rlp, "compare_scores", 1),
    "report": (rlp, "write_file", 1),
    "last policy": (Run, "log", 7),
}
"""Stage -> (module or class of a function, name of the function, number of the call at whose end the process is
killed)."""
EVAL_POINTS: dict[str, tuple[Any, str, int]] = {
    "sampling": (TransformersEngine, "generate", 2),
    "judging": (evaluate, "reward_model_judge", 2),
    "writing": (evaluate, "as_yaml", 1),
}


def train(models: Path, folder: Path) -> None:
    policy, pairs = str(models / "policy"), tiny.examples(8)
    config = RLPConfig(
        output_dir=str(folder),
        refinement="uml",
        num_answers=2,
        views_per_step=4,
        view_width=16,
        view_latent=4,
        min_reward_variance=0.0,
    )
    reward = RewardConfig(model_name_or_path=policy, **SHARED)
    ppo = PPOConfig(model_name_or_path=policy, response_length=5, num_ppo_epochs=1, num_mini_batches=2, **SHARED)
    train_rlp(config, reward, ppo, pairs=pairs, eval_pairs=pairs[:4], prompts=tiny.examples(8, seed=2))


def judge(models: Path, folder: Path) -> None:
    keys: dict[str, Any] = {"response_length": 6, "max_length": 32, "rollout_batch_size": 3}
    policies = (str(models / "policy"), str(models / "other"))
    config = EvalConfig(models=policies, reward_model_path=str(models / "judge"), output_dir=str(folder), **keys)
    evaluate_models(config, tiny.examples(8))


def kill_in(point: tuple[Any, str, int], number: int) -> None:
    """Makes this process send itself the signal `number` at the end of a call. `point` is (module or class, name of its
    function, number of the call)."""
    owner, name, at = point
    function, calls = getattr(owner, name), []

    def deadly(*arguments: Any, **keywords: Any) -> Any:
        result = function(*arguments, **keywords)
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), number)
        return result

    setattr(owner, name, deadly)


def content(folder: Path) -> dict[str, Any]:
    """Returns the contents of all files of a finished run, without checkpoints, times and the path of the run."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and "checkpoint-" not in str(path)]
    return {
        str(path.relative_to(folder)): [untimed(row) for row in read_metrics(path)]
        if path.name == "metrics.jsonl"
        else path.read_bytes().replace(str(folder).encode(), b"FOLDER")
        for path in files
    }


def ended(act: Callable[[], None]) -> int:
    """Calls `act` in a forked process; returns the exit code of the process, which is negative if a signal killed
    it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            act()
            code = 0
        except Interrupted as stop:
            code = stop.exit_code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at(kind: str, place: str, points: list[list[Any]]) -> None:
    """Kills a run at each point with each signal and starts it again; prints both exit codes and the files that differ
    from those of an uninterrupted run."""
    run, known = (train, RLP_POINTS) if kind == "rlp" else (judge, EVAL_POINTS)
    models, told = Path(place), {}
    assert ended(lambda: run(models, models / "whole")) == 0
    whole = content(models / "whole")
    for point, number in points:
        folder = models / f"{point}-{number}".replace(" ", "-")

        def cut(point: str = point, number: int = number, folder: Path = folder) -> None:
            kill_in(known[point], number)
            run(models, folder)

        codes = [ended(cut)]
        if codes == [143]:
            assert not list(folder.rglob(".lock"))
        codes.append(ended(lambda folder=folder: run(models, folder)))
        left = content(folder)
        different = sorted(file for file in {*whole, *left} if whole.get(file) != left.get(file))
        told[f"{point} {number}"] = [*codes, different]
    print(json.dumps(told))  # noqa: T201


def outcomes(kind: str, place: Path, points: list[tuple[str, int]]) -> dict[str, list[Any]]:
    tiny.save_policy(place / "policy")
    tiny.save_policy(place / "other", seed=5)
    tiny.save_reward_model(place / "judge")
    program = f"from tests.test_kill_points import kill_at; kill_at({kind!r}, {str(place)!r}, {points!r})"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout.splitlines()[-1])


def expected(points: list[tuple[str, int]]) -> dict[str, list[Any]]:
    """Returns the expected outcome of each kill: [exit code, exit code of the repeated command, files that differ].
    SIGTERM ends `rlp` with code 143, after a trainer has saved its last step. SIGTERM to `eval`, and SIGKILL, kill the
    process."""
    return {
        f"{point} {number}": [143 if number == signal.SIGTERM and point in RLP_POINTS else -number, 0, []]
        for point, number in points
    }


def every(points: dict[str, tuple[Any, str, int]]) -> list[tuple[str, int]]:
    return [(point, int(number)) for point in points for number in (signal.SIGKILL, signal.SIGTERM)]


@pytest.mark.faults
def test_rlp_killed_in_any_stage_and_started_again_ends_with_the_same_files(tmp_path):
    points = every(RLP_POINTS)
    assert outcomes("rlp", tmp_path, points) == expected(points)


@pytest.mark.faults
def test_eval_killed_while_it_samples_judges_or_writes_and_started_again_ends_with_the_same_files(tmp_path):
    points = every(EVAL_POINTS)
    assert outcomes("eval", tmp_path, points) == expected(points)
    assert len(read_rows(tmp_path / "whole" / "samples.jsonl")) == 24
