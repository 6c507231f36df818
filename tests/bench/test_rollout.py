import json

from bench.rollout import run_rollout


def test_a_group_prefills_its_shared_prefix_once(tmp_path):
    table = run_rollout([1, 2], episodes=2, slots=2, rounds=1, device="cpu", folder=tmp_path)
    [file] = tmp_path.iterdir()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["group_size"], row["reset_group"]) for row in rows] == [(1, "point"), (2, "point"), (2, "response")]
    assert rows[0]["prefilled"] == rows[0]["prefix_tokens"]
    for row in rows[1:]:
        assert row["prefilled"] < 0.6 * row["prefix_tokens"]
    assert all(row["seconds"] > 0 and row["judge_seconds"] > 0 and 2 <= row["sampled"] <= 106 for row in rows)
    assert len(table.splitlines()) == 2 + len(rows)
