"""Runs every example on a tiny model: YAML files with the command line, scripts by their `main`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import yaml

from fastrlhf.cli import main
from fastrlhf.runtime.metrics import read_metrics
from tests import tiny

EXAMPLES = Path(__file__).parent.parent / "examples"
COMMANDS = {"ipo": "dpo"}  # example -> command, if the names differ
METHODS = ("sft", "reward", "dpo", "ipo", "kto", "ppo", "grpo", "drpo", "rto", "rlp")
ON_POLICY = ("ppo", "grpo", "drpo", "rto")
SHORT = {"max_length": 96, "micro_batch_tokens": 2048}  # the tiny model has 128 positions
EXPECTED = {"dpo": "first loss 0.6931", "kto": "first loss 0.5000", "rlp": "runs/rlp/round-1/policy"}
FEW = {"response_length": 6, "num_ppo_epochs": 1, "max_steps": 1}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saves a policy, a reward model, and a second policy that is used as the DPO model."""
    folder = tmp_path_factory.mktemp("models")
    tiny.save_policy(folder / "sft")
    tiny.save_reward_model(folder / "reward")
    tiny.save_policy(folder / "dpo", seed=1)
    return folder


@pytest.fixture
def here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with `examples` and, in `models`, the models from which the examples of later methods
    start."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "examples").symlink_to(EXAMPLES)
    (tmp_path / "models").symlink_to(models)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings_for(method: str) -> dict[str, object]:
    return {"progress": False, **SHORT, **(FEW if method in ON_POLICY else {"max_steps": 2})}


def models_for(method: str) -> dict[str, str]:
    names = {"model_name_or_path": "models/sft"}
    names |= {"reward_model_path": "models/reward"} if method in ("ppo", "drpo", "rto") else {}
    return names | ({"dpo_model_path": "models/dpo"} if method == "rto" else {})


def as_flags(settings: dict[str, object]) -> list[str]:
    return [part for key, value in settings.items() for part in (f"--{key}", str(value))]


@pytest.mark.parametrize("method", [method for method in METHODS if method != "rlp"])
def test_a_file_runs(here: Path, method: str):
    flags = as_flags(models_for(method) | settings_for(method))
    command = COMMANDS.get(method, method)
    assert main([command, "--config", f"examples/{method}.yaml", *flags]) == 0
    rows = read_metrics(here / "runs" / method / "metrics.jsonl")
    assert len(rows) == settings_for(method)["max_steps"]
    assert any(name.startswith("eval_") for name in rows[-1])


def test_the_file_of_rlp_runs(here: Path):
    sections = yaml.safe_load((EXAMPLES / "rlp.yaml").read_text())
    sections["rlp"] |= {"num_answers": 3, "min_confidence": 0.0}
    sections["reward"] |= {"model_name_or_path": "models/sft", "progress": False, **SHORT, "max_steps": 1}
    sections["ppo"] |= {"model_name_or_path": "models/sft", "progress": False, **SHORT, **FEW}
    Path("rlp.yaml").write_text(yaml.safe_dump(sections))
    assert main(["rlp", "--config", "rlp.yaml"]) == 0
    assert (here / "runs/rlp/round-1/report.json").exists()


def test_the_file_of_eval_runs(here: Path, capsys: pytest.CaptureFixture[str]):
    flags = ["--models", "models/sft", "models/dpo", "--reward_model_path", "models/reward", "--response_length", "6"]
    assert main(["eval", "--config", "examples/eval.yaml", *flags, "--max_length", "96"]) == 0
    assert "models/dpo" in capsys.readouterr().out


@pytest.mark.parametrize("method", METHODS)
def test_a_script_runs(here: Path, method: str, capsys: pytest.CaptureFixture[str]):
    spec = importlib.util.spec_from_file_location(f"example_{method}", EXAMPLES / f"{method}.py")
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    settings = settings_for("ppo" if method == "rlp" else method)
    if method in ("dpo", "ipo"):
        del settings["max_steps"]  # the script sets it
    script.main(*models_for(method).values(), **settings)
    assert EXPECTED.get(method, "") in capsys.readouterr().out
    assert (here / "runs" / method).is_dir()


def test_every_method_has_a_file_and_a_script_of_readable_length():
    for suffix in ("yaml", "py"):
        named = {path.stem for path in EXAMPLES.glob(f"*.{suffix}")}
        assert named - {"eval", "rewards"} == set(METHODS)
    for method in METHODS:
        lines = [line for line in (EXAMPLES / f"{method}.py").read_text().splitlines() if line.strip()]
        assert len(lines) <= 25
