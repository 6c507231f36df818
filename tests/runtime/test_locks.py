"""Tests that two runs never write to one folder: on one host or two hosts, with and without kernel locks."""

import errno
import fcntl
import json
import os
import socket
import threading
import time

import pytest

from fastrlhf.runtime import locks
from fastrlhf.runtime.locks import LOCK, check_idle, locked


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.02)
    monkeypatch.setattr(locks, "WATCH", 0.3)


@pytest.fixture(params=["flock", errno.ENOSYS, errno.ENOLCK])
def file_system(request, monkeypatch):
    """Simulates a file system with kernel locks (flock), and two file systems on which flock fails with different
    errors."""
    if request.param != "flock":

        def refuse(descriptor, operation):
            raise OSError(request.param, os.strerror(request.param))

        monkeypatch.setattr(fcntl, "flock", refuse)
    return request.param


def test_the_lock_file_names_its_owner_is_refreshed_and_is_removed_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    threads = threading.active_count()
    with locked(tmp_path):
        first = json.loads((tmp_path / LOCK).read_text())
        assert first == {"host": socket.gethostname(), "pid": os.getpid(), "job": "4711", "beat": first["beat"]}
        end = time.monotonic() + 5
        while json.loads((tmp_path / LOCK).read_text())["beat"] < 2:
            assert time.monotonic() < end
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == threads


def test_a_folder_in_which_a_run_is_training_is_not_idle(tmp_path, file_system):
    check_idle(str(tmp_path))
    check_idle(str(tmp_path / "nowhere"))
    owner = f"process {os.getpid()} on {socket.gethostname()}"
    with locked(tmp_path):
        for ask in (lambda: check_idle(str(tmp_path)), locked(tmp_path).__enter__):
            with pytest.raises(ValueError, match=r"^output_dir: another run is training in .*; choose another") as stop:
                ask()
            assert owner in str(stop.value)
        assert (tmp_path / LOCK).exists()
    check_idle(str(tmp_path))


def test_a_live_run_of_another_host_keeps_this_one_out(tmp_path):
    """A kernel lock is visible only on its host. A live run on another host is recognised because its lock file
    changes."""
    beat = {"host": "node7", "pid": 12, "job": "99", "beat": 3}
    (tmp_path / LOCK).write_text(json.dumps(beat))
    timer = threading.Timer(0.1, lambda: (tmp_path / LOCK).write_text(json.dumps(beat | {"beat": 4})))
    timer.start()
    with pytest.raises(ValueError, match=r"another run is training in .* \(process 12 on node7, job 99\); choose"):
        check_idle(str(tmp_path))
    timer.join()
    assert json.loads((tmp_path / LOCK).read_text())["host"] == "node7"


@pytest.mark.parametrize("left", ['{"host": "node7", "pid": 12, "job": "", "beat": 3}', "", "[]"])
def test_the_lock_of_a_dead_run_is_taken_over(tmp_path, left, caplog):
    (tmp_path / LOCK).write_text(left)
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert "that run is dead; its lock file is deleted" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_after_a_kill_on_this_host_there_is_no_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "WATCH", 1000.0)
    (tmp_path / LOCK).write_text(json.dumps({"host": socket.gethostname(), "pid": 1, "job": "", "beat": 0}))
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_without_kernel_locks_there_is_a_warning(tmp_path, file_system, caplog):
    with locked(tmp_path):
        pass
    assert ("this file system has no locks" in caplog.text) == (file_system != "flock")


def test_of_two_runs_that_start_at_once_only_one_gets_the_lock(tmp_path, monkeypatch):
    """Both runs start before a lock file exists. Creating the file is atomic, so it fails for the second run."""
    monkeypatch.setattr(locks, "_clear_dead", lambda folder, has_locks: None)
    (tmp_path / LOCK).write_text(json.dumps({"host": "node7", "pid": 12, "job": "", "beat": 0}))
    with pytest.raises(ValueError, match="another run is training in"), locked(tmp_path):
        pytest.fail("let in")


def test_a_lock_that_another_run_has_taken_over_is_left_to_it(tmp_path):
    other = json.dumps({"host": "node7", "pid": 12, "job": "", "beat": 0})
    with locked(tmp_path):
        (tmp_path / LOCK).write_text(other)
        time.sleep(0.1)
    assert (tmp_path / LOCK).read_text() == other
