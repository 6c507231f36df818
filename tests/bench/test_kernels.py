import json
import math
import os
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import kernels, problems, providers, tune
from bench.__main__ import main
from bench.kernels import COLUMNS, run_kernels, table
from bench.measure import Step, interleave, peak_extra_bytes, run
from bench.problems import FLOORS, TASKS, Case, make_problem
from bench.providers import PROVIDERS, Provider, select
from fastrlhf_kernels import linear_logprob
from fastrlhf_kernels._tiles import FORWARD

CPU = torch.device("cpu")
TINY = Case(24, 16, 40, dead=0.5)
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def problem() -> problems.Problem:
    return make_problem(TINY, torch.float32, CPU)


def rows_in(folder: Path) -> list[dict]:
    return [json.loads(line) for file in folder.iterdir() for line in file.read_text().splitlines()]


def measured(folder: Path, chosen: list[Provider], case: Case = TINY) -> tuple[list[str], dict[str, dict]]:
    faults = run_kernels(CPU, [case], chosen, runs=3, folder=folder)
    return faults, {row["provider"]: row for row in rows_in(folder)}


def test_a_run_writes_a_row_with_every_column_for_each_implementation(tmp_path: Path, capsys: pytest.CaptureFixture):
    faults, rows = measured(tmp_path, select(CPU, ["entropy"], ["4 products", "eager", "ours"]))
    assert not faults
    assert list(rows) == ["4 products", "eager", "ours"]
    for name in ("eager", "ours"):
        assert all(math.isfinite(rows[name][column]) for column in COLUMNS)
        assert all(0 < rows[name][column] < 1e-5 for column in kernels.ERRORS)
        assert rows[name]["runs"] == 3
        share = rows["4 products"]["total_ms"] / rows[name]["total_ms"]
        assert rows[name]["percent_of_floor"] == pytest.approx(100 * share)
    assert {"commit", "date", "device", "torch", "triton"} <= rows["ours"].keys()
    assert f"| entropy | ours | {rows['ours']['forward_ms']:.2f} " in capsys.readouterr().out


def wrong_value(*args, **kwargs):
    out = linear_logprob(*args, **kwargs)
    return out._replace(logprob=out.logprob * 1.001)


def wrong_gradient(hidden, *args, **kwargs):
    return linear_logprob(1.001 * hidden - 0.001 * hidden.detach(), *args, **kwargs)


@pytest.mark.parametrize(("broken", "where"), [(wrong_value, "output 0"), (wrong_gradient, "gradient 0")])
def test_a_wrong_op_is_not_timed(broken, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(providers, "linear_logprob", broken)
    options = ["--device", "cpu", "--shape", "24", "16", "40", "--runs", "3", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["bench", "kernels", *options])
    with pytest.raises(SystemExit, match=f"logprob, ours: {where} at T = 65.*: error .*, allowed"):
        main()
    ours, eager = sorted(rows_in(tmp_path), key=lambda row: row["provider"], reverse=True)
    assert ours["total_ms"] is None
    assert where in ours["error"]
    assert eager["total_ms"] > 0


def fails(p: problems.Problem):
    raise RuntimeError("no such kernel\nand more")


def test_missing_or_failing_libraries_are_reported_and_the_others_measured(tmp_path: Path, capsys):
    eager = next(p for p in PROVIDERS if p.name == "eager")
    peers = [
        Provider("absent", "logprob", fails, "no_such_package"),
        Provider("failing", "logprob", fails),
        Provider("not a number", "logprob", lambda p: (p.hidden.sum(1) * p.weight.sum() * math.nan,)),
    ]
    _, rows = measured(tmp_path, [*peers, eager])
    assert rows["failing"]["error"] == "RuntimeError: no such kernel"
    assert rows["not a number"]["error"].startswith("ArithmeticError: not finite")
    assert rows["eager"]["total_ms"] > 0
    assert "absent" not in rows
    assert "| logprob | absent | not installed |" in capsys.readouterr().out


def test_the_table_shows_the_newest_row_and_what_is_not_measured_yet(tmp_path: Path):
    eager, ours = select(CPU, ["logprob"], ["eager", "ours"])
    measured(tmp_path, [eager])
    measured(tmp_path, [eager])
    other = TINY._replace(peaked=False)
    (file,) = tmp_path.iterdir()
    older, newest = kernels.read_rows(file)
    older["forward_ms"] = 999.0
    lines = table([older, newest], [TINY, other], [eager, ours]).splitlines()
    assert lines[0] == "### T = 24, D = 16, V = 40, peaked, 50 % of rows without gradient"
    assert lines[4].startswith(f"| logprob | eager | {newest['forward_ms']:.2f} | {newest['backward_ms']:.2f} |")
    assert [line.split("|")[3].strip() for line in (lines[5], *lines[-2:])] == ["not measured yet"] * 3


@pytest.mark.parametrize(
    "provider", [p for p in select(CPU) if p.task not in FLOORS], ids=lambda p: f"{p.task}-{p.name}"
)
def test_every_implementation_returns_what_its_task_defines(provider: Provider, problem: problems.Problem):
    if provider.missing:
        pytest.skip(f"{provider.name} is not installed")
    task = provider.asked
    found = run(task.step(provider.function, problem))
    truth = run(task.step(task.reference, problem.double()))
    for tensors, exact in zip(found, truth, strict=True):
        torch.testing.assert_close(tensors, tuple(x.float() for x in exact), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.by_row])
