"""Sends the metrics of a run to the services that `report_to` names: TensorBoard, W&B, trackio, MLflow and SwanLab.

Each service is called through its own library and takes server, project, key and mode (online or offline) from its
usual environment variables; the default project is "fastrlhf". `reporters.json` in the folder of a run keeps the id
that each service has given to the run. A resumed run reads it and continues the same run at every service.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from fastrlhf.runtime.atomic import write_file

PROJECT = "fastrlhf"
IDS = "reporters.json"
"""Name of the file in the folder of a run that stores the id of the run at each tracker."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """The data with which a service starts or continues a run."""

    folder: Path
    run_name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    id: str | None = None
    """The id of the run at this service if the run is resumed."""
    next_step: int | None = None
    """The first step that a resumed run will log."""


class Reporter(Protocol):
    """A service that receives the metrics in addition to the files."""

    id: str
    """Identifies the run at the service."""
    replaces: bool
    """Whether the service replaces the metrics of a step that it already has. If not, such steps are not sent again."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self, *, failed: bool) -> None: ...


class _TensorBoard:
    package, module, replaces = "tensorboard", "torch.utils.tensorboard", True

    def __init__(self, module: ModuleType, start: Start):
        self.id = "tensorboard"  # the name of its folder
        self._writer = module.SummaryWriter(str(start.folder / self.id), purge_step=start.next_step)
        self._writer.add_text("config", f"```\n{json.dumps(start.config, indent=2, default=str)}\n```")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class _WandB:
    package = module = "wandb"
    replaces = False

    def __init__(self, module: ModuleType, start: Start):
        self._run = module.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=start.run_name,
            config=dict(start.config),
            dir=str(start.folder),
            id=start.id,
            resume="allow" if start.id else None,
            allow_val_change=bool(start.id),
        )
        self.id = self._run.id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Trackio:
    package = module = "trackio"
    replaces = False

    def __init__(self, module: ModuleType, start: Start):
        self.id = start.id or start.run_name  # runs are continued by name
        self._run = module.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=self.id,
            config=dict(start.config),
            resume="allow" if start.id else "never",
            space_id=os.environ.get("TRACKIO_SPACE_ID"),
            embed=False,
        )
        self.id = self._run.name  # "never" gives a new name if the project already has this one

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish()


class _MLflow:
    package = module = "mlflow"
    replaces = False

    def __init__(self, module: ModuleType, start: Start):
        if not os.environ.get("MLFLOW_EXPERIMENT_ID"):
            module.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        self._mlflow = module
        run = module.start_run(run_id=start.id, run_name=None if start.id else start.run_name)
        self.id = run.info.run_id
        if not start.id:  # the parameters of an MLflow run cannot change
            parameters = [(key, str(value)[:6000]) for key, value in start.config.items()]
            for first in range(0, len(parameters), 100):  # the most that one request may hold
                module.log_params(dict(parameters[first : first + 100]))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        names = {re.sub(r"[^\w\-. :/]", "_", name): value for name, value in metrics.items()}
        self._mlflow.log_metrics(names, step=step, run_id=self.id)

    def close(self, *, failed: bool) -> None:
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


class _SwanLab:
    package = module = "swanlab"
    replaces = False

    def __init__(self, module: ModuleType, start: Start):
        self._run = module.init(
            project=os.environ.get("SWANLAB_PROJECT", PROJECT),
            name=start.run_name,
            config=dict(start.config),
            log_dir=os.environ.get("SWANLAB_LOG_DIR", str(start.folder / "swanlab")),
            id=start.id,
            resume="allow" if start.id else None,
        )
        self.id = self._run.id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(state="crashed" if failed else "success")


REPORTERS = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "trackio": _Trackio,
    "mlflow": _MLflow,
    "swanlab": _SwanLab,
}


def import_reporters(names: Sequence[str]) -> dict[str, ModuleType]:
    """Imports the modules of the named reporters; `none`: no module; `all`: every reporter whose package is installed.

    Raises ValueError if a reporter is unknown, if its package is not installed, and if `none` or `all` is given
    together with another name.
    """
    for name in ("none", "all"):
        if name in names and len(names) > 1:
            raise ValueError(f"report_to: {name!r} cannot be combined with others; got {', '.join(names)}")
    if "none" in names:
        return {}
    if "all" in names:
        names = [name for name, reporter in REPORTERS.items() if find_spec(reporter.package)]
    return {name: _import_reporter(name) for name in names}


def _import_reporter(name: str) -> ModuleType:
    if name not in REPORTERS:
        raise ValueError(f"report_to: unknown reporter {name!r}; known are {', '.join(REPORTERS)}, none, all")
    reporter = REPORTERS[name]
    try:
        return importlib.import_module(reporter.module)
    except ImportError as error:
        raise ValueError(
            f"report_to: {name!r} needs a package that cannot be imported ({error}); pip install {reporter.package}"
        ) from error


def start_reporters(
    modules: Mapping[str, ModuleType],
    folder: Path,
    run_name: str,
    config: Mapping[str, Any],
    next_step: int | None = None,
) -> dict[str, Reporter]:
    """Starts the run at every service, and writes the ids of the run to `reporters.json`. `next_step` is the first step
    that a resumed run will log; None: a new run. Raises ValueError, naming the service, if one cannot start."""
    ids = read_ids(folder) if next_step is not None else {}
    started: dict[str, Reporter] = {}
    for name, module in modules.items():
        start = Start(folder=folder, run_name=run_name, config=config, id=ids.get(name), next_step=next_step)
        try:
            started[name] = REPORTERS[name](module, start)
        except Exception as error:
            for other in started.values():
                with suppress(Exception):
                    other.close(failed=True)
            raise ValueError(f"report_to: {name} cannot start: {error!r}; fix it or leave {name} out") from error
    if started:
        write_file(folder / IDS, json.dumps(ids | {name: each.id for name, each in started.items()}) + "\n")
    return started


def read_ids(folder: Path) -> dict[str, str]:
    """Returns service -> id of the run in this folder. Raises ValueError if the file is damaged."""
    path = folder / IDS
    try:
        ids = json.loads(path.read_text("utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); delete it, and the services start a new run") from error
    if not isinstance(ids, dict) or not all(isinstance(value, str) for value in ids.values()):
        raise ValueError(f"{path}: expected a JSON object of texts; delete it, and the services start a new run")
    return ids
