"""Tests which errors count as out of memory, the message of these errors, and that the run is saved if possible."""

import pytest
import torch

from fastrlhf.algorithms import ppo, sft, update
from fastrlhf.cli import main
from fastrlhf.rollout import engine
from fastrlhf.runtime import optim
from fastrlhf.runtime.out_of_memory import describe, is_out_of_memory
from fastrlhf.runtime.rng_state import GlobalRandomness
from tests.resumable import run, save_models, untimed_log
from tests.tools import measure

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"
ROUNDED = {"dtype": "bfloat16", "master_weights": "stochastic_rounding"}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


def fail_at(patch, module, name: str, call: int) -> None:
    """Makes call number `call` (counted from 1) of the function module.name run out of memory."""
    calls, real = [], getattr(module, name)

    def counted(*arguments, **keywords):
        calls.append(None)
        if len(calls) == call:
            raise torch.OutOfMemoryError(CUDA)
        return real(*arguments, **keywords)

    patch.setattr(module, name, counted)


def test_out_of_memory_errors_of_torch_and_python_are_recognised():
    with pytest.raises(RuntimeError) as cpu:  # 2^60 bytes do not fit into any address space
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(cpu.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError(CUDA))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))


def test_the_line_says_how_much_was_asked_for_and_ends_in_the_notes():
    error = torch.OutOfMemoryError(CUDA)
    error.add_note("saved")
    assert describe(error) == "out of memory in a forward or backward (2.00 GiB more); saved"


@pytest.mark.parametrize(
    ("kind", "module", "name", "call"),
    [
        ("sft", sft, "token_nll", 4),  # step 4, after the evaluation
        # The fourth call of `update` fails, after the scores were normalised and the judge has drawn random numbers.
        ("ppo", ppo, "update", 4),
        ("drpo", ppo, "update", 4),
    ],
)
def test_a_run_is_saved_after_its_last_whole_step_and_continues(kind, module, name, call, paths, tmp_path):
    before = GlobalRandomness().state_dict()
    whole = untimed_log(tmp_path / "whole", run(kind, paths, tmp_path / "whole"))
    GlobalRandomness().load_state_dict(before)
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, module, name, call)
        with pytest.raises(torch.OutOfMemoryError) as stop:
            run(kind, paths, tmp_path / "cut")
    assert "checkpoint-3; the same command continues" in describe(stop.value)
    assert untimed_log(tmp_path / "cut", run(kind, paths, tmp_path / "cut")) == whole


@pytest.mark.parametrize(
    ("kind", "module", "name", "call", "settings"),
    [
        # There are four optimiser steps per update; this is the second step of the second update
        ("rto", update, "_policy_loss", 6, {}),
        ("sft", optim, "stochastic_round", 40, ROUNDED),  # 21 tensors per step; this call is in the second step
    ],
)
def test_if_weights_have_changed_within_the_step_no_checkpoint_is_saved(
    kind, module, name, call, settings, paths, tmp_path
):
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, module, name, call)
        with pytest.raises(torch.OutOfMemoryError) as stop:
            run(kind, paths, tmp_path / "run", save_steps=0, **settings)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    told = f"its last weights are in {tmp_path / 'run' / 'interrupted'}, in the middle of step 2: some have changed"
    assert told in describe(stop.value)


def test_the_place_is_that_of_the_innermost_part_of_the_run(paths, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, engine, "draw_tokens", 1)
        with pytest.raises(torch.OutOfMemoryError) as stop:
            run("ppo", paths, tmp_path / "run")
    assert describe(stop.value).startswith("out of memory in the rollout")


def test_the_command_prints_place_parts_and_advice(tmp_path, monkeypatch, capsys):
    measure.make_inputs(tmp_path)
    settings = measure.settings(tmp_path, "sft", measure.SMALL, "reward")
    settings |= {"output_dir": str(tmp_path / "run"), "max_steps": 3}
    flags = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    fail_at(monkeypatch, sft, "token_nll", 3)  # two micro-batches per step; this call is in the second step
    assert main(["sft", *flags]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("fastrlhf sft: out of memory in a forward or backward (2.00 GiB more); saved as ")
    assert "checkpoint-1; the same command continues; plan counts " in told
    assert "activations, blocks of logits, temporaries" in told
    assert "the cheapest change that fits: --micro_batch_tokens " in told
