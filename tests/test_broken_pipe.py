"""A reader of standard output that goes, in processes of their own: what is told is told at exit too."""

import os
import subprocess
import sys

import pytest

from fastrlhf.cli import quiet_when_unread

PRINT = "from fastrlhf.cli import quiet_when_unread as quiet\nwith quiet():\n    "


def unread(code: str, unbuffered: str = "") -> subprocess.CompletedProcess[str]:
    """What Python ends with whose standard output nobody reads any more; `unbuffered` is PYTHONUNBUFFERED."""
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
        "print('short')",  # which breaks no earlier than the flush
        "print('long' * 100_000)",
        "print('short'); raise SystemExit(1)",
    ],
)
def test_output_that_nobody_reads_ends_a_command_without_a_word(code, unbuffered):
    ended = unread(PRINT + code, unbuffered)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_the_command_line_does_so_too():
    ended = unread("import sys; from fastrlhf.cli import main; sys.exit(main(['plan', '--help']))")
    assert (ended.returncode, ended.stderr) == (141, "")


def test_a_broken_pipe_that_is_not_the_output_is_an_error_still():
    with pytest.raises(BrokenPipeError, match="of a worker"), quiet_when_unread():
        raise BrokenPipeError("of a worker")


def test_exit_codes_pass():
    with pytest.raises(SystemExit) as ended, quiet_when_unread():
        raise SystemExit(1)
    assert ended.value.code == 1
