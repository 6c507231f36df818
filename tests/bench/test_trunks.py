import json

from bench.trunks import run_trunks


def test_both_layouts_are_timed_and_shared_trunks_compute_fewer_tokens(tmp_path):
    table = run_trunks([2], episodes=2, rounds=1, device="cpu", folder=tmp_path)
    [file] = tmp_path.iterdir()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["reset_group"], row["share_trunks"]) for row in rows] == [
        (kind, share) for kind in ("point", "response") for share in (False, True)
    ]
    for plain, shared in ((rows[0], rows[1]), (rows[2], rows[3])):
        assert 0.5 * plain["tokens"] < shared["tokens"] < 0.75 * plain["tokens"]
        assert min(plain["seconds"], shared["seconds"]) > 0
    assert len(table.splitlines()) == 6
