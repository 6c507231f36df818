"""Checks examples/docker/Dockerfile: versions are pinned, extras exist, and the copied files suffice for an install."""

from __future__ import annotations

import re
import shutil
import tomllib
import zipfile
from pathlib import Path

from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parent.parent
FILE = ROOT / "examples" / "docker" / "Dockerfile"
INSTRUCTIONS = ("FROM", "RUN", "ENV", "ARG", "WORKDIR", "COPY", "ENTRYPOINT", "CMD")


def instructions() -> list[tuple[str, str]]:
    """Returns (instruction, arguments) of every line that is neither blank nor a comment."""
    lines = [line for line in FILE.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]


def all_of(name: str) -> list[str]:
    return [rest for found, rest in instructions() if found == name]


def test_every_line_is_an_instruction_and_the_base_image_is_pinned():
    assert {name for name, _ in instructions()} == {*INSTRUCTIONS}
    [base] = all_of("FROM")
    [python] = re.findall(r"^python:(3\.\d+)\.\d+-slim-\w+$", base)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == ">=3.11"
    assert python == "3.12"
    assert all_of("ENTRYPOINT") == ['["fastrlhf"]']
    assert "fastrlhf" in project["scripts"]


def test_torch_is_the_tested_version_and_the_extras_exist():
    [makefile] = re.findall(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    arguments = dict(argument.split("=", 1) for argument in all_of("ARG"))
    assert arguments["TORCH"] == makefile
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "train" in arguments["EXTRAS"].split(",")
    assert {*arguments["EXTRAS"].split(",")} <= {*project["optional-dependencies"]}
    assert [run for run in all_of("RUN") if "pip" in run] == ['pip install "$TORCH"', 'pip install ".[$EXTRAS]"']


def test_the_copied_files_suffice_to_install_both_packages(tmp_path):
    for copied in all_of("COPY"):
        *sources, target = copied.split()
        for source in sources:
            place = tmp_path / target / source if target == "./" else tmp_path / target
            (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, place)
    wheel = next(WheelBuilder(str(tmp_path)).build(directory=str(tmp_path / "dist"), versions=["standard"]))
    with zipfile.ZipFile(wheel) as archive:
        names = {*archive.namelist()}
    assert {"fastrlhf/cli.py", "fastrlhf/recipes/dpo_hh.yaml", "fastrlhf_kernels/linear_logprob.py"} <= names
