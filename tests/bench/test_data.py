import json

from bench.data import make_rows, run_data


def test_each_start_has_a_row_and_both_starts_give_the_same_tokens(tmp_path):
    table = run_data([20], None, 1, tmp_path).splitlines()
    (file,) = tmp_path.iterdir()
    first, second = map(json.loads, file.read_text().splitlines())
    assert (first["start"], second["start"]) == ("first", "second")
    assert first["tokens"] == second["tokens"] > 20 * 200
    assert (first["fingerprint"], first["sum"]) == (second["fingerprint"], second["sum"])
    assert len(table) == 4
    assert table[2].startswith(f"| here | 20 | {first['tokens']:,} | first | ")


def test_the_rows_depend_on_the_seed_only(tmp_path):
    texts = []
    for seed in (0, 0, 1):
        folder = tmp_path / str(len(texts))
        folder.mkdir()
        make_rows(folder, 3, seed)
        texts.append((folder / "pairs.jsonl").read_text())
    assert texts[0] == texts[1] != texts[2]
    assert [set(json.loads(line)) for line in texts[0].splitlines()] == [{"prompt", "chosen", "rejected"}] * 3
