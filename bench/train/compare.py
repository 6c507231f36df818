"""Runs our trainer and TRL's alternately over the same data; writes result rows and a table.

TRL pads, so it runs in several variants: with several batch sizes, with the data of each step sorted by length, and for
SFT without padding. A "side" below is one variant of one trainer. All sides must start at the same loss, otherwise
nothing is written.
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
"""dtype -> largest allowed relative difference of the first losses. float32 sums differ in their order; bfloat16
numbers have 3 digits."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The model and the data that all sides share."""

    task: Task
    config: TrainConfig
    """Configuration of our trainer. It names the model from which every side starts."""
    examples: list[Example]
    drawn: list[TokenizedExample]
    """The examples of all steps, in the order in which our trainer draws them."""
    shape: PretrainedConfig
    outputs: int
    """Number of outputs of the head: the vocabulary size, or 1."""


@dataclass(frozen=True, kw_only=True)
class Side:
    run: Callable[[], Run]
    trees: list[Tree]
    """The token trees that this side must compute in the counted steps, without padding."""


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
    """Runs all sides alternately, `rounds` times each; appends a row per side and returns a table.

    A run is one warm-up step and `steps` counted steps of `rows` sequences or pairs each. TRL splits each step into
    batches of each size in `batch_sizes`. The data are the first dialogues of hh_helpful_test in FASTRLHF_DATA. The
    time of a step is the median over the rounds; on a CPU it is the CPU time of one thread, so that other programs
    matter less. A side that does not fit into GPU memory is skipped, and the table says so. Raises ValueError if a
    batch size does not divide `rows`, and RuntimeError if first losses differ by more than `TOLERANCE`; then the sides
    would not compute the same task, and nothing is written.
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
    """Raises RuntimeError if a side's loss differs from the first side's by more than the relative `tolerance`."""
    expected = next(iter(losses.values()))[0]
    for side, found in losses.items():
        for loss in found:
            if not abs(loss - expected) <= tolerance * abs(expected):
                raise RuntimeError(f"{side}: the first loss is {loss:.7g}, ours is {expected:.7g}: the tasks differ")


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
    # The folder of the model is still empty; the model is written below.
    tokenizer, inputs = open_inputs(replace(config, model_name_or_path=""), [*task.fields], examples, None)
    # The padding token must not be the EOS: transformers' classifiers would read the score at the token before it.
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
        # Sorting and padding-free variants are pointless for batches of one row, which have no padding between rows.
        for name, (ordered, settings) in theirs.items() if batch_size > 1 else [("", theirs[""])]:
            rows = [task.to_row(example) for example in ordered]
            run = partial(run_trl, task, setup.config, rows, batch_size, settings)
            sides[f"TRL, batches of {batch_size}{name}"] = Side(run=run, trees=apart)
    return sides


def _in_turn(sides: Mapping[str, Side], rounds: int) -> tuple[dict[str, list[Run]], list[str]]:
    """Runs all sides alternately; returns (the runs of each side, the sides that do not fit into GPU memory)."""
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name in [*runs]:
            try:
                runs[name].append(sides[name].run())
            except torch.OutOfMemoryError:
                del runs[name]
    return runs, [name for name in sides if name not in runs]


def _summary(setup: Setup, runs: Sequence[Run], trees: Sequence[Tree]) -> Row:
    """Makes the result row of a side. Tokens per second count every sequence with its prompt, on all sides. TFLOP/s
    count only the operations that the side must compute, so a shared prompt counts once.
    """
    segments = forest(trees)
    rows = 2 * len(trees) if setup.task.is_classifier else sum(segment.num_scored for segment in segments)
    spans = [(segment.cut, len(segment.token_ids)) for segment in segments]
    operations = training_operations(setup.shape, spans, rows=rows, outputs=setup.outputs)
    # The median is taken per step, so that a short load on the machine does not affect a whole round.
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
