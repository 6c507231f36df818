"""Tests of faults in a run and in its folder: each fault leads to a clear error or to a clean recovery."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fastrlhf.runtime.run import Run
from tests import tiny
from tests.resumable import Killed, Watch, run, save_models, untimed_log


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def whole(paths, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return untimed_log(folder, run("sft", paths, folder))


@pytest.fixture(scope="module")
def half_done(paths, tmp_path_factory):
    """The folder of a run that was killed after its fourth step; it has two checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "half"
    with pytest.MonkeyPatch.context() as patch:
        Watch("sft", patch).kill = (4, "after")
        with pytest.raises(Killed):
            run("sft", paths, folder)
    return folder


@pytest.fixture
def cut(half_done, tmp_path):
    return Path(shutil.copytree(half_done, tmp_path / "run"))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def flip_a_bit(file: Path) -> None:
    """Flips a bit in the middle of a file. In the manifest, whose middle is the hash of another file, flips a bit of
    the first byte."""
    content = bytearray(file.read_bytes())
    content[0 if file.name == "manifest.json" else len(content) // 2] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json", "manifest.json"]
)
def test_a_damaged_checkpoint_is_skipped_with_a_warning(file, damage, cut, paths, whole, caplog):
    damage(cut / "checkpoint-4" / file)
    result = run("sft", paths, cut)
    assert f"{cut / 'checkpoint-4'} is skipped: {file}" in caplog.text
    assert untimed_log(cut, result) == whole


def test_leftovers_of_a_killed_save_or_deletion_are_removed_by_the_next_run(cut, paths, whole):
    """The next run also removes leftovers of other steps, whose names no later save uses. Files of the user stay."""
    for name in (".checkpoint-1.discarded", ".checkpoint-3.partial/value_model"):
        (cut / name).mkdir(parents=True)
        (cut / name / "model.safetensors").write_bytes(b"0" * 100)
    (cut / ".notes.partial").mkdir()
    assert untimed_log(cut, run("sft", paths, cut)) == whole
    assert sorted(path.name for path in cut.glob(".*")) == [".notes.partial"]


def test_without_its_optimiser_a_run_resumes_only_on_request(cut, paths, whole):
    shutil.rmtree(cut / "checkpoint-2")
    (cut / "checkpoint-4" / "optimizer.safetensors").unlink()
    before = sorted(path.name for path in cut.rglob("*"))
    with pytest.raises(ValueError, match=r"no checkpoint in .* \(checkpoint-4: optimizer.safetensors is missing\)"):
        run("sft", paths, cut)
    assert sorted(path.name for path in cut.rglob("*")) == before
    result = run("sft", paths, cut, resume_weights_only=True)
    log, weights = untimed_log(cut, result)
    # Step 5 has the loss of the uninterrupted run. Adam's moments start at 0, so the weights after it differ.
    for name in ("loss", "learning_rate", "grad_norm"):
        assert [row[name] for row in log] == [row[name] for row in whole[0]]
    assert weights != whole[1]


def test_weights_that_are_damaged_are_never_resumed_from(cut, paths):
    for step in (2, 4):
        flip_a_bit(cut / f"checkpoint-{step}" / "model.safetensors")
    for weights_only in (False, True):
        with pytest.raises(ValueError, match=r"checkpoint-4: model.*; checkpoint-2: model.* its hash differs"):
            run("sft", paths, cut, resume_weights_only=weights_only)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.5}, r"another configuration \(learning_rate: 0.01 there, 0.5 here\)"),
        ({"resume_from_checkpoint": "never"}, "already holds a run; choose another folder"),
    ],
)
def test_another_configuration_is_refused_and_named(settings, message, cut, paths):
    with pytest.raises(ValueError, match=f"^output_dir: .*{message}"):
        run("sft", paths, cut, **settings)


def test_keys_that_change_no_number_may_change(cut, paths, whole):
    assert untimed_log(cut, run("sft", paths, cut, save_steps=1, run_name="again", micro_batch_tokens=4096)) == whole


def test_another_dataset_is_refused_and_its_split_named(cut, paths, monkeypatch):
    changed = tiny.examples(10)
    changed[7] = replace(changed[7], reference="w1")
    monkeypatch.setattr(tiny, "examples", lambda count, seed=0: changed[:count])
    with pytest.raises(ValueError, match=r"another dataset: train was 10 rows of hash \w+ and is 10 rows of hash"):
        run("sft", paths, cut)


def test_other_weights_to_start_from_are_refused(cut, paths, monkeypatch, tmp_path):
    shutil.copytree(paths["policy"], tmp_path / "kept")
    try:
        tiny.save_policy(Path(paths["policy"]), seed=9)
        with pytest.raises(ValueError, match="started from other weights"):
            run("sft", paths, cut)
    finally:
        shutil.copytree(tmp_path / "kept", paths["policy"], dirs_exist_ok=True)


