"""Compiles every Triton kernel without a GPU and reports registers, spills, shared memory, matrix and TMA units.

`python -m bench aot [--arch 80 90 100] [--check]` prints a table in Markdown: warps x registers per thread, shared
memory, units used, instructions executed per logit outside the matrix product. The table describes the
compiled code; it says nothing about speed.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.sass import ASYNC_LOADS, MATRIX_UNITS, TMA_LOAD, instructions_per_tile
from fastrlhf_kernels import _head, _head_kernels, _kl_kernels, _rows
from fastrlhf_kernels._tiles import (
    FORWARD,
    GRADIENT,
    GROUP,
    KL_FORWARD,
    KL_GRADIENT,
    STORING,
    Pinned,
    Tiles,
    pinned_tiles,
)
from fastrlhf_kernels._triton import OPTIONS

ARCHITECTURES = (80, 90, 100)
CONSUMER = (86, 89, 120)
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Bytes of shared memory that one program may use."""
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LEAN = "linear_logprob forward", "linear_logprob forward entropy"
LEAN_LIMIT = {90: 9.0}
"""Architecture -> limit of the executed instructions per logit, outside the matrix product, for the kernels in LEAN."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kernel to compile, with the argument types and constants of its launch."""

    name: str
    kernel: Any
    types: Mapping[str, str]
    """Argument name -> Triton type, such as "*bf16", "i32" or "tensordesc<bf16[128, 64]>"."""
    constants: Mapping[str, Any]
    """Argument name -> constant. An argument that is in neither mapping is optional and compiled as None."""
    warps: int = 4
    stages: int = 3
    multiplies: bool = False
    """Whether the kernel must use the matrix units, and TMA if it takes descriptors."""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """Resource usage of a compiled case."""

    case: Case
    arch: int
    registers: int
    spilled: int
    """Bytes of stack per thread"""
    shared: int
    """Bytes per program"""
    warps: int
    matrix_units: bool
    async_loads: bool
    """Whether tiles are loaded asynchronously, by TMA or by cp.async."""
    tma: bool
    per_logit: float | None
    """Instructions executed per logit outside the matrix product (see `bench/sass.py`); None if they cannot be
    counted."""

    def fault(self) -> str:
        """Describes the faults of the compiled code; "" if it has none."""
        if self.spilled:
            return f"spills {self.spilled} bytes"
        if self.shared > SHARED_MEMORY[self.arch]:
            return f"asks for {self.shared} bytes of shared memory; the GPU has {SHARED_MEMORY[self.arch]}"
        if self.case.multiplies and not self.matrix_units:
            return "does not use the matrix units"
        if self.case.multiplies and not self.async_loads:
            return "does not load its tiles asynchronously"
        limit = LEAN_LIMIT.get(self.arch)
        if limit and self.case.name in LEAN and (self.per_logit is None or self.per_logit > limit):
            return f"executes {self.per_logit} instructions per logit; the limit is {limit}"
        descriptors = any(kind.startswith("tensordesc") for kind in self.case.types.values())
        return "takes descriptors but does not use TMA" if descriptors and not self.tma else ""


def cases(arch: int) -> Iterator[Case]:
    """Returns all kernels in bfloat16, as launched on this architecture; each with all options on and with all options
    off."""
    major, minor = divmod(arch, 10)
    tables = (FORWARD, STORING, GRADIENT, KL_FORWARD, KL_GRADIENT)
    pinned = [pinned_tiles(table, (major, minor), 2, loadable=True) for table in tables]
    yield from _head_cases(*pinned[:3])
    yield from _kl_cases(*pinned[3:])
    yield from _logits_cases()
    yield from _row_cases()


