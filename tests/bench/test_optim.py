import json

import pytest

from bench import optim


def test_a_row_per_setting_and_no_setting_below_what_its_tensors_take(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(optim, "SETTINGS", optim.SETTINGS[:1] + optim.SETTINGS[-1:])
    table = optim.run_optim(24, "cpu", tmp_path).splitlines()
    (file,) = tmp_path.iterdir()
    plain, smallest = map(json.loads, file.read_text().splitlines())
    assert [row["parameters"] for row in (plain, smallest)] == [24 * 1024**2] * 2
    # Weight, gradient and two moments of 4 bytes; the first gradient of an update may meet the last of the one before.
    assert 16 <= plain["bytes"] < 17
    # 2 and 2 of bfloat16, 1 and 1 of 8 bits; all 24 matrices in float32, with their gradients, as they are one bucket;
    # the noise and the new values of one.
    assert 6 + 8 < smallest["bytes"] < 19
    assert table[2].startswith("| torch |  | 16")
