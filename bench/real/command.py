"""The options of `python -m bench real`, and the order of its parts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

PARTS = ("parity", "bf16", "speed", "demo")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m bench real`."""
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=f"one or more of {', '.join(PARTS)}")
    parser.add_argument(
        "--trl", default=sys.executable, metavar="PYTHON", help="Python interpreter of an environment with TRL 1.16"
    )
    parser.add_argument("--tasks", nargs="+", default=["sft", "dpo", "ipo", "reward", "ppo"], help="for parity, speed")
    parser.add_argument("--forms", nargs="+", default=["chat", "text"], choices=["chat", "text"], help="for parity")
    parser.add_argument("--steps", type=int, default=20, help="training steps, for parity")
    parser.add_argument("--batch", type=int, default=2, help="rows per training step, for parity")
    parser.add_argument("--rounds", type=int, default=3, help="number of runs of each side, alternating, for speed")
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/bench_real"), help="folder of the model, which the first run makes"
    )
    parser.add_argument("--demo", type=Path, default=Path("runs/demo_real"), help="new folder of the part demo")
    parser.add_argument(
        "--out", type=Path, default=Path("bench/results"), help="folder of the files to which result rows are appended"
    )


def run_real(a: argparse.Namespace) -> str:
    """Makes the model and runs the parts; returns their tables. Ends the program with a message if the folder of the
    demo exists."""
    if "demo" in a.parts and a.demo.exists():
        sys.exit(f"--demo: {a.demo} exists already; name a new folder, for example: make demo-real REAL_OUT={a.demo}_2")
    from bench.real.model import smollm2

    model, tables = smollm2(a.cache), list[str]()
    for part in a.parts:
        if part == "parity":
            from bench.real.parity import run_parity

            tables.append(run_parity(model, a.tasks, a.forms, a.steps, a.batch, a.trl, a.out))
        if part == "bf16":
            from bench.real.bf16 import run_bf16

            tables.append(run_bf16(model, a.out))
        if part == "speed":
            from bench.real.speed import run_speed

            tables.append(run_speed(model, a.tasks, a.rounds, a.trl, a.out))
        if part == "demo":
            from bench.real.demo import run_demo

            tables.append(run_demo(model, a.demo))
    return "\n\n".join(tables)
