"""Tests with real processes of a vLLM engine, with a stand-in for the library (stand_in/vllm.py)."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from fastrlhf.algorithms import roles
from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.config import PPOConfig
from fastrlhf.rollout.vllm import open_vllm
from fastrlhf.rollout.vllm_child import Child
from fastrlhf.rollout.vllm_memory import SharedMemory
from tests import tiny

STAND_IN = Path(__file__).parent / "stand_in"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is shared through memfd")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.syspath_prepend(STAND_IN)


def test_if_the_process_is_killed_a_checkpoint_is_saved_and_the_trainer_is_unchanged(tmp_path, monkeypatch):
    """Two updates have correct log-probs before and after the weights change. The vLLM process is killed in the third
    update."""
    opened = []

    def opening(*arguments):
        opened.append(open_vllm(*arguments))
        return opened[0]

    def judge(rollouts):
        judge.calls += 1
        if judge.calls == 2:
            os.kill(opened[0].children[0].pid, signal.SIGKILL)
        return torch.tensor([float(len(rollout.completion)) for rollout in rollouts])

    judge.calls = 0
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(roles, "open_vllm", opening)
    config = PPOConfig(
        model_name_or_path=tiny.save_policy(tmp_path / "sft"),
        output_dir=str(tmp_path / "run"),
        engine="vllm",
        advantage_estimator="rloo",
        num_generations=4,
        per_device_train_batch_size=8,
        max_steps=3,
        response_length=6,
        max_length=32,
        temperature=0.8,
        learning_rate=1e-2,
        save_steps=0,
        progress=False,
    )
    threads, environment, generator = torch.get_num_threads(), dict(os.environ), torch.get_rng_state()
    death = r"^engine: the vLLM process \d+ was killed by SIGKILL \(the kernel does so when memory is short\); its own"
    with pytest.raises(ValueError, match=death) as told:
        train_ppo(config, tiny.examples(20), judge=judge)
    [note] = told.value.__notes__
    assert note == f"saved as {tmp_path / 'run' / 'checkpoint-2'}; the same command continues"
    assert (tmp_path / "run" / "checkpoint-2").is_dir()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-5 for row in rows)
    assert rows[1]["objective/kl"] > 0.01
    assert not list((tmp_path / "tmp").iterdir())
    assert not any(name.split(".")[0] == "vllm" for name in sys.modules)
    assert (torch.get_num_threads(), dict(os.environ)) == (threads, environment)
    assert torch.equal(torch.get_rng_state(), generator)
    assert not torch.distributed.is_initialized()


def child(behaviour: str) -> Child:
    memory = SharedMemory.create()
    return Child(memory.descriptor, {"STAND_IN": behaviour})


SETTINGS = {
    "model": "nowhere",
    "dtype": "float32",
    "max_model_len": 8,
    "max_num_seqs": 1,
    "gpu_memory_utilization": 0.1,
    "enable_sleep_mode": False,
    "trust_remote_code": False,
    "seed": 0,
    "enable_chunked_prefill": False,
}


def test_an_error_in_the_process_is_one_line_with_its_traceback_as_the_cause():
    process = child("fails")
    with pytest.raises(ValueError, match=r"^engine: vllm no memory node is free$") as told:
        process.ask("open", SETTINGS)
    assert 'raise RuntimeError("no memory node' in str(told.value.__cause__)
    assert not Path(f"/proc/{process.pid}").exists()


def test_a_process_that_exits_is_an_error_with_its_exit_code():
    process = child("exits")
    with pytest.raises(ValueError, match=rf"^engine: the vLLM process {process.pid} ended with exit code 3; its own"):
        process.ask("open", SETTINGS)
    with pytest.raises(ValueError, match=rf"^engine: the vLLM process {process.pid} ended with exit code 3; its own"):
        process.ask("sleep")


def test_vllm_sees_neither_torchruns_variables_nor_the_pipes_of_the_trainer(monkeypatch):
    started = {}

    def start(command, **settings):
        started.update(settings)
        raise FileNotFoundError

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(FileNotFoundError):
        Child(0, {"CUDA_VISIBLE_DEVICES": "3"})
    environment = started["env"]
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_USE_AGENT_STORE"} & {*environment}
    assert environment["CUDA_VISIBLE_DEVICES"] == "3"
    assert environment["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert (started["stdin"], started["stdout"]) == (subprocess.DEVNULL, 2)


TRAINER = """
import os, signal, sys
from fastrlhf.rollout.vllm_child import Child

signal.alarm(60)
process = Child(os.memfd_create("weights"), {"STAND_IN": "hangs"})
process.send("open", SETTINGS)
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_busy_process_ends_with_a_trainer_that_is_killed(tmp_path):
    """The vLLM process shares the trainer's standard error, so the pipe closes only when both processes have ended. The
    vLLM process must also remove its temporary folder."""
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER.replace("SETTINGS", repr(SETTINGS))],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TMPDIR": str(tmp_path)},
    )
    assert trainer.stderr
    while (line := trainer.stderr.readline()) != "hangs\n":
        assert line, "the trainer ended before it was killed"
    [folder] = tmp_path.glob("fastrlhf-vllm-*")
    assert (folder / "vllm_dist_1").exists()
    trainer.communicate("go\n", timeout=60)
    assert trainer.returncode == -signal.SIGKILL
    assert [path.name.partition("_")[0] for path in tmp_path.iterdir()] == ["torchinductor"]
