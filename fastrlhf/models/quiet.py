"""Keeps transformers and bitsandbytes from printing progress bars, tables of missing weights and advice while a model
is loaded or saved. The callers check for real problems themselves and raise errors."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import transformers
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

BITSANDBYTES = logging.getLogger("bitsandbytes")


@contextmanager
def quiet() -> Iterator[None]:
    """Context in which these libraries print only errors; afterwards their settings are restored."""
    settings = transformers.logging
    verbosity, bars, level = settings.get_verbosity(), settings.is_progress_bar_enabled(), BITSANDBYTES.level
    downloads = not are_progress_bars_disabled()
    settings.set_verbosity_error()
    settings.disable_progress_bar()
    BITSANDBYTES.setLevel(logging.ERROR)
    try:
        yield
    finally:
        settings.set_verbosity(verbosity)
        BITSANDBYTES.setLevel(level)
        if bars:
            settings.enable_progress_bar()
        (enable_progress_bars if downloads else disable_progress_bars)()
