"""`python -m bench data`: measures time and memory of opening the rows of a run, at the first and at the second start.

Preference pairs of random words are written to a JSONL file, and a byte-level BPE tokenizer is trained on some of them.
Each start is a separate process with one thread. Memory is the growth of the resident set from before the rows are
opened until every token was read once, per token; the peak is that of the whole process. `--beside FOLDER` also
measures another checkout of this project.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from bench.results import RESULTS, append_row, device_name

ROOT = Path(__file__).parent.parent
NUM_WORDS, VOCABULARY = 20_000, 8000
LENGTHS = (80, 60)
"""Mean number of words of a prompt and of a response."""

PROGRAM = """
import gc, json, os, resource, sys, time
config = json.loads(sys.argv[1])
import numpy, torch, transformers
torch.set_num_threads(1)
from fastrlhf.config import DPOConfig
try:
    from fastrlhf.runtime.inputs import open_inputs
except ModuleNotFoundError:  # before October 2026
    from fastrlhf.data.inputs import open_inputs
known = DPOConfig.__dataclass_fields__
def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
before, wall, cpu = resident(), time.perf_counter(), sum(os.times()[:4])
_, data = open_inputs(DPOConfig(**{key: value for key, value in config.items() if key in known}),
                      ["chosen", "rejected"], None, None)
fingerprint = data.fingerprint["train"]  # every run with an output folder computes it
wall, cpu = time.perf_counter() - wall, sum(os.times()[:4]) - cpu
opened = resident()
tokens = total = 0
for i in range(len(data.train)):
    row = data.train.arrays(i) if hasattr(data.train, "arrays") else data.train[i]
    for ids in (row.prompt, row.chosen, row.rejected):
        tokens += len(ids)
        total += int(sum(ids)) if isinstance(ids, list) else int(ids.sum(dtype="int64"))
after = resident()
print(json.dumps({"pairs": len(data.train), "tokens": tokens, "sum": total, "fingerprint": fingerprint,
                  "seconds": wall, "cpu_seconds": cpu, "bytes_per_token": (after - before) / tokens,
                  "bytes_per_token_opened": (opened - before) / tokens,
                  "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
"""


def run_data(sizes: list[int], beside: Path | None, processes: int, folder: Path = RESULTS) -> str:
    """Measures each number of pairs, appends rows, and returns the table in Markdown. Raises RuntimeError if the two
    checkouts, or the two starts, give different tokens."""
    lines = [
        "| build | pairs | tokens | start | seconds | CPU seconds | ms per pair | bytes per token | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for size in sizes:
        with tempfile.TemporaryDirectory() as place:
            config = make_rows(Path(place), size) | {"dataset_num_proc": processes}
            found = [("here", start, measure(ROOT, config)) for start in ("first", "second")]
            found += [("beside", "every", measure(beside, config))] if beside else []
        if len({(row["fingerprint"], row["sum"]) for _, _, row in found}) > 1:
            raise RuntimeError(f"{size} pairs: the starts give different tokens: {found}")
        for build, start, row in found:
            shared = {"bench": "data", "build": build, "start": start, "processes": processes}
            append_row({**shared, **row, "device": device_name("cpu")}, folder)
            cells = [build, f"{row['pairs']:,}", f"{row['tokens']:,}", start, f"{row['seconds']:.2f}"]
            cells += [f"{row['cpu_seconds']:.2f}", f"{1e3 * row['cpu_seconds'] / row['pairs']:.3f}"]
            cells += [f"{row['bytes_per_token']:.1f}", f"{row['peak_mib']:.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def make_rows(folder: Path, num: int, seed: int = 0) -> dict[str, Any]:
    """Writes `num` pairs and a tokenizer into the folder; returns the keys of a configuration that reads them."""
    draw = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    weights = [1 / (i + 2) for i in range(len(letters))]
    words = ["".join(draw.choices(letters, weights, k=draw.randint(2, 9))) for _ in range(NUM_WORDS)]
    frequencies = [1 / (i + 10) for i in range(NUM_WORDS)]

    def text(mean: int) -> str:
        return (
            " ".join(draw.choices(words, frequencies, k=draw.randint(mean // 2, mean + mean // 2))).capitalize() + "."
        )

    file, corpus = folder / "pairs.jsonl", list[str]()
    with file.open("w", encoding="utf-8") as rows:
        for i in range(num):
            row = {"prompt": text(LENGTHS[0]), "chosen": " " + text(LENGTHS[1]), "rejected": " " + text(LENGTHS[1])}
            rows.write(json.dumps(row) + "\n")
            corpus += row.values() if i < 1000 else ()
    core = ByteLevelBPETokenizer()
    core.train_from_iterator(corpus, VOCABULARY, special_tokens=["</s>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=core._tokenizer, eos_token="</s>").save_pretrained(folder / "tokenizer")
    return {
        "dataset_name": str(file),
        "tokenizer_name_or_path": str(folder / "tokenizer"),
        "model_config": json.dumps({"model_type": "llama"}),
        "dataset_cache_dir": str(folder / "store"),
        "max_length": 1024,
        "device": "cpu",
    }


def measure(root: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Opens the rows in a new process with the code of the checkout `root`."""
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'kernels'}", "OMP_NUM_THREADS": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    program = [sys.executable, "-c", PROGRAM, json.dumps(config)]
    run = subprocess.run(program, env=environment, capture_output=True, text=True, check=False, cwd=root)
    if run.returncode:
        raise RuntimeError(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])