def test_the_float64_results_do_not_depend_on_the_chunk_size(task: str, problem: problems.Problem, monkeypatch):
    whole = run(TASKS[task].step(TASKS[task].reference, problem.double()))
    monkeypatch.setitem(problems.CHUNK, "cpu", 7 * 40)
    for tensors, expected in zip(TASKS[task].truth(problem), whole, strict=True):
        assert len(tensors) == len(expected)
        for a, b in zip(tensors, expected, strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-12, atol=1e-14)


def test_problems_are_peaked_or_flat_and_dead_rows_have_no_gradient():
    case = Case(400, 64, 1000, dead=0.5)
    peaked = make_problem(case, torch.float32, CPU)
    assert 0.85 < (peaked.logprob > math.log(0.25)).float().mean() < 0.95
    flat = make_problem(case._replace(peaked=False), torch.float32, CPU)
    assert flat.logprob.mean().item() == pytest.approx(-math.log(1000) - 0.5, abs=0.3)  # because logits have variance 1
    assert torch.equal(peaked.grad_logprob == 0, peaked.dead)
    assert 0.4 < peaked.dead.float().mean() < 0.6
    assert (make_problem(case._replace(rows=2050), torch.float32, CPU).advantage == 0).float().mean() == 0.5


def test_steps_are_timed_alternately_within_their_time_limit_without_failing_ones():
    calls = []

    def forward(name: str, milliseconds: float) -> tuple[torch.Tensor]:
        calls.append(name)
        if name == "b" and calls.count("b") == 2:
            raise RuntimeError("out of memory")
        time.sleep(milliseconds / 1e3)
        return (torch.zeros(()),)

    steps = {name: Step(partial(forward, name, ms)) for name, ms in (("a", 0), ("b", 0), ("slow", 20))}
    found = interleave(steps, CPU, runs=5, seconds=0.05)
    assert "".join(name[0] for name in calls) == "absabsasaa"
    assert str(found["b"]) == "out of memory"
    assert found["slow"]["runs"] == 3
    assert found["slow"]["total_ms"] >= 20
    assert found["slow"]["total_ms_20"] <= found["slow"]["total_ms"] <= found["slow"]["total_ms_80"]


