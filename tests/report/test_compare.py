import re

import pytest

from fastrlhf.cli import main
from fastrlhf.report.compare import write_comparison
from fastrlhf.runtime.metrics import MetricsWriter


def write_run(folder, loss, config=""):
    with MetricsWriter(folder) as writer:
        writer.log(1, {"loss": 2 * loss, "num_tokens": 9})
        writer.log(2, {"loss": loss, "num_tokens": 9})
    (folder / "config.yaml").write_text(f"output_dir: {folder}\nbeta: 0.1\n{config}")


def rows(page):
    return re.findall(r"<tr><th>([^<]*)</th><td>(.*?)</td><td>(.*?)</td></tr>", page)


def test_two_runs_are_compared_by_last_values_settings_and_curves(tmp_path):
    write_run(tmp_path / "a", 0.5, "learning_rate: 1.0e-05\n")
    write_run(tmp_path / "b", 0.25, "learning_rate: 2.0e-05\n")
    path = write_comparison([tmp_path / "a", tmp_path / "b"], tmp_path / "page.html")
    page = path.read_text()
    assert path == tmp_path / "page.html"
    assert re.findall("<h2>(.*?)</h2>", page) == ["Last values", "Settings that differ", "a, b"]
    assert rows(page) == [("loss", "0.5", "0.25"), ("learning_rate", "1e-5", "2e-5")]
    assert re.findall(r"<title>(\w+): 2 points", page) == ["a", "b"] * 2  # curves of loss and num_tokens


def test_runs_of_the_same_name_are_distinguished_and_stages_keep_their_names(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"seed-{seed}" / "run" / "sft", 0.5)
    page = write_comparison([tmp_path / f"seed-{seed}" / "run" for seed in (0, 1)], tmp_path / "page.html").read_text()
    assert "<th>seed-0/run/sft</th><th>seed-1/run/sft</th>" in page
    assert "Settings that differ" not in page


def test_a_folder_without_metrics_and_one_given_twice_are_named(tmp_path):
    write_run(tmp_path / "a", 0.5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no metrics\.jsonl"):
        write_comparison([tmp_path / "a", tmp_path / "empty"], tmp_path / "page.html")
    with pytest.raises(ValueError, match="a: given twice"):
        write_comparison([tmp_path / "a", tmp_path / "a"], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_the_command_writes_the_page_into_the_current_folder_or_to_output(tmp_path, monkeypatch, capsys):
    for name in ("a", "b"):
        write_run(tmp_path / name, 0.5)
    monkeypatch.chdir(tmp_path)
    assert main(["report", "a", "b"]) == 0
    assert main(["report", "a", "b", "--output", "two.html"]) == 0
    assert capsys.readouterr().out == "comparison.html\ntwo.html\n"
    assert (tmp_path / "comparison.html").read_text() == (tmp_path / "two.html").read_text()
    assert main(["report", "a", "--output"]) == 2
    assert "--output: must be followed by the page to write" in capsys.readouterr().err
    assert main(["report", "a", "--wrong"]) == 2
    assert "RUN_DIR: must be the folder of a run, or of several" in capsys.readouterr().err
