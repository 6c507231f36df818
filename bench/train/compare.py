"""Runs our trainer and TRL's in turn over the same rows, step by step; writes rows and a table.

TRL pads, so it runs with several batch sizes, with the rows of each step sorted by length, and for SFT without padding.
All sides must start at the same loss, or nothing is written.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PretrainedConfig

from bench.mfu import training_operations, utilisation
from bench.results import RESULTS, append_row, device_name
from bench.train.sides import Run, run_ours, run_trl
from bench.train.tasks import MODELS, TASKS, Row, Task
from fastrlhf.algorithms.scoring import Tree
from fastrlhf.config import TrainConfig
from fastrlhf.data.examples import load_examples
from fastrlhf.data.packing import forest, num_in_sequences
from fastrlhf.data.specials import special_ids
from fastrlhf.models.loading import build_policy, load_reward_model
from fastrlhf.runtime.inputs import open_inputs
from fastrlhf.runtime.optim import index_batches
from fastrlhf.tools.plan.work import to_tree
from fastrlhf.types import Example, TokenizedExample

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
"""Largest relative difference of first losses: float32 sums in another order; three digits in bfloat16."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The input of all sides."""

    task: Task
    config: TrainConfig
    """Configuration of ours; every side starts from its model."""
    examples: list[Example]
    drawn: list[TokenizedExample]
    """The rows of all steps, in the order in which ours draws them."""
    shape: PretrainedConfig
    outputs: int
    """Outputs of the head: the vocabulary size, or 1."""


@dataclass(frozen=True, kw_only=True)
class Side:
    run: Callable[[], Run]
    trees: list[Tree]
    """The trees that it computes in the counted steps, without padding."""


def run_train(
    name: str,
    model: str,
    *,
    steps: int,
    rows: int,
    rounds: int,
    batch_sizes: Sequence[int],
    device: str,
    folder: Path = RESULTS,
) -> str:
    """Runs ours and TRL's `rounds` times in turn: a step to warm up and `steps` that count, each of `rows` sequences or
    pairs, which TRL cuts into `batch_sizes`. Appends a row per side and returns a table.

    The dialogues are the first ones of hh_helpful_test in FASTRLHF_DATA. A step's seconds are the median over the
    rounds; on a CPU those of one thread's processor, so that other work counts less. A side that does not fit into GPU
    memory is left out, and the table says so. Raises ValueError where steps are not whole batches, and RuntimeError
    where first losses differ by more than `TOLERANCE`: the sides would not have the same task, and nothing is written.
    """
    for batch_size in batch_sizes:
        if rows % batch_size:
            raise ValueError(f"batch-sizes: {batch_size} must divide the {rows} rows of a step")
    load, threads = os.getloadavg()[0], torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as work:
            setup = _prepare(TASKS[name], model, steps, rows, device, work)
            sides = _sides(setup, batch_sizes)
            runs, too_large = _in_turn(sides, rounds)
    finally:
        torch.set_num_threads(threads)
    check_first_losses(
        {side: [run.losses[0] for run in past] for side, past in runs.items()}, TOLERANCE[setup.config.dtype]
    )
    shared = {
        "bench": f"train {name}", "model": model, "steps": steps, "rows_per_step": rows, "rounds": rounds,
        "dtype": setup.config.dtype, "threads": 1 if device == "cpu" else threads, "load_before": load,
        "device": device_name(device),
    }  # fmt: skip
    found = [{**shared, "provider": side, **_summary(setup, past, sides[side].trees)} for side, past in runs.items()]
    for row in found:
        append_row(row, folder)
    return "\n".join([*_table(found), *[f"\n{side}: out of memory" for side in too_large]])


def check_first_losses(losses: Mapping[str, Sequence[float]], tolerance: float) -> None:
    """Raises RuntimeError where a side's loss, relative to that of the first side, differs by more than `tolerance`."""
    expected = next(iter(losses.values()))[0]
    for side, found in losses.items():
        for loss in found:
            if not abs(loss - expected) <= tolerance * abs(expected):
                raise RuntimeError(
                    f"{side}: the first loss is {loss:.7g}, that of ours {expected:.7g}: the tasks differ"
                )


