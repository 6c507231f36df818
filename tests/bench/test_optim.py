import json

import pytest

from bench import optim


def test_every_setting_has_a_row_with_at_least_the_bytes_of_its_tensors(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(optim, "SETTINGS", optim.SETTINGS[:1] + optim.SETTINGS[-1:])
    table = optim.run_optim(24, "cpu", tmp_path).splitlines()
    (file,) = tmp_path.iterdir()
    plain, smallest = map(json.loads, file.read_text().splitlines())
    assert [row["parameters"] for row in (plain, smallest)] == [24 * 1024**2] * 2
    # Weight, gradient and two moments of 4 bytes each; a new gradient may exist together with the last old one.
    assert 16 <= plain["bytes"] < 17
    # bfloat16 weight and gradient (2 + 2), 8-bit moments (1 + 1). The 24 matrices are one bucket, so float32 copies of
    # all weights and gradients exist (8), and noise and new values of one matrix.
    assert 6 + 8 < smallest["bytes"] < 19
    assert table[2].startswith("| torch |  | 16")