def test_extra_memory_is_the_peak_without_the_returned_gradients():
    leaf = torch.ones(1000, requires_grad=True)

    def forward() -> tuple[torch.Tensor]:
        torch.empty(5000)
        return (leaf.sum(),)

    extra, _, (gradient,) = peak_extra_bytes(Step(forward, (leaf,)), CPU)
    assert extra == 4 * (5000 - 1000)
    assert gradient.shape == (1000,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_memory_and_time_are_those_of_the_device():
    leaf = torch.ones(1 << 20, device="cuda", requires_grad=True)

    def forward() -> tuple[torch.Tensor]:
        torch.empty(5 << 20, device="cuda")
        torch.cuda._sleep(10**8)  # cycles; the host does not wait for them
        return (leaf.sum(),)

    step = Step(forward, (leaf,))
    extra, _, _ = peak_extra_bytes(step, leaf.device)
    assert extra == pytest.approx(4 * (4 << 20), abs=4096)
    assert interleave({"sleeps": step}, leaf.device, 3, math.inf)["sleeps"]["forward_ms"] > 20


def test_the_tuner_refuses_a_wrong_candidate(problem, monkeypatch: pytest.MonkeyPatch):
    good, bad = tune.CANDIDATES[:2]
    pinned = FORWARD[9]

    def ours(p, impl="auto"):
        wrong = impl == "auto" and FORWARD[9].light == bad
        return tuple(x * (1.1 if wrong else 1.0) for x in providers.ours(p))

    monkeypatch.setattr(tune, "CANDIDATES", (bad, good))
    monkeypatch.setattr(tune, "ours", ours)
    lines = tune.compare("forward", FORWARD, 9, problem, runs=3)
    assert lines[0].endswith(f" ms {'*' if good == pinned.light else ' '}{tuple(good)}")
    assert lines[1] == f"refused     {tuple(bad)}: wrong by 0.1"
    assert FORWARD[9] == pinned


@pytest.fixture
def gpu_script(tmp_path: Path):
    """Returns a function that runs a part of bench/gpu.sh with a fake GPU and a fake Python whose every step fails. The
    function returns the steps that the script started, each with its time limit.
    """
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "python3").write_text('#!/bin/sh\n[ "$1" = -c ] && exit $MISSING\nexit 1\n')
    (tmp_path / "timeout").write_text(f'#!/bin/sh\nshift 2\necho "$@" >> {tmp_path}/calls\nshift\nexec "$@"\n')
    for name in ("nvidia-smi", "python3", "timeout"):
        (tmp_path / name).chmod(0o755)
    script, calls = ROOT / "bench" / "gpu.sh", tmp_path / "calls"
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": str(tmp_path / "out"), "MISSING": "0"}
    environment |= {"DEVICE": "cuda", "TRL_112": ""}

    def run(*arguments: str, **changed: str) -> list[list[str]]:
        calls.write_text("")
        settings = os.environ | environment | {"FASTRLHF_DATA": "here"} | changed
        ended = subprocess.run(["bash", script, *arguments], env=settings, timeout=60, capture_output=True, check=False)
        assert ended.returncode == 1
        return [line.split() for line in calls.read_text().splitlines()]

    return run


def test_the_gpu_script_goes_on_after_a_failing_step(gpu_script, tmp_path: Path):
    """Checks that each part of the script starts all of its commands, although all of them fail."""
    assert [step[2:5] for step in gpu_script("test")] == [["-m", "pytest", "-q"]] * 2
    assert [step[2:] for step in gpu_script("tune")] == [["-m", "bench", "tune"]]
    steps = gpu_script("kernels", "--dead", "0")
    assert [step[2:5] for step in steps] == [["-m", "bench", "kernels"]] * 2
    where = ["--device", "cuda", "--out", str(tmp_path / "out")]
    assert steps[0][-6:] == ["--dead", "0", *where]
    for part, model in (("train_600m", "qwen3-0.6b"), ("train_1b", "llama-3.2-1b")):
        assert [step[4:8] for step in gpu_script(part)] == [
            ["train", trainer, "--model", model] for trainer in ("sft", "dpo", "reward")
        ]
    assert [step[4:] for step in gpu_script("on_policy_1b")] == [
        ["train", "drpo", "--shape", "pythia-1b", "--episodes", "64", "--rounds", "2", *where],
        ["trunks", "--episodes", "128", *where],
        ["rollout", "--episodes", "512", "--slots", "64", *where],
    ]
    [step] = gpu_script("on_policy_3b", TRL_112="here")
    size = ["--shape", "pythia-2.8b", "--episodes", "64", "--rounds", "1"]
    fits = ["--optim", "adamw_8bit", "--master-weights", "stochastic_rounding"]
    assert step[6:] == [*size, *fits, "--trl-path", "here", *where]


@pytest.mark.parametrize("part", ["test", "tune", "kernels", "train_600m", "train_1b", "on_policy_1b", "on_policy_3b"])
def test_every_part_of_the_gpu_script_takes_less_than_nine_minutes(gpu_script, part):
    steps = gpu_script(part)
    assert steps
    assert sum(int(step[0]) for step in steps) < 540


def test_a_part_of_the_gpu_script_without_its_libraries_fails(gpu_script):
    assert not gpu_script("train_1b", FASTRLHF_DATA="")
    assert not gpu_script("train_600m", MISSING="1")
    assert not gpu_script("on_policy_3b", MISSING="1")


def test_tasks_and_implementations_use_the_same_names():
    assert {provider.task for provider in PROVIDERS} == set(TASKS)
    assert len({(provider.task, provider.name) for provider in PROVIDERS}) == len(PROVIDERS)
