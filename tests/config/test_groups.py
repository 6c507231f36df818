"""Tests of the sections into which --help groups the keys."""

from collections import Counter
from itertools import chain

from fastrlhf.config import CONFIGS
from fastrlhf.config.groups import GROUPS
from fastrlhf.config.help import keys_of


def test_every_key_belongs_to_exactly_one_group():
    """If this test fails for a new key, add the key to a group in config/groups.py."""
    grouped = Counter(chain.from_iterable(GROUPS.values()))
    keys = {name for kind in CONFIGS.values() for name in keys_of(kind)}
    assert keys - {*grouped} == set()
    assert {*grouped} - keys == set()
    assert max(grouped.values()) == 1
