"""Tests the types that a type checker finds in an installed fastrlhf: checks three user programs against the wheel and
an editable install. The environments contain only fastrlhf, so that checks are fast; in them the types of torch and
transformers are unknown.
"""

import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

import fastrlhf

ROOT = Path(__file__).parent.parent

SETTINGS = """\
from fastrlhf import DPOConfig, PPOConfig, SFTConfig

sft = SFTConfig(model_name_or_path="a", learning_rate=1e-6, lr_scheduler_type="cosine")
dpo = DPOConfig(model_name_or_path="a", loss_type=("sigmoid", "sft"), loss_weights=(1.0, 0.1))
reveal_type(sft.learning_rate)
reveal_type(sft.report_to)
reveal_type(dpo.losses)
reveal_type(PPOConfig().cliprange_high)
"""

TRAINING = """\
import fastrlhf
from fastrlhf import Example, SFTConfig, load_examples, train_ppo, train_sft
from fastrlhf_kernels import Sum

loaded = load_examples("rows.jsonl", needs=("prompt", "reference"))
reveal_type(loaded.examples)
result = train_sft(SFTConfig(), loaded.examples, [Example(prompt="a", reference="b", row=0)])
reveal_type(result)
reveal_type(result.final)
reveal_type(train_ppo(fastrlhf.DRPOConfig()).output_dir)
reveal_type(Sum(1.0))
"""

MISTAKES = """\
from fastrlhf import PPOConfig, SFTConfig, train_sft

PPOConfig(learning_rat=1e-6)
SFTConfig(lr_scheduler_type="cosin")
train_sft(PPOConfig())
"""

REVEALED = {
    "settings.py": ["float", "tuple[str, ...]", "tuple[str, ...]", "float | None"],
    "training.py": ["list[Example]", "TrainResult", "dict[str, float]", "Path | None", "Sum"],
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    for name, text in (("settings.py", SETTINGS), ("training.py", TRAINING), ("mistakes.py", MISTAKES)):
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=["standard", "editable"])
def python(request, tmp_path_factory) -> str:
    """The interpreter of an environment into which the wheel, or the wheel of an editable install, was unpacked."""
    folder = tmp_path_factory.mktemp(request.param)
    [wheel] = WheelBuilder(str(ROOT)).build(directory=str(folder / "dist"), versions=[request.param])
    venv.EnvBuilder(symlinks=True).create(folder)
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    zipfile.ZipFile(wheel).extractall(packages)
    return str(folder / "bin" / "python")


def run(*command: str, cwd: Path) -> str:
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=300).stdout


def test_pyright_sees_real_types_and_the_three_mistakes(python, programs):
    told = run(sys.executable, "-m", "pyright", "--pythonpath", python, ".", cwd=programs)
    for name, expected in REVEALED.items():
        assert re.findall(rf'{name}:\d+:\d+ - information: Type of ".*" is "(.*)"', told) == expected
    assert [int(line) for line in re.findall(r"mistakes\.py:(\d+):\d+ - error", told)] == [3, 4, 5]
    assert 'No parameter named "learning_rat"' in told
    assert "3 errors, 0 warnings" in told


def test_mypy_sees_real_types_and_the_three_mistakes(python, programs, tmp_path):
    told = run(
        *(sys.executable, "-m", "mypy", "--python-executable", python, "--cache-dir", str(tmp_path), "."), cwd=programs
    )
    for name, expected in REVEALED.items():
        revealed = re.findall(rf'{name}:\d+: note: Revealed type is "(.*)"', told)
        plain = [re.sub(r"builtins\.|pathlib\.|fastrlhf[\w.]*\.", "", text) for text in revealed]
        assert plain == expected
    assert [int(line) for line in re.findall(r"mistakes\.py:(\d+): error", told)] == [3, 4, 5]
    assert "Found 3 errors in 1 file" in told


def test_only_the_two_packages_become_importable(python, tmp_path):
    names = ["fastrlhf", "fastrlhf_kernels", "bench", "tests", "kernels"]
    program = f"from importlib.util import find_spec; print([bool(find_spec(name)) for name in {names}])"
    assert run(python, "-c", program, cwd=tmp_path) == "[True, True, False, False, False]\n"


def test_public_names_are_exported_typed_and_listed():
    assert sorted(fastrlhf.__all__) == sorted(fastrlhf._EXPORTS)
    assert {*dir(fastrlhf)} == {*fastrlhf.__all__, "__version__"}
    names: dict[str, object] = {}
    exec("from fastrlhf import *", names)
    assert {*fastrlhf.__all__} <= {*names}
    assert fastrlhf.train_on_policy is fastrlhf.train_ppo
