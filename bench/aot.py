"""Compiles every kernel ahead of time, without a GPU: does it fit, does it spill, does it use the matrix and TMA units?

`python -m bench aot [--arch 80 90 100] [--check]` prints a table in Markdown. What is read from the compiled code is a
fact about the code, not about its speed.
"""

from __future__ import annotations

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

from fastrlhf_kernels import _head_kernels
from fastrlhf_kernels._tiles import FORWARD, GRADIENT, GROUP, Pinned, Tiles

ARCHITECTURES = (80, 90, 100)
SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes that one program may use."""
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MATRIX_UNITS = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA|UTCMMA)\b")
TMA_LOAD = re.compile(r"\bUTMALDG\b")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kernel with the types and constants that it is launched with."""

    name: str
    kernel: Any
    types: Mapping[str, str]
    """argument -> "*bf16", "i32", "tensordesc<bf16[128, 64]>", ...; the rest are `constants`"""
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 3
    multiplies: bool = False
    """Must use the matrix units, and TMA where it takes descriptors."""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler made of a case."""

    case: Case
    arch: int
    registers: int
    spilled: int
    """Bytes of stack per thread"""
    shared: int
    """Bytes per program"""
    warps: int
    matrix_units: bool
    tma: bool

    def fault(self) -> str:
        """What is wrong with it; empty where nothing is."""
        if self.spilled:
            return f"spills {self.spilled} bytes"
        if self.shared > SHARED_MEMORY[self.arch]:
            return f"asks for {self.shared} bytes of shared memory, of {SHARED_MEMORY[self.arch]}"
        if self.case.multiplies and not self.matrix_units:
            return "multiplies without the matrix units"
        descriptors = any(kind.startswith("tensordesc") for kind in self.case.types.values())
        return "loads descriptors without TMA" if descriptors and not self.tma else ""


def cases(arch: int) -> Iterator[Case]:
    """Every kernel as it is launched on this architecture, in bfloat16, with everything switched on and off."""
    yield from _head_cases(FORWARD[arch // 10], GRADIENT[arch // 10])


def compile_case(case: Case, arch: int) -> Compiled:
    signature = {name: case.types.get(name, "constexpr") for name in case.kernel.arg_names}
    constants = {name: case.constants[name] for name, kind in signature.items() if kind == "constexpr"}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name.startswith("stride") or name == "size"
    }
    built = triton.compile(
        ASTSource(case.kernel, signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": case.warps, "num_stages": case.stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage, code = (_dump(flag, file.name) for flag in ("--dump-resource-usage", "-sass"))
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
    threads = re.findall(r"\.(?:reqntid|maxntid) (\d+)", built.asm["ptx"])[0]
    return Compiled(
        case=case,
        arch=arch,
        registers=int(registers),
        spilled=int(stack),
        shared=built.metadata.shared,
        warps=int(threads) // 32,
        matrix_units=bool(MATRIX_UNITS.search(code)),
        tma=bool(TMA_LOAD.search(code)),
    )


def _dump(flag: str, cubin: str) -> str:
    return subprocess.run([TOOLS / "cuobjdump", flag, cubin], capture_output=True, text=True, check=True).stdout


def _head_cases(forward_tiles: Pinned, gradient_tiles: Pinned) -> Iterator[Case]:
    rows = {"bias": "*bf16", "row_temperature": "*fp32", "targets": "*i64"}
    numbers = {
        "num_rows": "i32", "vocab": "i32", "size": "i32", "stride_hidden": "i32", "stride_weight": "i32",
        "inner_scale": "fp32", "outer_scale": "fp32",
    }  # fmt: skip
    plain = {"HAS_BIAS": False, "SOFTCAP": False, "ROW_TEMPERATURE": False}
    full = dict.fromkeys(plain, True)

    def common(tiles: Tiles, options: Mapping[str, bool]) -> tuple[dict[str, str], dict[str, Any]]:
        types = {**rows, **numbers, **_operands(tiles)}
        constants = {
            "ROWS": tiles.rows, "VOCAB": tiles.vocab, "INNER": tiles.inner, "GROUP": GROUP,
            "DESCRIPTORS": tiles.descriptors, "PRECISION": "tf32x3", **options,
        }  # fmt: skip
        for flag, argument in (("HAS_BIAS", "bias"), ("ROW_TEMPERATURE", "row_temperature")):
            if not options[flag]:
                types.pop(argument)
                constants[argument] = None
        return types, constants

    for label, options, entropy in (("", plain, False), (" entropy", plain, True), (" everything", full, True)):
        forward, gradient = (
            tiles.heavy if options is full else tiles.light for tiles in (forward_tiles, gradient_tiles)
        )
        types, constants = common(forward, options)
        constants |= {"SHARE": _head_kernels.SHARE, "ENTROPY": entropy, "STATS": options is full}
        yield Case(
            name=f"linear_logprob forward{label}",
            kernel=_head_kernels.forward_kernel,
            types={**types, "partial": "*fp32", "ignore": "i32"},
            constants={**constants, "SPECIALIZE": forward.specialize},
            warps=forward.warps,
            stages=forward.stages,
            multiplies=True,
        )
        types, constants = common(gradient, options)
        extra = {"peaks": "*fp32", "levels": "*fp32", "at_targets": "*fp32", "out": "*bf16"}
        if gradient.descriptors:
            extra["out"] = f"tensordesc<bf16[{gradient.rows}, {gradient.vocab}]>"
        extra |= {"start": "i32", "stop": "i32", "stride_out": "i32"}
        tilts = {"tilts": "*fp32"} if entropy else {}
        yield Case(
            name=f"linear_logprob gradient{label}",
            kernel=_head_kernels.gradient_kernel,
            types={**types, **extra, **tilts},
            constants={**constants, "TILT": entropy, "tilts": None},
            warps=gradient.warps,
            stages=gradient.stages,
            multiplies=True,
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
        constants={"ENTROPY": True, "STATS": True, "BLOCK": _head_kernels.MERGED},
    )


def _operands(tiles: Tiles) -> dict[str, str]:
    if not tiles.descriptors:
        return {"hidden": "*bf16", "weight": "*bf16"}
    return {
        "hidden": f"tensordesc<bf16[{tiles.rows}, {tiles.inner}]>",
        "weight": f"tensordesc<bf16[{tiles.vocab}, {tiles.inner}]>",
    }


def run_aot(arches: Sequence[int]) -> tuple[str, list[str]]:
    """One line of Markdown per kernel and architecture, and the faults found."""
    lines = [
        f"| kernel (triton {triton.__version__}) | sm | warps | registers | spilled | shared KB | matrix | TMA |",
        "|---|---|---|---|---|---|---|---|",
    ]
    faults = []
    for arch in arches:
        for case in cases(arch):
            c = compile_case(case, arch)
            lines.append(
                f"| {case.name} | {arch} | {c.warps} | {c.registers} | {c.spilled} | {c.shared / 1024:.0f} "
                f"| {'yes' if c.matrix_units else ''} | {'yes' if c.tma else ''} |"
            )
            if c.fault():
                faults.append(f"{case.name} on sm_{arch}: {c.fault()}")
    return "\n".join(lines), faults