@pytest.mark.parametrize("lost", [0, -1])
def test_a_log_that_lost_rows_is_not_continued(lost, cut, paths):
    rows = (cut / "metrics.jsonl").read_text().splitlines(keepends=True)
    del rows[lost]
    (cut / "metrics.jsonl").write_text("".join(rows))
    with pytest.raises(ValueError, match=r"metrics.jsonl' does not hold the steps 1 to 4"):
        run("sft", paths, cut)


def test_a_finished_run_is_not_trained_again(cut, paths):
    run("sft", paths, cut)
    before = {path: path.stat().st_mtime_ns for path in cut.rglob("*")}
    with pytest.raises(ValueError, match="already holds a run; choose another folder"):
        run("sft", paths, cut)
    assert {path: path.stat().st_mtime_ns for path in cut.rglob("*")} == before


def test_two_runs_never_share_a_folder(paths, tmp_path, whole, monkeypatch):
    log, refused = Run.log, []

    def intruding(first, step, metrics):
        log(first, step, metrics)
        if step == 3:
            monkeypatch.setattr(Run, "log", log)
            with pytest.raises(ValueError, match="another run is training in") as refusal:
                run("sft", paths, tmp_path / "run")
            refused.append(refusal)

    monkeypatch.setattr(Run, "log", intruding)
    assert untimed_log(tmp_path / "run", run("sft", paths, tmp_path / "run")) == whole
    assert len(refused) == 1


def test_on_a_full_disk_the_older_checkpoint_stays_and_nothing_else(paths, whole, tmp_path, monkeypatch):
    """Limits the size of a file to 60 kB from the fourth step on, like a quota, so that weights cannot be written."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    log, folder = Run.log, tmp_path / "run"

    def filling(run, step, metrics):
        if step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
        log(run, step, metrics)

    monkeypatch.setattr(Run, "log", filling)
    try:
        with pytest.raises(OSError, match=r"checkpoint-4' cannot be written: .*[Ff]ile too large"):
            run("sft", paths, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    written = {path.relative_to(folder).parts[0] for path in folder.rglob("*") if path.is_file()}
    assert written == {"checkpoint-2", "config.yaml", "metrics.jsonl", "samples.jsonl"}
    assert untimed_log(folder, run("sft", paths, folder)) == whole


@pytest.mark.slow
def test_killed_at_any_file_operation_and_restarted_a_run_ends_with_the_same_result(paths, tmp_path):
    """Uses real processes and SIGKILL: a child process that has loaded the libraries forks one process per kill
    point."""
    program = f"from tests.test_faults import kill_everywhere; kill_everywhere({paths!r}, {str(tmp_path)!r})"
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'kernels'}", "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )
    assert child.returncode == 0, child.stderr[-3000:]
    told = json.loads(child.stdout.splitlines()[-1])
    assert told["points"] > 11
    assert told["killed"] == told["points"]
    assert told["resumed"] > 3
    assert told["different"] == []


def kill_everywhere(paths: dict[str, str], place: str, num_points: int = 11) -> None:
    """Kills one run at each of `num_points` file operations, spread over the whole run, and restarts it; prints the
    outcomes."""
    settings = {"max_steps": 3, "save_steps": 1, "save_total_limit": 1, "eval_steps": 0, "device": "cpu"}

    def child(name: str, kill_at: int = -1) -> tuple[bool, int]:
        """Trains in a child process; returns whether it was killed, and the number of its file operations."""
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            count = 0

            def operation(event: str, arguments: tuple = ()) -> None:
                nonlocal count
                known = event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "fsync")
                if known and (event == "fsync" or f"/{name}" in str(arguments[0])):
                    count += 1
                    if count == kill_at:
                        os.kill(os.getpid(), signal.SIGKILL)

            os.fsync = lambda descriptor: operation("fsync")  # no real fsync, because the kernel's data survive a kill
            sys.addaudithook(operation)
            try:
                run("sft", paths, Path(place, name), **settings)
            except BaseException as error:
                print(name, kill_at, repr(error), file=sys.stderr)  # noqa: T201
                os._exit(1)
            os.write(writing, str(count).encode())
            os._exit(0)
        os.close(writing)
        _, status = os.waitpid(pid, 0)
        said = os.read(reading, 20)
        os.close(reading)
        return os.WIFSIGNALED(status), int(said or 0)

    _, total = child("whole")
    expected = untimed_log(Path(place, "whole"))
    told = {"points": 0, "killed": 0, "resumed": 0, "different": []}
    last = {total - i for i in (1, 3, 5, 7)}  # the files of the final model are being moved at these points
    for kill_at in sorted({1 + i * total // num_points for i in range(num_points)} | last):
        name = f"run{kill_at}"
        told["points"] += 1
        told["killed"] += child(name, kill_at)[0]
        if not (Path(place, name) / "config.json").exists():
            told["resumed"] += bool(list(Path(place, name).glob("checkpoint-*")))
            child(name)
        folder = Path(place, name)
        if not (folder / "config.json").exists() or untimed_log(folder) != expected:
            told["different"].append([kill_at, sorted(path.name for path in folder.glob("*"))])
    print(json.dumps(told | {"total": total}))  # noqa: T201
