import gzip
import json
import logging
import os
from pathlib import Path

import datasets
import pyarrow
import pytest

from fastrlhf.data.rows import read_rows, shorten


def read(source: Path | str, split: str = "train", config_name: str | None = None) -> list[object]:
    return [row for _, row in read_rows(str(source), split, config_name)]


def places(source: Path) -> list[str]:
    return [place for place, _ in read_rows(str(source), "train", None)]


def write(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def test_the_same_rows_are_read_from_every_kind_of_file(tmp_path):
    rows = [{"prompt": "007", "completion": 'a, "b"\nc'}, {"prompt": "NA", "completion": "\u00fc"}]
    lines = write(tmp_path / "a.jsonl", rows)
    (tmp_path / "lines.json").write_text(lines.read_text())
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "a.csv").write_text(
        'prompt,completion\r\n007,"a, ""b""\nc"\r\nNA,\u00fc\r\n', encoding="utf-8-sig", newline=""
    )
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    for file in list(tmp_path.iterdir()):
        if file.suffix != ".parquet":
            (tmp_path / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
            (tmp_path / f"{file.name}.zst").write_bytes(zstd(file.read_bytes()))
    for file in list(tmp_path.iterdir()):
        (tmp_path / f"upper {file.name.upper()}").write_bytes(file.read_bytes())
    files = sorted(tmp_path.iterdir())
    assert len(files) == 26
    for file in files:
        assert read(file) == rows, file.name


def test_the_place_of_a_row_is_its_file_and_line(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    assert places(write(tmp_path / "a.jsonl", rows)) == ["a.jsonl line 1", "a.jsonl line 2"]
    (tmp_path / "gaps.jsonl").write_text('\n{"prompt": "a"}\n \n{"prompt": "b"}')
    assert places(tmp_path / "gaps.jsonl") == ["gaps.jsonl line 2", "gaps.jsonl line 4"]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert places(tmp_path / "a.json") == ["a.json item 0", "a.json item 1"]
    (tmp_path / "a.csv").write_text('prompt\n"a\na"\n\nb\n')  # a line break inside quotes does not end a row
    assert places(tmp_path / "a.csv") == ["a.csv line 3", "a.csv line 5"]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    assert places(tmp_path / "a.parquet") == ["a.parquet row 0", "a.parquet row 1"]


def test_a_line_separator_inside_a_text_does_not_end_a_row(tmp_path):
    row = {"prompt": "a\u2028b\u0085c\x0cd"}
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
        assert read(tmp_path / name) == [row]


def test_an_odd_value_affects_no_other_row(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": 3}, ["b"], None, {"other": {"deep": [1, None]}}]
    assert read(write(tmp_path / "a.jsonl", rows)) == rows


def test_a_cell_may_be_longer_than_the_csv_modules_default(tmp_path):
    (tmp_path / "a.csv").write_text(f"prompt\n{'a' * 200_000}\n")
    assert len(read(tmp_path / "a.csv")[0]["prompt"]) == 200_000


def test_a_home_folder_is_filled_in(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.jsonl", [{"prompt": "a"}])
    assert read("~/a.jsonl") == [{"prompt": "a"}]


def test_a_folder_has_the_splits_that_its_file_names_say(tmp_path):
    write(tmp_path / "train-00000-of-00002.jsonl", [{"prompt": "a"}])
    write(tmp_path / "train-00001-of-00002.jsonl", [{"prompt": "b"}])
    write(tmp_path / "test.jsonl", [{"prompt": "c"}])
    (tmp_path / "README.md").write_text("about")
    assert read(tmp_path) == [{"prompt": "a"}, {"prompt": "b"}]
    assert read(tmp_path, "test") == [{"prompt": "c"}]
    with pytest.raises(ValueError, match=r"no split 'validation' among \['test', 'train'\]"):
        read(tmp_path, "validation")


def test_a_split_of_a_folder_has_files_of_every_ending(tmp_path):
    write(tmp_path / "train-1.jsonl", [{"prompt": "a"}])
    (tmp_path / "train-2.csv").write_text("prompt\nb\n")
    write(tmp_path / "train-3.JSONL", [{"prompt": "c"}])
    (tmp_path / "train-4.jsonl.zst").write_bytes(zstd(b'{"prompt": "d"}\n'))
    write(tmp_path / "train-5.ndjson", [{"prompt": "e"}])
    datasets.Dataset.from_list([{"prompt": "f"}]).to_parquet(tmp_path / "train-6.parquet")
    assert [row["prompt"] for row in read(tmp_path)] == ["a", "b", "c", "d", "e", "f"]


def test_names_of_splits_and_endings_may_have_capitals(tmp_path):
    write(tmp_path / "Train.jsonl", [{"prompt": "a"}])
    write(tmp_path / "TRAIN-2.Json", [{"prompt": "b"}])
    write(tmp_path / "Test.JSONL", [{"prompt": "c"}])
    prompts = {split: sorted(row["prompt"] for row in read(tmp_path, split)) for split in ("train", "test")}
    assert prompts == {"train": ["a", "b"], "test": ["c"]}


def test_data_files_of_a_folder_that_are_not_read_are_named(tmp_path, caplog):
    write(tmp_path / "train.jsonl", [{"prompt": "a"}])
    with caplog.at_level(logging.WARNING, "fastrlhf"):
        assert read(tmp_path) == [{"prompt": "a"}]
    assert not caplog.records
    write(tmp_path / "more.jsonl", [{"prompt": "b"}])
    write(tmp_path / ".hidden" / "rows.jsonl", [{"prompt": "c"}])
    for name in ("train.txt", "README.md"):
        (tmp_path / name).write_text("about")
    with caplog.at_level(logging.WARNING, "fastrlhf"):
        assert read(tmp_path) == [{"prompt": "a"}]
    (told,) = caplog.messages
    assert told.startswith(
        f"{tmp_path}: files that are not read: more.jsonl, train.txt; the others form the splits train. "
    )


def test_a_file_that_two_rules_put_into_a_split_is_read_once(tmp_path):
    write(tmp_path / "train" / "train-1" / "a.jsonl", [{"prompt": "a"}])
    assert read(tmp_path) == [{"prompt": "a"}]


def test_brackets_and_other_characters_of_patterns_are_part_of_a_name(tmp_path):
    folder = tmp_path / "run[1]*?{a}"
    write(folder / "train[ab].jsonl", [{"prompt": "a"}])
    datasets.Dataset.from_list([{"prompt": "b"}]).to_parquet(folder / "train-[x]?.parquet")
    write(tmp_path / "run1" / "traina.jsonl", [{"prompt": "wrong"}])
    write(folder / "traina.jsonl", [{"prompt": "left out"}])
    assert read(folder / "train[ab].jsonl") == [{"prompt": "a"}]
    assert read(folder / "train-[x]?.parquet") == [{"prompt": "b"}]
    (folder / "traina.jsonl").unlink()
    (folder / "train[ab].jsonl").rename(folder / "train-[ab].jsonl")
    assert read(folder) == [{"prompt": "a"}, {"prompt": "b"}]


def test_a_folder_that_save_to_disk_wrote_is_read(tmp_path):
    rows = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]
    dataset = datasets.Dataset.from_list(rows)
    dataset.save_to_disk(tmp_path / "one[1]")
    datasets.DatasetDict({"train": dataset, "held": dataset.select([1])}).save_to_disk(tmp_path / "two")
    assert read(tmp_path / "one[1]") == rows
    assert places(tmp_path / "two") == ["two row 0", "two row 1"]
    assert read(tmp_path / "two", "held") == rows[1:]
    with pytest.raises(ValueError, match=r"no split 'test' among \['held', 'train'\]"):
        read(tmp_path / "two", "test")
    with pytest.raises(ValueError, match=r"save_to_disk wrote the folders inside it; name one: one\[1\]$"):
        read(tmp_path)
    dataset.select([]).save_to_disk(tmp_path / "empty")
    with pytest.raises(ValueError, match="not a readable folder of save_to_disk: it has no rows"):
        read(tmp_path / "empty")
    for file in (tmp_path / "one[1]").glob("*.arrow"):
        file.unlink()
    with pytest.raises(ValueError, match="not a readable folder of save_to_disk"):
        read(tmp_path / "one[1]")


@pytest.mark.parametrize(
    ("split", "rows"),
    [
        ("train[:3]", "abc"),
        ("train[-2:]", "ij"),
        ("train[10%:30%]", "bc"),
        ("train[:99]", "abcdefghij"),
        ("train[8:]+test[:1]", "ijx"),
        ("test+train[:1]", "xya"),
    ],
)
def test_slices_of_splits_are_those_of_datasets(tmp_path, split, rows):
    write(tmp_path / "train.jsonl", [{"prompt": letter} for letter in "abcdefghij"])
    write(tmp_path / "test.jsonl", [{"prompt": letter} for letter in "xy"])
    assert "".join(row["prompt"] for row in read(tmp_path, split)) == rows
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "test")}
    theirs = datasets.load_dataset("json", data_files=files, split=split, cache_dir=str(tmp_path / "cache"))
    assert "".join(theirs["prompt"]) == rows


def test_a_slice_that_cannot_be_understood_is_refused(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"prompt": "a"}])
    with pytest.raises(ValueError, match=r"split 'train\[::2\]' cannot be understood: a slice looks"):
        read(file, "train[::2]")
    with pytest.raises(ValueError, match=r"no split 'test' among \['train'\]"):
        read(file, "test[:3]")


