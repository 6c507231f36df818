"""Tests of `make demo-real` on a tiny model: its folders, its report, its table."""

import json

from bench.real import demo
from bench.real.demo import run_demo
from tests import tiny


def test_every_method_has_a_folder_a_row_and_a_place_in_the_report(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "NUM_HELD_OUT", 4)
    monkeypatch.setattr(demo, "NUM_ROWS", 24)
    for settings in demo.SETTINGS.values():
        monkeypatch.setitem(settings, "max_steps", 2)
    monkeypatch.setitem(demo.LORA, "progress", False)
    out = tmp_path / "out"
    table = run_demo(tiny.save_policy(tmp_path / "policy"), out).splitlines()
    methods = json.loads((out / "summary.json").read_text())["methods"]
    assert list(methods) == ["start", "sft", "dpo", "drpo"]
    assert methods["sft"]["kl"] == 0
    assert methods["start"]["kl"] != 0
    assert methods["start"]["seconds"] == 0
    assert [line.split()[0] for line in table[:5]] == ["method", *methods]
    assert table[-1] == str(out / "report.html")
    assert "drpo" in (out / "report.html").read_text()
    for name in ("sft", "dpo", "drpo"):
        rows = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        assert len(rows) == 2
        assert (out / name / "adapter").exists()
        assert methods[name]["tokens"] == sum(row["num_tokens"] for row in rows) > 0
    assert "reward/judge" in " ".join(rows[0])
