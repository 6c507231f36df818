"""Tests that the pass of a reference continues after a kill with the same numbers, and that damage is found."""

import logging
import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastrlhf.algorithms import reference, saved_logprobs
from fastrlhf.algorithms.dpo import train_dpo
from fastrlhf.algorithms.saved_logprobs import SavedLogprobs
from fastrlhf.config import DPOConfig
from fastrlhf.runtime.atomic import PASSES
from fastrlhf.runtime.run import Run
from tests import resumable, tiny


def config(model, **settings) -> DPOConfig:
    fields = {"per_device_train_batch_size": 8, "max_steps": 2, "learning_rate": 1e-3, "progress": False}
    return DPOConfig(model_name_or_path=model, micro_batch_tokens=60, **fields | settings)


def run(cfg):
    return [resumable.untimed(row) for row in train_dpo(cfg, tiny.examples(12), tiny.examples(6, seed=1)).history]


@pytest.fixture
def packs(monkeypatch) -> list[int]:
    """Saves after every pack. The list gets the number of sequences of each computed pack."""
    compute, sizes = reference.sequence_logprobs, []

    def counted(model, batch):
        sizes.append(len(batch.cu_rows) - 1)
        return compute(model, batch)

    monkeypatch.setattr(reference, "sequence_logprobs", counted)
    monkeypatch.setattr(saved_logprobs, "SAVE_EVERY", 0.0)
    return sizes


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_and_die(cfg, where: str) -> None:
    """Runs in a child process that kills itself in its third pack, or while it writes the second chunk."""
    module, name, at = {
        "pack": (reference, "sequence_logprobs", 3),
        "write": (saved_logprobs.np, "save", 5),
    }[where]
    function, calls = getattr(module, name), []

    def deadly(*arguments):
        calls.append(1)
        if len(calls) == at:
            kill()
        return function(*arguments)

    def target() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, deadly)
            run(cfg)

    child = multiprocessing.get_context("fork").Process(target=target)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("where", ["pack", "write"])
@pytest.mark.parametrize("place", ["output_dir", "ref_cache_dir"])
def test_after_a_kill_the_same_command_computes_only_what_is_missing(where, place, model, packs, tmp_path, caplog):
    expected = run(config(model, **{place: str(tmp_path / "whole")}))
    everything = sum(packs)
    cfg = config(model, **{place: str(tmp_path / "killed")})
    run_and_die(cfg, where)
    packs.clear()
    with caplog.at_level(logging.INFO):
        assert run(cfg) == expected
    saved = everything - sum(packs)
    assert 0 < saved < everything
    assert f"reference: log-probs of {saved} of {everything} responses read from" in caplog.text
    assert (tmp_path / "killed").exists()
    if place == "output_dir":
        assert not (tmp_path / "killed" / PASSES).exists()
    else:
        [entry] = (tmp_path / "killed").iterdir()
        assert [chunk.name for chunk in entry.iterdir()] == ["all"]


def test_a_run_that_continues_from_a_checkpoint_computes_no_log_probs(model, packs, tmp_path, monkeypatch):
    cfg = config(model, save_steps=1, output_dir=str(tmp_path / "killed"))
    expected = run(replace(cfg, output_dir=str(tmp_path / "whole")))
    log = Run.log

    def deadly(run, step, *arguments, **keywords):
        if step == 2:
            raise resumable.Killed
        log(run, step, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", deadly)
        with pytest.raises(resumable.Killed):
            run(cfg)
    packs.clear()
    assert run(cfg) == expected
    assert packs == []


def flip_a_byte(chunk: Path) -> None:
    content = bytearray((chunk / "logprobs.npy").read_bytes())
    content[-3] ^= 4
    (chunk / "logprobs.npy").write_bytes(content)


DAMAGES = {
    "logprobs.npy has changed since it was written": flip_a_byte,
    "trees.npy is missing": lambda chunk: (chunk / "trees.npy").unlink(),
    "manifest.json is missing": lambda chunk: (chunk / "manifest.json").unlink(),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_chunk_is_computed_again_with_a_warning(message, model, packs, tmp_path, caplog):
    cfg = config(model, ref_cache_dir=str(tmp_path))
    expected = run(cfg)
    [entry] = tmp_path.iterdir()
    DAMAGES[message](entry / "all")
    everything = sum(packs)
    packs.clear()
    assert run(cfg) == expected
    assert sum(packs) == everything
    said = f"ref_cache_dir: {entry / 'all'} is damaged, so its log-probs are computed again: {message}"
    assert said in caplog.text
    packs.clear()
    assert run(cfg) == expected
    assert packs == []


def test_a_run_continues_if_nothing_can_be_written(model, packs, tmp_path, monkeypatch, caplog):
    expected = run(config(model))

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved_logprobs.np, "save", full)
    assert run(config(model, ref_cache_dir=str(tmp_path))) == expected
    [entry] = tmp_path.iterdir()
    assert list(entry.iterdir()) == []
    assert caplog.text.count("cannot be written, the run continues without it") == 1


def test_chunks_hold_every_tree_once_and_nothing_that_is_not_finite(tmp_path, packs):
    saved = SavedLogprobs(tmp_path / "entry", "ref_cache_dir")
    saved.add({4: torch.tensor([-1.5, -2.0]), 1: torch.tensor([-0.25])})
    saved.add({0: torch.tensor([float("nan"), -1.0])})
    saved.add({3: torch.tensor([-3.0])})
    assert sorted(path.name for path in saved.folder.iterdir()) == ["1", "3"]
    assert np.load(saved.folder / "1" / "logprobs.npy").tolist() == [-1.5, -2.0, -0.25]
    found = SavedLogprobs(tmp_path / "entry", "ref_cache_dir").read()
    assert {i: values.tolist() for i, values in found.items()} == {4: [-1.5, -2.0], 1: [-0.25], 3: [-3.0]}
    saved.complete([torch.tensor([-1.0]), torch.tensor([-2.0, -4.0])])
    assert {i: values.tolist() for i, values in saved.read().items()} == {0: [-1.0], 1: [-2.0, -4.0]}
    assert [path.name for path in saved.folder.iterdir()] == ["all"]


def test_a_chunk_is_written_when_the_last_one_is_old(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(saved_logprobs.time, "monotonic", lambda: now[0])
    saved = SavedLogprobs(tmp_path / "entry", "ref_cache_dir")
    for tree, (second, names) in enumerate([(29.0, []), (30.0, ["0"]), (59.0, ["0"]), (60.0, ["0", "2"])]):
        now[0] = 100.0 + second
        saved.add({tree: torch.tensor([-second])})
        assert sorted(path.name for path in tmp_path.glob("entry/*")) == names
