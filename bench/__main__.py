"""python -m bench toy [--seeds N] [--methods NAMES] [--jobs N] [--out DIR]"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.toy import run_toy


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    toy = commands.add_parser("toy", help="the demo over several seeds: means, intervals, DR-PO against PPO")
    toy.add_argument("--seeds", type=int, default=5, choices=range(1, 11), help="seeds 0 .. N - 1")
    toy.add_argument("--methods", default="sft,reward,dpo,ppo,drpo")
    toy.add_argument("--jobs", type=int, default=2, help="seeds run side by side, the cores shared between them")
    toy.add_argument("--out", type=Path, default=Path("runs/bench_toy"), help="a folder per seed")
    arguments = parser.parse_args()
    print(run_toy(arguments.seeds, arguments.methods, arguments.jobs, arguments.out))


if __name__ == "__main__":
    main()
