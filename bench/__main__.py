"""python -m bench toy | resets | aot, each with --help"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    toy = commands.add_parser("toy", help="the demo over several seeds: means, intervals, DR-PO against PPO")
    toy.add_argument("--seeds", type=int, default=5, choices=range(1, 11), help="seeds 0 .. N - 1")
    toy.add_argument("--methods", default="sft,reward,dpo,ppo,drpo")
    toy.add_argument("--jobs", type=int, default=2, help="seeds run side by side, the cores shared between them")
    toy.add_argument("--out", type=Path, default=Path("runs/bench_toy"), help="a folder per seed")
    resets = commands.add_parser("resets", help="PPO against DR-PO where exploration is hard and the judge is right")
    resets.add_argument("--seeds", type=int, default=5, choices=range(1, 11), help="seeds 0 .. N - 1")
    resets.add_argument("--jobs", type=int, default=2, help="seeds run side by side, one thread each")
    resets.add_argument("--out", type=Path, default=Path("runs/bench_resets"), help="a folder per seed")
    aot = commands.add_parser("aot", help="every kernel compiled without a GPU: registers, spills, shared memory")
    aot.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=[80, 90, 100])
    aot.add_argument("--check", action="store_true", help="exit with 1 where a kernel spills or misses its units")
    arguments = parser.parse_args()
    # Each command imports what it alone needs.
    if arguments.command == "toy":
        from bench.toy import run_toy

        print(run_toy(arguments.seeds, arguments.methods, arguments.jobs, arguments.out))
    if arguments.command == "resets":
        from bench.resets import run_resets

        print(run_resets(arguments.seeds, arguments.jobs, arguments.out))
    if arguments.command == "aot":
        from bench.aot import run_aot

        table, faults = run_aot(arguments.arch)
        print(table)
        if faults and arguments.check:
            sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
