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
    # Bytes per parameter: weight, gradient and two moments of 4 each. One more gradient tensor may exist for a moment.
    assert 16 <= plain["bytes"] < 17
    # Bytes per parameter: bfloat16 weight and gradient 2 + 2, 8-bit moments 1 + 1, float32 copies of both 4 + 4.
    # All 24 matrices form one bucket and are copied at once. Rounding also needs noise and new values of one matrix.
    assert 6 + 8 < smallest["bytes"] < 19
    assert table[2].startswith("| torch |  | 16")
