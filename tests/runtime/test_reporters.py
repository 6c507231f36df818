"""Tests of experiment trackers, with stand-ins and, offline, with the real libraries, which `make test-extras`
installs."""

import glob
import struct
import sys
import warnings
from types import ModuleType

import pytest
import torch

from fastrlhf.runtime.metrics import MetricsWriter, read_metrics
from fastrlhf.runtime.reporters import REPORTERS, import_reporters, read_ids


class FakeRun:
    """A stand-in for a W&B run, whose logging fails from step `fails_at` on."""

    def __init__(self, fails_at=None):
        self.rows, self.exit_code, self.fails_at, self.id = [], None, fails_at, "abc123"

    def log(self, metrics, step):
        if self.fails_at is not None and step >= self.fails_at:
            raise ConnectionError("the network is down")
        self.rows.append((step, metrics))

    def finish(self, exit_code):
        self.exit_code = exit_code


class FakeWandB(ModuleType):
    """A stand-in for the wandb package: `init` returns `run` and records its arguments."""

    def __init__(self):
        super().__init__("wandb")
        self.run = FakeRun()
        self.arguments = {}

    def init(self, **arguments):
        self.arguments = arguments
        return self.run


@pytest.fixture
def wandb(monkeypatch):
    module = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


def test_an_unknown_reporter_is_an_error_that_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"'tensorbord'.*tensorboard, wandb, trackio, mlflow, swanlab, none, all"):
        MetricsWriter(tmp_path / "run", report_to=["tensorbord"])
    assert not (tmp_path / "run").exists()


def test_none_and_all_are_understood_as_in_transformers(monkeypatch):
    assert import_reporters(["none"]) == {}
    monkeypatch.setattr("fastrlhf.runtime.reporters.find_spec", lambda package: package == "wandb" or None)
    monkeypatch.setitem(sys.modules, "wandb", FakeWandB())
    assert list(import_reporters(["all"])) == ["wandb"]
    for names in (["none", "wandb"], ["tensorboard", "all"]):
        name = "none" if "none" in names else "all"
        with pytest.raises(
            ValueError, match=f"^report_to: '{name}' cannot be combined with others; got {', '.join(names)}$"
        ):
            import_reporters(names)


def test_a_missing_package_is_an_error_that_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        MetricsWriter(tmp_path / "run", report_to=["wandb"])
    assert not (tmp_path / "run").exists()


def test_wandb_receives_the_same_numbers_and_how_the_run_ended(tmp_path, wandb):
    with MetricsWriter(tmp_path / "run7", report_to=["wandb"], config={"beta": 0.1}) as writer:
        writer.log(3, {"loss": torch.tensor(0.5)})
    assert wandb.run.rows == [(3, {"loss": 0.5})]
    assert wandb.run.exit_code == 0
    assert wandb.arguments["project"] == "fastrlhf"
    assert (wandb.arguments["name"], wandb.arguments["config"]) == ("run7", {"beta": 0.1})


def test_wandb_learns_that_a_run_failed(tmp_path, wandb):
    with pytest.raises(ZeroDivisionError), MetricsWriter(tmp_path, report_to=["wandb"], run_name="mine"):
        _ = 1 / 0
    assert wandb.run.exit_code == 1
    assert wandb.arguments["name"] == "mine"


def test_a_failing_reporter_is_reported_once_and_dropped_and_the_file_continues(tmp_path, wandb):
    wandb.run = FakeRun(fails_at=2)
    with MetricsWriter(tmp_path, report_to=["wandb"]) as writer:
        writer.log(1, {"loss": 1.0})
        with pytest.warns(RuntimeWarning, match=r"wandb.*network is down"):
            writer.log(2, {"loss": 2.0})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            writer.log(3, {"loss": 3.0})
    assert wandb.run.rows == [(1, {"loss": 1.0})]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_row_is_in_the_file_before_a_reporter_may_block_on_it(tmp_path, wandb):
    seen = []
    wandb.run.log = lambda metrics, step: seen.append(read_metrics(tmp_path / "metrics.jsonl")[-1]["step"])
    with MetricsWriter(tmp_path, report_to=["wandb"]) as writer:
        writer.log(1, {"loss": 1.0})
        writer.log(2, {"loss": 2.0})
    assert seen == [1, 2]