def compile_case(case: Case, arch: int) -> Compiled:
    signature = {name: case.types.get(name, "constexpr") for name in case.kernel.arg_names}
    constants = {name: case.constants.get(name) for name, kind in signature.items() if kind == "constexpr"}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name.startswith("stride") or name in ("size", "reference_size", "vocab")
    }
    built = triton.compile(
        ASTSource(case.kernel, signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": case.warps, "num_stages": case.stages, **OPTIONS},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage, code = (_dump(flag, file.name) for flag in ("--dump-resource-usage", "-sass"))
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
    threads = int(re.findall(r"\.(?:reqntid|maxntid) (\d+)", built.asm["ptx"])[0])
    executed = instructions_per_tile(code) if case.multiplies else None
    logits = case.constants["ROWS"] * case.constants["VOCAB"] if case.multiplies else 1
    return Compiled(
        case=case,
        arch=arch,
        registers=int(registers),
        spilled=int(stack),
        shared=built.metadata.shared,
        warps=threads // 32,
        matrix_units=bool(MATRIX_UNITS.search(code)),
        async_loads=bool(ASYNC_LOADS.search(code)),
        tma=bool(TMA_LOAD.search(code)),
        per_logit=None if executed is None else executed * threads / logits,
    )


def _dump(flag: str, cubin: str) -> str:
    return subprocess.run([TOOLS / "cuobjdump", flag, cubin], capture_output=True, text=True, check=True).stdout


def _head_cases(*tables: Pinned) -> Iterator[Case]:
    """Returns the cases of `linear_logprob`, and of the forward of `linear_policy_loss`, which also stores exp(z -
    top)."""
    optional = {"bias": "*bf16", "row_temperature": "*fp32"}
    integers = ("num_rows", "vocab", "size", "stride_hidden", "stride_weight")
    numbers = {**dict.fromkeys(integers, "i32"), "inner_scale": "fp32", "outer_scale": "fp32"}

    def case(name: str, kernel: Any, tiles: Tiles, types: Mapping[str, str], constants: Mapping[str, Any]) -> Case:
        products = {
            "hidden": _matrix(tiles, tiles.rows, tiles.inner),
            "weight": _matrix(tiles, tiles.vocab, tiles.inner),
        }
        pinned = {"ROWS": tiles.rows, "VOCAB": tiles.vocab, "INNER": tiles.inner, "GROUP": GROUP}
        pinned |= {"DESCRIPTORS": tiles.descriptors, "PRECISION": "tf32x3"}
        return Case(
            name=name,
            kernel=kernel,
            types={"targets": "*i64", **numbers, **products, **types},
            constants={**pinned, **constants},
            warps=tiles.warps,
            stages=tiles.stages,
            multiplies=True,
        )

    for label, entropy, everything in (("", False, False), (" entropy", True, False), (" everything", True, True)):
        forward, storing, gradient = (tiles.heavy if everything else tiles.light for tiles in tables)
        types = {"partial": "*fp32", "ignore": "i32", **(optional if everything else {})}
        flags = {"SHARE": _head.SHARE, "ENTROPY": entropy, "STATS": everything, "SOFTCAP": everything}
        folded = flags | {"stride_masses": 0}
        yield case(f"linear_logprob forward{label}", _head_kernels.forward_kernel, forward, types, folded)
        types |= {"masses": _matrix(storing, storing.rows, storing.vocab), "tops": "*fp32", "stride_masses": "i32"}
        yield case(f"linear_policy_loss forward{label}", _head_kernels.forward_kernel, storing, types, flags)
        types: dict[str, str] = dict.fromkeys(
            ("peaks", "levels", "at_targets", *(["tilts"] if entropy else [])), "*fp32"
        )
        types |= {
            "out": _matrix(gradient, gradient.rows, gradient.vocab),
            **dict.fromkeys(("start", "stop", "stride_out"), "i32"),
            **(optional if everything else {}),
        }
        yield case(
            f"linear_logprob gradient{label}", _head_kernels.gradient_kernel, gradient, types, {"SOFTCAP": everything}
        )
    for label, everything in (("", False), (" everything", True)):
        rows = ("tops", "peaks", "levels", "at_targets", *(("tilts", "row_temperature") if everything else ()))
        tiles = tables[1].heavy if everything else tables[1].light
        yield Case(
            name=f"linear_policy_loss scale{label}",
            kernel=_head_kernels.scale_kernel,
            types={
                "masses": "*bf16",
                "targets": "*i64",
                "outer_scale": "fp32",
                **dict.fromkeys(rows, "*fp32"),
                **dict.fromkeys(("num_rows", "vocab", "stride_masses"), "i32"),
            },
            constants={"ROWS": _head.SCALED_ROWS, "VOCAB": tiles.vocab, "SOFTCAP": everything},
        )
    outputs = ("logprob", "logsumexp", "entropy", "max_logprob", "mean_logit", "peaks", "totals")
    yield Case(
        name="linear_logprob merge",
        kernel=_head_kernels.merge_kernel,
        types={
            "partial": "*fp32",
            "targets": "*i64",
            **dict.fromkeys(outputs, "*fp32"),
            **dict.fromkeys(("num_rows", "shares", "vocab", "ignore"), "i32"),
        },
        constants={
            "ENTROPY": True,
            "STATS": True,
            "BLOCK": _head.MERGED_ROWS,
            "SHARES": _head.MERGED_SHARES,
        },
    )


def _kl_cases(*tables: Pinned) -> Iterator[Case]:
    """Returns the cases of the kernels of `linear_kl`."""
    optional = {"bias": "*bf16", "reference_bias": "*bf16", "row_temperature": "*fp32"}
    strides = (f"stride_{side}{matrix}" for side in ("", "reference_") for matrix in ("hidden", "weight"))
    integers = ("num_rows", "vocab", "size", "reference_size", *strides)
    numbers = {**dict.fromkeys(integers, "i32"), "inner_scale": "fp32", "outer_scale": "fp32"}

    def case(name: str, kernel: Any, tiles: Tiles, types: Mapping[str, str], constants: Mapping[str, Any]) -> Case:
        hidden, weight = _matrix(tiles, tiles.rows, tiles.inner), _matrix(tiles, tiles.vocab, tiles.inner)
        sides = {"hidden": hidden, "weight": weight, "reference_hidden": hidden, "reference_weight": weight}
        pinned = {"ROWS": tiles.rows, "VOCAB": tiles.vocab, "INNER": tiles.inner, "GROUP": GROUP}
        pinned |= {"DESCRIPTORS": tiles.descriptors, "PRECISION": "tf32x3"}
        return Case(
            name=f"linear_kl {name}",
            kernel=kernel,
            types={"targets": "*i64", **numbers, **sides, **types},
            constants={**pinned, **constants},
            warps=tiles.warps,
            stages=tiles.stages,
            multiplies=True,
        )

    for label, entropy, everything in (("", False, False), (" entropy", True, False), (" everything", True, True)):
        forward, gradient = (tiles.heavy if everything else tiles.light for tiles in tables)
        given = optional if everything else {}
        flags = {"SHARE": _head.SHARE, "ENTROPY": entropy, "SOFTCAP": everything}
        types = {"partial": "*fp32", "ignore": "i32", **given}
        yield case(f"forward{label}", _kl_kernels.forward_kernel, forward, types, flags)
        rows = [f"{field}s" for field in _kl_kernels.Slopes._fields if entropy or field != "tilt"]
        types = {**dict.fromkeys(rows, "*fp32"), **dict.fromkeys(("start", "stop", "stride_out"), "i32"), **given}
        types["out"] = _matrix(gradient, gradient.rows, gradient.vocab)
        yield case(f"gradient{label}", _kl_kernels.gradient_kernel, gradient, types, {"SOFTCAP": everything})
    outputs = ("kl", "logprob", "reference_logprob", "entropy", "peaks", "totals", "reference_peaks", "drifts")
    yield Case(
        name="linear_kl merge",
        kernel=_kl_kernels.merge_kernel,
        types={
            "partial": "*fp32",
            "targets": "*i64",
            **dict.fromkeys(outputs, "*fp32"),
            **dict.fromkeys(("num_rows", "shares", "vocab", "ignore"), "i32"),
        },
        constants={"ENTROPY": True, "BLOCK": _head.MERGED},
    )


def _row_cases() -> Iterator[Case]:
    """Returns the cases of the per-token loss kernels, which use one thread per row and no matrix products."""
    modules = (f"fastrlhf_kernels.{name}" for name in ("policy_loss", "value_loss", "kl_estimate", "pair_loss", "gae"))
    # The package exports functions named like these modules, so the modules are imported by name.
    policy, value, kl, pair, gae = (importlib.import_module(name) for name in modules)

    def case(
        name: str, kernel: Any, floats: str, constants: Mapping[str, Any], other: Mapping[str, str], warps: int = 4
    ) -> Case:
        types = {**dict.fromkeys(floats.split(), "*fp32"), "num_rows": "i32", **other}
        return Case(name=name, kernel=kernel, types=types, constants={"BLOCK": _rows.BLOCK, **constants}, warps=warps)

    masked = {"mask": "*i1"}
    scalars = masked | dict.fromkeys(("low", "high", "dual_clip", "kl_coef", "entropy_coef"), "fp32")
    plain = "logprob sampler_logprob advantage partials d_logprob d_entropy"
    yield case("policy_loss", policy.policy_kernel, plain, {"KL_KIND": "k2", "LOSS_TYPE": "ppo"}, scalars)
    full = plain + " reference_logprob weight entropy"
    yield case("policy_loss everything", policy.policy_kernel, full, {"KL_KIND": "k3", "LOSS_TYPE": "ppo"}, scalars)
    group = {"KL_KIND": "k3", "LOSS_TYPE": "gspo"}
    yield case("policy_loss gspo", policy.policy_kernel, full + " sequence_log_ratio", group, scalars)
    yield case("policy_loss cispo", policy.policy_kernel, full, group | {"LOSS_TYPE": "cispo"}, scalars)
    rows = "value rollout_value returns partials slope"
    yield case("value_loss", value.value_kernel, rows + " weight", {}, masked | {"clip": "fp32"})
    rows = "logprob reference_logprob sampler_logprob value slope"
    yield case("kl_estimate k3", kl.kl_kernel, rows, {"KIND": "k3"}, {})
    rows = "logprob reference_logprob partials slope"
    pairs = masked | {"cu_seqlens": "*i32", "beta": "fp32", "kappa": "fp32"}
    kind = {"KIND": "dpo", "LENGTH_NORM": "sum", "PER_ROW": True}
    yield case("pair_loss dpo", pair.pair_kernel, rows, kind, pairs, pair.WARPS)
    kind = {"KIND": "ipo", "LENGTH_NORM": "mean", "PER_ROW": False}
    yield case("pair_loss ipo, sums", pair.pair_kernel, rows + " weight target", kind, pairs, pair.WARPS)
    kind = {"KIND": "orpo", "LENGTH_NORM": "mean", "PER_ROW": False}
    yield case("pair_loss orpo", pair.pair_kernel, "logprob partials slope", kind, pairs, pair.WARPS)
    kind = {"KIND": "apo_down", "LENGTH_NORM": "sum", "PER_ROW": False}
    yield case(
        "pair_loss apo_down, sums",
        pair.pair_kernel,
        "logprob reference_logprob partials slope",
        kind,
        pairs,
        pair.WARPS,
    )
    rows = "reward value bootstrap advantage returns"
    yield case("gae", gae.gae_kernel, rows, {}, masked | {"cu_seqlens": "*i32", "gamma": "fp32", "decay": "fp32"})


def _logits_cases() -> Iterator[Case]:
    """Returns the cases of `logprob_from_logits` at V = 128256."""
    op = importlib.import_module("fastrlhf_kernels.logprob_from_logits")
    types = {"logits": "*bf16", "targets": "*i64", "bits": "*fp32"} | dict.fromkeys(("stride_logits", "vocab"), "i32")
    inputs = types | {"partial": "*fp32", "inner": "fp32", "ignore": "i32"}
    outputs = dict.fromkeys(("logprob", "logsumexp", "entropy", "peaks", "totals"), "*fp32")
    rows = dict.fromkeys(("peaks", "levels", "tilts", "at_targets"), "*fp32")
    gradient = types | rows | {"grad": "*bf16", "stride_grad": "i32", "inner": "fp32"}
    sizes = {"SHARE": op.SHARE, "SHARES": 8, "DEPTH": op.DEPTH, "LANES": op.LANES, "BLOCK": op.BACKWARD_BLOCK}
    for label, on in (("", False), (" everything", True)):
        flags = sizes | dict.fromkeys(("SOFTCAP", "ENTROPY", "TILT"), on)
        for step, kernel, kinds, warps in (
            ("forward", op.forward_kernel, inputs, 4),
            ("merge", op.merge_kernel, inputs | outputs, 1),
            ("backward", op.backward_kernel, gradient, 4),
        ):
            name = f"logprob_from_logits {step}{label}"
            yield Case(name=name, kernel=kernel, types=kinds, constants=flags, warps=warps)


def _matrix(tiles: Tiles, rows: int, columns: int) -> str:
    return f"tensordesc<bf16[{rows}, {columns}]>" if tiles.descriptors else "*bf16"


def run_aot(arches: Sequence[int]) -> tuple[str, list[str]]:
    """Compiles all kernels for `arches`; returns a Markdown table with a line per kernel, and the faults found."""
    cells: dict[str, dict[int, str]] = {}
    faults = []
    for arch in arches:
        for case in cases(arch):
            c = compile_case(case, arch)
            units = (["matrix"] if c.matrix_units else []) + (["TMA"] if c.tma else [])
            units += [] if c.per_logit is None else [f"{c.per_logit:.1f} per logit"]
            words = [f"{c.warps} x {c.registers}", *([f"{c.shared / 1024:.0f} KB"] if c.shared > 1023 else []), *units]
            cells.setdefault(case.name, {})[arch] = ", ".join(words)
            if c.fault():
                faults.append(f"{case.name} on sm_{arch}: {c.fault()}")
    lines = [
        f"| triton {triton.__version__} | {' | '.join(f'sm_{arch}' for arch in arches)} |",
        "|---" * (len(arches) + 1) + "|",
    ]
    for name, by_arch in cells.items():
        lines.append(f"| {name} | {' | '.join(by_arch.get(arch, '') for arch in arches)} |")
    return "\n".join(lines), faults