def test_several_files_are_read_as_one(tmp_path):
    first = write(tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    (tmp_path / "b.csv").write_text("prompt\nc\n")
    names = [str(first), str(tmp_path / "b.csv")]
    assert [place for place, _ in read_rows(names, "train", None)] == [
        "a.jsonl line 1",
        "a.jsonl line 2",
        "b.csv line 2",
    ]
    assert [row["prompt"] for _, row in read_rows(tuple(names), "train[1:]", None)] == ["b", "c"]
    with pytest.raises(ValueError, match=r"missing.jsonl: no such file or folder"):
        list(read_rows([*names, "missing.jsonl"], "train", None))


def test_the_hub_slices_by_itself(monkeypatch):
    asked = []

    def load_dataset(name, config_name, split):
        asked.append(split)
        return datasets.Dataset.from_list([{"prompt": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("owner/name", "train[:1]") == [{"prompt": "a"}]
    assert asked == ["train[:1]"]


def test_a_single_file_is_the_split_train(tmp_path):
    with pytest.raises(ValueError, match=r"no split 'test' among \['train'\] \(a single file is the split 'train'\)"):
        read(write(tmp_path / "a.jsonl", [{"prompt": "a"}]), "test")


def test_a_folder_with_configurations_needs_the_name_of_one(tmp_path):
    for name in ("one", "two"):
        write(tmp_path / name / "train.jsonl", [{"prompt": name}])
    cards = [f"- config_name: {name}\n  data_files: {name}/train.jsonl" for name in ("one", "two")]
    (tmp_path / "README.md").write_text("\n".join(["---", "configs:", *cards, "---", ""]))
    assert read(tmp_path, config_name="two") == [{"prompt": "two"}]
    for wrong in (None, "three"):
        with pytest.raises(ValueError, match=r"config_name is wrong.*'one', 'two'"):
            read(tmp_path, config_name=wrong)


def test_a_folder_without_data_files_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="not a folder of data files"):
        read(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match="no file that ends in one of"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_changed_content_at_the_same_path_is_read_again(tmp_path, name):
    for prompt in ("old", "new"):
        if name.endswith("parquet"):
            datasets.Dataset.from_list([{"prompt": prompt}]).to_parquet(tmp_path / name)
        else:
            write(tmp_path / name, [{"prompt": prompt}])
        os.utime(tmp_path / name, (1, 1))
        assert read(tmp_path / name) == [{"prompt": prompt}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}\n', "a.jsonl line 2: not UTF-8"),
        ("a.jsonl", '{"prompt": "a"}\n'.encode("utf-16"), "a.jsonl line 1: not UTF-8"),
        ("a.csv", b"prompt\na\n\xe9\n", "a.csv line 3: not UTF-8"),
        ("a.jsonl", b'{"prompt": "a"}\n\n{"prompt": "b"\n', "a.jsonl line 3, column 15: broken JSON"),
        ("a.json", b'[{"prompt": "a"},\n {"prompt": }]', "a.json line 2, column 13: broken JSON"),
        ("a.json", b'{"data":\n[]}', "a.json line 1.*one object per line"),
        ("a.csv", b"prompt,completion\na,b,c\n", "a.csv line 2: broken CSV: 3 cells under 2 columns"),
        ("a.csv", b'prompt\n"a\nb\n', "a.csv line 3: broken CSV"),
        ("a.parquet", b"PAR1 not", "a.parquet: not a readable Parquet file"),
        ("a.jsonl.gz", b"not gzip", "cannot be read, or is truncated: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 99, mtime=0)[:-12], "cannot be read, or is truncated"),
        ("a.jsonl.zst", b"not zstd", "cannot be read, or is truncated"),
        ("a.jsonl.zst", zstd(b'{"prompt": "a"}\n' * 99)[:-6], "cannot be read, or is truncated: Truncated"),
        ("a.txt", b"hello", "a data file ends in one of .jsonl"),
        ("a.py", b"1 / 0", "a.py: dataset scripts are not run; save their rows, for example with Dataset.to_parquet"),
    ],
)
def test_a_broken_file_is_one_clear_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path / name)
    assert type(caught.value) is ValueError
    assert caught.value.__cause__ is None


def test_rows_of_the_hub_have_its_name_as_their_place(monkeypatch):
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    assert list(read_rows("owner/name", "train", None)) == [
        ("owner/name row 0", rows[0]),
        ("owner/name row 1", rows[1]),
    ]


def test_errors_of_the_hub_become_one_line_value_errors(monkeypatch):
    def load_dataset(*arguments, **keywords):
        raise ConnectionError("Couldn't reach 'owner/name'\n  on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        ValueError, match=r"owner/name: not a local file or folder.* reach 'owner/name' on the Hub \(check"
    ) as caught:
        read("owner/name")
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("source", ["/nowhere/a", "./nowhere", "~/nowhere", "a/b/c", "owner/missing.jsonl"])
def test_a_name_that_looks_like_a_path_is_never_searched_on_the_hub(source, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(ValueError, match="no such file or folder"):
        read(source)


def test_a_long_text_is_shortened_to_one_line():
    assert shorten("a\n  b\tc ") == "a b c"
    assert shorten("abcdef", width=4) == "abcd..."
    assert shorten("abcd", width=4) == "abcd"
