"""Folders with a policy each, for the trainers on pairs and groups."""

import pytest

from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return tiny.save_policy(tmp_path_factory.mktemp("other"), seed=3)
