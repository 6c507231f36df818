"""`python -m bench real speed`: CPU time and memory beside TRL and `generate`, on one thread.

Each run of a trainer is a separate process. Ours and TRL's with each batch size run in turn, so that a change of the
machine's load affects all of them; the table shows the median over the rounds of the ratios within a round.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from bench.real.rows import FILES, Row, num_characters, read_rows, short_pairs
from bench.real.sides import both_jobs, has_trl, reward_model, run_job
from bench.results import RESULTS, append_row, device_name
from fastrlhf.data.specials import special_ids
from fastrlhf.data.tokenizer import load_tokenizer
from fastrlhf.data.tokens import tokenize_examples
from fastrlhf.evaluation.completions import respond
from fastrlhf.models.loading import load_policy
from fastrlhf.types import Example, TokenizedExample

Run = dict[str, Any]
"""The result of a job: losses, CPU seconds of each step, peak memory."""
STEPS, BATCH, TRL_BATCHES = 2, 4, (1, 4)
"""Counted steps after a warm-up step, rows per step, and the sizes of the batches into which TRL splits a step."""
PROMPTS, LENGTH = 8, 32
HEAD = "| | beside | our time / its time | our memory / its memory | CPU seconds | MB |\n|---|---|---|---|---|---|"


def run_speed(policy: str, tasks: Sequence[str], rounds: int, trl: str, folder: Path = RESULTS) -> str:
    """Measures sampling and the tasks among sft, dpo and reward; appends a result row for each comparison and returns a
    table. `trl` is the Python interpreter of an environment with TRL; without it only sampling is measured, and the
    last line says so."""
    trained = [task for task in tasks if task in ("sft", "dpo", "reward")]
    lines = [HEAD, sampling_line(policy, rounds, folder)]
    print(lines[-1], flush=True)
    if not has_trl(trl):
        return "\n".join([*lines, f"\nnot measured: training, because {trl} cannot import trl; pass --trl PYTHON"])
    for task in trained:
        lines += training_lines(policy, task, rounds, trl, folder)
        print("\n".join(lines[-len(TRL_BATCHES) :]), flush=True)
    return "\n".join(lines)


def typical_pairs(count: int) -> list[Row]:
    """Returns the pairs of dialogues whose lengths are around the median, in the order of the file."""
    rows = read_rows(FILES["chat"])
    order = sorted(range(len(rows)), key=lambda i: num_characters(rows[i]))
    first = (len(rows) - count) // 2
    return [{name: rows[i][name] for name in ("prompt", "chosen", "rejected")} for i in sorted(order[first:][:count])]


def training_lines(policy: str, task: str, rounds: int, trl: str, folder: Path) -> list[str]:
    """Runs our trainer and TRL's in turn; returns a line of the table per batch size of TRL."""
    runs: dict[str, list[Run]] = {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        model = reward_model(policy, work / "reward") if task == "reward" else policy
        rows = typical_pairs((1 + STEPS) * BATCH)
        for _ in range(rounds):
            for size in TRL_BATCHES:
                ours, theirs = both_jobs(
                    task, rows, model, work, steps=1 + STEPS, batch=BATCH, trl_batch=size, is_chat=True
                )
                if size == TRL_BATCHES[0]:
                    runs.setdefault("ours", []).append(run_job(ours, work))
                runs.setdefault(f"TRL, batches of {size}", []).append(run_job(theirs, work, trl))
    check_losses(runs)
    return [_append(task, side, runs["ours"], runs[side], rounds, folder) for side in runs if side != "ours"]


def check_losses(runs: dict[str, list[Run]]) -> None:
    """Raises RuntimeError if the first losses of two sides differ by more than 1e-5, relatively."""
    expected = runs["ours"][0]["losses"][0]
    for side, found in runs.items():
        for run in found:
            if not abs(run["losses"][0] - expected) <= 1e-5 * abs(expected):
                raise RuntimeError(f"{side}: the first loss is {run['losses'][0]:.7g}, ours is {expected:.7g}")


def sampling_line(policy: str, rounds: int, folder: Path = RESULTS) -> str:
    """Samples the most probable tokens after short prompts with our engine and with `generate`, in turn; the row also
    counts the equal responses. Memory is not compared, because both run in this process."""
    tokenizer, model = load_tokenizer(policy), load_policy(policy)
    examples = [Example(prompt=row["prompt"], row=i) for i, row in enumerate(short_pairs("chat", PROMPTS))]
    prompts = tokenize_examples(examples, tokenizer, max_length=512, fields=()).examples
    eos, threads = special_ids(tokenizer)[0], torch.get_num_threads()
    torch.set_num_threads(1)
    ours: list[Run] = []
    theirs: list[Run] = []
    equal = 0
    try:
        for _ in range(rounds + 1):  # the first round is a warm-up
            start = time.process_time()
            sampled = respond(
                *(model, prompts), eos_token_id=eos, response_length=LENGTH, temperature=0, seed=0, batch_size=PROMPTS
            )
            middle = time.process_time()
            generated = generate(model, prompts, eos)
            ours.append({"seconds": [middle - start]})
            theirs.append({"seconds": [time.process_time() - middle]})
            equal = sum(list(a.completion) == b for a, b in zip(sampled, generated, strict=True))
    finally:
        torch.set_num_threads(threads)
    return _append("sampling", "generate", ours[1:], theirs[1:], rounds, folder, equal=equal, prompts=PROMPTS)


@torch.no_grad()
def generate(model: PreTrainedModel, prompts: Sequence[TokenizedExample], eos: int) -> list[list[int]]:
    """Returns the responses of transformers' `generate` to a batch padded on the left, up to the first EOS."""
    width = max(len(row.prompt) for row in prompts)
    ids = torch.tensor([[eos] * (width - len(row.prompt)) + list(row.prompt) for row in prompts])
    seen = torch.tensor([[0] * (width - len(row.prompt)) + [1] * len(row.prompt) for row in prompts])
    settings = {"do_sample": False, "max_new_tokens": LENGTH, "eos_token_id": eos, "pad_token_id": eos}
    tokens = cast(Any, model).generate(ids, attention_mask=seen, **settings)[:, width:].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in tokens]


def _append(task: str, side: str, ours: list[Run], theirs: list[Run], rounds: int, folder: Path, **more: Any) -> str:
    """Appends the result row of a comparison and returns its line of the table."""
    times = [(sum(a["seconds"]), sum(b["seconds"])) for a, b in zip(ours, theirs, strict=True)]
    ratio = median(a / b for a, b in times)
    our_time, their_time = (median(column) for column in zip(*times, strict=True))
    row = {
        "bench": "real speed", "model": "SmolLM2-135M-Instruct", "task": task, "beside": side, "rounds": rounds,
        "threads": 1, "dtype": "float32", "time_ratio": ratio, "seconds": our_time, "their_seconds": their_time,
        "device": device_name("cpu"), **more,
    }  # fmt: skip
    memory, peaks = "", ""
    if "peak_mb" in ours[0]:
        row |= {"peak_mb": median(a["peak_mb"] for a in ours), "their_peak_mb": median(b["peak_mb"] for b in theirs)}
        row |= {"steps": STEPS, "rows_per_step": BATCH, "trl": theirs[0]["trl"]}
        memory = f"{row['peak_mb'] / row['their_peak_mb']:.2f}"
        peaks = f"{row['peak_mb']:.0f}, {row['their_peak_mb']:.0f}"
    append_row(row, folder)
    return f"| {task} | {side} | {ratio:.2f} | {memory} | {our_time:.1f}, {their_time:.1f} | {peaks} |"
