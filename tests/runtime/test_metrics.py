import json

import pytest
import torch

from fastrlhf.runtime.metrics import MetricsWriter, read_metrics, read_rows


def test_each_step_is_one_json_line_with_its_metrics_in_order(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.log(1, {"loss": 0.5, "a/b": 2})
        writer.log(2, {"a/b": 3, "loss": 0.25})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [list(json.loads(line)) for line in lines] == [
        ["step", "time", "loss", "a/b"],
        ["step", "time", "a/b", "loss"],
    ]
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert (first["step"], first["loss"], first["a/b"]) == (1, 0.5, 2)
    assert 0 <= first["time"] <= second["time"] < 60


def test_a_row_is_on_disk_before_the_writer_is_closed(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.log(1, {"loss": 0.5})
        writer.samples(1, [{"prompt": "p"}])
        assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] == 0.5
        assert read_rows(tmp_path / "samples.jsonl") == [{"step": 1, "prompt": "p"}]


def test_numbers_that_json_lacks_are_strings_in_the_file_and_floats_when_read(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.log(1, {"a": float("nan"), "b": float("inf"), "c": -float("inf"), "d": torch.tensor(float("nan"))})
    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (row["a"], row["b"], row["c"], row["d"]) == ("nan", "inf", "-inf", "nan")
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row["a"] != row["a"]
    assert (row["b"], row["c"]) == (float("inf"), -float("inf"))


def test_tensors_and_integers_are_written_as_the_numbers_they_hold(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.log(1, {"tensor": torch.tensor(0.5), "count": 2**60 + 1})
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (row["tensor"], row["count"]) == (0.5, 2**60 + 1)


@pytest.mark.parametrize("name", ["step", "time"])
def test_a_metric_may_not_take_the_name_of_a_column(tmp_path, name):
    with MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match=name):
        writer.log(1, {name: 3.0})


def test_samples_keep_any_text(tmp_path):
    rows = [
        {"prompt": 'a\nb\u2028"c" \u00e9', "response": "\ud800 lone", "score": 0.5},
        {"prompt": [{"role": "user", "content": "hi"}], "response": "", "score": None},
    ]
    with MetricsWriter(tmp_path) as writer:
        writer.samples(7, rows)
    assert read_rows(tmp_path / "samples.jsonl") == [{"step": 7, **row} for row in rows]


def test_a_second_writer_appends_and_cuts_off_the_line_a_killed_run_left(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    assert [row["step"] for row in read_metrics(path)] == [1]
    with MetricsWriter(tmp_path) as writer:
        writer.log(2, {"loss": 2.0})
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [(1, 3.0), (2, 2.0)]


def test_a_complete_last_line_without_a_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}')
    assert [row["step"] for row in read_metrics(path)] == [1]
    with MetricsWriter(tmp_path) as writer:
        writer.log(2, {"loss": 2.0})
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


@pytest.mark.parametrize("line", ["{oops}", "[1, 2]"])
def test_a_broken_line_is_an_error_with_file_and_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)


def test_a_metrics_file_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        MetricsWriter(tmp_path)


def test_a_resumed_run_drops_later_rows_and_continues_its_clock(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "time": 50.0}\n{"step": 2, "time": 90.5}\n{"step": 3, "time": 99.0}\n{"step": 4, "ti'
    )
    (tmp_path / "samples.jsonl").write_text('{"step": 2}\n{"step": 2}\n{"step": 3}\n')
    with MetricsWriter(tmp_path, resumed_at=2) as writer:
        writer.log(3, {"loss": 2.0})
        writer.flush()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[2]["loss"] == 2.0
    assert 90.5 <= rows[2]["time"] < 99.0
    assert [row["step"] for row in read_rows(tmp_path / "samples.jsonl")] == [2, 2]


def test_a_run_that_starts_again_from_nothing_drops_every_row(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "time": 40.0}\n{"step": 1, "time": 50.0}\n')
    with MetricsWriter(tmp_path, resumed_at=-1) as writer:
        writer.log(1, {"loss": 2.0})
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row["time"] < 50


class Full:
    """A fake file. Writes fail as on a full disk while `full` is set; otherwise each write accepts only three bytes."""

    def __init__(self, file):
        self.file, self.full = file, True

    def write(self, content):
        if self.full:
            raise OSError(28, "No space left on device")
        return self.file.write(content[:3])

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_row_that_cannot_be_written_is_kept_and_written_later_and_a_checkpoint_can_hold_it(tmp_path, caplog):
    with MetricsWriter(tmp_path) as writer:
        writer.log(1, {"loss": 1.0})
        disk = writer._metrics._file = Full(writer._metrics._file)
        with pytest.warns(RuntimeWarning, match=r"metrics.jsonl: a row cannot be written .*; it is kept") as told:  # noqa: PT031
            writer.log(2, {"loss": 2.0})
            writer.log(3, {"loss": 3.0})
        assert len(told) == 1
        kept = writer.flush()
        assert [json.loads(line)["step"] for line in kept["metrics.jsonl"].splitlines()] == [2, 3]
        assert f"{tmp_path / 'metrics.jsonl'} cannot be written: No space left on device" in caplog.text
        resumed_in(tmp_path / "resumed", tmp_path, kept)
        disk.full = False
        assert writer.flush() == {}
        assert [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1.0, 2.0, 3.0]
        writer.log(4, {"loss": 4.0})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def resumed_in(folder, source, kept):
    """Continues the log of a killed run after step 3, in a copy of the run's folder, and checks that no row is
    missing."""
    folder.mkdir()
    for name in ("metrics.jsonl", "samples.jsonl"):
        (folder / name).write_bytes((source / name).read_bytes())
    with MetricsWriter(folder, resumed_at=3, unwritten=kept) as writer:
        writer.log(4, {"loss": 4.0})
    assert [row["loss"] for row in read_metrics(folder / "metrics.jsonl")] == [1.0, 2.0, 3.0, 4.0]


def test_a_partly_written_row_is_completed(tmp_path):
    class Almost(Full):
        def write(self, content):
            if not self.full:
                raise OSError(28, "No space left on device")
            self.full = False
            return self.file.write(content[:9])

    with MetricsWriter(tmp_path) as writer:
        writer.log(1, {"loss": 1.0})
        writer._metrics._file = Almost(writer._metrics._file)
        with pytest.warns(RuntimeWarning, match="it is kept"):  # noqa: PT031
            writer.log(2, {"loss": 2.0})
            writer.log(3, {"loss": 3.0})
        assert not (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n")
        resumed_in(tmp_path / "resumed", tmp_path, writer.flush())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"step": 2, "time"\n', r"metrics.jsonl, line 2: not JSON \(.*\); fix or delete the line$"),
        (b"\xff\xfe\n", r"metrics.jsonl, line 2: not JSON \(.*\); fix or delete the line$"),
        (b"[2]\n", r"line 2: expected a JSON object, found '\[2\]'; fix or delete the line$"),
        (b'{"loss": 1}\n', r"metrics.jsonl, line 2: the row has no step; fix or delete the line$"),
    ],
)
def test_a_damaged_log_is_named_with_file_and_line_when_a_run_resumes(line, message, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "time": 1.0}\n' + line + b'{"step": 3, "time": 3.0}\n')
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=message):
        MetricsWriter(tmp_path, resumed_at=3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
