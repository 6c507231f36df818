"""Tests of full disks: the run waits for space, the error names the missing bytes, and other errors are raised
unchanged."""

import errno
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from fastrlhf.runtime import disk
from fastrlhf.runtime.disk import DiskFull, check_room, is_full, size, with_room


@pytest.fixture
def usage(monkeypatch):
    """Replaces the disk sizes that the file system reports."""
    found = SimpleNamespace(total=10**12, free=5 * 2**30)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: found)
    return found


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(disk.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(disk.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return now


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (DiskFull("x"), True),
        (OSError(errno.EIO, "Input/output error"), False),
        (OSError(errno.EFBIG, "File too large"), False),
        (ValueError("28"), False),
    ],
)
def test_a_full_disk_is_distinguished_from_other_errors(error, full):
    assert is_full(error) == full


def test_too_little_room_names_folder_and_bytes(usage, tmp_path):
    check_room(tmp_path / "new" / "run", 5 * 2**30, "a checkpoint")
    told = rf"^a checkpoint needs 5\.01 GiB, but '{tmp_path}/new/run' has 5\.00 GiB free$"
    with pytest.raises(DiskFull, match=told):
        check_room(tmp_path / "new" / "run", int(5.01 * 2**30), "a checkpoint")
    usage.total = usage.free = 0  # some file systems report no sizes
    check_room(tmp_path, 10**15, "a checkpoint")


def test_sizes_are_in_gib_or_bytes():
    assert (size(3 * 2**29), size(740_000)) == ("1.50 GiB", "740,000 bytes")


def attempt(tmp_path, write, **settings):
    with_room(write, folder=tmp_path, needed=10, what="a checkpoint", **{"minutes": 1.0} | settings)


def test_a_write_that_finds_the_disk_full_is_repeated_until_there_is_room(clock, tmp_path, caplog):
    tried = []

    def write():
        tried.append(clock[0])
        if len(tried) < 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    attempt(tmp_path, write)
    assert tried == [0.0, 10.0, 20.0]
    assert caplog.text.count("waiting up to 1 minutes (disk_wait_minutes) for room") == 1


@pytest.mark.parametrize(("minutes", "times"), [(0, 1), (1.0, 7)])
def test_after_the_wait_the_error_says_what_to_do(minutes, times, clock, tmp_path):
    tried = []

    def write():
        tried.append(clock[0])
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskFull, match=r"No space left on device; free some space, then start the same command again$"):
        attempt(tmp_path, write, minutes=minutes)
    assert len(tried) == times


def test_deletable_files_are_deleted_before_any_wait(clock, tmp_path):
    old, tried = ["a", "b"], []

    def write():
        tried.append(len(old))
        if old:
            raise DiskFull("full")

    attempt(tmp_path, write, make_room=lambda: bool(old and old.pop()))
    assert tried == [2, 1, 0]
    assert clock == [0.0]


def test_another_error_is_raised_at_once(clock, tmp_path):
    with pytest.raises(PermissionError):
        attempt(tmp_path, lambda: (_ for _ in ()).throw(PermissionError(errno.EACCES, "denied")))
    assert clock == [0.0]
