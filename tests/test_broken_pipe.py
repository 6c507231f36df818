"""Tests of writing to a pipe that its reader has closed, including errors at exit, in separate processes."""

import os
import subprocess
import sys

import pytest

from fastrlhf.cli import quiet_when_unread

PRINT = "from fastrlhf.cli import quiet_when_unread as quiet\nwith quiet():\n    "


def unread(code: str, unbuffered: str = "") -> subprocess.CompletedProcess[str]:
    """Runs `code` in a Python process whose standard output is a pipe without a reader. `unbuffered` is the value of
    PYTHONUNBUFFERED."""
    read, write = os.pipe()
    os.close(read)
    try:
        return subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(write)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "code",
    [
        "print('short')",  # short output is buffered, so the error comes at the flush
        "print('long' * 100_000)",
        "print('short'); raise SystemExit(1)",
    ],
)
def test_a_closed_output_ends_a_command_silently(code, unbuffered):
    ended = unread(PRINT + code, unbuffered)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_a_closed_output_ends_the_command_line_silently():
    ended = unread("import sys; from fastrlhf.cli import main; sys.exit(main(['plan', '--help']))")
    assert (ended.returncode, ended.stderr) == (141, "")


def test_a_broken_pipe_other_than_standard_output_is_an_error():
    with pytest.raises(BrokenPipeError, match="of a worker"), quiet_when_unread():
        raise BrokenPipeError("of a worker")


def test_exit_codes_are_kept():
    with pytest.raises(SystemExit) as ended, quiet_when_unread():
        raise SystemExit(1)
    assert ended.value.code == 1
