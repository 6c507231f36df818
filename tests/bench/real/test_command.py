"""Tests of the options of `python -m bench real`."""

import pytest

from bench.__main__ import make_parser
from bench.real import command, parity


def test_the_parts_run_in_the_order_of_the_command_line(monkeypatch, tmp_path):
    monkeypatch.setattr("bench.real.model.smollm2", lambda cache: f"{cache}/model")
    monkeypatch.setattr(parity, "run_parity", lambda *given: repr(given))
    options = ["--tasks", "sft", "--forms", "text", "--steps", "3", "--batch", "1", "--trl", "p", "--cache", "c"]
    a = make_parser().parse_args(["real", "parity", "parity", *options, "--out", str(tmp_path)])
    once = repr(("c/model", ["sft"], ["text"], 3, 1, "p", tmp_path))
    assert command.run_real(a) == f"{once}\n\n{once}"


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        make_parser().parse_args(["real", "parity", "unknown"])
    assert "invalid choice: 'unknown'" in capsys.readouterr().err


def test_a_demo_never_writes_to_an_existing_folder(monkeypatch, tmp_path):
    monkeypatch.setattr("bench.real.model.smollm2", lambda cache: pytest.fail("the model was made"))
    a = make_parser().parse_args(["real", "demo", "--demo", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^--demo: .* exists already; name a new folder, for example: make demo-real"):
        command.run_real(a)
