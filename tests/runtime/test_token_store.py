import os
from pathlib import Path

import numpy as np
from huggingface_hub import constants

from fastrlhf.data.examples import Origin
from fastrlhf.data.token_report import TokenReport
from fastrlhf.data.token_set import TokenSet
from fastrlhf.runtime.token_store import Part, entries, read_part, remove, store_folder, write_part
from fastrlhf.types import TokenizedExample

ROWS = [TokenizedExample(prompt=[3], chosen=[4, 1], margin=0.1, row=0), TokenizedExample(prompt=[5, 6], row=7)]
REPORT = TokenReport(
    num_examples=3,
    num_kept=2,
    max_length=8,
    eos_added=1,
    eos_present=0,
    responses_cut=0,
    prompts_cut=0,
    dropped={"empty_prompt": 1},
    firsts={"empty_prompt": "row 4, \ud83d"},  # half a surrogate pair, as some files contain
    ends=("</s>",),
)


def part() -> Part:
    origin = Origin(sources=("rows.jsonl",), lines=["rows.jsonl: 2 rows"], read=frozenset({"prompt", "chosen"}))
    return Part(rows=TokenSet.of(ROWS), report=REPORT, loaded="rows", origin=origin, earlier_turns=4)


def test_an_entry_gives_back_rows_and_facts_and_maps_its_tokens(tmp_path):
    assert read_part(tmp_path, "a1") is None
    written = write_part(tmp_path, "a1", part(), "rows.jsonl")
    found = read_part(tmp_path, "a1")
    for each in (written, found):
        assert each == part()
        (block,) = each.rows.blocks
        assert isinstance(block.tokens.base, np.memmap)
        assert not block.tokens.flags.writeable
    assert written.rows.known_fingerprint.startswith("2 rows of hash ")
    assert found.rows.known_fingerprint == written.rows.known_fingerprint
    assert (tmp_path / "a1" / "tokens.npy").stat().st_size == 128 + 4 * 5


def test_entries_are_listed_the_last_used_first_and_can_be_removed(tmp_path):
    for key in ("a1", "b2"):
        write_part(tmp_path, key, part(), f"rows {key}")
    (tmp_path / ".c3.1.partial").mkdir()
    for key, time in (("a1", 100), ("b2", 300), (".c3.1.partial", 200)):
        os.utime(tmp_path / key, (time, time))
    listed = entries(tmp_path)
    assert [(entry.key, entry.told, entry.num_rows, entry.num_tokens) for entry in listed] == [
        ("b2", "rows b2", 2, 5),
        (".c3.1.partial", "interrupted write", 0, 0),
        ("a1", "rows a1", 2, 5),
    ]
    assert listed[0].num_bytes == sum(file.stat().st_size for file in (tmp_path / "b2").iterdir())
    mapped = read_part(tmp_path, "a1")
    assert entries(tmp_path)[0].key == "a1"  # reading counts as a use
    remove(tmp_path, ["a1", ".c3.1.partial"])
    assert [path.name for path in tmp_path.iterdir()] == ["b2"]
    assert mapped.rows == ROWS  # rows that a run has mapped stay readable after the entry was removed


def test_old_remains_of_an_interrupted_write_are_deleted_by_the_next_write(tmp_path):
    for name, age in ((".old.1.partial", 1e6), (".new.2.partial", 0)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, times=(path_time := (tmp_path / name).stat().st_mtime - age, path_time))
    write_part(tmp_path, "a1", part(), "rows")
    assert {path.name for path in tmp_path.iterdir()} == {"a1", ".new.2.partial"}


def test_the_store_is_beside_the_caches_of_the_hub_unless_a_folder_is_given(monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", "/cache")
    assert store_folder("") == Path("/cache/fastrlhf/tokens")
    assert store_folder("~/here") == Path.home() / "here"
