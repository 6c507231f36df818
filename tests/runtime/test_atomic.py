"""Tests that folders and files are written either completely or not at all."""

import errno
import os
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastrlhf.runtime import atomic
from fastrlhf.runtime.atomic import (
    MANIFEST,
    check_folder,
    check_writable,
    discard_folder,
    flush_tree,
    sweep_files,
    write_file,
    write_files,
    write_folder,
)
from fastrlhf.runtime.disk import DiskFull


def fill(folder: Path) -> None:
    (folder / "a.txt").write_text("alpha")
    (folder / "deep").mkdir()
    (folder / "deep" / "b.txt").write_text("beta")


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_written_folder_holds_its_files_and_a_manifest_that_they_match(tmp_path):
    write_folder(tmp_path / "x", fill)
    assert names(tmp_path) == {"x/a.txt", "x/deep/b.txt", f"x/{MANIFEST}"}
    check_folder(tmp_path / "x")


def test_a_folder_that_cannot_be_made_is_named_with_its_key(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path, why in (
        (tmp_path / "file", f"cannot be made: '{tmp_path / 'file'}' is a file"),
        (tmp_path / "file" / "a" / "b", f"cannot be made: '{tmp_path / 'file'}' is a file"),
        (tmp_path / "link" / "a", f"cannot be made: '{tmp_path / 'link'}' is a broken link"),
        (tmp_path / ("n" * 300), "cannot be written to: File name too long"),
        (Path("/proc/fastrlhf/run"), "cannot be written to: "),
    ):
        with pytest.raises(ValueError, match="^" + re.escape(f"output_dir: {str(path)!r} {why}")):
            check_writable(str(path), "output_dir")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_a_folder_that_can_be_made_is_not_made(tmp_path):
    check_writable(str(tmp_path / "a" / "b"), "output_dir")
    check_writable(str(tmp_path), "output_dir")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_that_name_is_replaced(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "old.txt").write_text("old")
    write_folder(tmp_path / "x", fill)
    assert names(tmp_path) == {"x/a.txt", "x/deep/b.txt", f"x/{MANIFEST}"}


def test_everything_is_on_the_disk_before_the_name_appears(tmp_path, monkeypatch):
    events, flush, rename = [], os.fsync, os.rename

    def flushed(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        flush(descriptor)

    def renamed(source, target):
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "rename", renamed)
    write_folder(tmp_path / "x", fill)
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert set(before) == {"a.txt", "b.txt", "deep", MANIFEST, ".x.partial"}
    assert after == [tmp_path.name]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_only_the_old_folder(tmp_path, failure):
    write_folder(tmp_path / "x", fill)

    def fails(folder):
        fill(folder)
        raise failure

    with pytest.raises(type(failure)) as error:
        write_folder(tmp_path / "x", fails)
    if isinstance(failure, OSError):
        assert str(error.value) == f"{str(tmp_path / 'x')!r} cannot be written: {failure}"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    check_folder(tmp_path / "x")


def test_a_file_that_another_host_has_written_elsewhere_is_an_error(tmp_path, monkeypatch):
    # answers of the other host: the names of the files that it sees, then their hashes
    others = iter([[["deep/c.txt"]], []])
    monkeypatch.setattr(atomic, "on_each", lambda call: [call(), *next(others)])
    with pytest.raises(
        OSError, match=r"x' cannot be written: c.txt, written by another .* choose an output_dir that all hosts share"
    ):
        write_folder(tmp_path / "x", fill)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "deep" / "b.txt").unlink(), r"^deep/b.txt is missing$"),
        (lambda folder: (folder / "a.txt").write_text("alph"), r"^a.txt has 4 bytes, but 5 were written$"),
        (
            lambda folder: (folder / "a.txt").write_text("alphb"),
            r"^a.txt has changed since it was written: its hash differs$",
        ),
        (lambda folder: (folder / MANIFEST).unlink(), r"^manifest.json is missing$"),
        (lambda folder: (folder / MANIFEST).write_text('{"files": {"a.txt": '), r"^manifest.json is damaged$"),
        (lambda folder: (folder / MANIFEST).write_text('{"files": {"a.txt": {"size": 5}}}'), r"^manifest.json is dam"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), r"^manifest.json is damaged$"),
    ],
)
def test_damaged_files_are_named(tmp_path, damage, message):
    write_folder(tmp_path / "x", fill)
    damage(tmp_path / "x")
    with pytest.raises(ValueError, match=message):
        check_folder(tmp_path / "x")


