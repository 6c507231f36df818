"""Stops real torchrun jobs, and measures whether a long run needs more and more memory. `make test-faults` runs the
long tests, which are marked `faults`.
"""

import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.config import PPOConfig
from fastrlhf.runtime.atomic import check_folder
from fastrlhf.runtime.metrics import read_metrics
from fastrlhf.runtime.run import Run
from tests import tiny
from tests.ranks import MODEL
from tests.resumable import save_models, untimed_log

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
FORWARDED = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
"""Signals that torchrun is told to forward to the ranks. By default SIGUSR1 and SIGUSR2 end torchrun itself at once."""
PATIENCE = 180.0


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Writes a configuration of 120 steps. Returns a function that starts this run on two processes in a given
    folder."""
    place = tmp_path_factory.mktemp("job")
    tiny.tokenizer().save_pretrained(place / "tokenizer")
    rows = [{"prompt": row.prompt, "completion": row.reference} for row in tiny.examples(40)]
    (place / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    keys = {
        "model_config": MODEL,
        "tokenizer_name_or_path": str(place / "tokenizer"),
        "dataset_name": str(place / "rows.jsonl"),
        "train_batch_size": 4,
        "max_length": 32,
        "max_steps": 120,
        "progress": False,
    }
    (place / "job.yaml").write_text(json.dumps(keys))  # JSON is valid YAML

    def start(folder: Path, *flags: str) -> subprocess.Popen:
        given = ["--config", str(place / "job.yaml"), "--output_dir", str(folder), *flags]
        command = [*TORCHRUN, "--signals-to-handle", FORWARDED, "-m", "fastrlhf", "sft", *given]
        return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    return start


def rows_of(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def ranks_of(launcher: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


def stop(child: subprocess.Popen, folder: Path, rows: int, number: int, later: float = 0.0) -> str:
    """Signals the launcher and its ranks at once, as SLURM does, `later` seconds after the log has `rows` rows; returns
    the job's output."""
    end = time.monotonic() + PATIENCE
    while rows_of(folder) < rows and child.poll() is None:
        assert time.monotonic() < end, "the job did not log that many rows in time"
        time.sleep(0.002)
    assert child.poll() is None, child.communicate()[1]
    time.sleep(later)
    for pid in [child.pid, *ranks_of(child.pid)]:
        os.kill(pid, number)
    try:
        return child.communicate(timeout=PATIENCE)[1]
    finally:
        child.kill()


def check_saved(folder: Path, said: str) -> int:
    """Checks that a stopped job saved its last step, and returns the step."""
    step = rows_of(folder)
    assert f"saved as {folder / f'checkpoint-{step}'}; the same command continues" in said, said
    check_folder(folder / f"checkpoint-{step}")
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == list(range(1, step + 1))
    return step


def test_a_job_whose_launcher_and_ranks_are_signalled_at_once_saves_its_last_step(job, tmp_path):
    child = job(tmp_path / "run")
    said = stop(child, tmp_path / "run", 3, signal.SIGTERM)
    assert 3 <= check_saved(tmp_path / "run", said) < 120
    assert child.returncode != 0


@pytest.mark.faults
def test_a_job_that_is_signalled_after_its_last_step_finishes_and_releases_its_folder(job, tmp_path):
    folder = tmp_path / "run"
    child = job(folder, "--max_steps", "2")
    stop(child, folder, 2, signal.SIGUSR1)
    assert child.returncode != 0  # the exit code of torchrun
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [1, 2]
    assert (folder / "config.json").exists()
    assert not list(folder.glob(".*"))
    assert not list(folder.glob("checkpoint-*"))


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory):
    """The log and the model of an uninterrupted job."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert job(folder).wait(timeout=PATIENCE) == 0
    return untimed_log(folder)


@pytest.mark.faults
@pytest.mark.parametrize("seed", [0, 1])
def test_a_job_stopped_ten_times_ends_bit_identical_to_an_uninterrupted_one(seed, job, whole, tmp_path):
    draw, folder, steps = random.Random(seed), tmp_path / "run", [0]
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]
    while len(steps) <= 10:
        child = job(folder)
        number = numbers[len(steps) % 4]
        said = stop(child, folder, steps[-1] + draw.randint(1, 2), number, later=draw.uniform(0, 0.1))
        steps.append(check_saved(folder, said))
        print(f"stop {len(steps) - 1} of 10: {signal.Signals(number).name}, step {steps[-1]} is saved", flush=True)  # noqa: T201
    assert job(folder).wait(timeout=PATIENCE) == 0
    assert untimed_log(folder) == whole


@pytest.mark.faults
def test_five_hundred_updates_with_evaluation_take_no_more_memory_files_or_threads(tmp_path, monkeypatch):
    """Memory must grow by less than 5 MB from update 100, when all pools and caches have their final size, to update
    500."""
    paths, seen, log = save_models(tmp_path), {}, Run.log

    def measured(run, step, *arguments, **keywords):
        log(run, step, *arguments, **keywords)
        if step in (100, 499):
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            files = len(list(Path("/proc/self/fd").iterdir()))
            seen[step] = pages * os.sysconf("SC_PAGE_SIZE"), files, threading.active_count()

    monkeypatch.setattr(Run, "log", measured)
    config = PPOConfig(
        model_name_or_path=paths["policy"],
        reward_model_path=paths["judge"],
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=4,
        num_ppo_epochs=1,
        num_mini_batches=1,
        response_length=5,
        max_length=32,
        max_steps=500,
        eval_steps=25,
        save_steps=100,
        save_total_limit=1,
        progress=False,
    )
    train_ppo(config, tiny.examples(10), tiny.examples(4, seed=1))
    (memory, *counts), (later, *later_counts) = seen[100], seen[499]
    print(f"400 updates: {(later - memory) / 1e6:+.2f} MB, files and threads {counts} -> {later_counts}")  # noqa: T201
    assert later_counts == counts
    assert later - memory < 5e6, f"{(later - memory) / 1e6:.1f} MB in 400 updates"
