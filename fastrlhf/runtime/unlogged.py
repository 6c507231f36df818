"""Keeps the rows that are not in the log files yet, so that a checkpoint can store them."""

from __future__ import annotations

from typing import Any

Row = tuple[int, dict[str, float], str, list[dict[str, Any]]]
"""(step, metrics, name of the metric that the progress shows, samples): the arguments of `Run.log`."""


class Unlogged:
    """The rows that are not in the log files yet, as a part of a run with a state. Usually there are none."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        """The row of the step that is being evaluated, which is logged after the evaluation; at most one row."""
        self.unwritten: dict[str, str] = {}
        """File name -> lines that could not be written."""

    def state_dict(self) -> dict[str, Any]:
        state = {"rows": self.rows, "unwritten": self.unwritten}
        return {key: value for key, value in state.items() if value}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self.rows = [(*row,) for row in state.get("rows", ())]
        self.unwritten = dict(state.get("unwritten", {}))
