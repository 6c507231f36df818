"""Loads models and rows in parts, exchanges rows, and makes different numbers of passes; tests/ranks.py calls it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from fastrlhf.algorithms import experience, reference, saved_logprobs
from fastrlhf.config import SFTConfig
from fastrlhf.data.packing import pack, sequence
from fastrlhf.distributed import ranks, rows
from fastrlhf.distributed.rows import SpreadRows
from fastrlhf.models import adapters, loading
from fastrlhf.models.forward import token_logprobs
from fastrlhf.models.loading import load_policy
from fastrlhf.models.parts import Part
from fastrlhf.models.sharding import full, own_pace, shard
from fastrlhf.rollout.engine import TransformersEngine
from fastrlhf.rollout.shared import SharedEngine
from fastrlhf.runtime import dataset
from fastrlhf.runtime.inputs import open_inputs
from fastrlhf.types import PackedBatch, Prefix
from tests import tiny


def loaded_parts(place: Path, families: Sequence[str]) -> dict[str, Any]:
    """Loads each model twice, in parts and as a whole, and adds an adapter. Shards the model loaded in parts, with a
    reference that shares its weights. Returns the number of entries of the largest unsharded weight in the backbone
    before sharding, the names of weights that differ afterwards, and the largest differences of log-probs."""
    found: dict[str, Any] = {}
    batch = pack([sequence([5, 6, 7], [8, 9])])
    for name in ("policy", *families):
        model = load_policy(str(place / name))
        with patch.object(loading, "loading_parts", lambda device: nullcontext()):
            plain = load_policy(str(place / name))
        for each in (model, plain):
            adapters.add_adapter(each, SFTConfig(use_peft=True, lora_r=2), "")
        matrices = [(n, p) for n, p in model.named_parameters() if "lora" not in n]
        prints = [adapters.base_fingerprint(each) for each in (model, plain)]
        reference = adapters.frozen_copy(model)
        before = [n for n, p in matrices if not isinstance(p, Part)]
        shard(model, reference)
        with torch.no_grad():
            values = [token_logprobs(each, batch).logprob for each in (model, reference, plain)]
        pairs = zip(model.named_parameters(), plain.parameters(), strict=True)
        found[name] = {
            "whole": before,
            "fingerprint": prints[0] == prints[1],
            "different": [n for (n, ours), theirs in pairs if not torch.equal(full(ours), theirs)],
            "logprob": max((value - values[-1]).abs().max().item() for value in values),
        }
    return found


def paces() -> dict[str, Any]:
    """Samples from a sharded model three times: five episodes; one episode, which only one rank samples; and with an
    error on rank 1. Returns whether the samples equal those of the unsharded model, and the error."""
    model, plain = tiny.policy("qwen3"), tiny.policy("qwen3")
    shard(model)
    prefixes = [Prefix(token_ids=[5, 6, 7 + i], num_reset=0, row=i, episode=i) for i in range(5)]
    engines = [
        TransformersEngine(model=each, eos_token_id=tiny.EOS, response_length=6, temperature=1.0, seed=3, batch_size=2)
        for each in (model, plain)
    ]
    expected, ours = engines[1].generate(prefixes), SharedEngine(engine=engines[0], model=model, response_length=6)
    five, one = ours.generate(prefixes), ours.generate(prefixes[:1])

    def fail_on_rank_1() -> None:
        with own_pace(model):
            if dist.get_rank():
                raise ValueError("of rank 1")
            token_logprobs(model, pack([sequence([5], [8, 9])]))

    error = "none"
    try:
        fail_on_rank_1()
    except ValueError as raised:
        error = str(raised)
    return {
        "five": [x.completion for x in five] == [x.completion for x in expected],
        "one": one[0].completion == expected[0].completion,
        "error": error,
        "held": sum(weight.numel() for weight in model.parameters() if not isinstance(weight, DTensor)),
    }


def spread_rows() -> dict[str, Any]:
    """Reads rows of a tensor that is spread over the two ranks: rows that this rank holds, all rows of the other rank,
    and one row of each. Returns, for each case, the number of wrong values and the numbers of rows sent to each rank
    (None: no exchange)."""
    whole, other = torch.arange(28.0).bfloat16().view(7, 4), 1 - dist.get_rank()
    index = [torch.tensor([5, 0, 2]), torch.tensor([1, 6, 3, 4])]
    mine = index[dist.get_rank()]
    tensor = SpreadRows(whole[mine], mine)
    found: dict[str, Any] = {"wrong": [], "sent": []}
    for needed in (mine.flip(0), index[other], torch.stack([index[other][1], mine[2]])):
        with patch.object(rows, "_exchanged", wraps=rows._exchanged) as exchange:
            values = tensor.rows(needed).at(needed)
        found["wrong"].append(int((values != whole[needed]).sum()))
        found["sent"].append(exchange.call_args.args[1] if exchange.called else None)
    return found


@contextmanager
def watched_states(found: dict[str, Any]) -> Iterator[None]:
    """Records, in `found`, the numbers of rows of each spread tensor (of this rank, of all ranks), the numbers of rows
    sent to each rank in every exchange, and the sizes of the tensors that the ranks summed."""
    found |= {"held": [], "moved": [], "summed": []}
    init, exchange, add = SpreadRows.__init__, rows._exchanged, ranks.total

    def made(self: SpreadRows, values: torch.Tensor, index: torch.Tensor) -> None:
        init(self, values, index)
        found["held"].append((len(values), len(self._holder)))

    def exchanged(values: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        found["moved"].append(sent)
        return exchange(values, sent, received)

    def summed(values: torch.Tensor) -> torch.Tensor:
        found["summed"].append(values.numel())
        return add(values)

    with (
        patch.object(SpreadRows, "__init__", made),
        patch.object(rows, "_exchanged", exchanged),
        patch.object(experience, "total", summed),
    ):
        yield


def stopped_pass(run: Callable[..., Any], place: Path, two: Path) -> list[int]:
    """Stops the pass of the reference of a DPO run in the second pack of each rank, and starts the run again. Returns
    the numbers of packs that this rank began in both passes."""
    compute, begun = reference.sequence_logprobs, []

    def counted(model: PreTrainedModel, batch: PackedBatch) -> torch.Tensor:
        begun[-1] += 1
        if begun == [2]:
            raise ValueError("stopped")
        return compute(model, batch)

    with (
        patch.object(reference, "sequence_logprobs", counted),
        patch.object(saved_logprobs, "SAVE_EVERY", 0.0),
    ):
        for expected in (pytest.raises(ValueError, match="stopped"), nullcontext()):
            begun.append(0)
            with expected:
                run("dpo", place, two / "dpo stopped")
    return begun


def stored_rows(place: Path) -> dict[str, Any]:
    """Opens the same rows twice, the first time with an empty token store. Returns how often this rank tokenised each
    time, the number of rows, and the fingerprints."""
    config = SFTConfig(
        model_name_or_path=str(place / "policy"),
        dataset_name=str(place / "rows.jsonl"),
        dataset_cache_dir=str(place / "tokens"),
        num_eval_examples=2,
        device="cpu",
        per_device_train_batch_size=4,
    )
    opened, calls = [], []
    for _ in range(2):
        with patch.object(dataset, "tokenize_examples", wraps=dataset.tokenize_examples) as tokenize:
            opened.append(open_inputs(config, ["reference"], None, None)[1])
            calls.append(tokenize.call_count)
    return {"calls": calls, "rows": [len(each.train) for each in opened], "hash": [each.fingerprint for each in opened]}
