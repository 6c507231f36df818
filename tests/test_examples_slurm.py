"""Runs the batch scripts of examples/slurm with stand-ins for SLURM's commands; tests signals, requeueing and
resuming."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import tiny
from tests.ranks import MODEL
from tests.resumable import untimed_log

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "slurm"
SCRIPTS = ("single_node.sbatch", "several_nodes.sbatch")
PATIENCE = 120.0
SRUN = """\
#!/usr/bin/env bash
# Starts the command SLURM_NNODES times and passes SIGTERM on, as srun does.
while [[ $1 == --* ]]; do shift; done
for ((i = 0; i < SLURM_NNODES; i++)); do "$@" & tasks+=($!); done
trap 'kill -TERM "${tasks[@]}"' TERM
for task in "${tasks[@]}"; do
    while wait "$task"; code=$?; kill -0 "$task" 2>/dev/null; do :; done
    [ "$code" -gt "${worst:=0}" ] && worst=$code
done
exit "${worst:-0}"
"""
SCONTROL = """\
#!/usr/bin/env bash
if [ "$1" = show ]; then echo localhost; else echo "$*" >> "$PLACE/scontrol"; fi
"""
TORCHRUN = """\
#!/usr/bin/env bash
exec "$PYTHON" -m torch.distributed.run "$@"
"""
TRAINER = """\
#!/usr/bin/env bash
# Trains until SIGTERM, then saves; the second time it finishes.
printf '%s\\n' "$@" > "$PLACE/arguments"
[ -e "$PLACE/fails" ] && exit 3
[ -e "$PLACE/saved" ] && exit 0
trap 'touch "$PLACE/saved"; exit 1' TERM
touch "$PLACE/started"
while :; do sleep 0.05; done
"""


@pytest.fixture
def cluster(tmp_path):
    """The environment of a job with stand-ins for SLURM's commands and for `torchrun`, which trains nothing."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("torchrun", TRAINER)):
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
    return os.environ | {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PLACE": str(tmp_path),
        "PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
    }


def start(script: str, environment: dict[str, str], *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(["bash", str(FOLDER / script), *arguments], env=environment)


def wait_for(ready, job: subprocess.Popen) -> None:
    end = time.monotonic() + PATIENCE
    while not ready():
        assert job.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)


def queued(place: Path) -> str:
    return (place / "scontrol").read_text() if (place / "scontrol").exists() else ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_near_the_time_limit_the_run_is_saved_and_queued_and_the_same_script_finishes_it(script, cluster, tmp_path):
    arguments = ("dpo", "--config", "my run.yaml")
    job = start(script, cluster, *arguments)
    wait_for((tmp_path / "started").exists, job)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(PATIENCE) == 1
    assert (tmp_path / "saved").exists()
    assert queued(tmp_path) == "requeue 42\n"
    assert start(script, cluster, *arguments).wait(PATIENCE) == 0
    assert queued(tmp_path) == "requeue 42\n"
    single = ["--standalone", "--nproc-per-node", "2", "--shutdown-timeout", "240"]
    several = [
        *("--nnodes", "1", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:20042"),
        *("--rdzv-id", "42-0", "--shutdown-timeout", "240"),
    ]
    given = (tmp_path / "arguments").read_text().splitlines()
    assert given == [*(single if script == SCRIPTS[0] else several), "-m", "fastrlhf", *arguments]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_preempted_run_is_saved_and_left_to_slurm(script, cluster, tmp_path):
    job = start(script, cluster, "dpo")
    wait_for((tmp_path / "started").exists, job)
    job.send_signal(signal.SIGTERM)
    assert job.wait(PATIENCE) == 1
    assert (tmp_path / "saved").exists()
    assert queued(tmp_path) == ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_that_fails_is_not_queued_again(script, cluster, tmp_path):
    (tmp_path / "fails").touch()
    assert start(script, cluster, "dpo").wait(PATIENCE) == 3
    assert queued(tmp_path) == ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_job_asks_for_the_signal_and_for_the_queue_and_has_time_to_save(script):
    text = (FOLDER / script).read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert asked == {
        "job-name": "fastrlhf",
        "nodes": "1" if script == SCRIPTS[0] else "2",
        "ntasks-per-node": "1",
        "gpus-per-node": "8",
        "cpus-per-task": "64",
        "time": "24:00:00",
        "signal": "B:USR1@300",
        "requeue": "",
        "open-mode": "append",
        "output": "%x-%j.log",
    }
    [patience] = re.findall(r"--shutdown-timeout (\d+)", text)
    assert int(patience) < 300
    checked = subprocess.run(["bash", "-n", str(FOLDER / script)], capture_output=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, b"")
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, str(FOLDER / script)], check=True)


@pytest.mark.faults
def test_real_processes_that_are_signalled_resume_and_end_as_an_uninterrupted_run(cluster, tmp_path):
    (tmp_path / "bin" / "torchrun").write_text(TORCHRUN)
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    rows = [{"prompt": row.prompt, "completion": row.reference} for row in tiny.examples(40)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    keys = {
        "model_config": MODEL,
        "tokenizer_name_or_path": str(tmp_path / "tokenizer"),
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "train_batch_size": 4,
        "max_length": 32,
        "max_steps": 120,
        "progress": False,
    }
    (tmp_path / "job.yaml").write_text(json.dumps(keys))  # JSON is valid YAML
    several = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1"}

    def run(script: str, folder: Path) -> subprocess.Popen:
        environment = cluster | (several if script == SCRIPTS[1] else {}) | {"SLURM_JOB_ID": str(os.getpid())}
        arguments = ("sft", "--config", str(tmp_path / "job.yaml"), "--output_dir", str(folder))
        return start(script, environment, *arguments)

    assert run(SCRIPTS[0], tmp_path / "whole").wait(PATIENCE) == 0
    for script in SCRIPTS:
        folder = tmp_path / script
        job, log = run(script, folder), folder / "metrics.jsonl"
        wait_for(lambda log=log: log.exists() and log.read_bytes().count(b"\n") >= 3, job)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(PATIENCE) != 0
        assert list(folder.glob("checkpoint-*"))
        assert queued(tmp_path).splitlines()[-1].startswith("requeue ")
        assert run(script, folder).wait(PATIENCE) == 0
        assert untimed_log(folder) == untimed_log(tmp_path / "whole")
