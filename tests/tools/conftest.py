from pathlib import Path

import pytest

from tests.tools import measure


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A folder with a tokenizer, rows and reward models, for which small runs are planned."""
    path = tmp_path_factory.mktemp("plan")
    measure.make_inputs(path)
    return path
