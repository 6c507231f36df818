"""What a checkpoint holds of a log that does not have all of its rows yet."""

from __future__ import annotations

from typing import Any

Row = tuple[int, dict[str, float], str, list[dict[str, Any]]]
"""Step, metrics, the name of the metric that the progress shows, samples: the arguments of `Run.log`."""


class Unlogged:
    """The rows that are missing in the files of a log, as a part of the run: empty most of the time."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        """The row of the step that is being evaluated, which is logged with the evaluation; none or one."""
        self.unwritten: dict[str, str] = {}
        """Lines that could not be written, by the name of their file."""

    def state_dict(self) -> dict[str, Any]:
        state = {"rows": self.rows, "unwritten": self.unwritten}
        return {key: value for key, value in state.items() if value}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self.rows = [(*row,) for row in state.get("rows", ())]
        self.unwritten = dict(state.get("unwritten", {}))
