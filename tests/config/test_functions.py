"""Tests of user-defined functions, given by module or file, and of the errors if they cannot be loaded."""

import sys

import pytest

from fastrlhf.config.functions import load_function

DATACLASS = """\
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Weights:
    scale: float = 2.0

def scaled(x):
    return Weights().scale * x
"""


def test_a_function_is_named_by_module_or_by_file(tmp_path, monkeypatch):
    (tmp_path / "halves.py").write_text("def half(x):\n    return x / 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("halves:half", f"{tmp_path}/halves.py:half", "~/halves.py:half"):
        assert load_function(name, "psi")(3) == 1.5


def test_a_file_may_hold_dataclasses_with_postponed_annotations(tmp_path):
    (tmp_path / "mine.py").write_text(DATACLASS)
    assert load_function(f"{tmp_path}/mine.py:scaled", "psi")(3) == 6


def test_files_of_the_same_name_in_two_folders_are_separate_modules(tmp_path):
    functions = []
    for value in (1, 2):
        (tmp_path / str(value)).mkdir()
        (tmp_path / str(value) / "mine.py").write_text(f"VALUE = {value}\ndef value():\n    return VALUE\n")
        functions.append(load_function(f"{tmp_path}/{value}/mine.py:value", "psi"))
    assert [function() for function in functions] == [1, 2]
    modules = [sys.modules[function.__module__] for function in functions]
    assert [module.VALUE for module in modules] == [1, 2]


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("import no_such_module\ndef f(x): ...\n", "No module named 'no_such_module'"),
        ("from math import no_such_name\ndef f(x): ...\n", "cannot import name 'no_such_name' from 'math'"),
    ],
)
def test_an_import_error_in_a_file_names_the_file(tmp_path, monkeypatch, text, missing):
    (tmp_path / "broken.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    for place in (f"{tmp_path}/broken.py", "broken"):
        with pytest.raises(ValueError, match=f"^reward_functions: '{place}' cannot be imported: {missing}"):
            load_function(f"{place}:f", "reward_functions")
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine.f", "'mine.f' must look like package.module:function or path/to/file.py:function"),
        ("math:", "'math:' must look like"),
        ("no_such_module:f", "'no_such_module' cannot be imported: No module named 'no_such_module'; install it"),
        ("no/such.py:f", "no file 'no/such.py'"),
        ("math:no_such_function", "'math' has no function 'no_such_function'"),
        ("math:pi", "'math' has no function 'pi'"),
    ],
)
def test_a_name_that_is_not_a_function_is_refused(name, message):
    with pytest.raises(ValueError, match=f"^psi: {message}"):
        load_function(name, "psi")
