"""Tests of runs on a full disk: they wait for space and lose no step and no row of the log."""

import errno
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastrlhf.algorithms.sft import train_sft
from fastrlhf.config import SFTConfig
from fastrlhf.models.loading import load_policy
from fastrlhf.runtime import disk
from fastrlhf.runtime.metrics import read_metrics
from fastrlhf.runtime.run import Run
from tests import resumable, tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_policy(tmp_path_factory.mktemp("policy"))


def config(model, folder: Path | str, **settings):
    fields = {"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-3, "progress": False}
    return SFTConfig(model_name_or_path=model, output_dir=str(folder), **fields | settings)


def raiser(error):
    def fail(*arguments, **keywords):
        raise error

    return fail


def test_the_model_is_saved_if_the_log_cannot_be_written(model, tmp_path, monkeypatch, caplog):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("fastrlhf.runtime.metrics._Lines._write", raiser(full))
    with pytest.warns(RuntimeWarning, match=r"metrics.jsonl: a row cannot be written .* kept and written later"):
        result = train_sft(config(model, tmp_path / "run"), tiny.examples(8))
    assert len(result.history) == 3
    assert f"{tmp_path / 'run' / 'metrics.jsonl'} cannot be written: No space left on device" in caplog.text
    assert "the last rows of the log are missing; the model is saved all the same" in caplog.text
    left = load_policy(str(tmp_path / "run")).state_dict()
    assert all(torch.equal(left[name], value) for name, value in result.model.state_dict().items())


def test_if_the_log_cannot_be_written_checkpoints_are_saved_and_hold_its_rows(model, tmp_path):
    """From step 2 on no row of the log can be written. The run is killed after step 4; the checkpoint of this step
    contains the rows."""
    train_sft(config(model, tmp_path / "whole", max_steps=5), tiny.examples(8))
    lines, log = "fastrlhf.runtime.metrics._Lines._write", Run.log

    def filling(run, step, *arguments, **keywords):
        if step == 2:
            patch.setattr(lines, raiser(OSError(errno.ENOSPC, "No space left on device")))
        log(run, step, *arguments, **keywords)
        if step == 4:
            raise resumable.Killed

    patch = pytest.MonkeyPatch()
    patch.setattr(Run, "log", filling)
    with pytest.warns(RuntimeWarning, match="it is kept"), pytest.raises(resumable.Killed):
        train_sft(config(model, tmp_path / "cut", max_steps=5, save_steps=4), tiny.examples(8))
    patch.undo()
    assert [row["step"] for row in read_metrics(tmp_path / "cut" / "metrics.jsonl")] == [1]
    train_sft(config(model, tmp_path / "cut", max_steps=5, save_steps=4), tiny.examples(8))
    assert resumable.untimed_log(tmp_path / "cut") == resumable.untimed_log(tmp_path / "whole")


@pytest.fixture
def small_disk(tmp_path):
    """The folder of a file system of 3 MB. Skips the test if this process may not mount file systems."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)]
    if not mount or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs permission to mount a tmpfs")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_run_waits_for_space_and_loses_no_step(model, small_disk, tmp_path, monkeypatch, caplog):
    """Uses a real file system: a file fills it before the checkpoint of step 2 and is deleted at the second check."""
    train_sft(config(model, tmp_path / "whole"), tiny.examples(8))
    ballast, log, looks = small_disk / "ballast", Run.log, []

    def filling(run, step, *arguments, **keywords):
        if step == 2:
            free = shutil.disk_usage(small_disk).free
            ballast.write_bytes(bytes(free - 50_000))
        log(run, step, *arguments, **keywords)

    def sleep(seconds):
        looks.append(sorted(path.name for path in (small_disk / "run").glob("*checkpoint*")))
        if len(looks) == 2:
            ballast.unlink()

    monkeypatch.setattr(Run, "log", filling)
    monkeypatch.setattr(disk.time, "sleep", sleep)
    train_sft(config(model, small_disk / "run", save_steps=1, save_total_limit=1), tiny.examples(8))
    assert looks == [["checkpoint-1"]] * 2
    assert "waiting up to 10 minutes (disk_wait_minutes) for room" in caplog.text
    assert resumable.untimed_log(small_disk / "run") == resumable.untimed_log(tmp_path / "whole")


def test_a_run_is_refused_if_the_disk_has_no_room_for_model_and_checkpoint(model, tmp_path, monkeypatch):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, free=200_000))
    with pytest.raises(OSError, match=r"^output_dir: the model with one checkpoint needs [\d,]+ bytes, but .* 200,000"):
        train_sft(config(model, tmp_path / "run"), tiny.examples(8))
    assert {path.name for path in (tmp_path / "run").iterdir()} == set()


def test_on_a_full_disk_the_oldest_checkpoint_is_deleted_before_the_run_waits(model, tmp_path, monkeypatch, caplog):
    """The disk is full until the third check. checkpoint-1, which save_total_limit would delete, is deleted first."""
    free, looks = [10**9], []

    def usage(path):
        return SimpleNamespace(total=10**9, free=free[0])

    def sleep(seconds):
        looks.append({path.name for path in (tmp_path / "cut").glob("checkpoint-*")})
        free[0] = 10**9 if len(looks) == 2 else 1000

    def filling(run, step, *arguments, **keywords):
        free[0] = 1000 if step == 4 else 10**9
        log(run, step, *arguments, **keywords)

    log = Run.log
    monkeypatch.setattr(Run, "log", filling)
    monkeypatch.setattr(disk.shutil, "disk_usage", usage)
    monkeypatch.setattr(disk.time, "sleep", sleep)
    settings = {"max_steps": 5, "save_steps": 1, "save_total_limit": 3}
    train_sft(config(model, tmp_path / "cut", **settings), tiny.examples(8))
    assert looks == [{"checkpoint-2", "checkpoint-3"}] * 2
    assert "checkpoint-1 is deleted to make room (save_total_limit 3)" in caplog.text
    assert "checkpoint-4 needs" in caplog.text
    assert "waiting up to 10 minutes (disk_wait_minutes) for room" in caplog.text
    assert {path.name for path in (tmp_path / "cut").glob("checkpoint-*")} == {f"checkpoint-{i}" for i in (2, 3, 4)}
