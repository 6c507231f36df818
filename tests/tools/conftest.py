from pathlib import Path

import pytest

from tests.tools import measure


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A folder with the inputs of small planned runs: a tokenizer, rows and reward models."""
    path = tmp_path_factory.mktemp("plan")
    measure.make_inputs(path)
    return path
