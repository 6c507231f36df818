import json
import os
from types import SimpleNamespace

import torch

from bench import engines
from bench.engines import PaddedGenerate, run_engines
from bench.trunks import MODEL
from fastrlhf.config import DRPOConfig
from fastrlhf.rollout.engine import TransformersEngine
from fastrlhf.types import Prefix
from tests import tiny


def test_a_row_for_each_of_three_engines(tmp_path, monkeypatch):
    def in_place(config, policy, eos):
        """Opens the built-in engine, in this process, in place of vLLM."""
        built_in = TransformersEngine.of(config, policy, eos)
        return SimpleNamespace(generate=built_in.generate, children=[SimpleNamespace(pid=os.getpid())])

    monkeypatch.setattr(engines, "open_vllm", in_place)
    table = run_engines(2, rounds=1, device="cpu", dtype="float32", folder=tmp_path, model=MODEL)
    [file] = tmp_path.iterdir()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["engine"] for row in rows] == ["vllm", "transformers", "padded generate"]
    assert rows[0]["tokens"] == rows[1]["tokens"]
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert len(table.splitlines()) == 2 + len(rows)


def test_padded_generate_counts_up_to_the_end_or_the_limit(monkeypatch):
    """The prefixes have 2 and 3 tokens, and the episodes at most 4 and 3. The second episode ends at its second
    token."""
    policy = tiny.policy()
    given = {}

    def generate(ids, attention_mask, **settings):
        given.update(ids=ids.tolist(), mask=attention_mask.tolist(), **settings)
        return torch.cat([ids, torch.tensor([[5, 6, 7, 8], [5, 0, 0, 0]])], dim=1)

    monkeypatch.setattr(policy, "generate", generate)
    prefixes = [
        Prefix(token_ids=[7, 8], num_reset=0, row=0, episode=0),
        Prefix(token_ids=[7, 8, 9], num_reset=1, row=1, episode=1),
    ]
    config = DRPOConfig(response_length=4, temperature=0.5)
    assert PaddedGenerate(model=policy, config=config).count(prefixes) == 4 + 2
    assert given["ids"] == [[0, 7, 8], [7, 8, 9]]
    assert given["mask"] == [[0, 1, 1], [1, 1, 1]]
    assert (given["max_new_tokens"], given["temperature"], given["top_k"]) == (4, 0.5, 0)
