"""Escapes text for a terminal, because names of files and columns may hold characters that move the cursor or change
colours."""

from __future__ import annotations

import logging


def printable(line: str) -> str:
    r"""Escapes the control characters of one line: a newline becomes \n, an escape \x1b."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


class PrintableFormatter(logging.Formatter):
    """A formatter of log records that escapes the control characters of every line."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))
