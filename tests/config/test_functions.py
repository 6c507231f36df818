"""Tests of user-defined functions that are named by module or file, and of the errors if they cannot be loaded."""

import sys
from functools import partial

import pytest

from fastrlhf.config import PPOConfig
from fastrlhf.config.functions import function_hashes, load_function, object_hashes, user_frames

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


def test_modules_that_a_file_imports_are_hashed_too_and_installed_ones_are_not(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "helper_of_hashes.py").write_text("import json\nimport deeper_of_hashes\n")
    (tmp_path / "deeper_of_hashes.py").write_text("bonus = 1.0\n")
    file = tmp_path / "reward.py"
    file.write_text("import torch\nfrom helper_of_hashes import json\n\ndef mine(rollout):\n    return 1.0\n")
    config = PPOConfig(reward_functions=(f"{file}:mine",))
    load_function(config.reward_functions[0], "reward_functions")
    before, name = function_hashes(config), f"{file}:mine"
    assert [*before] == [name, f"helper_of_hashes of {name}", f"deeper_of_hashes of {name}"]
    (tmp_path / "deeper_of_hashes.py").write_text("bonus = 2.0\n")
    after = function_hashes(config)
    assert [key for key in before if before[key] != after[key]] == [f"deeper_of_hashes of {name}"]


class Scorer:
    def __call__(self, rollout):
        return 1.0


def test_functions_that_a_program_holds_are_hashed_by_their_source_and_those_without_one_are_named(caplog):
    caplog.set_level("INFO", "fastrlhf")
    hashes = object_hashes(
        {"a": test_modules_that_a_file_imports_are_hashed_too_and_installed_ones_are_not, "b": Scorer()}
    )
    assert [*hashes] == ["a", "b"]
    assert len({*hashes.values()}) == 2
    assert object_hashes({"a": partial(Scorer(), 1)}) == {"a": hashes["b"]}
    assert object_hashes({"c": len}) == {}
    assert "function c has no source: a resumed run cannot tell whether it has changed" in caplog.text


def test_an_error_in_the_file_of_a_function_is_described_by_its_own_calls_the_last_five(tmp_path):
    file = tmp_path / "deep.py"
    file.write_text("def fall(depth):\n    return fall(depth - 1) if depth else {}['w1']\n")
    fall = load_function(f"{file}:fall", "reward_functions")
    with pytest.raises(RuntimeError) as stop:  # noqa: PT012
        try:
            fall(9)
        except KeyError as error:
            raise RuntimeError("from ours") from error
    line = f"{file}, line 2, in fall: return fall(depth - 1) if depth else {{}}['w1']"
    assert user_frames(stop.value) == [line] * 5
    assert user_frames(ValueError("not theirs")) == []
    file.write_text("def fall(:\n")
    with pytest.raises(ValueError, match=r"^reward_functions: '.*deep.py' is not valid Python: line 1: "):
        load_function(f"{file}:fall", "reward_functions")
