from pathlib import Path

import pytest

from tests.tools import measure


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A tokenizer, rows and reward models that small runs are planned with."""
    path = tmp_path_factory.mktemp("plan")
    measure.make_inputs(path)
    return path
