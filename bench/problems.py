"""The inputs (`Case`, `Problem`) and the computations (`Task`) of `python -m bench kernels`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import Step, Tensors, run
from fastrlhf_kernels import linear_logprob, pair_loss, policy_loss
from fastrlhf_kernels.gae import gae_reference
from fastrlhf_kernels.linear_kl import linear_kl_reference
from fastrlhf_kernels.linear_logprob import linear_logprob_reference
from fastrlhf_kernels.logprob_from_logits import logprob_from_logits_reference
from fastrlhf_kernels.pair_loss import pair_loss_reference
from fastrlhf_kernels.policy_loss import policy_loss_reference

SEQUENCE = 1024  # rows per sequence; a case with fewer than 2048 rows is split into two shorter sequences
CHUNK = {"cpu": 1 << 24, "cuda": 1 << 27}  # number of float64 logits in memory at a time


class Case(NamedTuple):
    rows: int  # T
    size: int  # D
    vocab: int  # V; 1 for ops that take log-probs and no hidden states
    peaked: bool = True  # targets are as likely as tokens sampled from a policy; if False, their p is about 1 / V
    dead: float = 0.0  # fraction of rows without a gradient: target ignored (Task.ignores), clipped or advantage 0

    @property
    def alone(self) -> bool:
        return self.vocab == 1

    def __str__(self) -> str:
        if self.alone:
            return f"T = {self.rows}"
        logits = "peaked" if self.peaked else "flat"
        shape = f"T = {self.rows}, D = {self.size}, V = {self.vocab}"
        return f"{shape}, {logits}, {100 * self.dead:.0f} % of rows without gradient"


@dataclass(frozen=True)
class Problem:
    """The input tensors of a case, equal for all implementations; float32 unless noted otherwise."""

    hidden: Tensor  # [T, D] in the dtype of the model
    weight: Tensor  # [V, D] in the dtype of the model
    targets: Tensor  # [T] int64
    dead: Tensor  # [T] bool
    grad_logprob: Tensor  # [T], 0 in dead rows
    grad_entropy: Tensor  # [T], 0 in dead rows
    logprob: Tensor  # [T] log-probs of the targets
    sampler_logprob: Tensor  # [T] `logprob` plus noise of 0.1 nats
    advantage: Tensor  # [T], constant within a sequence
    cu_seqlens: Tensor  # [2B+1] int64
    reference_hidden: Tensor  # [T, D] `hidden` plus noise, in the dtype of the model
    logits: Tensor | None = None  # [T, V] in the dtype of the model, for tasks that start from logits
    bias: Tensor | None = None  # [V] in the dtype of the model
    temperature: Tensor | float = 1.0  # [T]
    softcap: float | None = None

    @property
    def mask(self) -> Tensor:
        return self.targets != -100

    @property
    def num_pairs(self) -> int:
        return len(self.cu_seqlens) // 2

    @property
    def options(self) -> dict[str, Any]:
        return {"bias": self.bias, "temperature": self.temperature, "softcap": self.softcap}

    def double(self) -> Problem:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        floats = {k: v.double() for k, v in values.items() if isinstance(v, Tensor) and v.is_floating_point()}
        return replace(self, **floats)

    def chunks(self, elements: int) -> Iterator[Problem]:
        """Yields the problem in consecutive parts with about `elements` logits each. The field `cu_seqlens` of a part
        is invalid."""
        step = max(1, elements // len(self.weight))
        names = {f.name for f in fields(self)} - {"weight", "bias", "cu_seqlens"}
        by_row = {name: value for name in names if isinstance(value := getattr(self, name), Tensor)}
        for start in range(0, len(self.hidden), step):
            yield replace(self, **{name: value[start : start + step] for name, value in by_row.items()})


def make_problem(case: Case, dtype: torch.dtype, device: torch.device) -> Problem:
    """Draws the tensors of a case from a fixed seed, so that every call gives equal tensors.

    Target ids are log-uniform, similar to word frequencies. In a peaked case 90 % of the targets have a probability of
    .5 to .9997.
    """
    rng = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=rng, device=device)
    uniform = partial(torch.rand, generator=rng, device=device)
    rows, size, vocab, peaked, share = case
    weight, hidden = normal(vocab, size) / size**0.5, normal(rows, size)
    targets = (vocab ** uniform(rows)).long() - 1
    if peaked:
        lead = (math.log(vocab) + 8 * uniform(rows)) / weight[targets].square().sum(1)
        hidden += lead[:, None] * weight[targets]
        targets = targets.where(uniform(rows) < 0.9, torch.randint(vocab, (rows,), generator=rng, device=device))
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.no_grad():
        logprob = linear_logprob(hidden, weight, targets, impl="torch").logprob
    num_sequences = 2 * max(1, rows // (2 * SEQUENCE))
    cu_seqlens = torch.linspace(0, rows, num_sequences + 1, device=device).round().long()
    advantage = normal(num_sequences)
    advantage[: round(share * num_sequences)] = 0
    dead = uniform(rows) < share
    return Problem(
        hidden=hidden,
        weight=weight,
        targets=targets,
        dead=dead,
        grad_logprob=normal(rows).masked_fill(dead, 0),
        grad_entropy=(0.1 * normal(rows)).masked_fill(dead, 0),
        logprob=logprob,
        sampler_logprob=logprob + 0.1 * normal(rows),
        advantage=advantage.repeat_interleave(cu_seqlens.diff()),
        cu_seqlens=cu_seqlens,
        reference_hidden=hidden + (0.1 * normal(rows, size)).to(dtype),
        bias=normal(vocab).to(dtype),
        temperature=0.5 + uniform(rows),
        softcap=30.0,
    )


@dataclass(frozen=True)
class Task:
    """A computation that several implementations perform, with equal results up to rounding."""

    reference: Callable[[Problem], Tensors]
    """Computes the outputs by their definition, in the dtype of the problem."""
    leaves: tuple[str, ...] = ("hidden", "weight")
    """Names of the fields of the problem that need gradients."""
    by_row: bool = True
    """Whether there is one result per row, so that the float64 results can be computed for a few rows at a time."""
    options: bool = False
    """Whether there are a bias, a soft cap and a temperature per row."""
    ignores: bool = False
    """Whether dead rows have an ignored target, as in supervised fine-tuning."""
    row_bytes: int = 0
    """For an op that takes log-probs: bytes per row that the op must read and write, forward and backward together."""

    @property
    def alone(self) -> bool:
        return self.row_bytes > 0

    @property
    def given_logits(self) -> bool:
        return self.leaves == ("logits",)

    def step(self, function: Callable[[Problem], Tensors], problem: Problem) -> Step:
        if self.given_logits:
            problem = replace(problem, logits=problem.hidden @ problem.weight.T)
        if not self.options:
            problem = replace(problem, bias=None, temperature=1.0, softcap=None)
        if self.ignores:
            problem = replace(problem, targets=problem.targets.masked_fill(problem.dead, -100))
        leaves = {name: getattr(problem, name).detach().requires_grad_() for name in self.leaves}
        problem = replace(problem, **leaves)
        return Step(partial(function, problem), tuple(leaves.values()), (problem.grad_logprob, problem.grad_entropy))

    def truth(self, problem: Problem) -> tuple[list[Tensor], list[Tensor]]:
        """Computes (outputs, gradients) by the definition in float64."""
        weight = problem.weight.double()
        outputs, hidden_grads, weight_grad = [], [], torch.zeros_like(weight)
        for chunk in problem.chunks(CHUNK[weight.device.type]):
            some, gradients = run(self.step(self.reference, replace(chunk, weight=weight).double()))
            outputs.append([output.detach() for output in some])
            hidden_grads.append(gradients[0])
            weight_grad += sum(gradients[1:])
        joined = [torch.cat(pieces) for pieces in zip(*outputs, strict=True)]
        return joined, [torch.cat(hidden_grads), weight_grad][: len(self.leaves)]


def head(p: Problem, entropy: bool = False) -> Tensors:
    options = {k: v.to(p.hidden.dtype) if isinstance(v, Tensor) else v for k, v in p.options.items()}
    out = linear_logprob_reference(p.hidden, p.weight, p.targets, **options)  # pyright: ignore[reportArgumentType]
    return (out.logprob, out.entropy) if entropy and out.entropy is not None else (out.logprob,)


def given_logits(p: Problem) -> Tensors:
    assert p.logits is not None
    return (logprob_from_logits_reference(p.logits, p.targets).logprob,)


def kl(p: Problem) -> Tensors:
    return (linear_kl_reference(p.hidden, p.weight, p.reference_hidden, p.weight).kl,)


def sft(p: Problem, logprob: Tensor) -> Tensors:
    return (-logprob.where(p.mask, 0).sum(),)


def policy(p: Problem, logprob: Tensor, exact: bool = False) -> Tensors:
    rows = (logprob, p.sampler_logprob, p.advantage, p.mask)
    if exact:
        return (policy_loss_reference(*rows, num_tokens=len(logprob)),)
    return (policy_loss(*rows, num_tokens=len(logprob)).loss,)


def pairs(p: Problem, logprob: Tensor, exact: bool = False) -> Tensors:
    rows = (logprob, p.sampler_logprob, p.cu_seqlens, p.mask)
    if exact:
        return (pair_loss_reference(*rows, num_pairs=p.num_pairs),)
    return (pair_loss(*rows, num_pairs=p.num_pairs).loss,)


TASKS = {
    "products": Task(lambda p: (F.linear(p.hidden, p.weight)[:, 0],), by_row=False),
    "logprob": Task(head),
    "entropy": Task(partial(head, entropy=True)),
    "frozen head": Task(head, leaves=("hidden",)),
    "all options": Task(head, options=True),
    "given logits": Task(given_logits, leaves=("logits",), by_row=False),
    "kl": Task(kl),
    "sft": Task(lambda p: sft(p, *head(p)), by_row=False, ignores=True),
    "policy": Task(lambda p: policy(p, *head(p), exact=True), by_row=False),
    "policy, frozen head": Task(lambda p: policy(p, *head(p), exact=True), leaves=("hidden",), by_row=False),
    "dpo": Task(lambda p: pairs(p, *head(p), exact=True), by_row=False, ignores=True),
    "copy": Task(lambda p: (p.logprob,), (), by_row=False, row_bytes=16),
    "policy_loss": Task(lambda p: policy(p, p.logprob, exact=True), ("logprob",), by_row=False, row_bytes=17),
    "pair_loss": Task(lambda p: pairs(p, p.logprob, exact=True), ("logprob",), by_row=False, row_bytes=13),
    "gae": Task(lambda p: gae_reference(p.advantage, p.logprob, p.cu_seqlens), (), by_row=False, row_bytes=16),
}
# Tasks that measure the limit of the hardware. The last implementation of each task is the hardware floor of a case.
FLOORS = ("products", "copy")
