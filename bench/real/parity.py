"""`python -m bench real parity`: compares the losses of 20 training steps with TRL's, and PPO with a plain loop.

Both sides read the same raw rows, so the comparison includes templates and tokenisation. Not compared, because they
differ by design: the order of the data (TRL gets our order), the warm-up (none here), and TRL's bfloat16 default (off).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.real.ppo import compare_ppo
from bench.real.rows import short_pairs
from bench.real.sides import both_jobs, has_trl, reward_model, run_job
from bench.results import RESULTS, append_row, device_name

HEAD = "| | rows | steps of | loss, first to last | largest difference |\n|---|---|---|---|---|"


def run_parity(
    policy: str, tasks: Sequence[str], forms: Sequence[str], steps: int, batch: int, trl: str, folder: Path = RESULTS
) -> str:
    """Trains each task on the rows of each form with our trainer and with TRL's, appends a result row per comparison
    and returns a table. `policy` is the folder of the model; `trl` is the Python interpreter of an environment with
    TRL. Without TRL only PPO is compared, and the last line says so."""
    lines = [HEAD]
    offline = [task for task in tasks if task != "ppo"]
    found = has_trl(trl)
    for form in forms if found else ():
        for task in offline:
            lines.append(_compare(policy, task, form, steps, batch, trl, folder))
            print(lines[-1], flush=True)
    if "ppo" in tasks:
        lines.append(compare_ppo(policy, folder))
    if offline and not found:
        lines.append(f"\nnot compared: {', '.join(offline)}, because {trl} cannot import trl; pass --trl PYTHON")
    return "\n".join(lines)


def _compare(policy: str, task: str, form: str, steps: int, batch: int, trl: str, folder: Path) -> str:
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        model = reward_model(policy, work / "reward") if task == "reward" else policy
        rows = short_pairs(form, steps * batch)
        ours, theirs = both_jobs(
            task, rows, model, work, steps=steps, batch=batch, trl_batch=batch, is_chat=form == "chat"
        )
        our, their = run_job(ours, work), run_job(theirs, work, trl)
    losses = list(zip(our["losses"], their["losses"], strict=True))
    row = {
        "bench": "real parity", "model": "SmolLM2-135M-Instruct", "task": task, "form": form, "steps": steps,
        "rows_per_step": batch, "dtype": "float32", "max_difference": max(abs(a - b) for a, b in losses),
        "max_relative_difference": max(abs(a - b) / abs(b) for a, b in losses), "losses": our["losses"],
        "trl_losses": their["losses"], "trl": their["trl"], "device": device_name("cpu"),
    }  # fmt: skip
    append_row(row, folder)
    ends = f"{our['losses'][0]:.4f} to {our['losses'][-1]:.4f}"
    return f"| {task} | {form} | {batch} rows | {ends} | {row['max_difference']:.1e} |"
