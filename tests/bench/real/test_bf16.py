"""Tests of `python -m bench real bf16` on a tiny model."""

import json

import pytest
import torch

from bench.real import bf16
from bench.real.bf16 import mean_loss, packs_of, rounding, run_bf16
from fastrlhf.models.loading import load_policy
from fastrlhf.types import Example
from tests import tiny


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return tiny.save_policy(tmp_path_factory.mktemp("policy"))


def test_the_loss_and_the_rounding_are_those_of_full_logits(policy):
    examples = [Example(prompt=e.prompt, chosen=e.chosen, row=e.row) for e in tiny.examples(6)]
    losses = {}
    for dtype in ("float32", "bfloat16"):
        model, found = load_policy(policy, dtype=dtype), []
        for example in examples:
            prompt, response = tiny.ids(example.prompt), [*tiny.ids(example.chosen), tiny.EOS]
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].float()
            found += (-logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]).tolist()
        losses[dtype] = torch.tensor(found)
    packs = packs_of(policy, examples)
    assert len(packs) == 2
    assert mean_loss(load_policy(policy), packs) == pytest.approx(losses["float32"].mean().item(), rel=1e-5)
    error = rounding(policy, packs)
    expected = (losses["bfloat16"] - losses["float32"]).abs()
    assert error["tokens"] == len(expected)
    assert error["logprob_mean"] == pytest.approx(expected.mean().item(), rel=0.5)
    assert 0 < error["gradient"] < 0.2


def test_a_run_leaves_what_it_evaluated_and_bfloat16_would_lose_a_part_of_an_adapter(policy, monkeypatch, tmp_path):
    rows = [{"prompt": e.prompt, "chosen": e.chosen} for e in tiny.examples(40)]
    monkeypatch.setattr(bf16, "short_pairs", lambda form, count: rows[:count])
    table = run_bf16(policy, tmp_path, steps=4).splitlines()
    (file,) = tmp_path.glob("*.jsonl")
    error, full, lora = map(json.loads, file.read_text().splitlines())
    assert [row["run"] for row in (error, full, lora)] == ["rounding", "all weights", "lora"]
    assert error["logprob_max"] > error["logprob_mean"] > 0
    assert full["saved_bfloat16"] == pytest.approx(full["evaluated"], abs=1e-6)
    assert lora["saved_float32"] == pytest.approx(lora["evaluated"], abs=0.02)
    gain = lora["before"] - lora["evaluated"]
    assert lora["share_lost"] == pytest.approx((lora["saved_bfloat16"] - lora["evaluated"]) / gain)
    assert table[-1].startswith(f"| lora | {lora['before']:.4f} | {lora['evaluated']:.4f} | ")
