import os

import pytest

from fastrlhf.cli import main
from fastrlhf.runtime.token_store import write_part
from tests.runtime.test_token_store import part


@pytest.fixture
def store(tmp_path):
    for key, time in (("3f2a" + "0" * 28, 1e9), ("3f2b" + "0" * 28, 2e9)):
        write_part(tmp_path, key, part(), f"rows.jsonl (train, {key[:4]}), tokenizer tiny")
        os.utime(tmp_path / key, (time, time))
    return tmp_path


def run(capsys, store, *arguments: str) -> tuple[int, list[str]]:
    code = main(["cache", "--dataset_cache_dir", str(store), *arguments])
    output = capsys.readouterr()
    return code, (output.out + output.err).splitlines()


def test_entries_are_listed_with_their_size_and_origin(capsys, store):
    code, lines = run(capsys, store)
    assert code == 0
    assert [line.split("  ")[0] for line in lines[:2]] == ["3f2b00000000", "3f2a00000000"]
    assert lines[1].endswith(" MiB, 2 rows, 5 tokens: rows.jsonl (train, 3f2a), tokenizer tiny")
    assert lines[2].startswith(f"{store}: 2 entries, 0.")
    assert run(capsys, store / "none")[1] == [f"{store / 'none'}: 0 entries, 0.0 MiB"]


def test_entries_are_deleted_by_the_first_letters_of_their_keys_or_all_together(capsys, store):
    code, lines = run(capsys, store, "--clear", "3f2a")
    assert code == 0
    assert lines[0] == "deleted 3f2a00000000: 0.0 MiB, rows.jsonl (train, 3f2a), tokenizer tiny"
    assert [path.name[:4] for path in store.iterdir()] == ["3f2b"]
    (store / ".3f2c.9.partial").mkdir()
    assert run(capsys, store, "--clear", "all")[1][-1] == f"{store}: 0 entries, 0.0 MiB"
    assert list(store.iterdir()) == []


@pytest.mark.parametrize(("name", "number"), [("3f2", 2), ("9", 0), ("all 3f2a", 0)])
def test_a_key_that_fits_no_entry_or_several_is_refused_and_nothing_is_deleted(capsys, store, name, number):
    code, lines = run(capsys, store, "--clear", *name.split())
    assert code == 2
    name = name.split()[0]
    told = f"all, or the first letters of the key of one entry; it fits {number} entries"
    assert lines == [f"fastrlhf cache: clear: must be {told}; got {name!r}"]
    assert len(list(store.iterdir())) == 2