def _prepare(task: Task, model: str, steps: int, rows: int, device: str, work: str) -> Setup:
    data = os.environ["FASTRLHF_DATA"]
    config = task.config(
        tokenizer_name_or_path=f"{data}/tokenizers/small_bpe2000_tokenizer.json.gz",
        eos_token="<|endoftext|>",
        chat_template="hh",
        max_length=1024,
        truncation_mode="drop",
        model_name_or_path=work,
        max_steps=1 + steps,
        learning_rate=1e-6,
        per_device_train_batch_size=rows,
        micro_batch_tokens=8192 if device == "cpu" else 16_384,
        dtype="float32" if device == "cpu" else "bfloat16",
        device=device,
        progress=False,
        **task.settings,
    )
    examples = load_examples(f"{data}/hh_helpful_test.jsonl.gz").examples[: (1 + steps) * rows]
    # The model is made below: the folder that names it is empty until then.
    tokenizer, inputs = open_inputs(replace(config, model_name_or_path=""), [*task.fields], examples, None)
    # Not EOS: transformers' classifiers would read the score before it.
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.save_pretrained(work)
    eos, pad = special_ids(tokenizer)
    shape = MODELS[model]
    place: dict[str, Any] = {"device": device, "dtype": config.dtype}
    vocab_size = max(shape.vocab_size, len(tokenizer))
    build_policy(shape, vocab_size=vocab_size, eos_token_id=eos, seed=0, **place).save_pretrained(work)
    if task.is_classifier:
        load_reward_model(work, pad_token_id=pad, **place).save_pretrained(work)
    batches = index_batches(len(inputs.train), rows, 1 + steps, config.seed)
    return Setup(
        task=task,
        config=config,
        examples=examples,
        drawn=[inputs.train[i] for batch in batches for i in batch],
        shape=shape,
        outputs=1 if task.is_classifier else vocab_size,
    )


def _sides(setup: Setup, batch_sizes: Sequence[int]) -> dict[str, Side]:
    task, drawn, size = setup.task, setup.drawn, setup.config.batch_size

    def trees(config: TrainConfig) -> list[Tree]:
        return [to_tree(config)(example) for example in drawn[size:]]

    ways = {**task.ways, **(task.gpu_ways if setup.config.device == "cuda" else {})}
    ours = {name: replace(setup.config, **settings) for name, settings in ways.items()}
    sides = {
        name: Side(run=partial(run_ours, task, config, setup.examples), trees=trees(config))
        for name, config in ours.items()
    }
    apart = sides[[*task.ways][-1]].trees
    steps = [drawn[start : start + size] for start in range(0, len(drawn), size)]
    by_length = [example for step in steps for example in sorted(step, key=_longest)]
    theirs: dict[str, tuple[list[TokenizedExample], Mapping[str, Any]]]
    theirs = {"": (drawn, {}), ", sorted by length": (by_length, {})}
    theirs |= {f", {name}": (drawn, settings) for name, settings in task.trl_ways.items()}
    for batch_size in batch_sizes:
        # A batch of one row is the same in any order, and has no padding except within a pair.
        for name, (ordered, settings) in theirs.items() if batch_size > 1 else [("", theirs[""])]:
            rows = [task.to_row(example) for example in ordered]
            run = partial(run_trl, task, setup.config, rows, batch_size, settings)
            sides[f"TRL, batches of {batch_size}{name}"] = Side(run=run, trees=apart)
    return sides


def _in_turn(sides: Mapping[str, Side], rounds: int) -> tuple[dict[str, list[Run]], list[str]]:
    """(the runs of each side, the sides that do not fit into the GPU's memory)"""
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name in [*runs]:
            try:
                runs[name].append(sides[name].run())
            except torch.OutOfMemoryError:
                del runs[name]
    return runs, [name for name in sides if name not in runs]


def _summary(setup: Setup, runs: Sequence[Run], trees: Sequence[Tree]) -> Row:
    """Tokens are those of every sequence, its prompt included: the same on all sides. Operations are those of what is
    computed."""
    segments = forest(trees)
    rows = 2 * len(trees) if setup.task.is_classifier else sum(segment.num_scored for segment in segments)
    spans = [(segment.cut, len(segment.token_ids)) for segment in segments]
    operations = training_operations(setup.shape, spans, rows=rows, outputs=setup.outputs)
    # Medians are per step, so that a busy moment of the machine does not spoil a whole round.
    seconds = sum(median(times) for times in zip(*(run.seconds for run in runs), strict=True))
    return {
        "tokens_per_second": sum(map(num_in_sequences, trees)) / seconds,
        "tflops": operations / seconds / 1e12,
        "mfu": utilisation(operations / seconds, device_name(setup.config.device)),
        "seconds": seconds,
        "peak_mb": runs[-1].peak_mb,
        "first_loss": runs[0].losses[0],
        "last_loss": runs[0].losses[-1],
    }


def _table(rows: Sequence[Row]) -> list[str]:
    lines = ["| | tokens per second | TFLOP/s | MFU % | peak MB | first loss |", "|---|---|---|---|---|---|"]
    for row in rows:
        mfu = "" if row["mfu"] is None else f"{100 * row['mfu']:.1f}"
        peak = "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
        speed = f"{row['tokens_per_second']:.0f} | {row['tflops']:.3g}"
        lines.append(f"| {row['provider']} | {speed} | {mfu} | {peak} | {row['first_loss']:.4f} |")
    return lines


def _longest(example: TokenizedExample) -> int:
    return len(example.prompt) + max(len(example.chosen or ()), len(example.rejected or ()))
