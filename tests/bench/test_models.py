from contextlib import nullcontext

import pytest
import torch

from bench.models import checks
from bench.models.checks import CHECKS, DifferenceError, _compare, _differences
from bench.models.configs import causal_types, tiny_config
from bench.models.sweep import page, read_rows, summary, verdict, write_rows
from fastrlhf.models.small import VOCAB
from tests import tiny

RIGHT = {name: {"verdict": "right"} for name in CHECKS}


def row(kind: str, **others) -> dict:
    common = {"model_type": kind, "alone": "", "checks": RIGHT, "seconds": 1.0, "torch": "2.11", "transformers": "5.24"}
    return common | others


ROWS = [
    row("a"),
    row("b", alone="mixes sequences"),
    row("c", checks=RIGHT | {"lora": {"verdict": "wrong", "text": "lora differ by 1"}}),
    row("c2", checks={"packed": {"verdict": "right"}}),
    row("d", checks={}, refused="D: set x | y"),
    row("e", checks={}, crashed="KeyError: 'z'"),
    row(
        "f", checks=RIGHT | {"lora": {"verdict": "refused", "text": "?"}, "packed": {"verdict": "crashed", "text": "?"}}
    ),
]


def test_the_verdict_of_a_row_is_its_worst_check():
    assert [verdict(each) for each in ROWS] == ["right", "right", "wrong", "right", "refused", "crashed", "crashed"]
    assert summary(ROWS) == "2 crashed, 1 refused, 3 right, 1 wrong"


def test_rows_are_written_in_order_and_read_again(tmp_path):
    path = tmp_path / "rows" / "models.jsonl"
    write_rows({each["model_type"]: each for each in reversed(ROWS)}, path)
    assert list(read_rows(path).values()) == ROWS
    assert read_rows(tmp_path / "none") == {}


def test_the_page_has_a_line_per_type_with_the_versions_on_top():
    lines = page(ROWS).splitlines()
    assert lines[0].startswith("Measured with transformers 5.24 and torch 2.11")
    assert lines[4:] == [
        "| `a` | together | yes | yes | yes | yes | yes | yes |",
        "| `b` | one sequence at a time | yes | yes | yes | yes | yes | yes |",
        "| `c` | together | yes | yes | yes | yes | yes | no |",
        "| `c2` | together | yes | not run | not run | not run | not run | not run |",
        "| `d` | refused: D: set x / y | | | | | | |",
        "| `e` | refused: KeyError: 'z' | | | | | | |",
        "| `f` | together | no | yes | yes | yes | yes | no |",
    ]


def test_a_configuration_is_small_and_has_every_kind_of_layer():
    assert {"llama", "qwen3_5_text", "gemma3"} <= {*causal_types()}
    config = tiny_config("qwen3_5_text")
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (VOCAB, 32, 2)
    assert sorted(config.layer_types) == ["full_attention", "linear_attention"]
    assert tiny_config("gemma3").text_config.sliding_window == 4


def test_a_number_that_differs_is_reported():
    numbers = torch.tensor([1.0, 2.0]), {"w": torch.tensor([1.0, -4.0])}
    assert _differences(numbers, numbers) == {"values": 0.0, "gradients": 0.0}
    with pytest.raises(DifferenceError, match=r"^values differ by 0\.5$"):
        _differences((torch.tensor([1.0, 2.5]), numbers[1]), numbers)
    with pytest.raises(DifferenceError, match=r"^gradients differ by 0\.25$"):
        _differences((numbers[0], {"w": torch.tensor([1.0, -3.0])}), numbers)
    with pytest.raises(DifferenceError, match="packed and plain model have gradients for different parameters"):
        _differences((numbers[0], {"v": torch.tensor([1.0])}), numbers)


@pytest.mark.parametrize(("error", "right"), [(2e-4, True), (4e-4, False)])
def test_gradients_that_float32_cannot_hold_are_judged_by_float64(monkeypatch, error, right):
    """Simulates a plain model whose float32 gradients differ from its float64 gradients by 1e-4."""
    found = iter([4 * error, -4e-4, 0.0])  # errors of the pack, and of the plain model in float32 and float64
    numbers = lambda *_: (torch.zeros(1), {"w": torch.tensor([1.0, -4.0]) + next(found)})  # noqa: E731
    monkeypatch.setattr(checks, "_gradients", numbers)
    monkeypatch.setattr(checks, "_in_float64", lambda model: model)
    with nullcontext() if right else pytest.raises(DifferenceError, match=r"^gradients differ by 0\.0004$"):
        assert _compare(tiny.policy(), [], [])["gradients"] == pytest.approx(error, rel=1e-2)
