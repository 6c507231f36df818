import json

import pytest
import torch

from fastrlhf.config import SFTConfig
from fastrlhf.runtime.profiling import TorchProfiler, profilers
from tests.resumable import Killed, Watch, run, save_models


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


def optimizer_steps(file) -> int:
    events = json.loads(file.read_text())["traceEvents"]
    return sum(event.get("name", "").startswith("Optimizer.step#") for event in events)


def test_the_trace_covers_exactly_the_steps_that_are_asked_for(paths, tmp_path):
    few, more = (run("sft", paths, tmp_path / steps[0], profile_steps=steps) for steps in ("2:2", "3:5"))
    files = [*few.output_dir.glob("profile/*"), *more.output_dir.glob("profile/*")]
    assert [file.name for file in files] == ["steps-2-2.trace.json", "steps-3-5.trace.json"]
    counts = [optimizer_steps(file) for file in files]
    assert counts[0] > 0
    assert counts[1] == 3 * counts[0]


def test_a_failed_run_leaves_no_profiler_on(paths, tmp_path, monkeypatch):
    watch = Watch("sft", monkeypatch)
    watch.kill = (3, "before")
    with pytest.raises(Killed):
        run("sft", paths, tmp_path, profile_steps="2:4")
    assert not list(tmp_path.glob("profile/*"))
    assert not torch.autograd.profiler._is_profiler_enabled
    watch.kill = None
    run("sft", paths, tmp_path, profile_steps="2:4")  # resumed after step 2, within the range
    assert [file.name for file in tmp_path.glob("profile/*")] == ["steps-2-4.trace.json"]


def test_memory_is_recorded_only_on_a_gpu(monkeypatch):
    config = SFTConfig(profile_steps="5:8", output_dir="runs/x")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [name for name, _ in profilers(config)] == ["TorchProfiler"]
    assert isinstance(profilers(config)[0][1], TorchProfiler)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [name for name, _ in profilers(config)] == ["TorchProfiler", "MemorySnapshot"]
    assert profilers(SFTConfig()) == []