def test_a_resumed_run_continues_under_its_id_and_sends_no_step_twice(tmp_path, wandb):
    with MetricsWriter(tmp_path, report_to=["wandb"]) as writer:
        for step in (1, 2, 3):
            writer.log(step, {"loss": float(step)})
    assert (wandb.arguments["id"], wandb.arguments["resume"]) == (None, None)
    with MetricsWriter(tmp_path, report_to=["wandb"], resumed_at=1) as writer:
        for step in (2, 3, 4):
            writer.log(step, {"loss": float(step)})
    assert (wandb.arguments["id"], wandb.arguments["resume"]) == ("abc123", "allow")
    assert [step for step, _ in wandb.run.rows] == [1, 2, 3, 4]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    with MetricsWriter(tmp_path, report_to=["wandb"], resumed_at=-1) as writer:
        writer.log(1, {"loss": 5.0})
    assert wandb.arguments["id"] is None
    assert wandb.run.rows[-1] == (1, {"loss": 5.0})


def test_a_service_that_cannot_start_is_one_line_and_changes_no_log(tmp_path, wandb, monkeypatch):
    def refuse(**arguments):
        raise PermissionError("no API key")

    monkeypatch.setattr(wandb, "init", refuse)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 0.0}\n')
    with pytest.raises(
        ValueError, match=r"^report_to: wandb cannot start: PermissionError\('no API key'\); fix it or leave wandb out$"
    ):
        MetricsWriter(tmp_path, report_to=["wandb"], resumed_at=-1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "time": 0.0}\n'


@pytest.mark.parametrize("text", ["{", '["a"]', '{"wandb": 1}'])
def test_a_damaged_file_of_ids_is_an_error_with_the_fix(tmp_path, wandb, text):
    (tmp_path / "reporters.json").write_text(text)
    with pytest.raises(ValueError, match=r"reporters\.json: .*; delete it, and the services start a new run$"):
        MetricsWriter(tmp_path, report_to=["wandb"], resumed_at=1)


def records(path: str) -> list[bytes]:
    """Reads the records of a W&B run file, which has a header of 7 bytes and then LevelDB's log format with blocks of
    32 KiB."""
    with open(path, "rb") as file:
        data = file.read()
    at, whole, found = 7, b"", []
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole record, or its last part
            found.append(whole)
            whole = b""
    return found


def of_tensorboard(folder, ids):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("eval/loss@2")]


def of_wandb(folder, ids):
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(glob.glob(str(folder / "wandb" / f"offline-run-*-{ids['wandb']}" / "*.wandb"))):
        for record in records(path):
            parsed = Record.FromString(record)
            values = {"".join(item.nested_key) or item.key: item.value_json for item in parsed.history.item}
            if values:
                found.append((int(values["_step"]), float(values["eval/loss@2"])))
    return found


def of_trackio(folder, ids):
    from trackio.sqlite_storage import SQLiteStorage

    return [(row["step"], row["eval/loss@2"]) for row in SQLiteStorage.get_logs("fastrlhf", ids["trackio"])]


def of_mlflow(folder, ids):
    from mlflow import MlflowClient

    run = MlflowClient().get_run(ids["mlflow"])
    assert (run.data.params["beta"], len(run.data.params), run.info.status) == ("0.1", 151, "FINISHED")
    return [(point.step, point.value) for point in MlflowClient().get_metric_history(ids["mlflow"], "eval/loss_2")]


def of_swanlab(folder, ids):
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    found = []
    for path in sorted((folder / "swanlab").glob(f"run-*-{ids['swanlab']}/*.swanlab")):
        reader = DataStoreReader()
        reader.open(path)
        for record in reader:
            scalar = Record.FromString(record).scalar
            found += [(scalar.step, scalar.value.number)] if scalar.key == "eval/loss@2" else []
    return found


SERVICES = {
    "tensorboard": of_tensorboard,
    "wandb": of_wandb,
    "trackio": of_trackio,
    "mlflow": of_mlflow,
    "swanlab": of_swanlab,
}


@pytest.mark.parametrize("name", REPORTERS)
def test_the_real_library_holds_every_step_once_in_one_run_also_after_a_resume(tmp_path, monkeypatch, name):
    pytest.importorskip(REPORTERS[name].package)
    monkeypatch.chdir(tmp_path)
    for variable in ("WANDB_MODE", "SWANLAB_MODE"):
        monkeypatch.setenv(variable, "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    config, folder, metric = (
        {"beta": 0.1} | {f"key_{i}": "x" * 7000 for i in range(150)},
        tmp_path / "run",
        "eval/loss@2",
    )
    with MetricsWriter(folder, report_to=[name], config=config) as writer:
        for step in (1, 2, 3):
            writer.log(step, {metric: step / 2})
    ids = read_ids(folder)
    with MetricsWriter(folder, report_to=[name], config={**config, "beta": 0.2}, resumed_at=1) as writer:
        for step in (2, 3, 4):
            writer.log(step, {metric: step / 2})
    assert read_ids(folder) == ids
    assert SERVICES[name](folder, ids) == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
