"""What a command lets through to the terminal."""

from __future__ import annotations

import logging
import os
import sys


def quiet_libraries() -> None:
    """Their progress bars and advice would hide ours; errors still show. Of several processes the first one speaks."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.basicConfig(format="%(message)s")
    first = os.environ.get("RANK", "0") == "0"
    logging.getLogger("fastrlhf").setLevel(logging.INFO if first else logging.ERROR)
    if not first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for good)
