"""The command line of the benchmarks: `python -m bench COMMAND`. `--help` lists the options of a command."""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path


def make_parser() -> argparse.ArgumentParser:
    """Builds the argument parser with all commands and their options."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    toy = commands.add_parser("toy", help="the demo over several seeds: means, intervals, DR-PO against PPO")
    toy.add_argument("--seeds", type=int, default=5, choices=range(1, 11), help="number N of seeds: 0 .. N - 1")
    toy.add_argument("--methods", nargs="+", default=["sft", "reward", "dpo", "ppo", "drpo"])
    toy.add_argument("--jobs", type=int, default=2, help="seeds that run at the same time and share the cores")
    toy.add_argument(
        "--out", type=Path, default=Path("runs/bench_toy"), help="output folder, with one subfolder per seed"
    )
    resets = commands.add_parser("resets", help="PPO against DR-PO on a task with hard exploration and an exact judge")
    resets.add_argument("--seeds", type=int, default=5, choices=range(1, 11), help="number N of seeds: 0 .. N - 1")
    resets.add_argument("--jobs", type=int, default=2, help="seeds that run at the same time, one thread each")
    resets.add_argument(
        "--out", type=Path, default=Path("runs/bench_resets"), help="output folder, with one subfolder per seed"
    )
    labels = commands.add_parser("labels", help="DPO and IPO on few pairs, from noisy to deterministic labels")
    labels.add_argument("--seeds", type=int, default=3, choices=range(1, 11), help="number N of seeds: 0 .. N - 1")
    labels.add_argument("--jobs", type=int, default=2, help="seeds that run at the same time, one thread each")
    labels.add_argument(
        "--out", type=Path, default=Path("runs/bench_labels"), help="output folder, with one subfolder per seed"
    )
    papers = commands.add_parser("papers", help="reproduce the experiments of a paper: rows, a table, figures")
    papers.add_argument("names", nargs="+", choices=["ipo", "rto", "drpo", "rlp", "pieces"])
    papers.add_argument(
        "--fast",
        action="store_true",
        help="run only the small problems, with fewer seeds and steps; print tables, write nothing",
    )
    papers.add_argument("--batch-size", type=int, default=9, help="pairs per mini-batch, for ipo")
    papers.add_argument(
        "--seeds", type=int, default=3, choices=range(1, 11), help="number N of seeds of the embedded task: 0 .. N - 1"
    )
    papers.add_argument(
        "--jobs", type=int, default=2, help="runs of the embedded task at the same time, one thread each"
    )
    papers.add_argument(
        "--runs",
        type=Path,
        default=Path("runs/bench_papers"),
        help="output folder of the runs of the embedded task; finished runs are reused",
    )
    papers.add_argument(
        "--out",
        type=Path,
        default=Path("bench"),
        help="folder whose subfolders results and figures receive the rows and the PNGs",
    )
    clustering = commands.add_parser(
        "clustering", help="speed of grouping answers by meaning: batched questions or one pair at a time"
    )
    clustering.add_argument("--widths", type=int, nargs="+", default=[16, 128], help="hidden sizes of the NLI model")
    clustering.add_argument("--prompts", type=int, default=50)
    clustering.add_argument("--rounds", type=int, default=3, help="number of rounds; the fastest one is reported")
    clustering.add_argument(
        "--out", type=Path, default=Path("bench/results"), help="folder of the files to which result rows are appended"
    )
    trunks = commands.add_parser(
        "trunks", help="time of a DR-PO update with shared prefixes and with separate sequences"
    )
    trunks.add_argument("--groups", type=int, nargs="+", default=[4, 8], help="episodes per prompt")
    trunks.add_argument("--episodes", type=int, default=32, help="episodes per update")
    trunks.add_argument("--rounds", type=int, default=3)
    trunks.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    trunks.add_argument(
        "--out", type=Path, default=Path("bench/results"), help="folder of the files to which result rows are appended"
    )
    optim = commands.add_parser(
        "optim", help="memory per trained bfloat16 weight and time per update, for each optimiser"
    )
    optim.add_argument("--matrices", type=int, default=192, help="number of weight matrices of 1024 x 1024")
    optim.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    optim.add_argument(
        "--out", type=Path, default=Path("bench/results"), help="folder of the files to which result rows are appended"
    )
    peaks = commands.add_parser("peaks", help="memory of a process in each phase, alone and as one of two, on a CPU")
    peaks.add_argument("--models", nargs="+", default=["untied", "tied", "experts", "lora"])
    peaks.add_argument(
        "--out", type=Path, default=Path("bench/results"), help="folder of the files to which result rows are appended"
    )
    rollout = commands.add_parser("rollout", help="time of sampling and judging the episodes of a DR-PO update")
    rollout.add_argument("--groups", type=int, nargs="+", default=[1, 8], help="episodes per prompt")
    rollout.add_argument("--episodes", type=int, default=32, help="episodes per update")
    rollout.add_argument("--slots", type=int, default=32, help="episodes sampled at the same time")
    rollout.add_argument("--rounds", type=int, default=3)
    rollout.add_argument(
        "--engine",
        default="transformers",
        choices=["transformers", "vllm"],
        help="vllm: compare vLLM with the built-in engine and transformers' generate, for one number of --groups",
    )
    rollout.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16"], help="dtype of the weights, for --engine vllm"
    )
    rollout.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    rollout.add_argument(
        "--out", type=Path, default=Path("bench/results"), help="folder of the files to which result rows are appended"
    )
    data = commands.add_parser("data", help="time and memory of opening the rows of a run, first and second start")
    data.add_argument("--pairs", type=int, nargs="+", default=[1000, 10_000, 100_000])
    data.add_argument("--beside", type=Path, metavar="FOLDER", help="another checkout, which is measured too")
    data.add_argument("--processes", type=int, default=1, help="processes that tokenise; 0: one per core")
    data.add_argument(
        "--out", type=Path, default=Path("bench/results"), help="folder of the files to which result rows are appended"
    )
    aot = commands.add_parser("aot", help="compile every kernel without a GPU: registers, spills, shared memory")
    aot.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=[80, 86, 89, 90, 100, 120])
    aot.add_argument(
        "--check",
        action="store_true",
        help="exit with 1 if a kernel spills registers or does not use the matrix or TMA units",
    )
    kernels = commands.add_parser(
        "kernels", help="time, memory and error of our loss kernels and those of other libraries"
    )
    kernels.add_argument(
        "--device",
        default="cuda",
        choices=["cuda", "cpu"],
        help="device; on a CPU only plain torch and our kernels run, in float32",
    )
    kernels.add_argument(
        "--shape",
        type=int,
        nargs=3,
        action="append",
        metavar=("T", "D", "V"),
        help="tokens, hidden size, vocabulary size; may be repeated",
    )
    kernels.add_argument(
        "--peaked", type=int, nargs="+", choices=[1, 0], help="1: peaked logits, 0: flat logits; may be both"
    )
    kernels.add_argument("--dead", type=float, nargs="+", help="fractions of rows without a gradient")
    kernels.add_argument("--tasks", nargs="+", help="run only the given tasks (first column of the table)")
    kernels.add_argument(
        "--only",
        nargs="+",
        help="run only implementations whose name starts with a given text (second column of the table)",
    )
    kernels.add_argument("--runs", type=int, help="number of rounds; default 20 on a GPU, 9 on a CPU")
    kernels.add_argument(
        "--seconds", type=float, default=1.0, help="time limit in seconds per implementation and case, on a GPU"
    )
    kernels.add_argument(
        "--out", type=Path, default=Path("bench/results"), help="folder of the files to which result rows are appended"
    )
    kernels.add_argument(
        "--beside", type=Path, metavar="FOLDER", help="another checkout, whose ops are measured in the same rounds"
    )
    kernels.add_argument(
        "--table", type=Path, metavar="FILE", help="print the tables of the rows in FILE and measure nothing"
    )
    tune = commands.add_parser("tune", help="time candidate tile sizes of the fused head kernels; needs a GPU")
    tune.add_argument("--runs", type=int, default=10)
    train = commands.add_parser("train", help="compare our trainers with those of other libraries")
    algorithms = train.add_subparsers(dest="algorithm", required=True)
    offline = [
        algorithms.add_parser(name, help=f"{what} compared with TRL's, on real dialogues; TRL must be installed")
        for name, what in (("sft", "SFT"), ("dpo", "DPO"), ("reward", "a reward model"))
    ]
    for command in offline:
        command.add_argument(
            "--model",
            default="tiny",
            choices=["tiny", "qwen3-0.6b", "llama-3.2-1b"],
            help="architecture and size of the model; its weights are random",
        )
        command.add_argument("--steps", type=int, default=4, help="number of measured steps, after one warm-up step")
        command.add_argument("--rows", type=int, default=32, help="sequences or pairs per step")
        command.add_argument("--rounds", type=int, default=1, help="number of runs of each trainer, alternating")
        command.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8], help="batch sizes of TRL")
    drpo = algorithms.add_parser(
        "drpo", help="one DR-PO update compared with the padded reference and TRL's PPO, with TL;DR lengths"
    )
    drpo.add_argument("--shape", default="pythia-1b", choices=["tiny", "pythia-70m", "pythia-1b", "pythia-2.8b"])
    drpo.add_argument("--episodes", type=int, default=512)
    drpo.add_argument("--rounds", type=int, default=3, help="number of updates of each implementation, alternating")
    drpo.add_argument(
        "--micro-batch", type=int, default=4, help="episodes per micro-batch of the padded implementations"
    )
    drpo.add_argument("--micro-batch-tokens", type=int, default=2048, help="tokens per micro-batch of our trainer")
    drpo.add_argument(
        "--rollout-batch", type=int, default=32, help="episodes generated at the same time, in every implementation"
    )
    drpo.add_argument("--trl-path", type=Path, help="folder with TRL 1.12.0, if another version is installed")
    drpo.add_argument(
        "--optim", default="adamw_torch_fused", help="optimiser of our trainer and of the padded reference"
    )
    drpo.add_argument("--master-weights", default="float32", help="master weights for bfloat16 weights; TRL has none")
    for command in (*offline, drpo):
        command.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
        command.add_argument(
            "--out",
            type=Path,
            default=Path("bench/results"),
            help="folder of the files to which result rows are appended",
        )
    from bench.real.command import add_arguments

    add_arguments(commands.add_parser("real", help="parity, speed and bfloat16 on SmolLM2-135M, a pretrained model"))
    models = commands.add_parser("models", help="check a tiny model of every causal LM type against transformers")
    models.add_argument(
        "types", nargs="*", help="model types to check; default: types without a row for the installed transformers"
    )
    models.add_argument(
        "--checks", nargs="+", default=[], help="run only the given checks; do not commit the resulting incomplete rows"
    )
    models.add_argument(
        "--out", type=Path, help="file to which result rows are written; default bench/results/models.jsonl"
    )
    models.add_argument(
        "--page", action="store_true", help="print the existing rows as a Markdown table and run nothing"
    )
    return parser


def main() -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # keeps torch's profiler from logging every start and stop
    arguments = make_parser().parse_args()
    # Each command imports only what it needs.
    if arguments.command == "toy":
        from bench.toy import run_toy

        print(run_toy(arguments.seeds, arguments.methods, arguments.jobs, arguments.out))
    if arguments.command == "resets":
        from bench.resets import run_resets

        print(run_resets(arguments.seeds, arguments.jobs, arguments.out))
    if arguments.command == "labels":
        from bench.labels import run_labels

        print(run_labels(arguments.seeds, arguments.jobs, arguments.out))
    if arguments.command == "papers":
        for name in arguments.names:
            print(_paper(name, arguments))
    if arguments.command == "clustering":
        from bench.clustering import run_clustering

        print(run_clustering(arguments.widths, arguments.prompts, arguments.rounds, arguments.out))
    if arguments.command == "trunks":
        from bench.trunks import run_trunks

        print(run_trunks(arguments.groups, arguments.episodes, arguments.rounds, arguments.device, arguments.out))
    if arguments.command == "optim":
        from bench.optim import run_optim

        print(run_optim(arguments.matrices, arguments.device, arguments.out))
    if arguments.command == "peaks":
        from bench.peaks import run_peaks

        print(run_peaks(arguments.models, arguments.out))
    if arguments.command == "rollout":
        from bench.engines import run_engines
        from bench.rollout import run_rollout

        a = arguments
        if a.engine == "vllm":
            print(run_engines(a.episodes, a.rounds, a.device, a.dtype, a.out))
            return
        print(run_rollout(a.groups, a.episodes, a.slots, a.rounds, a.device, a.out))
    if arguments.command == "data":
        from bench.data import run_data

        print(run_data(arguments.pairs, arguments.beside, arguments.processes, arguments.out))
    if arguments.command == "kernels" and (faults := _kernels(arguments)):
        sys.exit("\n".join(faults))
    if arguments.command == "train" and arguments.algorithm == "drpo":
        print(_train_drpo(arguments))
    if arguments.command == "train" and arguments.algorithm != "drpo":
        from bench.train.compare import run_train

        options = ("steps", "rows", "rounds", "batch_sizes", "device")
        chosen = {name: getattr(arguments, name) for name in options}
        print(run_train(arguments.algorithm, arguments.model, **chosen, folder=arguments.out))
    if arguments.command == "real":
        from bench.real.command import run_real

        print(run_real(arguments))
    if arguments.command == "models":
        from bench.models.sweep import ROWS, page, read_rows, run_models

        path = arguments.out or ROWS
        if arguments.page:
            print(page(read_rows(path).values()))
        else:
            print(run_models(arguments.types, arguments.checks, path, again=bool(arguments.types)))
    if arguments.command == "tune":
        from bench.tune import run_tune

        run_tune(arguments.runs)
    if arguments.command == "aot":
        from bench.aot import run_aot

        table, faults = run_aot(arguments.arch)
        print(table)
        if faults and arguments.check:
            sys.exit("\n".join(faults))


def _paper(name: str, a: argparse.Namespace) -> str:
    if name == "ipo":
        from bench.papers.ipo import run_ipo

        return run_ipo(a.batch_size, a.out, fast=a.fast)
    if name in ("rlp", "pieces") and a.fast:
        sys.exit(f"papers {name}: --fast is not supported, since {name} has no small problem; use --seeds 1")
    if name == "pieces":
        from bench.papers.pieces import run_pieces

        return run_pieces(a.seeds, a.jobs, a.runs, a.out)
    if name == "rlp":
        from bench.papers.rlp import run_rlp

        return run_rlp(a.seeds, a.jobs, a.runs, a.out)
    if name == "rto":
        from bench.papers.rto import run_pessimism

        tables = [run_pessimism(a.out, fast=a.fast)]
    else:
        from bench.papers.drpo import FAST_MDPS, MDPS, run_lock, run_npg

        tables = [run_npg(FAST_MDPS if a.fast else MDPS), run_lock(a.out, fast=a.fast)]
    if not a.fast:
        from bench.papers.embedded import run_embedded

        tables.append(run_embedded(name, a.seeds, a.jobs, a.runs, a.out))
    return "\n\n".join(tables)


def _kernels(a: argparse.Namespace) -> list[str]:
    import torch

    from bench.kernels import CPU_SHAPE, SHAPES, all_cases, read_rows, run_kernels, table
    from bench.providers import select

    cpu = a.device == "cpu"
    shapes = a.shape or ([CPU_SHAPE] if cpu else SHAPES)
    cases = all_cases(shapes, a.peaked or ([1] if cpu else [1, 0]), a.dead or ([0.0] if cpu else [0.0, 0.5]))
    if a.table:
        print(table(read_rows(a.table), cases))
        return []
    if not cpu and not torch.cuda.is_available():
        return ["no GPU found: pass --device cpu"]
    tasks, only = a.tasks or (["logprob"] if cpu else []), a.only or (["eager", "ours"] if cpu else [])
    providers = select(torch.device(a.device), tasks, only)
    runs, seconds = a.runs or (9 if cpu else 20), math.inf if cpu else a.seconds
    return run_kernels(torch.device(a.device), cases, providers, runs, seconds, a.out, a.beside)


def _train_drpo(a: argparse.Namespace) -> str:
    from bench.drpo.compare import run_drpo
    from bench.drpo.problem import Problem

    problem = Problem(
        shape=a.shape,
        episodes=a.episodes,
        device=a.device,
        micro_batch=a.micro_batch,
        micro_batch_tokens=a.micro_batch_tokens,
        rollout_batch=a.rollout_batch,
        optim=a.optim,
        master_weights=a.master_weights,
    )
    return run_drpo(problem, a.rounds, a.trl_path, a.out)


if __name__ == "__main__":
    main()
