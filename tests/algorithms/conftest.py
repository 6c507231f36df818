"""Fixtures for the tests of the trainers on pairs and groups: each fixture is the folder of a saved tiny policy."""

import pytest

from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return tiny.save_policy(tmp_path_factory.mktemp("other"), seed=3)