def test_files_that_are_not_needed_may_be_damaged_and_others_may_be_added(tmp_path):
    write_folder(tmp_path / "x", fill)
    (tmp_path / "x" / "notes.txt").write_text("mine")
    check_folder(tmp_path / "x")
    (tmp_path / "x" / "a.txt").unlink()
    check_folder(tmp_path / "x", lambda name: name.endswith("b.txt"))


def test_a_discarded_folder_is_renamed_before_its_files_are_deleted(tmp_path, monkeypatch):
    write_folder(tmp_path / "x", fill)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)  # simulates a kill before any file is deleted
        discard_folder(tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == [".x.discarded"]
    write_folder(tmp_path / "x", fill)
    discard_folder(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_flushing_a_tree_does_not_change_it(tmp_path):
    fill(tmp_path)
    flush_tree(tmp_path)
    assert names(tmp_path) == {"a.txt", "deep/b.txt"}


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "made" / "a.json"
    write_file(file, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: pytest.fail("the disk is full"))
        with pytest.raises(pytest.fail.Exception):
            write_file(file, "new")
    assert file.read_text() == "old"
    write_file(file, "new")
    assert [path.read_text() for path in file.parent.iterdir()] == ["new"]


def test_a_group_of_files_is_complete_or_can_be_cleaned_up(tmp_path, monkeypatch):
    """Kills `write_files` at each of its six file operations (three flushes and three renames)."""
    texts = {"a": "1", "b": "2", "mark": "3"}
    for at in range(6):
        folder, done = tmp_path / str(at), []

        def killed(*arguments, at=at, done=done, do=None):
            done.append(0)
            if len(done) > at:
                raise SystemExit
            return do(*arguments)

        with monkeypatch.context() as patch, pytest.raises(SystemExit):  # noqa: PT012
            patch.setattr(atomic, "sweep_files", lambda *arguments: None)  # no cleanup runs after SIGKILL
            for name in ("fsync", "replace"):
                patch.setattr(os, name, partial(killed, do=getattr(os, name)))
            write_files(folder, texts)
        assert not (folder / "mark").exists()
        sweep_files(folder, texts)
        assert list(folder.iterdir()) == []
        write_files(folder, texts)
        sweep_files(folder, texts)
        assert {path.name: path.read_text() for path in folder.iterdir()} == texts


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_get_the_permissions_of_the_umask(umask, mode, tmp_path):
    """safetensors makes its files readable for their owner only, regardless of the umask; the saved files must follow
    the umask."""
    before = os.umask(umask)
    try:
        write_folder(tmp_path / "x", lambda folder: save_file({"a": torch.zeros(2)}, folder / "a.safetensors"))
        assert atomic.current_umask() == umask
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "x").iterdir()} == {
        "a.safetensors": mode,
        "manifest.json": mode,
    }


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EIO])
def test_a_file_system_that_cannot_flush_folders_is_warned_of_and_used(number, tmp_path, monkeypatch, caplog):
    flush = os.fsync

    def refuse(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    atomic._warn_once.cache_clear()
    if number == errno.EIO:  # an I/O error means a failing disk, not a file system without flushing
        with pytest.raises(OSError, match="Input/output error"):
            write_folder(tmp_path / "x", fill)
        return
    write_folder(tmp_path / "x", fill)
    check_folder(tmp_path / "x")
    assert caplog.text.count("the file system cannot flush folders") == 1


def test_a_full_disk_raises_its_own_error(tmp_path):
    def fail(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskFull, match=r"x' cannot be written: \[Errno 28\] No space left on device"):
        write_folder(tmp_path / "x", fail)
    assert list(tmp_path.iterdir()) == []
